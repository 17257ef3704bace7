"""The Pico decoder: a LLaMA-style network with pico-train's parameter names, built from a KernelSet.

Every op that a researcher may want to replace (norms, rotary embedding, SwiGLU, attention, the loss) is called through
``self.kernels``; what remains here is projections and wiring.

Precision: parameters keep their own dtype (float32 masters for ``bf16-mixed``), activations and the residual stream
are in ``compute_dtype``, and each projection casts its weight to the dtype of its input. Gradients arrive in the
parameters' dtype, so micro-batches accumulate in float32. This is the arithmetic of the published multi-GPU runs
(a bfloat16 module with float32 masters); pico-train on one device instead kept a float32 residual stream.

Source of the architecture and names: github.com/pico-lm/pico-train, src/model/pico_decoder.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pico_kernels import KernelSet
from pico_kernels.rope import rope_tables
from torch import Tensor, nn

from pico_fast.config import ModelConfig
from pico_fast.model.cache import KVCache, LayerCache


class Linear(nn.Linear):
    """A projection without bias that runs in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Holder of a norm's weight (d_model,); the op itself comes from the KernelSet."""

    def __init__(self, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (interleaved pairs)."""

    def __init__(self, config: ModelConfig, kernels: KernelSet):
        super().__init__()
        self.kernels = kernels
        self.head_dim = config.head_dim
        kv_width = config.attention_n_kv_heads * config.head_dim
        self.q_proj = Linear(config.d_model, config.d_model)
        self.k_proj = Linear(config.d_model, kv_width)
        self.v_proj = Linear(config.d_model, kv_width)
        self.o_proj = Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None) -> Tensor:
        """x (B, S, d) to (B, S, d); cos and sin (S, head_dim / 2) are those of the tokens' positions."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.kernels.rope(q, k, cos, sin, style="interleaved")
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o_proj(self.kernels.attention(q, k, v, causal=True).flatten(-2))


class SwiGLU(nn.Module):
    """w_2(silu(w_0(x)) * w_1(x))."""

    def __init__(self, config: ModelConfig, kernels: KernelSet):
        super().__init__()
        self.kernels = kernels
        self.w_0 = Linear(config.d_model, config.activation_hidden_dim)
        self.w_1 = Linear(config.d_model, config.activation_hidden_dim)
        self.w_2 = Linear(config.activation_hidden_dim, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, d) to (B, S, d)."""
        return self.w_2(self.kernels.swiglu(self.w_0(x), self.w_1(x)))


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm and added to the residual stream.

    A block hands its SwiGLU output to the next one unadded, so that every addition but the first sits in the fused
    ``add_rms_norm``. The order of construction is pico's: it decides the initial weights.
    """

    def __init__(self, config: ModelConfig, kernels: KernelSet):
        super().__init__()
        self.kernels = kernels
        self.eps = config.norm_eps
        self.attention = Attention(config, kernels)
        self.swiglu = SwiGLU(config, kernels)
        self.attention_norm = RMSNorm(config.d_model)
        self.swiglu_norm = RMSNorm(config.d_model)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """x and residual (B, S, d) sum to the residual stream (None: zero); returns the same pair, one block on."""
        if residual is None:
            normed, residual = self.kernels.rms_norm(x, self.attention_norm.weight, self.eps), x
        else:
            normed, residual = self.kernels.add_rms_norm(x, residual, self.attention_norm.weight, self.eps)
        attended = self.attention(normed, cos, sin, cache)
        normed, residual = self.kernels.add_rms_norm(attended, residual, self.swiglu_norm.weight, self.eps)
        return self.swiglu(normed), residual


class PicoDecoder(nn.Module):
    """The whole network. Input ids (B, S) int; hidden states (B, S, d_model) in ``compute_dtype``.

    Construction draws the initial weights from torch's global generator in pico's order, so that
    ``torch.manual_seed(42)`` before it gives pico's initial model.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig, kernels: KernelSet, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.compute_dtype = compute_dtype
        self.embedding_proj = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.n_layers))
        self.output_norm = RMSNorm(config.d_model)
        self.de_embedding_proj = Linear(config.d_model, config.vocab_size)
        cos, sin = rope_tables(config.max_seq_len, config.head_dim, config.position_emb_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def hidden(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Normed final states (B, S, d_model); with a cache, ``input_ids`` are the tokens that follow those in it.

        Raises ValueError where the positions would pass ``max_seq_len``.
        """
        start = 0 if cache is None else cache.length
        stop = start + input_ids.shape[1]
        if stop > self.config.max_seq_len:
            raise ValueError(
                f"input_ids: {stop} positions with those in the cache, model.max_seq_len is {self.config.max_seq_len}"
            )
        cos, sin = self.rope_cos[start:stop], self.rope_sin[start:stop]
        x, residual = self.embedding_proj(input_ids).to(self.compute_dtype), None
        for index, block in enumerate(self.layers):
            x, residual = block(x, residual, cos, sin, None if cache is None else cache.layers[index])
        normed, _ = self.kernels.add_rms_norm(x, residual, self.output_norm.weight, self.config.norm_eps)
        return normed

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, S, vocab_size) in ``compute_dtype``."""
        return self.de_embedding_proj(self.hidden(input_ids, cache))

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        reduction: str = "mean",
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of ``labels`` (B, S) int64, -100 not counted, without logits in memory.

        Returns a float32 scalar (the sum divided by ``denominator`` where one is given), or (B * S,) for
        ``reduction="none"``.
        """
        return self.kernels.linear_cross_entropy(
            self.hidden(input_ids).flatten(0, 1),
            self.de_embedding_proj.weight,
            labels.flatten(),
            reduction=reduction,
            denominator=denominator,
        )
