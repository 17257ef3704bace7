"""Training-step speed and memory: ``python -m benchmarks.train_step [section.key=value ...]``.

Runs :func:`pico_fast.step.training_step` on random tokens, each sequence length in a process of its own (peak memory is
a process's), and prints tokens/s, peak memory and the percent of the matmul rate measured in the same process.
Defaults are the tiny Pico decoder in bf16-mixed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

TINY = Path(__file__).parents[1] / "configs" / "pico-decoder-tiny.yaml"


def measure(overrides: list[str], seq_len: int, rows: int, micro_batches: int, steps: int) -> dict[str, object]:
    """Time ``steps`` optimizer steps of ``micro_batches`` x ``rows`` x ``seq_len`` tokens after two untimed ones."""
    from pico_fast.config_io import load_config
    from pico_fast.flops import flops_per_token, measured_matmul_flops
    from pico_fast.model.build import build_kernels, build_model
    from pico_fast.optim import build_optimizer
    from pico_fast.runtime import start_runtime
    from pico_fast.step import training_step

    import torch  # isort: skip (after pico_fast, which sets what OpenMP reads when torch is imported)

    config = load_config(TINY, [f"model.max_seq_len={seq_len}", "training.fabric.accelerator=auto", *overrides])
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
    peak_bytes = (
        torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    tokens_per_second = ids[..., 1:].numel() / median
    matmul = measured_matmul_flops(runtime.device, runtime.compute_dtype)
    return {
        "sequence": seq_len,
        "rows": rows,
        "micro_batches": micro_batches,
        "seconds_per_step": median,
        "tokens_per_second": tokens_per_second,
        "peak_bytes": peak_bytes,
        "matmul_flops": matmul,
        "percent_of_matmul": 100 * tokens_per_second * flops_per_token(config.model, seq_len) / matmul,
        "loss": numbers.loss.item(),
        "kernels": dataclasses.asdict(config.kernels)["default"],
        "precision": config.training.fabric.precision,
        "device": str(runtime.device),
        "threads": runtime.threads,
        "torch": torch.__version__,
    }


def main() -> int:
    """Measure every sequence length and print a Markdown table; with --json also one JSON line each."""
    parser = argparse.ArgumentParser(prog="benchmarks.train_step", description="Training-step speed and memory.")
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
        print(json.dumps(measure(given.overrides, given.one, rows, given.micro_batches, given.steps)))
        return 0
    print("| sequence | tokens/s | peak memory | of the measured matmul rate | loss |\n|---|---|---|---|---|")
    for seq_len in given.sequence:
        shared = [
            "--tokens",
            str(given.tokens),
            "--micro-batches",
            str(given.micro_batches),
            "--steps",
            str(given.steps),
        ]
        command = [sys.executable, "-m", "benchmarks.train_step", "--one", str(seq_len), *shared, *given.overrides]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
        result = json.loads(done.stdout.splitlines()[-1])
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
