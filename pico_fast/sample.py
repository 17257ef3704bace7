"""A text continued by a run's newest checkpoint: ``python -m pico_fast.sample RUN_DIR --prompt "def "``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from pico_kernels import KernelSet

from pico_fast.checkpoint.layout import RunLayout
from pico_fast.data.tokenizer import TokenizerError, load_tokenizer
from pico_fast.interop.huggingface import CheckpointFormatError, import_model
from pico_fast.model.decoder import PicoDecoder
from pico_fast.model.generate import generate


class SampleError(Exception):
    """There is nothing to sample from; the message says what is missing."""


def sample(
    checkpoint: Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int | None = 0,
) -> str:
    """``prompt`` and its continuation by the model and tokenizer in the folder ``checkpoint`` (``step_N``), in float32.

    The end-of-text token stands in for an empty prompt. Raises SampleError without model or tokenizer, ValueError for
    settings that :func:`~pico_fast.model.generate.generate` refuses.
    """
    try:
        config, state = import_model(checkpoint)
        tokenizer = load_tokenizer(str(checkpoint))
    except (OSError, CheckpointFormatError, TokenizerError) as error:
        raise SampleError(f"{checkpoint}: {error}") from None
    model = PicoDecoder(config, KernelSet.from_config())
    model.load_state_dict(state)
    ids = tokenizer.encode([prompt])[0] or [tokenizer.eos_id or 0]
    tokens = torch.tensor([ids[-config.max_seq_len + 1 :]])
    room = min(max_new_tokens, config.max_seq_len - tokens.shape[1])
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    continued = generate(model, tokens, room, eos_id=tokenizer.eos_id, **settings)  # type: ignore[arg-type]
    return prompt + tokenizer.decode(continued[0, tokens.shape[1] :].tolist())


def main() -> int:
    """The command line; exit code 2 where there is nothing to sample from."""
    parser = argparse.ArgumentParser(prog="pico_fast.sample", description="Continue a text with a run's checkpoint.")
    parser.add_argument("run_dir", type=Path, help="a run directory, or one of its step folders")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    latest = RunLayout(given.run_dir).latest
    try:
        text = sample(
            latest.resolve() if latest.exists() else given.run_dir,
            given.prompt,
            max_new_tokens=given.max_new_tokens,
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            seed=given.seed,
        )
    except (SampleError, ValueError) as error:
        print(f"pico_fast.sample: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
