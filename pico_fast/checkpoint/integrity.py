"""What is damaged in a committed checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pico_fast.checkpoint.errors import described
from pico_fast.checkpoint.layout import MANIFEST, STATE, RunLayout
from pico_fast.checkpoint.manifest import BLOCK_BYTES, BlockChecksums, FileEntry, Manifest, ManifestError


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify_step` found: damage to the state (which rules it out) and to the Hugging Face files."""

    step: int
    manifest: Manifest | None
    state: list[str] = field(default_factory=list)
    exports: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Nothing is damaged."""
        return not self.state and not self.exports

    @property
    def bytes(self) -> int:
        """Size of the files that the manifest lists."""
        return sum(entry.size for entry in self.manifest.files) if self.manifest else 0


def verify_step(layout: RunLayout, step: int, *, exports: bool = True) -> Verdict:
    """Read every file of a committed step and compare it with the manifest, block by block.

    ``exports=False`` leaves the Hugging Face files out. Raises nothing for damage: the verdict lists it.
    """
    name = f"{STATE}/{MANIFEST}"
    try:
        manifest = Manifest.from_bytes(layout.manifest(step).read_bytes())
    except FileNotFoundError:
        return Verdict(step, None, [f"{name} is missing"])
    except OSError as error:
        return Verdict(step, None, [f"{name} cannot be read: {described(error)}"])
    except ManifestError as error:
        return Verdict(step, None, [f"{name}: {error}"])
    verdict = Verdict(step, manifest)
    if manifest.step != step:
        verdict.state.append(f"{name} belongs to step {manifest.step}: the folder was renamed or copied")
    for entry in manifest.files:
        belongs_to_state = entry.path.startswith(f"{STATE}/")
        if belongs_to_state or exports:
            damage = file_damage(layout.step_dir(step) / entry.path, entry)
            if damage:
                (verdict.state if belongs_to_state else verdict.exports).append(damage)
    return verdict


def file_entry(path: Path, name: str) -> FileEntry:
    """Size and checksums of a finished file, which the manifest calls ``name``. Raises OSError."""
    checksums = _checksums(path)
    return FileEntry(path=name, size=checksums.size, crc32c=checksums.blocks())


def file_damage(path: Path, expected: FileEntry) -> str | None:
    """What is wrong with the file at ``path``; None if it is as it was written."""
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{expected.path} has {size} bytes, {expected.size} were written"
        blocks = _checksums(path).blocks()
    except FileNotFoundError:
        return f"{expected.path} is missing"
    except OSError as error:
        return f"{expected.path} cannot be read: {described(error)}"
    for number, (found, written) in enumerate(zip(blocks, expected.crc32c, strict=True)):
        if found != written:
            start = number * BLOCK_BYTES
            end = min(start + BLOCK_BYTES, expected.size) - 1
            return f"{expected.path}: the checksum of bytes {start} to {end} does not match what was written"
    return None


def _checksums(path: Path) -> BlockChecksums:
    checksums = BlockChecksums()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            checksums.update(block)
    return checksums
