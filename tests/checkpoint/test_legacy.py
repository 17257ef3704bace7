"""pico-train's checkpoint.pt, made here as Lightning Fabric makes it."""

import os
import random
import zipfile
from functools import partial

import numpy as np
import pytest
import torch

from pico_fast.checkpoint import verify
from pico_fast.checkpoint.errors import CheckpointError, NoGoodCheckpointError
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.checkpoint.legacy import load_legacy, pico_parameter_names
from pico_fast.checkpoint.load import latest_good
from pico_fast.checkpoint.rng import set_rng_state
from pico_fast.checkpoint.save import save_checkpoint
from pico_fast.checkpoint.state import load_state_tensors, state_tensors


class Block(torch.nn.Module):
    """Construction order as pico-train's PicoDecoderBlock; k and v have one shape: only the order tells which."""

    def __init__(self):
        super().__init__()
        shapes = {"q_proj": (4, 4), "k_proj": (4, 2), "v_proj": (4, 2), "o_proj": (4, 4)}
        self.attention = torch.nn.ModuleDict(
            {name: torch.nn.Linear(*shape, bias=False) for name, shape in shapes.items()}
        )
        shapes = {"w_0": (4, 6), "w_1": (4, 6), "w_2": (6, 4)}
        self.swiglu = torch.nn.ModuleDict({name: torch.nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
        self.attention_norm = torch.nn.RMSNorm(4)
        self.swiglu_norm = torch.nn.RMSNorm(4)


class Decoder(torch.nn.Module):
    def __init__(self, n_layers: int = 12, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding_proj = torch.nn.Embedding(9, 4)
        self.layers = torch.nn.ModuleList([Block() for _ in range(n_layers)])
        self.output_norm = torch.nn.RMSNorm(4)
        self.de_embedding_proj = torch.nn.Linear(4, 9, bias=False)


class Reordered(torch.nn.Module):
    """The same names in another order of construction."""

    def __init__(self):
        super().__init__()
        source = Decoder(1, seed=5)
        self.output_norm = source.output_norm
        self.layers = source.layers
        self.embedding_proj = source.embedding_proj
        self.de_embedding_proj = source.de_embedding_proj


def train(model, optimizer, steps) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def fabric_content(model, optimizer, step) -> dict:
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    return {
        "_model": model.state_dict(),
        "_optimizer": optimizer.state_dict(),
        "_lr_scheduler": warm_up.state_dict(),
        "_checkpoint_step": step,
        "_rng_states": {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state(),  # noqa: NPY002
            "torch.cuda": [],
        },
    }


@pytest.fixture
def pico(tmp_path):
    """A run with pico-train's state at step 3, and the model and optimizer that it came from."""
    layout = RunLayout(tmp_path / "run")
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 3)
    layout.fabric_state(3).parent.mkdir(parents=True)
    torch.save(fabric_content(model, optimizer, 3), layout.fabric_state(3))
    return layout, model, optimizer


def rewritten(layout: RunLayout, change) -> None:
    path = layout.fabric_state(3)
    content = torch.load(path, weights_only=False)
    torch.save(change(content) or content, path)


def test_the_order_of_construction():
    assert pico_parameter_names(12) == [name for name, _ in Decoder().named_parameters()]
    assert len(pico_parameter_names(12)) == 111


def test_an_old_run_resumes_exactly(pico):
    layout, model, optimizer = pico
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    torch.save(fabric_content(model, optimizer, 3), layout.fabric_state(3))
    expected_draws = [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002
    step, state, rejected = latest_good(layout)
    assert (step, state.source, rejected, state.meta["step"]) == (3, "pico-train", [], 3)
    other = Decoder(seed=1)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, fused=True)
    load_state_tensors(other, other_optimizer, state.tensors)
    expected, found = state_tensors(model, optimizer), state_tensors(other, other_optimizer)
    assert set(expected) == set(found)
    assert len(expected) == 111 * 4
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    set_rng_state(state.meta["rng"])
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == expected_draws  # noqa: NPY002
    assert state.meta["lr_scheduler"]["base_lrs"] == [1e-3]
    assert state.meta["param_groups"][0]["weight_decay"] == 0.01


def test_before_the_first_step(pico):
    layout, model, _ = pico
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save(fabric_content(model, optimizer, 3), layout.fabric_state(3))
    assert set(latest_good(layout)[1].tensors) == {f"model/{name}" for name in pico_parameter_names(12)}


def test_files_written_under_numpy_1(pico):
    layout, _, _ = pico
    path = layout.fabric_state(3)
    with zipfile.ZipFile(path) as archive:
        entries = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for info, data in entries:
            other = (b"numpy._core.multiarray", b"numpy.core.multiarray")
            if info.filename.endswith("data.pkl"):
                data = data.replace(*other) if other[0] in data else data.replace(*reversed(other))
            archive.writestr(info.filename, data)
    assert latest_good(layout)[0] == 3


def test_our_own_state_wins_and_pico_is_the_fallback(pico):
    layout, model, optimizer = pico
    save_checkpoint(layout, 5, tensors=state_tensors(model, optimizer), meta={})
    assert latest_good(layout)[1].source == "pico-fast"
    layout.manifest(5).unlink()
    step, state, rejected = latest_good(layout)
    assert (step, state.source) == (3, "pico-train")
    assert rejected == [(5, "state/manifest.json is missing")]


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("thing", [Evil(), partial(print), Block])
def test_any_other_object_is_refused(pico, thing, monkeypatch):
    layout, _, _ = pico
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    path = layout.fabric_state(3)
    content = fabric_content(*pico[1:], 3)
    torch.save({**content, "_extra": thing}, path)
    with pytest.raises(CheckpointError, match=r"refused, because it holds an object of \S+ that pico-train"):
        load_legacy(layout, 3)
    assert ran == []


def test_a_flipped_bit_is_found(pico):
    layout, _, _ = pico
    path = layout.fabric_state(3)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        records = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size > 40]
    for info in random.Random(0).sample(records, 10):
        name_length, extra_length = (
            int.from_bytes(content[info.header_offset + i : info.header_offset + i + 2], "little") for i in (26, 28)
        )
        position = info.header_offset + 30 + name_length + extra_length + 20
        content[position] ^= 1
        path.write_bytes(content)
        with pytest.raises(NoGoodCheckpointError, match=r"checksum of .*/data/"):
            latest_good(layout)
        content[position] ^= 1
    path.write_bytes(content)
    assert latest_good(layout)[0] == 3


@pytest.mark.parametrize("end", [0, 1, 100, -1, -100])
def test_a_truncated_file_is_named(pico, end):
    layout, _, _ = pico
    path = layout.fabric_state(3)
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: damaged or not written by torch.save"):
        load_legacy(layout, 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content.pop("_optimizer") and None, "_optimizer missing"),
        (lambda content: content.update(_checkpoint_step=4), "belongs to step 4, not 3"),
        (lambda content: content["_model"].popitem() and None, "not those of a Pico decoder"),
        (lambda content: content["_optimizer"]["param_groups"][0]["params"].pop() and None, "optimizer numbers 110"),
        (
            lambda content: content["_optimizer"]["state"][5].update(exp_avg=torch.zeros(3)),
            r"'exp_avg' number 5 has shape \(3,\)",
        ),
        (lambda content: [content], "not a pico-train checkpoint but list"),
        (lambda content: content.update(_lr_scheduler=3), "checkpoint.pt: "),
        (lambda content: content.update(_model={"w": torch.zeros(3)}), "not those of a Pico decoder"),
    ],
)
def test_what_does_not_fit_is_named(pico, change, named):
    layout, _, _ = pico
    rewritten(layout, change)
    with pytest.raises(CheckpointError, match=named):
        load_legacy(layout, 3)


def test_another_order_of_parameters_is_refused(tmp_path):
    layout = RunLayout(tmp_path)
    model = Reordered()
    layout.fabric_state(3).parent.mkdir(parents=True)
    torch.save(fabric_content(model, torch.optim.AdamW(model.parameters()), 3), layout.fabric_state(3))
    with pytest.raises(CheckpointError, match="in pico-train's order"):
        load_legacy(layout, 3)


def test_a_deepspeed_state_is_named(tmp_path):
    layout = RunLayout(tmp_path)
    (layout.fabric_state(3).parent / "checkpoint").mkdir(parents=True)
    with pytest.raises(NoGoodCheckpointError, match="DeepSpeed"):
        latest_good(layout)


def test_the_verify_command_reads_it(pico, capsys):
    layout, _, _ = pico
    assert verify.main([str(layout.root)]) == 0
    assert capsys.readouterr().out == "step_3  good  pico-train state, CRC-32 only\n"
    layout.fabric_state(3).write_bytes(b"x")
    assert verify.main([str(layout.root)]) == 1
    assert "step_3  BAD" in capsys.readouterr().out
