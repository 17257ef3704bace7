"""Any slice is read from any slicing, and nothing else is; states of earlier versions stay readable."""

import itertools
import json
import random
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pico_fast.checkpoint.errors import CheckpointError
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.checkpoint.load import latest_good
from pico_fast.checkpoint.manifest import TensorEntry
from pico_fast.checkpoint.save import save_checkpoint
from pico_fast.checkpoint.state import load_state_tensors, state_slices, state_tensors
from pico_fast.checkpoint.stored import SlicedTensors, WholeTensors, tiling_problem
from pico_fast.checkpoint.tensorfile import file_bytes, write_tensors
from pico_fast.model.sharding import tensor_parallel_dim
from pico_fast.parallel.mesh import Axis, Parallel
from pico_fast.parallel.slices import Slice

VERSION_1 = Path(__file__).parents[1] / "data" / "state_version_1" / "step_3"


def cuts_of(length: int, chance: random.Random) -> list[tuple[int, int]]:
    """``length`` in random pieces: (start, length) of each."""
    stops = sorted(chance.sample(range(1, length), chance.randrange(min(3, length)))) if length else []
    return [(start, stop - start) for start, stop in itertools.pairwise([0, *stops, length])]


def saved_in_pieces(
    folder: Path, tensors: dict[str, torch.Tensor], chance: random.Random
) -> tuple[list[TensorEntry], int]:
    """Cut each tensor into a random grid and write the pieces into as many files as the largest grid needs."""
    files: list[tuple[dict[str, torch.Tensor], dict[str, Slice]]] = []
    for name, tensor in tensors.items():
        for number, cell in enumerate(itertools.product(*(cuts_of(length, chance) for length in tensor.shape))):
            part = Slice(tuple(tensor.shape), tuple(start for start, _ in cell), tuple(length for _, length in cell))
            if number == len(files):
                files.append(({}, {}))
            files[number][0][name] = tensor[Slice.whole(tensor.shape).index(part)]
            files[number][1][name] = part
    entries = []
    for rank, (pieces, slices) in enumerate(files):
        path = folder / f"rank_{rank:05d}.safetensors"
        with open(path, "wb") as file:
            entries += write_tensors(pieces, slices, path.name, lambda data, file=file: file.write(bytes(data)))
        assert path.stat().st_size == file_bytes(pieces, slices)
        assert load_file(path).keys() == pieces.keys()
    return entries, len(files)


@pytest.mark.parametrize("seed", range(10))
def test_any_slice_of_any_slicing(tmp_path, seed):
    chance = random.Random(seed)
    tensors = {
        "a": torch.randn(7, 5),
        "b": torch.randn(11).bfloat16(),
        "c": torch.randint(0, 9, (3, 4, 5)),
        "d": torch.tensor(2.5),
        "e": torch.zeros(0, 3),
    }
    entries, files = saved_in_pieces(tmp_path, tensors, chance)
    assert files > 1
    stored = SlicedTensors(tmp_path, entries, check=True)
    whole = WholeTensors(tensors)
    assert set(stored) == set(tensors)
    for name, tensor in tensors.items():
        assert stored.kind(name) == whole.kind(name) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(stored[name], tensor)
        for _ in range(20):
            offset = tuple(chance.randint(0, length) for length in tensor.shape)
            shape = tuple(chance.randint(0, n - start) for n, start in zip(tensor.shape, offset, strict=True))
            part = Slice(tuple(tensor.shape), offset, shape)
            expected = tensor[Slice.whole(tensor.shape).index(part)]
            assert torch.equal(stored.read(name, part), expected)
            assert torch.equal(whole.read(name, part), expected)


def test_a_file_of_slices_says_where_each_begins_and_a_whole_one_needs_not(tmp_path):
    tensors = {"model/w": torch.ones(2, 3), "optimizer/step/w": torch.tensor(1.0)}
    for name, slices, expected in (
        ("whole", {"model/w": Slice.whole((2, 3))}, {"format": "pt"}),
        (
            "cut",
            {"model/w": Slice((4, 3), (2, 0), (2, 3))},
            {
                "format": "pt",
                "DCP_VERSION": "1.0",
                "DCP_SHARDING_INFO": {"model/w": {"saved_offsets": [2, 0]}, "optimizer/step/w": {"saved_offsets": []}},
            },
        ),
    ):
        with open(tmp_path / name, "wb") as file:
            write_tensors(tensors, slices, name, lambda data, file=file: file.write(bytes(data)))
        with safe_open(tmp_path / name, "pt") as file:
            metadata = file.metadata()
        if "DCP_SHARDING_INFO" in metadata:
            metadata["DCP_SHARDING_INFO"] = json.loads(metadata["DCP_SHARDING_INFO"])
        assert metadata == expected


def test_torch_still_looks_for_these_keys():
    from torch.distributed.checkpoint import _hf_utils

    from pico_fast.checkpoint import tensorfile

    assert tensorfile.SLICES_KEY == _hf_utils.CUSTOM_METADATA_KEY
    assert {_hf_utils.DCP_VERSION_KEY: str(_hf_utils.HF_DCP_VERSION)} == tensorfile.SLICES_VERSION
    assert _hf_utils.SAVED_OFFSETS_KEY == "saved_offsets"


def entry(name="w", dtype="F32", shape=(2,), global_shape=(4,), offset=(0,)) -> TensorEntry:
    return TensorEntry(name, "f", dtype, list(shape), list(global_shape), list(offset), "0" * 32)


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([entry(), entry(offset=(2,))], None),
        ([entry(offset=(2,)), entry()], None),
        ([entry(shape=(), global_shape=(), offset=())], None),
        ([entry(shape=(0, 3), global_shape=(0, 3), offset=(0, 0))], None),
        ([entry()], "its 1 slices do not make up the whole of"),
        ([entry(), entry(offset=(1,))], "its 2 slices do not make up"),
        ([entry(), entry(), entry(offset=(2,))], "its 3 slices do not make up"),
        ([entry(), entry(offset=(3,))], "its 2 slices do not make up"),
        ([entry(), entry(offset=(2,), shape=(3,))], "its 2 slices do not make up"),
        ([entry(), entry(offset=(2,), dtype="F16")], "disagree"),
        ([entry(), entry(offset=(2,), global_shape=(5,))], "disagree"),
        ([entry(shape=(2, 2))], "has not the dimensions"),
        ([entry(dtype="F8", shape=(4,))], "do not make up"),
    ],
)
def test_each_element_once(entries, problem):
    found = tiling_problem(entries)
    assert found is None if problem is None else problem in found


def test_what_is_not_the_manifests_is_refused(tmp_path):
    entries, _ = saved_in_pieces(tmp_path, {"a": torch.randn(7, 5)}, random.Random(0))
    last = tmp_path / entries[-1].file
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    SlicedTensors(tmp_path, entries, check=False)  # rank 0 has compared the checksums; the others need not
    with pytest.raises(CheckpointError, match=r"'a' has another checksum") as caught:
        SlicedTensors(tmp_path, entries, check=True)
    assert caught.value.path == last
    last.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        SlicedTensors(tmp_path, entries, check=False)
    last.unlink()
    with pytest.raises(CheckpointError, match=r"No such file or directory \(ENOENT\)"):
        SlicedTensors(tmp_path, entries, check=False)


class Allocations(TorchDispatchMode):
    """The bytes of memory that tensors take within: at most at one time, and by the largest of them."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                size = tensor.untyped_storage().nbytes()
                self.now += size
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
                weakref.finalize(tensor.untyped_storage(), self._freed, size)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


NAMES = {"layers.0.attention.q_proj.weight": (400, 30), "layers.0.swiglu.w_2.weight": (30, 400)}


class Block(torch.nn.Module):
    """Two projections with names of the sharding table, cut for one of ``size`` tensor-parallel ranks."""

    def __init__(self, size: int = 1):
        super().__init__()
        for name, shape in NAMES.items():
            shape = tuple(n // size if dim == tensor_parallel_dim(name) else n for dim, n in enumerate(shape))
            parent: torch.nn.Module = self
            for part in name.split(".")[:-1]:
                if not hasattr(parent, part):
                    setattr(parent, part, torch.nn.Module())
                parent = getattr(parent, part)
            parent.weight = torch.nn.Parameter(torch.randn(shape))


def trained(size: int = 1) -> tuple[Block, torch.optim.AdamW]:
    model = Block(size)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def test_a_rank_takes_no_more_memory_than_its_own_part(tmp_path):
    model, optimizer = trained()
    layout = RunLayout(tmp_path)
    save_checkpoint(layout, 1, tensors=state_tensors(model, optimizer), slices=state_slices(model, optimizer), meta={})
    whole = {name: tensor.clone() for name, tensor in state_tensors(model, optimizer).items()}
    parallel = Parallel(1, 4, tp=Axis(4, 1))
    mine = Block(4)
    fresh = torch.optim.AdamW(mine.parameters(), fused=True)
    _, state, _ = latest_good(layout)
    with Allocations() as allocations:
        load_state_tensors(mine, fresh, state.tensors, parallel)
    part = sum(parameter.nbytes for parameter in mine.parameters())
    assert 2 * part <= allocations.peak <= 2 * part + 100  # the moments, and a few counters of steps
    assert allocations.largest == max(parameter.nbytes for parameter in mine.parameters())
    for name, tensor in state_tensors(mine, fresh).items():
        dim = None if tensor.ndim == 0 else tensor_parallel_dim(name.split("/")[-1])
        expected = whole[name] if dim is None else whole[name].chunk(4, dim)[1]
        assert torch.equal(tensor, expected)
    with Allocations() as allocations:
        save_checkpoint(RunLayout(tmp_path / "other"), 1, tensors=state_tensors(mine, fresh), meta={})
    assert allocations.peak == 0  # contiguous tensors on the CPU are written from where they lie


def test_a_state_of_version_1(tmp_path):
    layout = RunLayout(tmp_path)
    shutil.copytree(VERSION_1, layout.step_dir(3))
    step, state, rejected = latest_good(layout)
    assert (step, rejected, state.warnings) == (3, [], [])
    assert state.meta == {"data_fingerprint": "abc", "loss": 2.5}
    values = torch.arange(1.0, 1000.0).div(7)
    expected, used = {}, 0
    for name, shape in {
        "layers.0.attention.q_proj.weight": (4, 3),
        "layers.0.attention.o_proj.weight": (3, 4),
        "output_norm.weight": (3,),
    }.items():
        for key in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
            count = torch.Size(shape).numel()
            expected[f"{key}/{name}"] = values[used : used + count].view(shape)
            used += count
        expected[f"optimizer/step/{name}"] = torch.tensor(3.0)
    assert set(state.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(state.tensors[name], tensor)
    second_half = Slice((3, 4), (0, 2), (3, 2))  # what the second of two tensor-parallel ranks needs
    name = "model/layers.0.attention.o_proj.weight"
    assert torch.equal(state.tensors.read(name, second_half), expected[name][:, 2:])


def test_one_process_still_writes_version_1_byte_for_byte(tmp_path):
    layout = RunLayout(tmp_path / "old")
    shutil.copytree(VERSION_1, layout.step_dir(3))
    _, state, _ = latest_good(layout)
    again = RunLayout(tmp_path / "new")
    save_checkpoint(again, 3, tensors=dict(state.tensors), meta=state.meta)
    file = "rank_00000.safetensors"
    assert (again.state_dir(3) / file).read_bytes() == (layout.state_dir(3) / file).read_bytes()
    old, new = (json.loads(run.manifest(3).read_text()) for run in (layout, again))
    for body in (old, new):
        del body["files"], body["torch"], body["xxh3_128"]
    assert old == new
