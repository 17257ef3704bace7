"""Peak memory of a training step by the loss's implementation: ``python -m benchmarks.step_memory``.

One micro-batch of ``--tokens`` tokens through :func:`benchmarks.train_step.measure`, each implementation in a process
of its own: on a CPU the most it held resident, on CUDA the most its tensors took. The reference writes all logits;
what it takes more than ours is printed beside the size of one float32 copy of them. Other settings are arguments:
``python -m benchmarks.step_memory --tokens 8192 --sequence 512 training.fabric.precision=32-true``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.train_step import TINY, measure_apart

LOSS = "kernels.linear_cross_entropy"


def compare(config_file: Path, overrides: list[str], seq_len: int, tokens: int, fused: str) -> dict[str, Any]:
    """Peak bytes with the loss ``fused`` and with the reference, their difference and the bytes of float32 logits."""
    peaks = {}
    for name in (fused, "reference"):
        result = measure_apart(config_file, [*overrides, f"{LOSS}={name}"], seq_len, tokens, micro_batches=1, steps=1)
        peaks[result["kernels"]["linear_cross_entropy"]] = result["peak_bytes"]
    tokens = result["rows"] * seq_len
    (ours, ours_bytes), (_, reference_bytes) = peaks.items()
    return {
        "device": result["device"],
        "precision": result["precision"],
        "sequence": seq_len,
        "tokens": tokens,
        "implementation": ours,
        "peak_bytes": ours_bytes,
        "reference_peak_bytes": reference_bytes,
        "saved_bytes": reference_bytes - ours_bytes,
        "float32_logits_bytes": tokens * result["vocab_size"] * 4,
    }


def main(argv: list[str] | None = None) -> int:
    """Print a Markdown table, a line per number of tokens; exit code 1 where less than the logits were saved."""
    parser = argparse.ArgumentParser(prog="benchmarks.step_memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=TINY, help="a YAML file (default: the tiny decoder)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192], help="per micro-batch")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--loss", default="auto", help="implementation beside the reference (%(default)s)")
    parser.add_argument("--json", type=Path, help="append one line per number of tokens to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_intermixed_args(argv)
    if given.loss == "reference":
        parser.error("--loss: expected another implementation to set beside the reference, got 'reference'")
    print("| tokens | loss | peak | with the reference | saved | float32 logits |\n|---|---|---|---|---|---|")
    enough = True
    for tokens in given.tokens:
        result = compare(given.config, given.overrides, given.sequence, tokens, given.loss)
        enough &= result["saved_bytes"] >= result["float32_logits_bytes"]
        if given.json:
            with open(given.json, "a") as file:
                file.write(json.dumps(result) + "\n")
        columns = ("peak_bytes", "reference_peak_bytes", "saved_bytes", "float32_logits_bytes")
        shown = " | ".join(f"{result[column] / 1e9:.2f} GB" for column in columns)
        print(f"| {result['tokens']:,} | {result['implementation']} | {shown} |", flush=True)
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
