"""The sharding table: which dimension of each parameter tensor parallelism splits.

The one place that says so. Checkpoints write it into their manifest, so that a state saved on one layout can be cut
for another; initialisation, gradient reduction, clipping and recording are to derive from it as well.

Megatron-LM's layout of a decoder block (arXiv 1909.08053): projections into heads or hidden units are split by
output, those back to ``d_model`` by input; everything else is replicated.
"""

from __future__ import annotations

# Suffix of the parameter's name without ".weight" -> dimension, or None where every rank holds the whole.
TENSOR_PARALLEL_DIM: dict[str, int | None] = {
    "embedding_proj": None,
    "attention.q_proj": 0,
    "attention.k_proj": 0,
    "attention.v_proj": 0,
    "attention.o_proj": 1,
    "swiglu.w_0": 0,
    "swiglu.w_1": 0,
    "swiglu.w_2": 1,
    "attention_norm": None,
    "swiglu_norm": None,
    "output_norm": None,
    "de_embedding_proj": None,
}


def tensor_parallel_dim(parameter: str) -> int | None:
    """Dimension along which ``parameter`` (``layers.3.swiglu.w_2.weight``) is split; None where it is replicated.

    Raises KeyError for a parameter that the table does not name.
    """
    name = parameter.removesuffix(".weight")
    if name.startswith("layers."):
        name = name.split(".", 2)[2]
    return TENSOR_PARALLEL_DIM[name]
