"""Remote files: which errors pass, how long one waits for it, and that the bytes are right afterwards."""

import asyncio
import io
import logging
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pico_fast.data.remote import RemoteFile, transient

CONTENT = bytes(range(256)) * 4


def hub_error(status):
    from huggingface_hub.utils import HfHubHTTPError

    response = SimpleNamespace(status_code=status, headers={}, request=None)  # of httpx or requests, by its version
    return HfHubHTTPError(f"status {status}", response=response)


def requests_error(status):
    requests = pytest.importorskip("requests")
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"status {status}", response=response)


def httpx_error(status):
    httpx = pytest.importorskip("httpx")
    request = httpx.Request("GET", "https://hub.invalid")
    return httpx.HTTPStatusError("status", request=request, response=httpx.Response(status, request=request))


def aiohttp_error(status):
    error = Exception("status")
    error.status = status  # as aiohttp.ClientResponseError has it
    return error


@pytest.mark.parametrize("kind", [hub_error, requests_error, httpx_error, aiohttp_error])
def test_the_status_decides(kind):
    assert all(transient(kind(status)) for status in (408, 429, 500, 502, 503, 504))
    assert not any(transient(kind(status)) for status in (400, 401, 403, 404, 410, 416))


@pytest.mark.parametrize("library", ["httpx", "requests"])
def test_network_libraries_without_a_status(library):
    module = pytest.importorskip(library)
    for name in ("ConnectError", "ReadTimeout", "RemoteProtocolError", "ConnectionError"):
        if hasattr(module, name):
            assert transient(getattr(module, name)("broken"))


def test_what_passes_and_what_lasts():
    from huggingface_hub.errors import OfflineModeIsEnabled

    for error in (OSError(5, "I/O error"), ConnectionResetError(), TimeoutError(), asyncio.TimeoutError()):
        assert transient(error)
    for error in (FileNotFoundError(), PermissionError(), IsADirectoryError(), ValueError(), RuntimeError()):
        assert not transient(error)
    assert not transient(OfflineModeIsEnabled("HF_HUB_OFFLINE=1"))


class FileSystem:
    """One file; ``plan`` says of each opening and reading whether it goes well, raises, or comes ``"short"``."""

    def __init__(self, plan):
        self.plan, self.opened = list(plan), []

    def next(self):
        event = self.plan.pop(0) if self.plan else None
        if isinstance(event, Exception):
            raise event
        return event

    def open(self, path, mode, **options):
        assert (mode, options) == ("rb", {"cache_type": "none"})
        self.next()
        self.opened.append(_File(self))
        return self.opened[-1]


class _File(io.BytesIO):
    def __init__(self, filesystem):
        super().__init__(CONTENT)
        self.filesystem = filesystem

    def read(self, size=-1):
        assert size > 0
        return super().read(size - 1 if self.filesystem.next() == "short" else size)


@given(
    plan=st.lists(st.sampled_from([None, None, "fails", "short"]), max_size=20),
    reads=st.lists(st.tuples(st.integers(0, 1100), st.integers(0, 300)), max_size=8),
)
def test_the_bytes_are_those_of_the_file(plan, reads):
    assume(sum(event is not None for event in plan) <= 4)  # so that no five tries in a row fail
    plan = [OSError("reset") if event == "fails" else event for event in plan]
    file, reference = RemoteFile(FileSystem(plan), "a", lambda _: None), io.BytesIO(CONTENT)
    for position, size in reads:
        assert file.seek(position) == reference.seek(position) == file.tell()
        assert file.read(size) == reference.read(size)
        assert file.read(3) == reference.read(3)  # goes on from there
        assert file.tell() == reference.tell()
    assert file.seek(-7, io.SEEK_END) == len(CONTENT) - 7
    assert file.read() == CONTENT[-7:]


def test_five_tries_over_a_minute_with_a_word_about_each(caplog):
    waits = []
    filesystem = FileSystem([None, *(OSError(f"outage {number}") for number in range(5))])
    with RemoteFile(filesystem, "data/a.parquet", waits.append) as file:
        with caplog.at_level(logging.WARNING), pytest.raises(OSError, match="outage 4"):
            file.read(10)
        assert file.read(10) == CONTENT[:10]
    assert waits == [4, 8, 16, 32]
    assert caplog.messages[0] == "data/a.parquet: outage 0; trying again in 4 s"
    assert len(caplog.messages) == 4
    assert filesystem.opened[-1].closed


def test_an_error_that_lasts_is_raised_at_once():
    for plan in ([PermissionError("no")], [hub_error(404)]):
        with pytest.raises(type(plan[0])):
            RemoteFile(FileSystem(plan), "a", lambda _: pytest.fail("waited"))
