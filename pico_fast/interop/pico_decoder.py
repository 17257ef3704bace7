"""Pico decoder for Hugging Face transformers: a LLaMA-style causal language model in one file.

This file stands beside the weights in every checkpoint and needs only torch and transformers (4.48 or newer)::

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Names of classes, configuration keys and parameters are those of pico-train (github.com/pico-lm/pico-train), so its
published checkpoints load with this file too. The architecture: RMSNorm before each sub-layer (arXiv 1910.07467),
rotary position embeddings on interleaved pairs (arXiv 2104.09864), grouped-query attention (arXiv 2305.13245), SwiGLU
(arXiv 2002.05202), no biases, embedding and output projection not tied.

Shapes below: B sequences, S new tokens, T cached and new tokens, H query heads, D head width, d = H * D.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast


class PicoDecoderHFConfig(PretrainedConfig):
    """Shape of a Pico decoder; ``batch_size`` is unused and kept because pico-train's checkpoints have it."""

    model_type = "pico_decoder"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "intermediate_size": "activation_hidden_dim",
        "max_position_embeddings": "max_seq_len",
        "num_attention_heads": "attention_n_heads",
        "num_hidden_layers": "n_layers",
        "num_key_value_heads": "attention_n_kv_heads",
    }

    def __init__(
        self,
        d_model: int = 768,
        n_layers: int = 12,
        vocab_size: int = 50304,
        batch_size: int = 1024,
        max_seq_len: int = 2048,
        attention_n_heads: int = 12,
        attention_n_kv_heads: int = 4,
        activation_hidden_dim: int = 3072,
        norm_eps: float = 1e-6,
        position_emb_theta: float = 10000.0,
        **kwargs: Any,
    ):
        self.d_model = d_model
        self.n_layers = n_layers
        self.vocab_size = vocab_size
        self.batch_size = batch_size
        self.max_seq_len = max_seq_len
        self.attention_n_heads = attention_n_heads
        self.attention_n_kv_heads = attention_n_kv_heads
        self.activation_hidden_dim = activation_hidden_dim
        self.norm_eps = norm_eps
        self.position_emb_theta = position_emb_theta
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``: statistics and division in float32, rounded to x's dtype, then scaled."""

    def __init__(self, config: PicoDecoderHFConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., d) over its last dimension."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rotary_angles(config: PicoDecoderHFConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B or 1, 1, S, D/2), float32, of the angle by which each pair of a head turns."""
    head_dim = config.d_model // config.attention_n_heads
    pairs = torch.arange(0, head_dim, 2, device=position_ids.device).float()
    frequencies = 1.0 / config.position_emb_theta ** (pairs / head_dim)
    angles = position_ids[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... of x (B, heads, S, D) in float32; same shape and dtype as x."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2).type_as(x)


def visible_keys(attention_mask: Tensor | None, slots: Tensor, cached: int) -> Tensor | None:
    """Which keys each query may see, boolean (B or 1, 1, S, T); None: causal attention and nothing cached.

    ``attention_mask`` (B, T) is 0 at padding, left or right; one of four dimensions is returned as it is. ``slots``
    (S,) are the places of the new tokens among the T.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    if attention_mask is None and cached == 0:
        return None
    total = cached + len(slots)
    keys, queries = torch.arange(total, device=slots.device), slots[:, None]
    if attention_mask is None:
        return (keys <= queries)[None, None]
    if attention_mask.shape[-1] != total:
        raise ValueError(
            f"attention_mask: {total} tokens expected ({cached} cached, {len(slots)} new), "
            f"{attention_mask.shape[-1]} given"
        )
    # A query that is padding may see itself: the softmax of one that sees nothing would be NaN.
    return (keys <= queries) & attention_mask[:, None, None, :].bool() | (keys == queries)


class Attention(nn.Module):
    """Causal self-attention; several query heads share a key and value head."""

    def __init__(self, config: PicoDecoderHFConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.d_model // config.attention_n_heads
        self.n_rep = config.attention_n_heads // config.attention_n_kv_heads
        kv_dim = config.attention_n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        slots: Tensor,
        past_key_values: Cache | None,
        output_attentions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output (B, S, d) for x (B, S, d) and, if asked for, the probabilities (B, H, S, T)."""
        queries, keys, values = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = rotate(queries, *angles), rotate(keys, *angles)
        if past_key_values is not None:
            # A static cache of transformers 4 writes to the given slots; other caches find their own.
            keys, values = past_key_values.update(keys, values, self.layer_idx, {"cache_position": slots})
        keys, values = (tensor.repeat_interleave(self.n_rep, dim=1) for tensor in (keys, values))
        weights = None
        if output_attentions or self.config._attn_implementation == "eager":
            output, weights = eager_attention(queries, keys, values, mask)
        else:
            if mask is not None and mask.dtype != torch.bool:
                mask = mask.to(queries.dtype)
            output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(output.transpose(1, 2).flatten(-2)), weights if output_attentions else None


def eager_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention written out: output (B, H, S, D) and the probabilities (B, H, S, T); softmax in float32.

    ``mask`` (B or 1, 1, S, T) is True where a query may see a key, or is added to the scores; None: causal.
    """
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).type_as(queries)
    return weights @ values, weights


class SwiGLU(nn.Module):
    """Feed-forward layer ``w_2(silu(w_0 x) * w_1 x)``."""

    def __init__(self, config: PicoDecoderHFConfig):
        super().__init__()
        self.w_0 = nn.Linear(config.d_model, config.activation_hidden_dim, bias=False)
        self.w_1 = nn.Linear(config.d_model, config.activation_hidden_dim, bias=False)
        self.w_2 = nn.Linear(config.activation_hidden_dim, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., d) to the same shape."""
        return self.w_2(F.silu(self.w_0(x)) * self.w_1(x))


class PicoDecoderBlock(nn.Module):
    """Attention and feed-forward layer, each normalised at its input and added to the residual stream."""

    def __init__(self, config: PicoDecoderHFConfig, layer_idx: int):
        super().__init__()
        self.attention = Attention(config, layer_idx)
        self.swiglu = SwiGLU(config)
        self.attention_norm = RMSNorm(config)
        self.swiglu_norm = RMSNorm(config)

    def forward(self, x: Tensor, *attention_inputs: Any) -> tuple[Tensor, Tensor | None]:
        """The residual stream (B, S, d) after this block, and the attention probabilities if asked for."""
        attended, weights = self.attention(self.attention_norm(x), *attention_inputs)
        x = x + attended
        return x + self.swiglu(self.swiglu_norm(x)), weights


class PicoDecoder(nn.Module):
    """The parameters; :class:`PicoDecoderHF` runs them."""

    def __init__(self, config: PicoDecoderHFConfig):
        super().__init__()
        self.embedding_proj = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([PicoDecoderBlock(config, index) for index in range(config.n_layers)])
        self.output_norm = RMSNorm(config)
        self.de_embedding_proj = nn.Linear(config.d_model, config.vocab_size, bias=False)


class PicoDecoderHF(PreTrainedModel, GenerationMixin):
    """Pico decoder with transformers' interface: ``from_pretrained``, ``generate``, padding, ``labels``."""

    config: PicoDecoderHFConfig
    config_class = PicoDecoderHFConfig
    _no_split_modules = ["PicoDecoderBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_cache_class = True  # transformers 4.48 asks for it before it gives generate() a DynamicCache

    def __init__(self, config: PicoDecoderHFConfig):
        super().__init__(config)
        self.pico_decoder = PicoDecoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation, as in pico-train, for what a checkpoint does not hold."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.reset_parameters()
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.pico_decoder.embedding_proj

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.pico_decoder.embedding_proj = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        """The projection to the vocabulary."""
        return self.pico_decoder.de_embedding_proj

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the projection to the vocabulary."""
        self.pico_decoder.de_embedding_proj = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token, (B, S, vocabulary) float32, and the mean loss if there are ``labels``.

        Args:
            input_ids: token ids (B, S); or give ``inputs_embeds`` (B, S, d).
            past_key_values: cache that the last call returned; grows by S.
            use_cache: also return a cache (off unless asked for, as in pico-train).
            attention_mask: (B, T) 0 at padding, left or right; or (B, 1, S, T), boolean or to be added to the scores.
            position_ids: (B, S); counted from the length of the cache if not given.
            labels: (B, S) token ids, shifted here; -100 is not counted.
            logits_to_keep: only the last so many positions (0: all), or the positions in a tensor.
            output_hidden_states: also return the embedding and each block's output, the last one normalised.
            output_attentions: also return each block's attention probabilities (then computed without SDPA).
            return_dict: False for a plain tuple.
            kwargs: ``num_items_in_batch`` divides the summed loss, as transformers' Trainer expects; others have no
                effect.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        decoder, config = self.pico_decoder, self.config
        hidden = decoder.embedding_proj(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        new, cached = hidden.shape[1], 0 if past_key_values is None else past_key_values.get_seq_length()
        slots = torch.arange(cached, cached + new, device=hidden.device)
        want_attentions = config.output_attentions if output_attentions is None else output_attentions
        attention_inputs = (
            rotary_angles(config, slots[None] if position_ids is None else position_ids),
            visible_keys(attention_mask, slots, cached),
            slots,
            past_key_values,
            want_attentions,
        )

        want_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states, attentions = [], []
        for layer in decoder.layers:
            if want_states:
                states.append(hidden)
            hidden, weights = layer(hidden, *attention_inputs)
            attentions.append(weights)
        hidden = decoder.output_norm(hidden)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = decoder.de_embedding_proj(hidden[:, kept]).float()
        loss = None
        if labels is not None:
            loss = ForCausalLMLoss(logits, labels, config.vocab_size, kwargs.get("num_items_in_batch"))
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=(*states, hidden) if want_states else None,
            attentions=tuple(attentions) if want_attentions else None,
        )
        return output.to_tuple() if return_dict is False else output


PicoDecoderHFConfig.register_for_auto_class()
PicoDecoderHF.register_for_auto_class("AutoModelForCausalLM")
