"""What an opponent of our kernels is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Opponent:
    """``call(*prepare(inputs))`` gives the op's outputs in the layout of ``truth(*prepare(inputs))``.

    ``overwrites``: the call or its backward writes over inputs or incoming gradients, which must be restored.
    ``bytes_per_call``: memory that one forward and backward takes beyond inputs, outputs and gradients, where that is
    so much that it may not fit. ``output_dtype``: what the outputs were rounded to, where ``call`` widens them after.
    ``gradient_slack``: relative error that the gate allows its gradients beyond its own, as it is known to round more.
    """

    name: str
    call: Callable[..., Tensors]
    truth: Callable[..., Tensors]
    prepare: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]] = tuple
    overwrites: bool = False
    bytes_per_call: int = 0
    output_dtype: torch.dtype | None = None
    gradient_slack: float = 0.0


Maker = Callable[[], Opponent | str]
"""Makes an opponent, or says why it cannot be had here."""


def gather(makers: Mapping[str, Maker]) -> tuple[list[Opponent], dict[str, str]]:
    """Those who can be had, and for the others by name the reason why not."""
    made = {name: make() for name, make in makers.items()}
    found = [opponent for opponent in made.values() if isinstance(opponent, Opponent)]
    return found, {name: reason for name, reason in made.items() if isinstance(reason, str)}


def narrow_weight(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The last argument, a float32 weight, in the dtype of the first."""
    return *inputs[:-1], inputs[-1].to(inputs[0].dtype)
