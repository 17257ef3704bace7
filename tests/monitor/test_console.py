import fcntl
import os
import pty
import struct
import sys
import termios
import textwrap

import pytest

from pico_fast.monitor.console import Console, count, duration, number, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999, "999"),
        (12_345, "12.3k"),
        (999_600, "1000k"),
        (1_050_000, "1.05M"),
        (4.2e11, "420G"),
    ],
)
def test_count(value: float, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (61, "1:01"), (3599.6, "1:00:00"), (47 * 3600, "47:00:00"), (50 * 3600, "2 d 2 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(59205.79, "59,206"), (123.456, "123.46"), (8, "8"), (0.05, "0.05"), (float("inf"), "inf"), (float("nan"), "nan")],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_size() -> None:
    assert (size(2_330_000_000), size(12_300_000)) == ("2.33 GB", "12 MB")


def test_auto_is_plain_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("auto", total_steps=10, start_step=0)
    assert console.mode == "plain"
    console.line("hello")
    console.advance(1, "unseen")
    console.close()
    assert capsys.readouterr() == ("hello\n", "")


def test_lines_redact_secrets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    Console("plain", total_steps=1, start_step=0).line("token hf_very_secret")
    assert capsys.readouterr().out == "token ***\n"


def test_a_closed_terminal_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w", buffering=1) as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        console = Console("plain", total_steps=1, start_step=0)
        console.line("nobody reads this")
        console.line("nor this")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())  # so that closing does not fail


def test_characters_outside_the_terminals_encoding_do_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Console("plain", total_steps=1, start_step=0).line("caf\u00e9 \U0001f4be")
    assert raw.getvalue() == b"caf? ?\n"


@pytest.mark.parametrize("columns", [0, 60, 120])
def test_bar_on_a_terminal(columns: int) -> None:
    """A real pseudo-terminal, also of width 0 as containers give it: the bar is shown, lines stay whole above it."""
    program = textwrap.dedent(
        """
        import sys, time
        from pico_fast.monitor.console import Console
        sys.stdin.readline()
        console = Console("auto", total_steps=20, start_step=5)
        assert console.mode == "bar"
        for step in range(6, 21):
            time.sleep(0.02)
            console.advance(step, f"loss {step}.25")
            if step == 10:
                console.line("a line in between")
        console.close()
        """
    )
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", program])
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    os.write(master, b"\n")
    output = b""
    while True:
        try:
            block = os.read(master, 65536)
        except OSError:  # the terminal is closed
            break
        if not block:
            break
        output += block
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, output.decode()
    pieces = output.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert "a line in between" in pieces
    last = [piece for piece in pieces if piece.strip()][-1]
    assert last.startswith("100%|")
    assert "20/20, loss 20.25" in last
    if columns:
        assert max(map(len, pieces)) <= columns
