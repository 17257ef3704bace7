"""The manifest finds any changed bit; block checksums are crc32c of 1 MiB blocks."""

import json
import random

import google_crc32c
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pico_fast.checkpoint.manifest import BLOCK_BYTES, BlockChecksums, FileEntry, Manifest, ManifestError, TensorEntry

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def small() -> Manifest:
    tensors = [TensorEntry("model/w", "rank_00000.safetensors", "F32", [2, 3], [2, 3], [0, 0], "0" * 32)]
    files = [FileEntry("state/rank_00000.safetensors", 123, [1, 2**32 - 1]), FileEntry("config.json", 0, [])]
    return Manifest(5, 1, "2.13.0", {"data": {"row": 40}, "loss": 1.5, "name": "é"}, tensors, files)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=4), st.integers(0, 2**40))
def test_round_trip(meta, step):
    manifest = Manifest(step, 1, "2.13.0", meta, small().tensors, small().files)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def test_it_is_plain_json_and_checksummed_as_documented():
    data = small().to_bytes()
    body = json.loads(data)
    claimed = body.pop("xxh3_128")
    line = json.dumps(body, sort_keys=True, separators=(",", ":")) + "\n"
    assert claimed == xxhash.xxh3_128_hexdigest(line.encode())
    assert (body["format"], body["version"]) == ("pico-fast-state", 1)
    assert body["files"][1] == {"path": "config.json", "size": 0, "crc32c": []}


def test_not_a_number_in_meta_does_not_stop_a_save():
    manifest = Manifest(1, 1, "2.13.0", {"loss": float("nan")}, [], [])
    assert np.isnan(Manifest.from_bytes(manifest.to_bytes()).meta["loss"])


def test_every_flipped_bit_is_found():
    data = small().to_bytes()
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(ManifestError):
                Manifest.from_bytes(bytes(flipped))


def test_every_truncation_and_extension_is_found():
    data = small().to_bytes()
    for end in range(len(data)):
        with pytest.raises(ManifestError):
            Manifest.from_bytes(data[:end])
    for tail in (b"\n", b" ", data):
        with pytest.raises(ManifestError):
            Manifest.from_bytes(data + tail)


def test_another_version_is_named():
    body = {**json.loads(small().to_bytes()), "version": 2}
    del body["xxh3_128"]
    line = json.dumps(body, sort_keys=True, separators=(",", ":")) + "\n"
    body["xxh3_128"] = xxhash.xxh3_128_hexdigest(line.encode())
    data = (json.dumps(body, sort_keys=True, separators=(",", ":")) + "\n").encode()
    with pytest.raises(ManifestError, match="another version"):
        Manifest.from_bytes(data)


@pytest.mark.parametrize(
    "size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 7]
)
def test_block_checksums_do_not_depend_on_the_pieces(size):
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    expected = [google_crc32c.value(data[i : i + BLOCK_BYTES].tobytes()) for i in range(0, size, BLOCK_BYTES)]
    cuts = sorted(random.Random(1).randrange(size + 1) for _ in range(20))
    checksums = BlockChecksums()
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, size], strict=True)):
        checksums.update(data[start:end] if number % 2 else data[start:end].tobytes())
    assert checksums.blocks() == expected
    assert checksums.size == size
