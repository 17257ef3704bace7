"""The same network in the layout of Llama: other names, and rotary position embeddings on half-split pairs.

Pico turns the neighbours (0, 1), (2, 3), ... of a head, as the original LLaMA; Hugging Face's Llama turns (0, D/2),
(1, D/2 + 1), ... The rows of the query and key projections are put into that order; scores, their dot products, do not
change. Source: transformers, ``models/llama/convert_llama_weights_to_hf.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pico_fast.config import ModelConfig

# Pico's name to Llama's; "{}" is the layer.
LLAMA_NAMES = {
    "embedding_proj.weight": "model.embed_tokens.weight",
    "layers.{}.attention.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.o_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.swiglu.w_0.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.swiglu.w_1.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.swiglu.w_2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.swiglu_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "output_norm.weight": "model.norm.weight",
    "de_embedding_proj.weight": "lm_head.weight",
}


def half_split_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection (heads * head_dim, d), interleaved pairs reordered to half-split ones."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_llama_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a Pico decoder as a state of transformers' ``LlamaForCausalLM``.

    ``state`` has the decoder's own names; tensors keep dtype and device and, but for the query and key projections,
    share memory with it. Raises KeyError for a name that is not a Pico decoder's.
    """
    llama = {}
    for name, tensor in state.items():
        pattern = re.sub(r"^layers\.\d+\.", "layers.{}.", name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = half_split_rows(tensor, config.head_dim)
        llama[LLAMA_NAMES[pattern].format(*re.findall(r"^layers\.(\d+)\.", name))] = tensor
    return llama


def llama_config_dict(config: ModelConfig) -> dict[str, Any]:
    """The same shape as keyword arguments of transformers' ``LlamaConfig``, or as a ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.activation_hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.attention_n_heads,
        "num_key_value_heads": config.attention_n_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.position_emb_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
