"""Training-step speed and memory: ``python -m benchmarks.train_step [section.key=value ...]``.

Runs :func:`pico_fast.step.training_step` on random tokens, each sequence length in a process of its own (peak memory is
a process's), and prints tokens/s, peak memory and the percent of the matmul rate measured in the same process.
Defaults are the tiny Pico decoder in bf16-mixed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TINY = Path(__file__).parents[1] / "configs" / "pico-decoder-tiny.yaml"


def peak_resident_bytes() -> int:
    """The most memory this process has held since its program started."""
    try:  # unlike getrusage, not counting what the parent held when it started this process
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(
    config_file: Path, overrides: list[str], seq_len: int, rows: int, micro_batches: int, steps: int
) -> dict[str, Any]:
    """Time ``steps`` optimizer steps of ``micro_batches`` x ``rows`` x ``seq_len`` tokens after two untimed ones."""
    from pico_fast.config_io import load_config
    from pico_fast.flops import flops_per_token, measured_matmul_flops
    from pico_fast.model.build import build_kernels, build_model
    from pico_fast.optim import build_optimizer
    from pico_fast.runtime import start_runtime
    from pico_fast.step import training_step

    import torch  # isort: skip (after pico_fast, which sets what OpenMP reads when torch is imported)

    config = load_config(config_file, [f"model.max_seq_len={seq_len}", "training.fabric.accelerator=auto", *overrides])
    runtime = start_runtime(config)
    on_gpu = runtime.device.type == "cuda"
    kernels = build_kernels(config, runtime)
    model = build_model(config, kernels, runtime)
    optimizer = build_optimizer(model, config.training.optimization)
    ids = torch.randint(config.model.vocab_size, (micro_batches, rows, seq_len + 1), dtype=torch.int32)
    seconds = []
    for step in range(steps + 2):
        start = time.perf_counter()
        numbers = training_step(model, optimizer, ids, step=step, lr=1e-3)
        numbers.loss.item()
        seconds.append(time.perf_counter() - start)
    median = sorted(seconds[2:])[steps // 2]
    peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes()
    tokens_per_second = ids[..., 1:].numel() / median
    matmul = measured_matmul_flops(runtime.device, runtime.compute_dtype)
    return {
        "sequence": seq_len,
        "rows": rows,
        "micro_batches": micro_batches,
        "vocab_size": config.model.vocab_size,
        "seconds_per_step": median,
        "tokens_per_second": tokens_per_second,
        "peak_bytes": peak_bytes,
        "matmul_flops": matmul,
        "percent_of_matmul": 100 * tokens_per_second * flops_per_token(config.model, seq_len) / matmul,
        "loss": numbers.loss.item(),
        "kernels": kernels.describe(),
        "precision": config.training.fabric.precision,
        "device": str(runtime.device),
        "threads": runtime.threads,
        "torch": torch.__version__,
    }


def measure_apart(
    config_file: Path, overrides: list[str], seq_len: int, tokens: int, micro_batches: int, steps: int
) -> dict[str, Any]:
    """:func:`measure` of ``tokens // seq_len`` rows, at least one, in a process of its own."""
    numbers = {"--one": seq_len, "--tokens": tokens, "--micro-batches": micro_batches, "--steps": steps}
    options = [part for name, value in numbers.items() for part in (name, str(value))]
    command = [sys.executable, "-m", "benchmarks.train_step", "--config", str(config_file), *options, *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    """Measure every sequence length and print a Markdown table; with --json also one JSON line each."""
    parser = argparse.ArgumentParser(prog="benchmarks.train_step", description="Training-step speed and memory.")
    parser.add_argument("--config", type=Path, default=TINY, help="a YAML file (default: the tiny decoder)")
    parser.add_argument("--sequence", type=int, nargs="+", default=[256, 512, 2048])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per micro-batch")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="timed steps; the median counts")
    parser.add_argument("--json", type=Path, help="append one line per sequence length to this file")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_intermixed_args()
    if given.one is not None:
        rows = max(1, given.tokens // given.one)
        result = measure(given.config, given.overrides, given.one, rows, given.micro_batches, given.steps)
        print(json.dumps(result))
        return 0
    print("| sequence | tokens/s | peak memory | of the measured matmul rate | loss |\n|---|---|---|---|---|")
    for seq_len in given.sequence:
        result = measure_apart(given.config, given.overrides, seq_len, given.tokens, given.micro_batches, given.steps)
        if given.json:
            with open(given.json, "a") as file:
                file.write(json.dumps(result) + "\n")
        print(
            f"| {seq_len} | {result['tokens_per_second']:,.0f} | {result['peak_bytes'] / 1e9:.2f} GB | "
            f"{result['percent_of_matmul']:.0f} % of {result['matmul_flops'] / 1e9:,.0f} GFLOP/s | "
            f"{result['loss']:.4f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
