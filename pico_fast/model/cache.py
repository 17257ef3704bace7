"""The key-value cache of generation: preallocated, filled from the left, any number of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from pico_fast.config import ModelConfig


class LayerCache:
    """Keys and values of one layer, (batch, capacity, kv heads, head_dim) each, filled up to ``length``."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values, self.length = keys, values, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, S, Hkv, D) of the next S tokens; returns views of all so far."""
        stop = self.length + keys.shape[1]
        if stop > self.keys.shape[1]:
            raise ValueError(f"the cache holds {self.keys.shape[1]} tokens; {stop} were given")
        self.keys[:, self.length : stop] = keys
        self.values[:, self.length : stop] = values
        self.length = stop
        return self.keys[:, :stop], self.values[:, :stop]


class KVCache:
    """One :class:`LayerCache` per layer for ``batch_size`` sequences of up to ``capacity`` tokens.

    ``tp`` ranks that share the heads keep ``attention_n_kv_heads / tp`` of them each.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        tp: int = 1,
    ):
        shape = (batch_size, capacity, config.attention_n_kv_heads // tp, config.head_dim)
        self.layers = [
            LayerCache(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))
            for _ in range(config.n_layers)
        ]

    @property
    def length(self) -> int:
        """Tokens stored so far (while a forward pass is under way: in the last layer)."""
        return self.layers[-1].length
