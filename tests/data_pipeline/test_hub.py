"""Hub datasets with the real ``datasets`` and ``huggingface_hub``, against a stand-in for the hub on this machine."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COMMIT, CONVERTED = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"
TOKEN = "hf_of_a_test"

CLIENT = """
import json, sys
from pico_fast.data.source import DataError, open_rows
try:
    rows = open_rows(sys.argv[1], sys.argv[2], row_len=9)
    first = rows.read(int(sys.argv[3]), int(sys.argv[4])).tolist()
    print(json.dumps({"rows": first, "revision": rows.shards.revision, "labels": rows.shards.labels,
                      "fingerprint": rows.fingerprint(), "known": rows.n_rows_known}))
except DataError as error:
    print(json.dumps({"error": str(error)}))
"""


class Hub(ThreadingHTTPServer):
    """Serves ``repositories[name][commit][path] = bytes`` as the hub does; keeps what was asked for."""

    daemon_threads = True

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.ranges, self.tokens = repositories, [], set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def ask(self, dataset, split, start, stop, home):
        """What the client says of rows [start, stop), run in a process of its own: the endpoint is read at import."""
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_address[1]}",
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
        }
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            environment.pop(name, None)
        command = [sys.executable, "-c", CLIENT, dataset, split, str(start), str(stop)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, code, body, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code):
        self.answer(404, b"{}", X_Error_Code=code)

    def respond(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.split("?")[0].replace("%2F", "/").replace("refs/convert/parquet", CONVERTED)
        match = re.match(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(resolve|tree|revision)/([^/]+))?/?(.*)$", path)
        if not match or match[1] not in self.server.repositories:
            return self.missing("RepoNotFound")
        commits = self.server.repositories[match[1]]
        commit = COMMIT if match[3] in (None, "main") else match[3]
        if commit not in commits:
            return self.missing("RevisionNotFound")
        if match[2] == "resolve":
            return self.file(commits[commit], match[4])
        if match[2] == "tree":
            return self.tree(commits[commit], match[4], "recursive=true" in self.path.lower())
        siblings = [{"rfilename": name} for name in commits[commit]]
        return self.answer(200, json.dumps({"id": match[1], "sha": commit, "siblings": siblings}).encode())

    do_GET = do_HEAD = do_POST = respond

    def file(self, files, name):
        if name not in files:
            return self.missing("EntryNotFound")
        content, wanted = files[name], re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if not wanted:
            return self.answer(200, content, ETag='"0"')
        first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
        self.server.ranges.append((name, last - first + 1))
        return self.answer(206, content[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(content)}")

    def tree(self, files, folder, recursive):
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for name, content in files.items():
            if not name.startswith(prefix):
                continue
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                path = prefix + "/".join(parts[:depth])
                entries[path] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
            if recursive or len(parts) == 1:
                entries[name] = {"type": "file", "oid": "0" * 40, "size": len(content), "path": name}
        return (
            self.answer(200, json.dumps(list(entries.values())).encode()) if entries else self.missing("EntryNotFound")
        )


def parquet(numbers):
    """A file of rows of 9 ids that all equal the row's number."""
    column = pa.array([[number] * 9 for number in numbers], pa.list_(pa.int32()))
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"input_ids": column, "noise": [os.urandom(5000) for _ in numbers]}), sink, row_group_size=4
    )
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def hub():
    pytest.importorskip("datasets")
    shards = {f"data/train-{i:05d}-of-00003.parquet": parquet(range(20 * i, 20 * i + 20)) for i in range(3)}
    lines = {"train.jsonl": b'{"input_ids": [1, 2]}\n'}
    server = Hub(
        {
            "owner/rows": {COMMIT: {**shards, "data/val-00000-of-00001.parquet": parquet(range(5))}},
            "owner/lines": {COMMIT: lines, CONVERTED: {"default/train/0000.parquet": parquet(range(7))}},
            "owner/only-lines": {COMMIT: lines},
        }
    )
    yield server
    server.shutdown()
    server.server_close()


def test_rows_are_read_in_place(hub, tmp_path):
    answer = hub.ask("owner/rows", "train", 18, 23, tmp_path)
    np.testing.assert_array_equal(answer["rows"], np.arange(18, 23)[:, None].repeat(9, 1))
    assert answer["revision"] == COMMIT
    assert answer["labels"] == [f"data/train-{i:05d}-of-00003.parquet" for i in range(3)]
    assert answer["known"] is None  # the third footer was not needed, not even for the fingerprint
    assert {name for name, _ in hub.ranges} == set(answer["labels"][:2])
    # two footers, each once more for its rows, of 64 KB; three row groups, of the ids alone
    assert sum(size for _, size in hub.ranges) < 4 * 2**16 + 3 * 1000
    assert f"Bearer {TOKEN}" in hub.tokens
    hub.ranges.clear()  # again, as a resume: the footers are known, only the two shards that are read are opened
    assert hub.ask("owner/rows", "train", 18, 23, tmp_path) == answer
    assert len(hub.ranges) == 2 + 3  # two shards opened; the first rows, which are checked at once, and two row groups


def test_other_formats_through_the_converted_copy(hub, tmp_path):
    answer = hub.ask("owner/lines", "train", 0, 7, tmp_path)
    np.testing.assert_array_equal(np.array(answer["rows"])[:, 0], np.arange(7))
    assert answer["revision"] == CONVERTED


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("owner/only-lines", "train", r"not parquet \(such as train\.jsonl\)"),
        ("owner/rows", "test", "no split 'test'; it has train, val"),
        ("owner/nothing", "train", "no such folder here .*check the name, the connection, and HF_TOKEN"),
    ],
)
def test_what_the_hub_does_not_have(hub, tmp_path, dataset, split, message):
    error = hub.ask(dataset, split, 0, 1, tmp_path)["error"]
    assert re.search(message, error), error
    assert TOKEN not in error
