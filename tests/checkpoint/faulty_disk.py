"""Disks that fail at a chosen call, and one that remembers what a power cut would leave; runs to try them on."""

import errno
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from pico_fast.checkpoint.filesystem import FileSystem
from pico_fast.checkpoint.integrity import verify_step
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.checkpoint.load import latest_good
from pico_fast.checkpoint.retention import prune
from pico_fast.checkpoint.save import save_checkpoint
from pico_fast.config import CheckpointingConfig

CALLS = [name for name in vars(FileSystem) if not name.startswith("_")]


class Crash(BaseException):
    """The process is dead: no handler of an Exception runs, and no further call has an effect."""


class Quick(FileSystem):
    """Does not wait for the disk: these tests take place in the page cache."""

    def fsync(self, fd):
        pass

    def sync(self, path):
        os.close(os.open(path, os.O_RDONLY))


def routed(base: type[FileSystem]) -> type[FileSystem]:
    """``base`` with every method passed through ``self.through(name, *arguments)``."""

    def method(name):
        return lambda self, *arguments: self.through(name, *arguments)

    return type("Routed", (base,), {name: method(name) for name in CALLS})


class Faulty(routed(Quick)):
    """Call number ``at`` goes wrong; with ``lasting`` all later ones too."""

    def __init__(self, at: int, fault: str, lasting: bool = False):
        self.at, self.fault, self.lasting = at, fault, lasting
        self.calls: list[str] = []

    def through(self, name, *arguments):
        number = len(self.calls)
        self.calls.append(name)
        if number == self.at or (number > self.at and self.lasting):
            if self.fault == "crash":
                if name == "write" and number == self.at:
                    Quick.write(self, arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Crash
            if self.fault == "short":
                if name == "write":
                    return Quick.write(self, arguments[0], arguments[1][: max(1, len(arguments[1]) // 3)])
            elif name not in ("close", "free_bytes") or self.fault == "EIO":
                if name == "close":
                    Quick.close(self, *arguments)
                raise OSError(getattr(errno, self.fault), os.strerror(getattr(errno, self.fault)))
        return getattr(Quick, name)(self, *arguments)


class Node:
    """A file (``data``: the bytes that fsync made durable) or a folder (its names now, and those made durable)."""

    def __init__(self, folder: bool):
        self.folder = folder
        self.data = b""
        self.link: str | None = None
        self.names: dict[str, Node] = {}
        self.durable: dict[str, Node] = {}


class PowerCut(routed(Quick)):
    """Keeps account of what the disk is bound to hold: an fsync makes a file's bytes, or a folder's names, durable.

    Everything since then may be lost or kept, name by name, which is worse than what journalling file systems do (after
    Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014). ``at_each_call`` is called before each call.
    """

    def __init__(self, base: Path, at_each_call):
        self.base, self.at_each_call = base, at_each_call
        self.root = self._adopt(base)
        self.open: dict[int, Path] = {}

    def _adopt(self, path: Path, durable: bool = True) -> Node:
        node = Node(path.is_dir() and not path.is_symlink())
        if path.is_symlink():
            node.link = os.readlink(path)
        elif node.folder:
            node.names = {inner.name: self._adopt(inner, durable) for inner in path.iterdir()}
            node.durable = dict(node.names) if durable else {}
        elif durable:
            node.data = path.read_bytes()
        return node

    def _find(self, path: Path) -> Node:
        node = self.root
        for part in path.relative_to(self.base).parts:
            node = node.names[part]
        return node

    def through(self, name, *arguments):
        self.at_each_call(self)
        path = arguments[0]
        if name == "sync" and path.is_file():
            for folder in reversed([path, *path.parents]):  # what other libraries wrote is met here for the first time
                if folder != self.base and self.base in folder.parents:
                    self._find(folder.parent).names.setdefault(folder.name, self._adopt(folder, durable=False))
        result = getattr(Quick, name)(self, *arguments)
        if name == "create":
            self.open[result] = path
            self._find(path.parent).names[path.name] = Node(False)
        elif name == "fsync":
            self._find(self.open[path]).data = self.open[path].read_bytes()
        elif name == "sync":
            node = self._find(path)
            if node.folder:
                node.durable = dict(node.names)
            else:
                node.data = path.read_bytes()
        elif name in ("mkdir", "symlink"):
            node = self._find(path.parent).names[path.name] = Node(name == "mkdir")
            node.link = arguments[1] if name == "symlink" else None
        elif name == "rename":
            node = self._find(path.parent).names.pop(path.name)
            self._find(arguments[1].parent).names[arguments[1].name] = node
        elif name in ("unlink", "rmdir", "remove_tree"):
            self._find(path.parent).names.pop(path.name, None)
        return result

    def after_the_cut(self, root: Path, chance: random.Random | None) -> None:
        """Write to ``root`` what the disk may hold: what is durable, and with ``chance`` any part of the rest."""
        self._restore(self.root, root, chance)

    def _restore(self, node: Node, path: Path, chance: random.Random | None) -> None:
        if node.link is not None:
            path.symlink_to(node.link)
        elif not node.folder:
            path.write_bytes(node.data)
        else:
            path.mkdir()
            for name in sorted({*node.names, *node.durable}):
                names = node.names if chance is not None and chance.random() < 0.5 else node.durable
                if name in names:
                    self._restore(names[name], path / name, chance)


def tensors_of(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {
        "model/w": torch.randn(50, generator=generator),
        "optimizer/exp_avg/w": torch.randn(50, generator=generator),
    }


def export_of(version: int):
    def export(folder: Path) -> None:
        (folder / "config.json").write_text(f'{{"version": {version}}}')
        (folder / "more").mkdir()
        (folder / "more" / "vocab.txt").write_text(f"{version}\n" * 10)

    return export


def save(layout: RunLayout, step: int, version: int, fs: FileSystem) -> None:
    save_checkpoint(
        layout, step, tensors=tensors_of(version), meta={"version": version}, write_extra=export_of(version), fs=fs
    )


def damage(layout: RunLayout, step: int) -> None:
    path = layout.state_dir(step) / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)


@dataclass(frozen=True)
class Scenario:
    """A run directory, an operation on it, and which (step, version) may be the newest good before and after it."""

    name: str
    prepared: dict[int, int]  # step: version
    old: tuple[int, int] | None
    new: tuple[int, int]
    damaged: int | None = None
    debris: bool = False  # what a save that died left in the new step's folder, whose name is not durable

    def prepare(self, root: Path) -> None:
        root.mkdir()
        layout = RunLayout(root)
        for step, version in self.prepared.items():
            save(layout, step, version, Quick())
        if self.damaged is not None:
            damage(layout, self.damaged)
        if self.debris:
            (layout.step_dir(self.new[0]) / ".tmp-1" / "state").mkdir(parents=True)
            (layout.step_dir(self.new[0]) / "config.json").write_text("debris")

    def operate(self, layout: RunLayout, fs: FileSystem) -> None:
        if self.name == "prune":
            prune(layout, CheckpointingConfig(keep_last=1), fs)
        else:
            save(layout, self.new[0], self.new[1], fs)

    def check(self, layout: RunLayout, *, done: bool = False) -> None:
        found = latest_good(layout)
        if found is None:
            assert self.old is None
            assert not done
            return
        step, state, _ = found
        assert (step, state.meta["version"]) in ([self.new] if done else [self.old, self.new])
        assert not state.warnings
        expected = tensors_of(state.meta["version"])
        assert set(state.tensors) == set(expected)
        assert all(torch.equal(state.tensors[name], tensor) for name, tensor in expected.items())
        for other in layout.steps():
            assert verify_step(layout, other).good or (other == self.damaged and not done)
        if os.path.lexists(layout.latest):
            latest = layout.latest_step()
            assert latest is not None
            assert verify_step(layout, latest).good or (latest == self.damaged and not done)
        if done:
            assert layout.latest_step() == step
            if self.damaged is not None:  # nobody's data is lost, not even damaged data
                kept = [path.as_posix() for path in layout.step_dir(self.damaged).glob(".bad-*/**/*") if path.is_file()]
                for name in ("config.json", "more/vocab.txt", "state/manifest.json", "state/rank_00000.safetensors"):
                    assert any(path.endswith(f"/{name}") for path in kept)
