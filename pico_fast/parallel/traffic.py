"""How many bytes each layout communicates: the formula of docs/parallel.md.

Counted are the bytes that one rank sends in a step's collectives, in the ring algorithms that NCCL and gloo use for
large tensors: over n ranks an all-gather or a reduce-scatter sends (n - 1) / n of the whole tensor, an all-reduce
twice that. Gradients are summed in float32, whatever their own dtype. Left out are single numbers (loss, norm,
agreement), evaluation and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from pico_fast.config import ModelConfig
from pico_fast.flops import parameter_counts
from pico_fast.parallel.layout import Layout

# Of each half of a block (attention, SwiGLU), times the micro-batch's tokens: forward, an all-gather and a
# reduce-scatter; backward, the gradient's all-gather, the tokens' second all-gather, and a reduce-scatter.
TENSOR_PARALLEL_COLLECTIVES = 2 * 5

# More of them per block where its parts are computed again. A recomputed part's last reduce-scatter is not: what
# follows from it is kept.
RECOMPUTED_COLLECTIVES = {"none": 0, "attention": 1, "block": 3}


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends per optimizer step, by the dimension of the mesh that they travel along."""

    tp: float
    dp_shard: float
    dp_replicate: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.tp + self.dp_shard + self.dp_replicate


def step_traffic(
    model: ModelConfig,
    layout: Layout,
    *,
    micro_batches: int,
    tokens: int,
    activation_bytes: int,
    recomputed: str = "none",
) -> Traffic:
    """Bytes sent per rank and step.

    Args:
        model: its shape.
        layout: sizes of the mesh.
        micro_batches: of one step, per rank.
        tokens: of one micro-batch on one data-parallel rank.
        activation_bytes: per element of ``compute_dtype``: activations, and the weights that FSDP2 gathers.
        recomputed: ``parallel.activation_checkpointing``.
    """
    counts = parameter_counts(model)
    on_rank = counts.total - counts.split + counts.split // layout.tp
    blocks = on_rank - 2 * counts.embedding - model.d_model  # the rest is FSDP2's outermost unit
    collectives = TENSOR_PARALLEL_COLLECTIVES + RECOMPUTED_COLLECTIVES[recomputed]
    activations = collectives * model.n_layers * micro_batches * tokens * model.d_model * activation_bytes
    whole = (counts.total - counts.split) // layout.dp_shard
    # A block is gathered for the forward pass, freed, and gathered again for the backward pass; the outer unit stays
    gathered = micro_batches * (2 * blocks + (on_rank - blocks)) * activation_bytes
    return Traffic(
        tp=_ring(layout.tp) * (activations + 2 * 4 * whole),
        dp_shard=_ring(layout.dp_shard) * (gathered + 4 * on_rank),
        dp_replicate=_ring(layout.dp_replicate) * 2 * 4 * on_rank / layout.dp_shard,
    )


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks
