"""One run per directory."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from pico_fast.checkpoint.layout import RunLayout
from pico_fast.checkpoint.lock import RunLock, RunLockedError

HOLDER = """
import sys, time
from pathlib import Path
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.checkpoint.lock import RunLock
with RunLock(RunLayout(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    layout = RunLayout(tmp_path / "new" / "run")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(layout.root)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLockedError, match=f"in use by process {holder.pid} on host") as caught:
            RunLock(layout).acquire()
        assert (caught.value.pid, caught.value.host) == (holder.pid, socket.gethostname())
        assert caught.value.since.startswith("20")
        assert str(layout.root) in str(caught.value)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with RunLock(layout):
        assert json.loads(layout.lock.read_text())["pid"] == os.getpid()


def test_the_same_process_is_refused_too_until_release(tmp_path):
    layout = RunLayout(tmp_path)
    first = RunLock(layout).acquire()
    with pytest.raises(RunLockedError):
        RunLock(layout).acquire()
    first.release()
    first.release()
    with RunLock(layout):
        pass
    with RunLock(layout):
        pass


def test_an_unreadable_owner_is_still_refused(tmp_path):
    layout = RunLayout(tmp_path)
    with RunLock(layout):
        layout.lock.write_text("")
        with pytest.raises(RunLockedError, match="another process") as caught:
            RunLock(layout).acquire()
        assert caught.value.pid is None


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    layout = RunLayout(tmp_path)
    read, write = os.pipe()
    with RunLock(layout):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # lives until the parent has checked
            os._exit(0)
    try:
        with RunLock(layout):
            pass
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_the_lock_survives_a_child_that_dies(tmp_path):
    layout = RunLayout(tmp_path)
    with RunLock(layout):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(RunLockedError):
            RunLock(layout).acquire()
