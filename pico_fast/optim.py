"""The optimizer and its learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from pico_fast.config import OptimizationConfig, TrainingConfig


def build_optimizer(model: nn.Module, config: OptimizationConfig) -> torch.optim.AdamW:
    """Fused AdamW over all parameters in one group, weight decay on each, as pico-train's published runs.

    Its learning rate is set anew before every step (:func:`learning_rate`).
    """
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of update ``step`` (0 is the first, which linear warm-up gives a rate of 0, as in pico-train).

    - ``linear_with_warmup``: up to ``lr`` over ``lr_warmup_steps``, then down to 0 at ``max_steps``.
    - ``cosine``: the same with half a cosine down to ``lr * lr_min_ratio`` (Loshchilov and Hutter, arXiv 1608.03983).
    - ``wsd``: constant after the warm-up; the last ``lr_decay_steps`` go down linearly to ``lr * lr_min_ratio``
      (Hu et al., arXiv 2404.06395).
    - ``constant``: ``lr`` after the warm-up.
    """
    optimization = config.optimization
    warmup, last = optimization.lr_warmup_steps, config.max_steps
    if step < warmup:
        return optimization.lr * step / warmup
    if optimization.lr_scheduler == "constant":
        return optimization.lr
    if optimization.lr_scheduler == "wsd":
        decay = optimization.lr_decay_steps or max(1, last // 10)
        start = max(warmup, last - decay)
    else:
        start = warmup
    remaining = max(0.0, (last - max(step, start)) / max(1, last - start))
    if optimization.lr_scheduler == "linear_with_warmup":
        return optimization.lr * remaining
    if optimization.lr_scheduler == "cosine":
        remaining = 0.5 * (1.0 - math.cos(math.pi * remaining))
    return optimization.lr * (optimization.lr_min_ratio + (1.0 - optimization.lr_min_ratio) * remaining)
