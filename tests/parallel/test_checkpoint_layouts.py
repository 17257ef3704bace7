"""A state saved under one layout loads under every other, bit for bit; torch's own reader agrees; exports are equal."""

import dataclasses
import errno
import functools
import hashlib
import itertools
import os
import random
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pico_kernels import KernelSet
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from pico_fast.checkpoint import verify
from pico_fast.checkpoint.errors import CheckpointError, NoGoodCheckpointError
from pico_fast.checkpoint.filesystem import FileSystem
from pico_fast.checkpoint.integrity import verify_step
from pico_fast.checkpoint.layout import RunLayout, rank_file
from pico_fast.checkpoint.legacy import pico_parameter_names
from pico_fast.checkpoint.load import latest_good
from pico_fast.checkpoint.manifest import Manifest
from pico_fast.checkpoint.retention import prune
from pico_fast.checkpoint.save import save_checkpoint
from pico_fast.checkpoint.state import StateMismatchError, load_state_tensors, state_slices, state_tensors
from pico_fast.config import CheckpointingConfig, ModelConfig
from pico_fast.interop.huggingface import export_model
from pico_fast.model.decoder import PicoDecoder
from pico_fast.model.sharding import tensor_parallel_dim
from pico_fast.parallel.layout import Layout
from pico_fast.parallel.mesh import DIMENSIONS, SINGLE, Axis, Parallel
from pico_fast.parallel.slices import gather_full, is_dtensor
from tests.ranks import RankFailedError, every_layout, run_ranks

pytestmark = pytest.mark.distributed

# vocab_size 5: three ways FSDP cuts unevenly, and of four shards one is empty
TINY = ModelConfig(
    d_model=16,
    n_layers=1,
    vocab_size=5,
    max_seq_len=8,
    attention_n_heads=4,
    attention_n_kv_heads=2,
    activation_hidden_dim=12,
)
LAYOUTS = {str(layout): layout for world_size in (2, 4) for layout in every_layout(world_size)}
ONE = str(Layout())
SAVED = [ONE, *LAYOUTS]
STEP = 3


def decoder() -> PicoDecoder:
    return PicoDecoder(TINY, KernelSet.from_config({"default": "reference"}))


@functools.cache
def truth() -> dict[str, torch.Tensor]:
    """A whole state of random bits: every tensor of its own, the same in every process."""
    tensors = {}
    for name, parameter in decoder().named_parameters():
        for key in ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{key}/{name}".encode()))
            tensors[f"{key}/{name}"] = torch.randn(parameter.shape, generator=generator).abs()
        tensors[f"optimizer/step/{name}"] = torch.tensor(float(STEP))
    return tensors


class Training:
    """A decoder and its optimizer under one layout, with one step behind them and nothing but NaN in their tensors."""

    def __init__(self, parallel: Parallel):
        self.parallel = parallel
        self.model = decoder()
        if parallel.tp.size > 1:
            for name, parameter in list(self.model.named_parameters()):
                dim = tensor_parallel_dim(name)
                if dim is not None:
                    mine = parameter.detach().chunk(parallel.tp.size, dim)[parallel.tp.rank].clone()
                    self.model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(mine)
        if parallel.dp_shard.size > 1:
            hybrid = ["dp_replicate"] if parallel.dp_replicate.size > 1 else []
            mesh = parallel.mesh[(*hybrid, "dp_shard")]
            for block in self.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.step()
        for tensor in state_tensors(self.model, self.optimizer).values():
            tensor.detach().fill_(torch.nan)

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self) -> None:
        """A forward pass without a backward one, after which FSDP's outer weights stand whole in their places."""
        if self.parallel.tp.size == 1:  # here the weights are cut, but the decoder does not know
            with torch.no_grad():
                self.model(torch.zeros(1, TINY.max_seq_len, dtype=torch.int64))
            shards = sum(is_dtensor(parameter) for parameter in self.model.parameters())
            assert (shards < len(list(self.model.parameters()))) or self.parallel.dp_shard.size == 1

    def load(self, root: Path) -> list[str]:
        """Load the newest state of a run; returns the names of what is then not exactly the truth."""
        step, state, _ = latest_good(RunLayout(root), self.parallel)
        assert step == STEP
        load_state_tensors(self.model, self.optimizer, state.tensors, self.parallel)
        return self.wrong()

    def wrong(self) -> list[str]:
        """Names of the tensors that, put together from all ranks without our own code, are not the truth."""
        found = {}
        for name, parameter in self.model.named_parameters():
            found[f"model/{name}"] = self.whole(name, parameter)
            for key, value in self.optimizer.state[parameter].items():
                found[f"optimizer/{key}/{name}"] = value if key == "step" else self.whole(name, value)
        assert found.keys() == truth().keys()
        return [name for name, tensor in truth().items() if not torch.equal(found[name], tensor)]

    def whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().full_tensor() if is_dtensor(tensor) else tensor.detach()
        dim = tensor_parallel_dim(name)
        if self.parallel.tp.size == 1 or dim is None:
            return tensor
        pieces = [torch.empty_like(tensor) for _ in range(self.parallel.tp.size)]
        dist.all_gather(pieces, tensor.contiguous(), group=self.parallel.tp.group)
        return torch.cat(pieces, dim)

    def save(self, root: Path, step: int = STEP, fs: FileSystem | None = None) -> None:
        full = gather_full(self.model, self.parallel)
        assert (full is None) == (self.parallel.rank != 0)
        save_checkpoint(
            RunLayout(root),
            step,
            tensors=state_tensors(self.model, self.optimizer),
            slices=state_slices(self.model, self.optimizer, self.parallel),
            meta={"rank": self.parallel.rank},
            write_extra=lambda folder: export_model(folder, full, TINY),
            parallel=self.parallel,
            fs=fs,
        )


def parallel_of(layout: Layout) -> Parallel | None:
    """The mesh of ``layout`` over the first ranks of this world; None on the ranks left out, which call it too."""
    sizes = dataclasses.asdict(layout)
    ranks = torch.arange(layout.world_size).view(*(sizes[name] for name in DIMENSIONS))
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=DIMENSIONS)
    hosts = dist.new_group(list(range(layout.world_size)), backend="gloo")
    if dist.get_rank() >= layout.world_size:
        return None
    axes = {
        name: Axis(size, mesh.get_local_rank(name), mesh.get_group(name) if size > 1 else None)
        for name, size in sizes.items()
    }
    return Parallel(dist.get_rank(), layout.world_size, **axes, mesh=mesh, hosts=hosts)


def save_and_load_everywhere(root: Path) -> dict[str, list[str]]:
    """In each of 4 processes: save under every layout, load everything everywhere; what came out wrong, by case."""
    dist.init_process_group("gloo")
    training = {
        name: parallel and Training(parallel)
        for name, parallel in ((name, parallel_of(layout)) for name, layout in LAYOUTS.items())
    }
    here = {name: case for name, case in training.items() if case is not None}
    wrong = {}
    for name, case in here.items():
        load_state_tensors(case.model, case.optimizer, truth(), case.parallel)
        wrong[f"{name} from memory"] = case.wrong()
        case.evaluate()
        case.save(root / name)
    dist.barrier()
    for (name, case), saved in itertools.product(here.items(), [*SAVED, "pico-train"]):
        for tensor in state_tensors(case.model, case.optimizer).values():
            tensor.detach().fill_(torch.nan)
        wrong[f"{saved} into {name}"] = case.load(root / saved)
    for name, case in here.items():
        case.step()  # the moments are such as the optimizer goes on with
        steps = {float(state["step"]) for state in case.optimizer.state.values()}
        finite = all(tensor.isfinite().all() for tensor in state_tensors(case.model, case.optimizer).values())
        wrong[f"{name} goes on"] = [] if finite and steps == {STEP + 1} else [str(steps)]
    return wrong


def write_pico_trains_state(root: Path) -> None:
    """The truth as pico-train's checkpoint.pt."""
    names = pico_parameter_names(TINY.n_layers)
    keys = ("step", "exp_avg", "exp_avg_sq")
    state = {number: {key: truth()[f"optimizer/{key}/{name}"] for key in keys} for number, name in enumerate(names)}
    path = RunLayout(root).fabric_state(STEP)
    path.parent.mkdir(parents=True)
    content = {
        "_model": {name: truth()[f"model/{name}"] for name in names},
        "_optimizer": {"state": state, "param_groups": [{"params": list(range(len(names)))}]},
        "_lr_scheduler": {},
        "_checkpoint_step": STEP,
        "_rng_states": {"python": random.getstate(), "numpy": np.random.get_state()},  # noqa: NPY002
    }
    torch.save(content, path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """The truth saved under every layout, below one folder, and what any load got wrong, by case."""
    root = tmp_path_factory.mktemp("layouts")
    alone = Training(SINGLE)
    load_state_tensors(alone.model, alone.optimizer, truth())
    alone.save(root / ONE)
    write_pico_trains_state(root / "pico-train")
    wrong: dict[str, list[str]] = {}
    for rank, found in enumerate(run_ranks(save_and_load_everywhere, 4, root, timeout=300)):
        wrong |= {f"rank {rank}: {case}": names for case, names in found.items()}
    for name in [*SAVED, "pico-train"]:
        wrong[f"{name} into {ONE}"] = Training(SINGLE).load(root / name)
    return root, wrong


def test_every_layout_loads_every_other_bit_for_bit(saved):
    _, wrong = saved
    pairs = len(SAVED) + 1
    ranks = sum(layout.world_size for layout in LAYOUTS.values())
    assert len(wrong) == ranks * (pairs + 2) + pairs
    assert {case: names for case, names in wrong.items() if names} == {}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", SAVED)
def test_torchs_reader_reads_the_state_whole(saved, name):
    folder = RunLayout(saved[0] / name).state_dir(STEP)
    reader = HuggingFaceStorageReader(str(folder))
    assert set(reader.read_metadata().state_dict_metadata) == set(truth())
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in truth().items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    assert [name for name, tensor in truth().items() if not torch.equal(tensors[name], tensor)] == []


def test_the_export_is_the_same_bytes_from_every_layout(saved):
    for file in ("model.safetensors", "config.json", "pico_decoder.py"):
        hashes = {
            name: hashlib.sha256((RunLayout(saved[0] / name).step_dir(STEP) / file).read_bytes()).hexdigest()
            for name in SAVED
        }
        assert len(set(hashes.values())) == 1, hashes


@pytest.mark.parametrize("name", SAVED)
def test_each_part_is_written_once(saved, name):
    """Copies along dp_replicate write nothing; the bytes of the state are those of the model and its moments."""
    sizes = LAYOUTS.get(name, Layout())
    layout = RunLayout(saved[0] / name)
    manifest = Manifest.from_bytes(layout.manifest(STEP).read_bytes())
    assert {entry.file for entry in manifest.tensors} == {p.name for p in layout.state_dir(STEP).glob("*.safetensors")}
    assert len({entry.file for entry in manifest.tensors}) == sizes.dp_shard * sizes.tp
    assert sum(torch.Size(entry.shape).numel() for entry in manifest.tensors) == sum(
        tensor.numel() for tensor in truth().values()
    )
    assert manifest.world_size == sizes.world_size
    assert manifest.meta == {"rank": 0}


def test_data_parallel_copies_save_the_bytes_of_one_process(saved):
    one, *copies = (
        RunLayout(saved[0] / str(Layout(dp_replicate=count))).state_dir(STEP) / rank_file(0) for count in (1, 2, 4)
    )
    assert {copy.read_bytes() for copy in copies} == {one.read_bytes()}


def test_the_verify_command_reads_every_ranks_file(saved, tmp_path, capsys):
    for name in SAVED:
        assert verify.main([str(saved[0] / name)]) == 0
        assert f"step_{STEP}  good" in capsys.readouterr().out
    layout = RunLayout(tmp_path / "run")
    for file in range(4):
        shutil.copytree(saved[0] / str(Layout(tp=2, dp_shard=2)), layout.root, symlinks=True)
        path = layout.state_dir(STEP) / rank_file(file)
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        assert verify.main([str(layout.root)]) == 1
        assert f"BAD  state/{path.name}" in capsys.readouterr().out
        with pytest.raises(NoGoodCheckpointError, match=path.name):
            latest_good(layout)
        shutil.rmtree(layout.root)


class Broken(FileSystem):
    """Its second write fails, or ends the process."""

    def __init__(self, kill: bool = False):
        self.kill, self.writes = kill, 0

    def write(self, fd, data):
        self.writes += 1
        if self.writes == 2:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fd, data)


def two_ranks_in_trouble(root: Path) -> None:
    """In each of 2 processes: saves and loads in which a rank fails, errors into a file; then rank 1 dies in a save."""
    dist.init_process_group("gloo")
    parallel = parallel_of(Layout(tp=2))
    case = Training(parallel)
    load_state_tensors(case.model, case.optimizer, truth(), parallel)
    case.save(root / "run", 1)
    errors = {}

    def note(name: str, call) -> None:
        try:
            call()
        except (CheckpointError, StateMismatchError) as error:
            errors[name] = (type(error).__name__, str(error), getattr(error, "errno", None))

    for rank in (0, 1):
        fs = Broken() if parallel.rank == rank else None
        note(f"rank {rank} has no space", functools.partial(case.save, root / "run", 2, fs))
    case.save(root / "run", 2)
    elsewhere = root / "run" if parallel.rank == 0 else root / "other-node" / "run"
    note("not shared", lambda: latest_good(RunLayout(elsewhere), parallel))
    if parallel.rank == 0:
        assert prune(RunLayout(root / "run"), CheckpointingConfig(keep_last=1)) == [1]
    smaller = {name: tensor for name, tensor in truth().items() if not name.endswith("exp_avg/output_norm.weight")}
    note("mismatch", lambda: load_state_tensors(case.model, case.optimizer, smaller, parallel))
    if parallel.rank == 0:
        damaged = RunLayout(root / "run").state_dir(2) / rank_file(1)
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-1])
    note("damaged", lambda: latest_good(RunLayout(root / "run"), parallel))
    if parallel.rank == 0:
        damaged.write_bytes(whole)
    dist.barrier()
    (root / f"errors-{parallel.rank}").write_text(repr(errors))
    try:
        case.save(root / "run", 3, Broken(kill=True) if parallel.rank == 1 else None)
    except RuntimeError as error:  # gloo's: the connection is gone
        (root / "survivor").write_text(str(error))


def test_all_ranks_learn_of_one_ranks_trouble(tmp_path):
    with pytest.raises(RankFailedError, match="died with exit code -9"):
        run_ranks(two_ranks_in_trouble, 2, tmp_path)
    errors = eval((tmp_path / "errors-0").read_text())
    assert errors == eval((tmp_path / "errors-1").read_text())
    expected = {
        "rank 0 has no space": ("CheckpointError", r"rank_00000.safetensors: rank 0: No space left", errno.ENOSPC),
        "rank 1 has no space": ("CheckpointError", r"rank_00001.safetensors: rank 1: No space left", errno.ENOSPC),
        "not shared": ("CheckpointError", "rank 1: step_2, which rank 0 verified, cannot be read", errno.ENOENT),
        "mismatch": ("StateMismatchError", "exp_avg/output_norm.weight: not in the checkpoint", None),
        "damaged": ("NoGoodCheckpointError", "state/rank_00001.safetensors has", None),
    }
    assert set(errors) == set(expected)
    for name, (kind, text, number) in expected.items():
        found_kind, message, found_number = errors[name]
        assert (found_kind, found_number) == (kind, number), name
        assert text in message
    for name in ("rank 0 has no space", "rank 1 has no space"):
        assert "step_2 was not saved" in errors[name][1]
        assert "step_1 is still the latest checkpoint" in errors[name][1]
    assert (tmp_path / "survivor").exists()
    layout = RunLayout(tmp_path / "run")
    assert layout.steps() == [2]
    assert verify_step(layout, 2).good
    assert latest_good(layout)[0] == 2
