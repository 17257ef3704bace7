"""Names and row order of Llama's layout; that the networks are equal is shown in test_pico_decoder."""

import pytest
import torch

from pico_fast.config import ModelConfig
from pico_fast.interop.llama import half_split_rows, llama_config_dict, to_llama_state


def test_rows_of_each_head_are_reordered():
    weight = torch.arange(12)[:, None].repeat(1, 2)  # two heads of width 6
    assert half_split_rows(weight, 6)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_only_queries_and_keys_are_changed():
    config = ModelConfig(d_model=8, attention_n_heads=2, attention_n_kv_heads=1)
    state = {f"layers.13.attention.{name}_proj.weight": torch.randn(8, 8) for name in "qkvo"}
    llama = to_llama_state(state, config)
    for name in "vo":
        assert (
            llama[f"model.layers.13.self_attn.{name}_proj.weight"] is state[f"layers.13.attention.{name}_proj.weight"]
        )
    for name in "qk":
        expected = half_split_rows(state[f"layers.13.attention.{name}_proj.weight"], 4)
        assert torch.equal(llama[f"model.layers.13.self_attn.{name}_proj.weight"], expected)


def test_an_unknown_name_is_refused():
    with pytest.raises(KeyError, match="rotary"):
        to_llama_state({"layers.0.rotary.weight": torch.ones(1)}, ModelConfig())


def test_the_configuration_is_a_llamas():
    from transformers import LlamaConfig

    config = LlamaConfig(**llama_config_dict(ModelConfig(position_emb_theta=777.0)))
    assert (config.hidden_size, config.num_key_value_heads, config.head_dim) == (768, 4, 64)
    rope = getattr(config, "rope_parameters", None) or vars(config)  # transformers 5, 4
    assert rope["rope_theta"] == 777.0
    assert not config.tie_word_embeddings
