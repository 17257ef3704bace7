"""Which implementation `auto` takes on a GPU, call by call."""

import dataclasses

import pico_kernels as pk
import pytest
import torch
from pico_kernels import _attention_auto as auto
from pico_kernels._flash_packages import PACKAGES, FlashPackage
from pico_kernels.attention import ATTENTION, attention_auto

THREE, FOUR, TWO = PACKAGES
HALF, FULL = torch.bfloat16, torch.float32


class Machine:
    """A GPU and what is installed beside it."""

    def __init__(self, patch: pytest.MonkeyPatch, capability: int, triton: bool, *packages: FlashPackage) -> None:
        fitting = [p for p in packages if capability in p.capabilities]
        patch.setattr(auto, "cuda_capability", lambda device: capability)
        patch.setattr(auto, "_installed_triton", lambda: triton)
        patch.setattr(
            auto, "flash_package", lambda major, dim: next((p for p in fitting if dim <= p.max_head_dim), None)
        )

    def choose(
        self,
        head_dim: int,
        dtype: torch.dtype = HALF,
        queries: int = 512,
        documents: bool = False,
        lse: bool = False,
    ) -> str:
        q = torch.empty(1, queries, 12, head_dim, dtype=dtype, device="meta")
        k = torch.empty(1, 512, 4, head_dim, dtype=dtype, device="meta")
        return auto.choose(q, k, torch.tensor([0, 512]) if documents else None, lse)


def test_hopper_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 9, True, THREE, FOUR, TWO)
    assert [machine.choose(dim) for dim in (8, 16, 32, 64, 96, 128, 256)] == ["triton"] * 3 + ["flash_attn"] * 4
    assert machine.choose(64, documents=True) == "flash_attn"
    assert machine.choose(64, lse=True) == "flash_attn"
    assert machine.choose(64, queries=1) == "triton"
    assert machine.choose(64, FULL) == "triton"
    assert machine.choose(64, torch.float64) == machine.choose(320, FULL) == "torch"


def test_hopper_without_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 9, True)
    assert [machine.choose(dim) for dim in (32, 64, 128)] == ["triton", "sdpa", "sdpa"]
    assert machine.choose(64, documents=True) == "triton"
    assert machine.choose(64, lse=True) == "triton"


@pytest.mark.parametrize(("capability", "package", "expected"), [(8, TWO, "sdpa"), (10, FOUR, "flash_attn")])
def test_other_gpus(monkeypatch: pytest.MonkeyPatch, capability: int, package: FlashPackage, expected: str) -> None:
    machine = Machine(monkeypatch, capability, True, package)
    assert machine.choose(64) == expected
    assert machine.choose(8) == "triton"


def test_amd_and_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Machine(monkeypatch, 0, True).choose(32) == "triton"
    assert Machine(monkeypatch, 0, True).choose(64) == "sdpa"
    without = Machine(monkeypatch, 8, False)
    assert without.choose(8) == "sdpa"
    assert without.choose(64, FULL) == without.choose(64, lse=True) == without.choose(64, documents=True) == "torch"


def test_asked_for_determinism_no_package_that_breaks_its_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert Machine(monkeypatch, 9, True, THREE).choose(64) == "sdpa"
        assert Machine(monkeypatch, 9, True, FOUR).choose(64) == "flash_attn"
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_table_always_has_an_answer() -> None:
    last = auto.RULES[-1]
    assert last == auto.Rule("torch", last.why)
    assert {rule.impl for rule in auto.RULES} <= set(ATTENTION)
    assert all(rule.why for rule in auto.RULES)


def test_rules_are_bounded_by_keys_too(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 8, True)
    long = dataclasses.replace(auto.RULES[0], impl="sdpa", keys=(513, 1024))
    monkeypatch.setattr(auto, "RULES", (long, *auto.RULES))
    assert machine.choose(8) == "triton"
    monkeypatch.setattr(auto, "RULES", (dataclasses.replace(long, keys=(512, 1024)), *auto.RULES))
    assert machine.choose(8) == "sdpa"


def test_on_a_gpu_the_kernel_set_has_the_table_and_it_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pk.KernelSet.from_config(device="cuda")
    assert kernels.attention is attention_auto
    assert kernels.describe()["attention"] == "auto"
    Machine(monkeypatch, 9, False)
    q = torch.randn(1, 20, 4, 8, generator=torch.Generator().manual_seed(0))
    traced = torch.compile(kernels.attention, backend="aot_eager", fullgraph=True)(q, q, q, causal=True)
    torch.testing.assert_close(traced, kernels.attention(q, q, q, causal=True))
