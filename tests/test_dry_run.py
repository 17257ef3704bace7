"""``--dry-run`` of a layout: one process builds its part and says what each would hold and send."""

import pytest

from pico_fast.config_io import load_config
from pico_fast.dry_run import print_dry_run
from pico_fast.runtime import UsageError


def printed(small_run, monkeypatch, capsys, world_size, **settings):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    print_dry_run(load_config(small_run(**settings), world_size=world_size))
    return capsys.readouterr().out


def test_one_process_has_no_layout(small_run, monkeypatch, capsys):
    output = printed(small_run, monkeypatch, capsys, 1)
    assert "processes" not in output
    assert "per process" not in output
    assert "parameters   19,616: " in output


def test_each_processes_share(small_run, monkeypatch, capsys):
    output = printed(small_run, monkeypatch, capsys, 4, **{"parallel.tp": 2})
    split = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert (
        f"processes    4: tp 2 x dp_shard 1 x dp_replicate 2; each holds {19_616 - split // 2:,} parameters" in output
    )
    assert "2 micro-batch(es) of 2 rows (32 tokens) on each of 2 data-parallel ranks" in output
    assert "traffic      0.1 MB sent per process and step: tp 0.1, dp_shard 0.0, dp_replicate 0.0" in output


def test_what_the_device_cannot_do_is_refused(small_run, monkeypatch, capsys):
    settings = {"parallel.tp": 2, "parallel.symmetric_memory": True}
    with pytest.raises(UsageError, match="needs NVIDIA GPUs joined by NVLink"):
        printed(small_run, monkeypatch, capsys, 2, **settings)
