"""The sharding table: which dimension of each parameter tensor parallelism splits.

The one place that says so. The initial weights are cut by it, gradients of weights that it does not split are summed
over the tensor-parallel ranks, norms count those once, and checkpoints say which part of a tensor a rank has written.

Megatron-LM's layout of a decoder block (arXiv 1909.08053): projections into heads or hidden units are split by
output, those back to ``d_model`` by input; everything else is replicated.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pico_fast.parallel.mesh import Axis

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


def tensor_parallel_part(parameter: str, whole: Tensor, tp: Axis) -> Tensor:
    """This rank's part of the whole tensor of ``parameter``, contiguous and without the rest's memory.

    Raises ValueError where the ranks do not divide it; the tensor itself is returned where nothing splits it.
    """
    dim = tensor_parallel_dim(parameter)
    if dim is None or tp.size == 1:
        return whole
    if whole.shape[dim] % tp.size:
        raise ValueError(f"{parameter}: parallel.tp = {tp.size} does not divide dimension {dim} of {whole.shape[dim]}")
    return whole.chunk(tp.size, dim)[tp.rank].clone(memory_format=torch.contiguous_format)


def keep_tensor_parallel_part(model: nn.Module, tp: Axis) -> None:
    """Cut every parameter of a whole ``model`` down to this rank's part, in place."""
    for name, parameter in model.named_parameters():
        parameter.data = tensor_parallel_part(name, parameter.data, tp)
    for module in model.modules():
        if isinstance(module, nn.Linear):  # what it prints, and what looks at it, sees its own sizes
            module.out_features, module.in_features = module.weight.shape
