"""What several processes cost: ``python -m benchmarks.parallel [--before TREE] [--json FILE]``.

- Bytes that one rank sends in a whole training step, counted from its collectives, beside the formula of
  docs/parallel.md (:mod:`pico_fast.parallel.traffic`), for every layout of 4 processes.
- Weak scaling: tokens/s of n processes of one thread relative to n times those of one; and CPU time per token, all
  processes together, relative to one process, which other work on the machine disturbs less. On gloo and a few cores
  the ratios compare layouts; they say nothing about GPUs.
- ``--before TREE``: one process of this code against one of another source tree (a folder with ``pico_fast`` and
  ``kernels``), by turns, step by step, in CPU time: what the parallel code costs those who do not use it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pico_fast.parallel.mesh import Parallel

ROOT = Path(__file__).parents[1]
TINY = Path("configs", "pico-decoder-tiny.yaml")
SEQUENCE, ROWS, MICRO_BATCHES = 256, 4, 2  # tokens of a row; rows of a micro-batch on one process
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {  # by number of processes and name: sizes of a Layout
    1: {"one process": {}},
    2: {"dp2": {"dp_replicate": 2}, "fsdp2": {"dp_shard": 2}, "tp2": {"tp": 2}},
    4: {
        "dp4": {"dp_replicate": 4},
        "fsdp4": {"dp_shard": 4},
        "hsdp 2x2": {"dp_replicate": 2, "dp_shard": 2},
        "tp4": {"tp": 4},
        "tp2 x dp2": {"tp": 2, "dp_replicate": 2},
        "tp2 x fsdp2": {"tp": 2, "dp_shard": 2},
    },
}


def small_decoder() -> list[str]:
    """Settings of a decoder with pico-decoder-tiny's width and heads, fewer ids and layers, on one thread."""
    return [
        f"model.max_seq_len={SEQUENCE}",
        "model.vocab_size=8192",
        "model.n_layers=4",
        "training.fabric.accelerator=cpu",
        "training.fabric.precision=32-true",
        "runtime.threads=1",
    ]


def rank_main(name: str, steps: int) -> None:
    """One rank of a measurement, started by torchrun; rank 0 prints its figures as JSON."""
    from pico_fast.config_io import load_config
    from pico_fast.model.build import build_kernels, build_model
    from pico_fast.optim import build_optimizer
    from pico_fast.parallel.agreement import sum_over_ranks
    from pico_fast.parallel.data_parallel import parallelise
    from pico_fast.parallel.layout import Layout
    from pico_fast.parallel.mesh import DIMENSIONS, start_parallel, stop_parallel
    from pico_fast.parallel.traffic import step_traffic
    from pico_fast.runtime import start_runtime, world_size
    from pico_fast.step import training_step

    import torch  # isort: skip (after pico_fast, which sets what OpenMP reads when torch is imported)

    layout = Layout(**LAYOUTS[world_size()][name])
    sizes = [f"parallel.{dimension}={size}" for dimension, size in dataclasses.asdict(layout).items()]
    config = load_config(ROOT / TINY, [*small_decoder(), *sizes])
    runtime = start_runtime(config)
    parallel = start_parallel(config, runtime.device)
    model = build_model(config, build_kernels(config, runtime), runtime, parallel)
    loss_function = parallelise(model, runtime, parallel)
    optimizer = build_optimizer(model, config.training.optimization)
    rows = ROWS * parallel.world_size // parallel.dp_size  # weak scaling: as many tokens in all per process
    ids = torch.randint(config.model.vocab_size, (MICRO_BATCHES, rows, SEQUENCE + 1), dtype=torch.int32)

    def step(number: int) -> None:
        numbers = training_step(
            model,
            optimizer,
            ids,
            step=number,
            lr=1e-4,
            loss_function=loss_function,
            parallel=parallel,
            max_grad_norm=1.0,
        )
        assert numbers is not None
        numbers.loss.item()

    for warm_up in range(2):
        step(warm_up)
    with sent_bytes(parallel) as sent:
        step(2)
    seconds, cpu = [], []
    for number in range(3, steps + 3):
        start, cpu_start = time.perf_counter(), time.process_time()
        step(number)
        cpu.append(time.process_time() - cpu_start)  # of all threads, gloo's too
        seconds.append(time.perf_counter() - start)
    cpu_of_all = sum_over_ranks(parallel, torch.tensor(statistics.median(cpu), dtype=torch.float64))
    tokens = ids[..., 1:].numel() * parallel.dp_size
    formula = step_traffic(
        config.model,
        layout,
        micro_batches=MICRO_BATCHES,
        tokens=rows * SEQUENCE,
        activation_bytes=4,
    )
    if parallel.is_main:
        figures = {
            "tokens_per_second": tokens / statistics.median(seconds),
            "cpu_seconds_per_token": cpu_of_all.item() / tokens,
            "sent": {dimension: sent[dimension] for dimension in DIMENSIONS},
            "sent_numbers": sent["world"],
            "formula": {dimension: getattr(formula, dimension) for dimension in DIMENSIONS},
        }
        print(json.dumps(figures), flush=True)
    stop_parallel()


@contextlib.contextmanager
def sent_bytes(parallel: Parallel) -> Iterator[Counter[str]]:
    """Add up what this rank sends inside, in ring algorithms; gives a Counter by dimension of the mesh.

    Groups that are none of its dimensions count as ``world``. Broadcasts do not count: DDP sees by one, in its first
    step, that all ranks have the same parameters. Raises ValueError for a collective that no step is known to use.
    """
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from pico_fast.parallel.mesh import DIMENSIONS

    groups = {dimension: getattr(parallel, dimension).group for dimension in DIMENSIONS}
    dimensions = {group.group_name: dimension for dimension, group in groups.items() if group is not None}
    counted: Counter[str] = Counter()

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.name()
            if name.startswith("c10d::"):
                group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
                ring = (group.size() - 1) / group.size()
                dimension = dimensions.get(group.group_name, "world")
                if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
                    counted[dimension] += ring * max(args[0].nbytes, args[1].nbytes)
                elif name in ("c10d::allreduce_", "c10d::allreduce_coalesced_"):
                    counted[dimension] += 2 * ring * sum(tensor.nbytes for tensor in args[0])
                elif name != "c10d::broadcast_":
                    raise ValueError(f"{name}: not known how much it sends")
            return function(*args, **(kwargs or {}))

    with Mode():
        yield counted


def measure(world_size: int, name: str, steps: int) -> dict[str, Any]:
    """The figures of one layout, from processes of its own."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size), "-m"]
    arguments = ["benchmarks.parallel", "--rank", name, "--steps", str(steps)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore::FutureWarning"}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *arguments], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def one_process_loop() -> None:
    """Time one training step for every line on stdin, in CPU seconds; runs with any version of pico_fast."""
    from pico_fast.config_io import load_config
    from pico_fast.model.build import build_kernels, build_model
    from pico_fast.optim import build_optimizer
    from pico_fast.runtime import start_runtime
    from pico_fast.step import training_step

    import torch  # isort: skip

    config = load_config(TINY, small_decoder())  # of the version's own tree: a file of this one may have new keys
    runtime = start_runtime(config)
    model = build_model(config, build_kernels(config, runtime), runtime)
    optimizer = build_optimizer(model, config.training.optimization)
    # few tokens: overhead per step and per module would be seen most easily
    ids = torch.randint(config.model.vocab_size, (4, 1, SEQUENCE // 4 + 1), dtype=torch.int32)
    for number, _ in enumerate(sys.stdin):
        start = time.process_time()
        training_step(model, optimizer, ids, step=number, lr=1e-4, max_grad_norm=1.0, measure_norm=True)
        print(time.process_time() - start, flush=True)


def against(before: Path, pairs: int) -> dict[str, float]:
    """CPU seconds of one process's step, this code over ``before``: median of ``pairs`` neighbouring pairs, and its
    standard error."""
    workers = []
    for tree in (before.resolve(), ROOT):
        environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}", "OMP_NUM_THREADS": "1"}
        workers.append(
            subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), "--loop"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=tree,
                env=environment,
            )
        )

    def seconds(worker: subprocess.Popen[str]) -> float:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())

    ratios = []
    for number in range(pairs + 5):
        order = workers if number % 2 else workers[::-1]
        taken = {id(worker): seconds(worker) for worker in order}
        ratios.append(taken[id(workers[1])] / taken[id(workers[0])])
    for worker in workers:
        worker.communicate()
    timed = ratios[5:]  # after the warm-up
    return {
        "ratio": statistics.median(timed),
        "error": 1.25 * statistics.stdev(timed) / len(timed) ** 0.5,  # of a median of normal values
        "pairs": float(len(timed)),
    }


def main() -> int:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4], choices=[2, 4])
    parser.add_argument("--steps", type=int, default=5, help="timed steps; the median counts")
    parser.add_argument("--before", type=Path, help="a source tree to compare one process with")
    parser.add_argument("--pairs", type=int, default=200, help="of steps, with --before")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--loop", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        rank_main(given.rank, given.steps)
        return 0
    if given.loop:
        one_process_loop()
        return 0
    results: dict[str, Any] = {}
    if given.processes:
        alone = results["one process"] = measure(1, "one process", given.steps)
        print(
            "| layout | sent per rank and step | formula | weak scaling | CPU time per token |\n|---|---|---|---|---|"
        )
    for world_size in given.processes:
        for name in LAYOUTS[world_size]:
            found = results[name] = measure(world_size, name, given.steps)
            sent, formula = (sum(found[key].values()) for key in ("sent", "formula"))
            found["weak_scaling"] = found["tokens_per_second"] / (world_size * alone["tokens_per_second"])
            found["cpu"] = found["cpu_seconds_per_token"] / alone["cpu_seconds_per_token"]
            print(
                f"| {name} | {sent:,.0f} B + {found['sent_numbers']:.0f} B of loss and norm | {formula:,.0f} B | "
                f"{found['weak_scaling']:.2f} | {found['cpu']:.2f} |",
                flush=True,
            )
    if given.before is not None:
        found = results["one process against before"] = against(given.before, given.pairs)
        print(
            f"one process, this code over {given.before}: {found['ratio']:.4f} +- {found['error']:.4f} CPU time per "
            f"step, median of {found['pairs']:.0f} pairs"
        )
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
