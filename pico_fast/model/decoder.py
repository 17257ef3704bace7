"""The Pico decoder: a LLaMA-style network with pico-train's parameter names, built from a KernelSet.

Every op that a researcher may want to replace (norms, rotary embedding, SwiGLU, attention, the loss) is called through
``self.kernels``; what remains here is projections and wiring.

Precision: parameters keep their own dtype (float32 masters for ``bf16-mixed``), activations and the residual stream
are in ``compute_dtype``, and each projection casts its weight to the dtype of its input. Gradients arrive in the
parameters' dtype, so micro-batches accumulate in float32. This is the arithmetic of the published multi-GPU runs
(a bfloat16 module with float32 masters); pico-train on one device instead kept a float32 residual stream.

Tensor parallelism: a rank's decoder has its part of the split weights (:mod:`pico_fast.model.sharding`), and the blocks
call their projections through an :class:`~pico_fast.parallel.tensor.AllTokens` or what takes its place there. Shapes
below are those of one process; with sequence parallelism x and the residual stream are (B * S / tp, d).

Source of the architecture and names: github.com/pico-lm/pico-train, src/model/pico_decoder.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pico_kernels import KernelSet
from pico_kernels.rope import rope_tables
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from pico_fast.config import ModelConfig
from pico_fast.model.cache import KVCache, LayerCache
from pico_fast.model.sharding import keep_tensor_parallel_part
from pico_fast.parallel.mesh import ONE, Axis
from pico_fast.parallel.symmetric_memory import SymmetricMemory
from pico_fast.parallel.tensor import ALL_TOKENS, AllTokens, ReplicatedTokens, SequenceParallel, gather_tokens


class _Lookup(torch.autograd.Function):
    """Rows of a weight narrower than float32; its gradient is added up in float32 and rounded once.

    ATen's own backward adds in the weight's dtype: in bfloat16 a token's sum stops growing at 256 times its terms (8192
    terms of 1e-3 come to 0.5), and frequent tokens occur that often.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocab_size, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        summed = torch.ops.aten.embedding_dense_backward(grad.float(), ids, ctx.vocab_size, -1, False)
        return summed.to(ctx.dtype), None


class Embedding(nn.Embedding):
    """Vectors of token ids, in the weight's dtype; its gradient is summed in float32 at least."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int to (..., d_model)."""
        if self.weight.dtype.itemsize < 4:  # bf16-true, and what FSDP2 gathers for bf16-mixed
            return _Lookup.apply(self.weight, ids)
        return super().forward(ids)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None, tokens: AllTokens) -> Tensor:
        """x (B, S, d) to (B, S, d); cos and sin (S, head_dim / 2) are those of the tokens' positions."""
        q, k, v = (
            projected.reshape(-1, cos.shape[0], projected.shape[-1] // self.head_dim, self.head_dim)
            for projected in tokens.column_parallel(x, self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.kernels.rope(q, k, cos, sin, style="interleaved")
        if cache is not None:
            k, v = cache.append(k, v)
        return tokens.row_parallel(self.kernels.attention(q, k, v, causal=True).flatten(-2), self.o_proj)


class SwiGLU(nn.Module):
    """w_2(silu(w_0(x)) * w_1(x))."""

    def __init__(self, config: ModelConfig, kernels: KernelSet):
        super().__init__()
        self.kernels = kernels
        self.w_0 = Linear(config.d_model, config.activation_hidden_dim)
        self.w_1 = Linear(config.d_model, config.activation_hidden_dim)
        self.w_2 = Linear(config.activation_hidden_dim, config.d_model)

    def forward(self, x: Tensor, tokens: AllTokens) -> Tensor:
        """(B, S, d) to (B, S, d)."""
        return tokens.row_parallel(self.kernels.swiglu(*tokens.column_parallel(x, self.w_0, self.w_1)), self.w_2)


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm and added to the residual stream.

    A block hands its SwiGLU output to the next one unadded, so that every addition but the first sits in the fused
    ``add_rms_norm``. The order of construction is pico's: it decides the initial weights.

    ``recomputed`` (``none``, ``block`` or ``attention``) is not kept for the backward pass but computed again in it.
    That happens inside the block, so that FSDP2's hooks, which gather its weights, run once per pass.
    """

    def __init__(self, config: ModelConfig, kernels: KernelSet, recomputed: str):
        super().__init__()
        self.kernels = kernels
        self.recomputed = recomputed
        self.eps = config.norm_eps
        self.attention = Attention(config, kernels)
        self.swiglu = SwiGLU(config, kernels)
        self.attention_norm = RMSNorm(config.d_model)
        self.swiglu_norm = RMSNorm(config.d_model)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None,
        tokens: AllTokens = ALL_TOKENS,
    ) -> tuple[Tensor, Tensor]:
        """x and residual (B, S, d) sum to the residual stream (None: zero); returns the same pair, one block on."""
        return self._maybe_recomputed("block", self._run, x, residual, cos, sin, cache, tokens)

    def _run(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None,
        tokens: AllTokens,
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            normed, residual = self.kernels.rms_norm(x, self.attention_norm.weight, self.eps), x
        else:
            normed, residual = self.kernels.add_rms_norm(x, residual, self.attention_norm.weight, self.eps)
        attended = self._maybe_recomputed("attention", self.attention, normed, cos, sin, cache, tokens)
        normed, residual = self.kernels.add_rms_norm(attended, residual, self.swiglu_norm.weight, self.eps)
        return self.swiglu(normed, tokens), residual

    def _maybe_recomputed(self, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.recomputed != part or not torch.is_grad_enabled():
            return function(*arguments)
        # Nothing in a block draws random numbers: their state need not be kept
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class PicoDecoder(nn.Module):
    """The whole network. Input ids (B, S) int; hidden states (B, S, d_model) in ``compute_dtype``.

    Construction draws the initial weights from torch's global generator in pico's order, so that
    ``torch.manual_seed(42)`` before it gives pico's initial model; a tensor-parallel rank then keeps its part of them.

    Args:
        config: shape of the whole model.
        kernels: implementation of each op.
        compute_dtype: of activations.
        tp: this rank among those that share the model; their seed must be the same.
        recomputed: ``parallel.activation_checkpointing``.
        symmetric_memory: whether those ranks' products are fused with their communication.

    Attributes:
        shared_over: groups of ranks that hold the model together and so must call its methods together.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self,
        config: ModelConfig,
        kernels: KernelSet,
        compute_dtype: torch.dtype = torch.float32,
        *,
        tp: Axis = ONE,
        recomputed: str = "none",
        symmetric_memory: bool = False,
    ):
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.compute_dtype = compute_dtype
        self.tp = tp
        self.embedding_proj = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, kernels, recomputed) for _ in range(config.n_layers))
        self.output_norm = RMSNorm(config.d_model)
        self.de_embedding_proj = Linear(config.d_model, config.vocab_size)
        cos, sin = rope_tables(config.max_seq_len, config.head_dim, config.position_emb_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        keep_tensor_parallel_part(self, tp)
        self._split = self._replicated = ALL_TOKENS
        self.shared_over: list[ProcessGroup] = []
        if tp.group is not None:
            self.shared_over.append(tp.group)
            self._split = SymmetricMemory(tp) if symmetric_memory else SequenceParallel(tp)
            self._replicated = ReplicatedTokens(tp.group)

    def hidden(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Normed final states (B, S, d_model); with a cache, ``input_ids`` are the tokens that follow those in it.

        Every tensor-parallel rank returns all of them, without gradient (RuntimeError where one is asked for). Raises
        ValueError where the positions would pass ``max_seq_len``.
        """
        return self._states(input_ids, cache, self._replicated)

    def _states(self, input_ids: Tensor, cache: KVCache | None, tokens: AllTokens) -> Tensor:
        """Normed final states of the tokens that ``tokens`` leaves to this rank."""
        start = 0 if cache is None else cache.length
        stop = start + input_ids.shape[1]
        if stop > self.config.max_seq_len:
            raise ValueError(
                f"input_ids: {stop} positions with those in the cache, model.max_seq_len is {self.config.max_seq_len}"
            )
        cos, sin = self.rope_cos[start:stop], self.rope_sin[start:stop]
        x, residual = self.embedding_proj(tokens.cut(input_ids)).to(self.compute_dtype), None
        for index, block in enumerate(self.layers):
            x, residual = block(x, residual, cos, sin, None if cache is None else cache.layers[index], tokens)
        normed, _ = self.kernels.add_rms_norm(x, residual, self.output_norm.weight, self.config.norm_eps)
        return normed

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, S, vocab_size) in ``compute_dtype``; as :meth:`hidden` with tensor parallelism."""
        return self.de_embedding_proj(self._states(input_ids, cache, self._replicated))

    def next_token_logits(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, vocab_size) of what follows ``input_ids`` (B, S), else as :meth:`forward`."""
        return self.de_embedding_proj(self._states(input_ids, cache, self._replicated)[:, -1])

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

        With tensor parallelism every rank gets the same ids and labels. The scalar is that of its B * S / tp tokens:
        the ranks' sum is the loss, so a ``mean`` needs the denominator (ValueError). ``none`` gives every
        rank the losses of all tokens, without gradient, whether or not the tokens divide over the ranks.
        """
        if self.tp.group is not None and reduction == "none":
            return self._token_losses(input_ids, labels)
        if self.tp.group is not None and reduction == "mean" and denominator is None:
            raise ValueError(
                "with tensor parallelism reduction='mean' needs the denominator: a rank sees its tokens only"
            )
        return self._loss(input_ids, labels, self._split, reduction, denominator)

    @torch.no_grad()
    def _token_losses(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Losses (B * S,) of all tokens on every rank."""
        assert self.tp.group is not None
        if input_ids.numel() % self.tp.size:
            return self._loss(input_ids, labels, self._replicated, "none", None)
        return gather_tokens(self._loss(input_ids, labels, self._split, "none", None), self.tp.group)

    def _loss(
        self, input_ids: Tensor, labels: Tensor, tokens: AllTokens, reduction: str, denominator: float | Tensor | None
    ) -> Tensor:
        return self.kernels.linear_cross_entropy(
            self._states(input_ids, None, tokens).flatten(0, -2),
            self.de_embedding_proj.weight,
            tokens.cut(labels).flatten(),
            reduction=reduction,
            denominator=denominator,
        )
