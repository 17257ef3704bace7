"""The process: cores, devices, and requests to stop."""

import os
import signal
import time

import pytest
import torch
from pico_kernels import KernelSet

from pico_fast import cores, runtime
from pico_fast.config import Config, ModelConfig, OptimizationConfig
from pico_fast.config_io import load_config
from pico_fast.model.decoder import PicoDecoder
from pico_fast.optim import build_optimizer
from pico_fast.runtime import GracefulStop, UsageError, start_runtime
from pico_fast.step import training_step


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"max": "max 100000"}, 8),
        ({"max": "150000 100000"}, 2),
        ({"max": "50000 100000"}, 1),
        ({"max": "9900000 100000"}, 8),
        ({"quota": "200000", "period": "100000"}, 2),
        ({"quota": "-1", "period": "100000"}, 8),
        ({}, 8),
    ],
)
def test_a_containers_quota_limits_the_cores(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cores, "_QUOTAS", ((tmp_path / "max", None), (tmp_path / "quota", tmp_path / "period")))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert cores.usable_cores() == expected


def test_a_gpu_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = Config()
    config.runtime.threads = torch.get_num_threads()
    found = start_runtime(config)
    assert found.device.type == "cpu"
    assert any("accelerator is 'cuda'" in warning for warning in found.warnings)
    assert (found.param_dtype, found.compute_dtype) == (torch.float32, torch.bfloat16)


def test_the_processes_of_a_node_share_its_cores(monkeypatch):
    monkeypatch.setattr(runtime, "usable_cores", lambda: 7)
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setenv("WORLD_SIZE", "8")
    for local, threads in ((1, 7), (2, 3), (8, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        assert start_runtime(load_config(None, ["training.fabric.accelerator=cpu"])).threads == threads
    assert set_to == [7, 3, 1]


def test_more_processes_than_devices_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(UsageError, match=r"4 processes.*3 GPU\(s\).*--nproc-per-node 3"):
        start_runtime(Config())
    with pytest.raises(UsageError, match="mps trains in one process, 4 were started"):
        start_runtime(load_config(None, ["training.fabric.accelerator=mps"]))


@pytest.mark.parametrize("rank", [0, 1])
def test_signals_become_a_request_and_handlers_come_back(capfd, monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    before = signal.getsignal(signal.SIGTERM)
    with GracefulStop() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # at once: the same request
        assert stop()
        assert stop.received is signal.SIGTERM
        assert not stop.overdue()
        stop.grace_s = 0.0
        time.sleep(0.01)
        assert stop.overdue()
    assert signal.getsignal(signal.SIGTERM) is before
    assert capfd.readouterr().err.count("SIGTERM: finishing the step") == int(rank == 0)  # of all, one says so


def test_a_step_that_is_given_up_leaves_everything_as_it_was():
    config = ModelConfig(
        d_model=16, n_layers=1, vocab_size=11, max_seq_len=8, attention_n_heads=2, attention_n_kv_heads=1
    )
    model = PicoDecoder(config, KernelSet.from_config())
    optimizer = build_optimizer(model, OptimizationConfig())
    rows = torch.randint(11, (3, 2, 9), dtype=torch.int32)
    training_step(model, optimizer, rows, step=0, lr=0.1)
    before = [parameter.clone() for parameter in model.parameters()]
    moments = [optimizer.state[parameter]["exp_avg"].clone() for parameter in model.parameters()]
    asked = iter([False, False, True])
    assert training_step(model, optimizer, rows, step=1, lr=0.1, give_up=lambda: next(asked)) is None
    for parameter, old, moment in zip(model.parameters(), before, moments, strict=True):
        assert torch.equal(parameter, old)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
        assert parameter.grad is None
