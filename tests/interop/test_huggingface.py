"""Checkpoints in pico-train's Hugging Face format: what is written, and what is read or refused."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pico_fast.config import ModelConfig
from pico_fast.data.tokenizer import load_tokenizer
from pico_fast.interop import pico_decoder
from pico_fast.interop.huggingface import CheckpointFormatError, export_model, import_model

CONFIG = ModelConfig(
    d_model=8,
    n_layers=1,
    vocab_size=11,
    max_seq_len=16,
    attention_n_heads=2,
    attention_n_kv_heads=1,
    activation_hidden_dim=12,
    norm_eps=1e-5,
    position_emb_theta=500.0,
)


def some_state():
    return {
        "embedding_proj.weight": torch.randn(11, 8),
        "layers.0.attention.k_proj.weight": torch.randn(8, 4).t(),  # not contiguous
        "output_norm.weight": torch.randn(8, dtype=torch.bfloat16),
    }


def test_what_is_exported_is_imported(tmp_path):
    state = some_state()
    export_model(tmp_path / "new" / "folder", state, CONFIG)
    config, imported = import_model(tmp_path / "new" / "folder")
    assert config == CONFIG
    assert imported.keys() == state.keys()
    for name, tensor in state.items():
        assert imported[name].dtype == torch.float32
        assert torch.equal(imported[name], tensor.float())


def test_files_are_those_of_pico_train(tmp_path):
    export_model(tmp_path, some_state(), CONFIG)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", "pico_decoder.py"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["PicoDecoderHF"]
    assert config["auto_map"] == {
        "AutoConfig": "pico_decoder.PicoDecoderHFConfig",
        "AutoModel": "pico_decoder.PicoDecoderHF",
        "AutoModelForCausalLM": "pico_decoder.PicoDecoderHF",
    }
    assert config["dtype"] == "float32"
    assert {name: config[name] for name in asdict(CONFIG)} == asdict(CONFIG)
    assert all(name.startswith("pico_decoder.") for name in load_file(tmp_path / "model.safetensors"))
    assert (tmp_path / "pico_decoder.py").read_text() == Path(pico_decoder.__file__).read_text()


def test_the_tokenizer_goes_along(tmp_path, golden):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(str(golden / "tokenizer"))
    export_model(tmp_path, some_state(), CONFIG, tokenizer)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert exported.eos_token_id == tokenizer.eos_id
    assert exported("def f(x):", add_special_tokens=False)["input_ids"] == tokenizer.encode(["def f(x):"])[0]
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_id


def test_pico_trains_own_files_are_imported(tmp_path):
    stored = {
        **asdict(CONFIG),
        "architectures": ["PicoDecoderHF"],
        "auto_map": {"AutoConfig": "pico_decoder.PicoDecoderHFConfig"},
        "torch_dtype": "float32",
        "transformers_version": "4.48.1",
    }
    (tmp_path / "config.json").write_text(json.dumps(stored))
    weight = torch.randn(8)
    save_file({"pico_decoder.output_norm.weight": weight}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config, state = import_model(tmp_path)
    assert config == CONFIG
    assert torch.equal(state["output_norm.weight"], weight)


def test_the_exporter_does_not_import_transformers():
    code = "import sys, pico_fast.interop.huggingface; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_of_the_modeling_file_are_ours():
    defaults = pico_decoder.PicoDecoderHFConfig()
    assert {name: getattr(defaults, name) for name in asdict(ModelConfig())} == asdict(ModelConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "cannot be read as JSON"),
        ([1], "a JSON object expected, list found"),
        ({"d_model": ...}, "d_model missing"),
        ({"d_model": "wide"}, "model.d_model: an integer expected, 'wide' given"),
        ({"n_layers": 0}, "model.n_layers: 0 must be at least 1"),
        ({"attention_n_heads": 3}, "3 heads do not divide model.d_model = 8"),
        ({"model_type": "llama"}, "model.model_type: 'llama' is not one of pico_decoder"),
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path, change, message):
    export_model(tmp_path, some_state(), CONFIG)
    path = tmp_path / "config.json"
    if isinstance(change, dict):
        stored = {**json.loads(path.read_text()), **change}
        path.write_text(json.dumps({name: value for name, value in stored.items() if value is not ...}))
    else:
        path.write_text("{" if change is None else json.dumps(change))
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        import_model(tmp_path)
    assert str(path) in str(caught.value)


def test_wrong_weights_are_refused(tmp_path):
    export_model(tmp_path, some_state(), CONFIG)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointFormatError, match=r"model\.safetensors: cannot be read as safetensors"):
        import_model(tmp_path)
    save_file({"pico_decoder.a": torch.ones(1), "lm_head.weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointFormatError, match=r"named pico_decoder\.\*, 'lm_head.weight' and 0 more do not"):
        import_model(tmp_path)
    save_file({}, path)
    with pytest.raises(CheckpointFormatError, match="there are none"):
        import_model(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointFormatError, match=r"model\.safetensors: cannot be read"):
        import_model(tmp_path)
