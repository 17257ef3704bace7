"""A checkpoint is written whole, read back exactly, and a failed save costs nothing."""

import contextlib
import errno
import os
import resource
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pico_fast.checkpoint.errors import CheckpointError, NoGoodCheckpointError, NoSpaceError
from pico_fast.checkpoint.filesystem import FileSystem
from pico_fast.checkpoint.integrity import verify_step
from pico_fast.checkpoint.layout import RunLayout, rank_file
from pico_fast.checkpoint.load import latest_good
from pico_fast.checkpoint.manifest import Manifest
from pico_fast.checkpoint.save import save_checkpoint


def some_tensors(seed: int = 0, n: int = 1000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/w": torch.randn(n, generator=generator),
        "model/b": torch.randn(4, 3, generator=generator).bfloat16(),
        "optimizer/step/w": torch.tensor(float(seed)),
        "optimizer/exp_avg/w": torch.randn(n, generator=generator),
    }


def export(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "pico_decoder"}')
    save_file({"w": torch.arange(10.0)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("{{ x }}")


def save(layout: RunLayout, step: int, *, seed: int | None = None, n: int = 1000, **options):
    tensors = some_tensors(step if seed is None else seed, n)
    return save_checkpoint(layout, step, tensors=tensors, meta={"step": step, "seed": seed}, **options)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(expected) and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_round_trip(tmp_path):
    layout = RunLayout(tmp_path / "runs" / "r")
    assert latest_good(layout) is None
    report = save(layout, 0)
    assert report.path == layout.step_dir(0)
    assert report.bytes == sum(path.stat().st_size for path in layout.state_dir(0).iterdir())
    save(layout, 10, write_extra=export)
    step, state, rejected = latest_good(layout)
    assert (step, state.step, rejected, state.meta) == (10, 10, [], {"step": 10, "seed": None})
    assert (state.source, state.path, state.warnings) == ("pico-fast", layout.step_dir(10), [])
    assert same(state.tensors, some_tensors(10))
    assert os.readlink(layout.latest) == "step_10"
    assert tree(layout.checkpoints) - tree(layout.checkpoints / "step_0") >= {"latest", "step_0", "step_10"}
    assert tree(layout.step_dir(10)) == {
        "config.json",
        "model.safetensors",
        "templates",
        "templates/chat.jinja",
        "state",
        "state/manifest.json",
        "state/rank_00000.safetensors",
    }
    assert {path.name for path in layout.checkpoints.iterdir()} == {"latest", "step_0", "step_10"}


def test_the_manifest_covers_every_file(tmp_path):
    layout = RunLayout(tmp_path)
    save(layout, 3, write_extra=export)
    manifest = Manifest.from_bytes(layout.manifest(3).read_bytes())
    listed = {entry.path: entry.size for entry in manifest.files}
    files = {
        path.relative_to(layout.step_dir(3)).as_posix(): path.stat().st_size
        for path in layout.step_dir(3).rglob("*")
        if path.is_file() and path != layout.manifest(3)
    }
    assert listed == files
    assert manifest.torch == torch.__version__
    assert {entry.name: (entry.dtype, entry.shape, entry.global_shape, entry.offset) for entry in manifest.tensors} == {
        "model/w": ("F32", [1000], [1000], [0]),
        "model/b": ("BF16", [4, 3], [4, 3], [0, 0]),
        "optimizer/step/w": ("F32", [], [], []),
        "optimizer/exp_avg/w": ("F32", [1000], [1000], [0]),
    }


def test_the_state_file_is_what_the_library_writes(tmp_path):
    layout = RunLayout(tmp_path)
    tensors = {
        "a": torch.arange(12.0).reshape(3, 4).t(),
        "b": torch.zeros(0, 5),
        "c": torch.tensor(7),
        "d": torch.tensor([True, False, True]),
        "e": torch.arange(5, dtype=torch.float16),
        "f": torch.arange(9, dtype=torch.uint8)[::2],
        "g": torch.arange(6, dtype=torch.float64).expand(2, 6),
        "é": torch.arange(3, dtype=torch.int16),
    }
    save_checkpoint(layout, 1, tensors=tensors, meta={})
    path = layout.state_dir(1) / rank_file(0)
    assert same(load_file(path), tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"}
    )
    assert (tmp_path / "theirs").stat().st_size == path.stat().st_size
    assert same(latest_good(layout)[1].tensors, tensors)


def test_the_state_file_is_the_librarys_byte_for_byte(tmp_path):
    layout = RunLayout(tmp_path)
    tensors = {name: tensor.float() for name, tensor in some_tensors().items()}
    save_checkpoint(layout, 1, tensors=tensors, meta={})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (layout.state_dir(1) / rank_file(0)).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_no_tensors_at_all(tmp_path):
    layout = RunLayout(tmp_path)
    save_checkpoint(layout, 1, tensors={}, meta={"a": 1})
    assert latest_good(layout)[1].tensors == {}


def test_an_unknown_dtype_is_refused_before_anything_is_there(tmp_path):
    layout = RunLayout(tmp_path)
    with pytest.raises(CheckpointError, match=r"'model/z': torch\.complex64 cannot be saved"):
        save_checkpoint(layout, 1, tensors={"model/z": torch.zeros(2, dtype=torch.complex64)}, meta={})
    assert list(layout.checkpoints.iterdir()) == []


def test_files_are_readable_as_the_umask_says(tmp_path):
    layout = RunLayout(tmp_path)
    before = os.umask(0o027)
    try:
        save(layout, 1, write_extra=export)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in layout.step_dir(1).rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_a_good_step_is_not_written_again(tmp_path):
    layout = RunLayout(tmp_path)
    save(layout, 5, write_extra=export)
    before = {path: path.stat().st_mtime_ns for path in layout.step_dir(5).rglob("*")}
    os.unlink(layout.latest)  # as if the first save had died right after its commit
    report = save(layout, 5, seed=99, write_extra=export)
    assert report.bytes == 0
    assert {path: path.stat().st_mtime_ns for path in layout.step_dir(5).rglob("*")} == before
    assert same(latest_good(layout)[1].tensors, some_tensors(5))
    assert os.readlink(layout.latest) == "step_5"


@pytest.mark.parametrize("damaged", ["state/rank_00000.safetensors", "state/manifest.json", "model.safetensors"])
def test_a_damaged_step_is_moved_aside_and_written_again(tmp_path, damaged):
    layout = RunLayout(tmp_path)
    for number in range(2):
        save(layout, 5, seed=number, write_extra=export)
        (layout.step_dir(5) / "notes.txt").write_text("mine")
        (layout.learning_dynamics(5)).mkdir(exist_ok=True)
        path = layout.step_dir(5) / damaged
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    save(layout, 5, seed=7, write_extra=export)
    assert same(latest_good(layout)[1].tensors, some_tensors(7))
    assert verify_step(layout, 5).good
    for number in range(2):
        aside = layout.step_dir(5) / f".bad-{number}"
        assert {"config.json", "model.safetensors", "templates/chat.jinja", "state/manifest.json"} <= tree(aside)
        if damaged != "state/rank_00000.safetensors":
            assert same(load_file(aside / "state" / rank_file(0)), some_tensors(number))
    assert (layout.step_dir(5) / "notes.txt").read_text() == "mine"
    assert layout.learning_dynamics(5).is_dir()


def test_files_of_an_old_pico_run_are_not_overwritten(tmp_path):
    layout = RunLayout(tmp_path)
    layout.fabric_state(5).parent.mkdir(parents=True)
    (layout.step_dir(5) / "config.json").write_text("pico's")
    save(layout, 5, write_extra=export)
    assert (layout.step_dir(5) / ".bad-0" / "config.json").read_text() == "pico's"
    assert "pico_decoder" in (layout.step_dir(5) / "config.json").read_text()
    assert layout.fabric_state(5).parent.is_dir()


def test_resume_falls_back_and_says_why(tmp_path):
    layout = RunLayout(tmp_path)
    for step in (1, 2, 3):
        save(layout, step, write_extra=export)
    path = layout.state_dir(3) / rank_file(0)
    path.write_bytes(path.read_bytes()[:-1])
    os.unlink(layout.manifest(2))
    step, state, rejected = latest_good(layout)
    assert step == 1
    assert same(state.tensors, some_tensors(1))
    size = path.stat().st_size
    assert rejected == [
        (3, f"state/rank_00000.safetensors has {size} bytes, {size + 1} were written"),
        (2, "state/manifest.json is missing"),
    ]
    (layout.state_dir(1) / rank_file(0)).unlink()
    with pytest.raises(NoGoodCheckpointError, match=r"none of 3 checkpoint\(s\)") as caught:
        latest_good(layout)
    assert [step for step, _ in caught.value.rejected] == [3, 2, 1]


def test_a_copied_step_is_rejected(tmp_path):
    layout = RunLayout(tmp_path)
    save(layout, 1)
    os.rename(layout.step_dir(1), layout.step_dir(2))
    with pytest.raises(NoGoodCheckpointError, match="belongs to step 1"):
        latest_good(layout)


def test_a_changed_hugging_face_file_does_not_cost_the_state(tmp_path):
    layout = RunLayout(tmp_path)
    save(layout, 1, write_extra=export)
    (layout.step_dir(1) / "config.json").write_text("{}")
    step, state, rejected = latest_good(layout)
    assert (step, rejected) == (1, [])
    assert state.warnings == ["config.json has 2 bytes, 30 were written"]
    assert not verify_step(layout, 1).good


@pytest.mark.parametrize("name", ["state", "learning_dynamics", "fabric_state"])
def test_an_export_must_not_take_our_names(tmp_path, name):
    layout = RunLayout(tmp_path)
    with pytest.raises(CheckpointError, match=f"wrote '{name}'"):
        save(layout, 1, write_extra=lambda folder: ((folder / name).mkdir(), (folder / name / "x").write_text("")))
    assert layout.steps() == []


def test_an_export_that_fails_leaves_the_old_checkpoint(tmp_path):
    layout = RunLayout(tmp_path)
    save(layout, 1)

    def broken(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(CheckpointError, match=r"ENOSPC.*step_1 is still the latest checkpoint") as caught:
        save(layout, 2, write_extra=broken)
    assert caught.value.errno == errno.ENOSPC
    assert {path.name for path in layout.checkpoints.iterdir()} == {"latest", "step_1"}
    assert latest_good(layout)[0] == 1


def test_a_meta_that_is_not_json_is_refused(tmp_path):
    layout = RunLayout(tmp_path)
    with pytest.raises(CheckpointError, match="there is no earlier checkpoint"):
        save_checkpoint(layout, 1, tensors=some_tensors(), meta={"x": object()})
    assert layout.step_dirs() == []


def test_leftovers_of_dead_saves_go_and_nothing_else(tmp_path):
    layout = RunLayout(tmp_path)
    save(layout, 1)
    (layout.step_dir(1) / "notes.txt").write_text("mine")
    (layout.step_dir(1) / ".tmp-7" / "state").mkdir(parents=True)
    (layout.step_dir(2) / ".tmp-7" / "state").mkdir(parents=True)
    layout.next_latest.symlink_to("step_2")
    save(layout, 3)
    assert layout.step_dirs() == [1, 3]
    assert {path.name for path in layout.step_dir(1).iterdir()} == {"state", "notes.txt"}
    assert {path.name for path in layout.checkpoints.iterdir()} == {"latest", "step_1", "step_3"}


class Full(FileSystem):
    """A disk that says it has ``free`` bytes."""

    def __init__(self, free: int):
        self.free = free

    def free_bytes(self, path: Path) -> int:
        return self.free


def test_the_space_is_checked_before_writing(tmp_path):
    layout = RunLayout(tmp_path)
    save(layout, 1)
    n = 100_000
    state_bytes = 2 * 4 * n
    with pytest.raises(NoSpaceError, match=r"bytes needed, 1000 bytes free; step_1 is still the latest") as caught:
        save(layout, 2, n=n, fs=Full(1000))
    assert (caught.value.free, caught.value.errno) == (1000, errno.ENOSPC)
    assert state_bytes < caught.value.needed < state_bytes + (5 << 20)
    assert layout.step_dirs() == [1]
    with pytest.raises(NoSpaceError):
        save(layout, 2, n=n, fs=Full(caught.value.needed - 1))
    with pytest.raises(NoSpaceError) as with_export:  # which holds the parameters once more
        save(layout, 2, n=n, fs=Full(caught.value.needed), write_extra=export)
    assert with_export.value.needed == caught.value.needed + 4 * n + 24
    save(layout, 2, n=n, fs=Full(caught.value.needed))


@contextlib.contextmanager
def full_disk(folder: Path):
    """A place where the kernel refuses to write more than about 8 MB, with the errno it gives.

    A small tmpfs, or without the right to mount one, a limit on the size of files.
    """
    folder.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode == 0
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if mounted:
            yield folder, errno.ENOSPC
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (6 << 20, before[1]))
            yield folder, errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if mounted:
            subprocess.run(["umount", folder], check=True)


def test_a_really_full_disk(tmp_path):
    with full_disk(tmp_path / "small") as (folder, number):
        layout = RunLayout(folder / "run")
        save(layout, 1, n=1000, write_extra=export)
        for _ in range(3):  # the failed save must not leave the disk full
            with pytest.raises(CheckpointError, match="step_1 is still the latest checkpoint") as caught:
                save(layout, 2, n=2_000_000, fs=Full(1 << 40))
            assert caught.value.errno == number
            assert caught.value.path.name == rank_file(0)
            assert layout.step_dirs() == [1]
            assert verify_step(layout, 1).good
        save(layout, 2, n=100_000)
        assert latest_good(layout)[0] == 2
    with full_disk(tmp_path / "limited") as (folder, number):
        layout = RunLayout(folder / "run")
        save(layout, 1)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            with pytest.raises(CheckpointError, match=r"EFBIG.*step_1 is still the latest"):
                save(layout, 2, n=200_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert latest_good(layout)[0] == 1
        assert layout.step_dirs() == [1]


def test_a_tensor_larger_than_a_piece_streams_exactly(tmp_path):
    layout = RunLayout(tmp_path)
    tensors = {"model/big": torch.arange(5_000_000, dtype=torch.int32), "model/small": torch.ones(3)}
    save_checkpoint(layout, 1, tensors=tensors, meta={})
    assert same(latest_good(layout)[1].tensors, tensors)
    assert len(Manifest.from_bytes(layout.manifest(1).read_bytes()).files[0].crc32c) == 20
