"""benchmarks.report: tables, ratios, targets, plots and messages, from made-up JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import load, main, time_text


def gpu_benchmark(opponent: str, seconds: float, direction: str = "forward", **changes: Any) -> dict[str, Any]:
    """One benchmark of the GPU suite: 100 MB at a copy bandwidth of 4 TB/s, which takes 25 us."""
    extra = {
        "op": "rms_norm",
        "size": "small",
        "d_model": 384,
        "tokens": 65536,
        "direction": direction,
        "opponent": opponent,
        "bytes": 100_000_000,
        "copy_bytes_per_second": 4e12,
        "percent_of_copy": 100 * 25e-6 / seconds,
        "wall_seconds": 60e-6,
    } | changes
    return {
        "group": f"{extra['op']} {direction}",
        "name": f"test_kernel[{opponent}]",
        "params": {"case": "rms_norm-d384-64k", "direction": direction, "opponent": opponent},
        "extra_info": extra,
        "stats": {"median": seconds},
    }


def product_benchmark(
    op: str, opponent: str, seconds: float, direction: str = "forward", peak: int | None = None, **changes: Any
) -> dict[str, Any]:
    """One benchmark of attention or the loss: 0.4 TFLOP at a matmul rate of 800 TFLOP/s, which takes 500 us."""
    extra = {
        "op": op,
        "case": f"{op}-case",
        "size": "tiny",
        "d_model": 96,
        "head_dim": 8,
        "tokens": 32768,
        "seq_len": 2048,
        "direction": direction,
        "opponent": opponent,
        "flops": 4e11,
        "matmul_flops_per_second": 8e14,
        "percent_of_matmul": 100 * 500e-6 / seconds,
        "peak_bytes": peak,
    } | changes
    return {
        "group": f"{op} {direction}",
        "name": f"test_kernel[{opponent}]",
        "params": {},
        "extra_info": extra,
        "stats": {"median": seconds},
    }


def cpu_benchmark(impl: str, dtype: str, seconds: float) -> dict[str, Any]:
    return {
        "group": "swiglu 4096 x 384",
        "name": f"test_swiglu[{dtype}-{impl}]",
        "params": {"dtype": f"UNSERIALIZABLE[torch.{dtype}]", "impl": impl},
        "extra_info": {},
        "stats": {"median": seconds},
    }


def report(tmp_path: Path, benchmarks: list[dict[str, Any]], **more: Any) -> str:
    file = tmp_path / "run.json"
    file.write_text(
        json.dumps({"machine_info": {"device": "Card X", "torch": "2.11"}, "benchmarks": benchmarks} | more)
    )
    assert main([str(file), "--out", str(tmp_path / "out")]) == 0
    return (tmp_path / "out" / "run.md").read_text()


def test_opponents_side_by_side_with_ratios_and_percent(tmp_path: Path) -> None:
    text = report(
        tmp_path,
        [gpu_benchmark("reference", 100e-6), gpu_benchmark("triton", 26.6e-6), gpu_benchmark("liger", 40e-6)],
        not_measured=["apex: no apex (rms_norm-d384-64k)"],
    )
    assert "Card X, torch 2.11." in text
    assert "Copy bandwidth measured in this run: 4.00 TB/s" in text
    assert "|  | at least | triton | reference | liger |" in text
    assert (
        "| small, d 384, 64k tokens | 100.0 MB | 26.6 µs (94 %) | 100 µs (3.76x, 25 %) | 40 µs (1.50x, 62 %) |" in text
    )
    assert "| small, d 384, 64k tokens | 60 µs | 60 µs | 60 µs |" in text
    assert "- apex: no apex (rms_norm-d384-64k)" in text
    assert "![rms_norm forward](run-rms-norm-forward.png)" in text
    assert (tmp_path / "out" / "run-rms-norm-forward.png").read_bytes().startswith(b"\x89PNG")


def test_targets_are_all_met(tmp_path: Path) -> None:
    both = [gpu_benchmark("triton", 26e-6, direction) for direction in ("forward", "backward")]
    assert "4 of 4 met." in report(tmp_path, [*both, gpu_benchmark("liger", 30e-6)])


def test_targets_that_are_missed_are_named(tmp_path: Path) -> None:
    text = report(
        tmp_path,
        [
            gpu_benchmark("triton", 50e-6),
            gpu_benchmark("triton", 40e-6, "backward"),
            gpu_benchmark("torch.compile", 25e-6),
            gpu_benchmark("copy of as many bytes", 25e-6),
            gpu_benchmark("triton", 31e-6, d_model=96, size="tiny"),
        ],
    )
    assert "1 of 5 met." in text  # the tiny one reaches 81 % of its 80
    for missed in (
        "- missed: rms_norm forward, d 384, 64k tokens: 50 % of the copy bandwidth, goal 90 %",
        "- missed: rms_norm backward, d 384, 64k tokens: 62 % of the copy bandwidth, goal 85 %",
        "- missed: rms_norm forward, d 384, 64k tokens: takes 2.00 of the time of torch.compile",
        "- missed: rms_norm forward + backward, d 384, 64k tokens: 1.80 byte floors, goal below 1.3",
    ):
        assert missed in text
    assert "copy of as many bytes" not in text.partition("## rms_norm")[0]


def test_attention_in_tflops_and_percent_of_the_matmul_rate(tmp_path: Path) -> None:
    text = report(
        tmp_path,
        [
            product_benchmark("attention", "triton", 2e-3, peak=50_000_000),
            product_benchmark("attention", "sdpa flash", 4e-3, peak=None),
            gpu_benchmark("rope of the same q and k", 1e-4, op="attention", seq_len=2048, head_dim=8),
        ],
    )
    assert "Matmul rate in bfloat16 measured in this run: 800.00 TFLOP/s (100 %)." in text
    assert "|  | at least | triton | sdpa flash |" in text
    row = "| tiny, d 96, 32k tokens, sequences of 2048 | 0.4 TFLOP | 2 ms (200 TFLOP/s, 25 %) |"
    assert f"{row} 4 ms (2.00x, 100 TFLOP/s, 12 %) |" in text
    assert "Peak memory of forward and backward beyond the inputs:" in text
    assert "| tiny, d 96, 32k tokens, sequences of 2048 | 50 MB |  |" in text
    assert "wall" not in text.partition("rope")[0]


def test_rope_beside_attention(tmp_path: Path) -> None:
    both = [
        product_benchmark("attention", name, seconds, direction)
        for direction in ("forward", "backward")
        for name, seconds in (("triton", 1e-3), ("auto", 0.5e-3), ("rope of the same q and k", 1e-4))
    ]
    text = report(tmp_path, both)
    assert "| tiny, head_dim 8, sequences of 2048 | 200 µs | 1 ms | auto | 20 % |" in text
    assert "rope of the same" not in text


@pytest.mark.parametrize(
    ("head_dim", "times", "said"),
    [
        (8, {"triton": 1.0, "auto": 9.0, "sdpa flash": 1.0}, None),
        (
            16,
            {"triton": 1.03, "auto": 1.0, "flash_attn": 1.0},
            "`triton` takes 1.03 of the time of flash_attn, goal 1.02",
        ),
        (16, {"auto": 1.0, "flash_attn": 2.0}, "`triton` was not measured"),
        (64, {"triton": 1.0, "flash_attn": 2.0}, "`auto` was not measured"),
        (
            32,
            {"triton": 1.1, "auto": 1, "sdpa flash": 1},
            "`triton` takes 1.10 of the time of sdpa flash, goal 1.02",
        ),
        (64, {"triton": 9.0, "auto": 1.1, "sdpa cudnn": 1.0, "flash_attn": 2.0}, None),
        (
            128,
            {"triton": 1, "auto": 1.2, "flash_attn": 1},
            "`auto` takes 1.20 of the time of flash_attn, goal 1.10",
        ),
    ],
)
def test_targets_of_attention(tmp_path: Path, head_dim: int, times: dict[str, float], said: str | None) -> None:
    found = [product_benchmark("attention", name, seconds, head_dim=head_dim) for name, seconds in times.items()]
    text = report(tmp_path, found)
    assert f"{0 if said else 1} of 1 met." in text
    assert said is None or f"32k tokens, sequences of 2048: {said}" in text


@pytest.mark.parametrize(
    ("d_model", "seconds", "peak", "missed"),
    [
        (96, 1.0, 100, []),
        (384, 1.2, 100, ["1.17 times as fast as liger, goal 1.30"]),
        (768, 1.39, 100, []),
        (1536, 1.5, 101, ["0.93 times as fast as liger, goal 0.98", "0.10 of the memory of plain, goal 0.10"]),
    ],
)
def test_targets_of_the_loss(tmp_path: Path, d_model: int, seconds: float, peak: int, missed: list[str]) -> None:
    step = "forward + backward"
    found = [
        product_benchmark("linear_cross_entropy", name, time, step, memory, d_model=d_model)
        for name, time, memory in (("triton", seconds, peak), ("plain", 3.0, 1000), ("liger", 1.4, 50))
    ]
    text = report(tmp_path, found)
    assert f"{2 - len(missed)} of 2 met." in text
    for said in missed:
        assert f"- missed: linear_cross_entropy {step}, d {d_model}, 32k tokens: {said}" in text


def test_json_of_the_cpu_suite(tmp_path: Path) -> None:
    text = report(
        tmp_path,
        [
            cpu_benchmark("torch", "bfloat16", 2e-3),
            cpu_benchmark("reference", "bfloat16", 3e-3),
            cpu_benchmark("torch", "float32", 1.0),
        ],
    )
    assert "| bfloat16 | 2 ms | 3 ms (1.50x) |" in text
    assert "| float32 | 1 s |  |" in text
    assert "## Targets" not in text
    assert "wall" not in text
    assert (tmp_path / "out" / "run-swiglu-4096-x-384.png").stat().st_size > 1000


def test_without_our_kernel_there_are_no_ratios_and_its_targets_are_missed(tmp_path: Path) -> None:
    losses = [product_benchmark("linear_cross_entropy", name, 1.0, "forward + backward") for name in ("auto", "plain")]
    text = report(tmp_path, [gpu_benchmark("reference", 100e-6), gpu_benchmark("liger", 50e-6), *losses])
    assert "x," not in text
    assert "0 of 2 met." in text
    assert "- missed: rms_norm forward, d 384, 64k tokens: `triton` was not measured" in text
    assert "- missed: linear_cross_entropy forward + backward, d 96, 32k tokens: `triton` was not measured" in text


def test_a_planned_case_without_figures_is_missed(tmp_path: Path) -> None:
    found = [product_benchmark("attention", name, 1.0, case="a") for name in ("triton", "flash_attn")]
    text = report(tmp_path, found, planned=["a", "b"])
    assert "1 of 2 met." in text
    assert "- missed: b: nothing was measured" in text


def test_beside_the_file_by_default(tmp_path: Path) -> None:
    file = tmp_path / "ops.json"
    file.write_text(json.dumps({"benchmarks": [cpu_benchmark("torch", "float32", 1e-3)]}))
    assert main([str(file)]) == 0
    assert (tmp_path / "ops.md").read_text().startswith("# Benchmarks\n\nunknown machine.\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("{", "not JSON: "),
        ("[]", "not pytest-benchmark's JSON: no list 'benchmarks'"),
        ('{"benchmarks": []}', "no benchmark was measured"),
        ('{"benchmarks": [{"name": "a", "params": null}]}', "a benchmark lacks 'stats'"),
    ],
)
def test_files_without_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    file = tmp_path / "bad.json"
    if content is not None:
        file.write_text(content)
    assert main([str(file)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks.report: {file}: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (1.234e-5, "12.3 µs"), (2e-8, "0.02 µs")]
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_groups_keep_the_order_of_the_file_with_the_subject_first(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    found = [gpu_benchmark("aten", 3e-5), gpu_benchmark("triton", 2e-5), gpu_benchmark("aten", 3e-5, "backward")]
    file.write_text(json.dumps({"benchmarks": found}))
    _, groups = load(file)
    assert [group.name for group in groups] == ["rms_norm forward", "rms_norm backward"]
    assert groups[0].opponents == ["triton", "aten"]
    assert groups[1].subject is None


def test_rows_are_ordered_by_tokens_and_width(tmp_path: Path) -> None:
    found = [
        gpu_benchmark("triton", 3e-5, d_model=width, size=f"w{width}", tokens=tokens)
        for width, tokens in ((768, 65536), (96, 65536), (768, 16384))
    ]
    (tmp_path / "run.json").write_text(json.dumps({"benchmarks": found}))
    _, (group,) = load(tmp_path / "run.json")
    assert group.variants == ["w768, d 768, 16k tokens", "w96, d 96, 64k tokens", "w768, d 768, 64k tokens"]
