"""The conformance tool: our implementations pass it, wrong kernels fail the right check, the documented ones pass."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pico_kernels as pk
import pytest
import torch
from pico_kernels import conformance
from pico_kernels._triton import triton_problem
from pico_kernels.conformance import Result, check

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRONG = _load(HERE / "wrong_kernels.py")


def failed(results: list[Result]) -> dict[str, str]:
    return {result.check: result.reason for result in results if not result.passed}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside Triton's interpreter, which is too slow for the tool's large calls; for kernels that need none."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("op", list(pk.OPS))
def test_our_implementations_pass(op: str, impl: str) -> None:
    results = check(pk.OPS[op][impl], op, quick=impl == "reference")
    assert failed(results) == {}
    names = [result.check for result in results]
    assert "torch.compile" in names
    assert ("offsets beyond 2^31" in names) == (impl == "torch")
    assert ("the logits never in memory" in names) == (op == "linear_cross_entropy" and impl == "torch")
    assert sum(name.startswith("gradient of ") for name in names) >= 6
    measured = [result for result in results if result.check.startswith(("forward", "gradient", "strides"))]
    assert all(0 <= result.error <= result.limit < 1e3 for result in measured)


@pytest.mark.slow
@pytest.mark.skipif(triton_problem("cpu") is not None, reason="Triton's interpreter is not available")
@pytest.mark.parametrize("op", [op for op in pk.OPS if "triton" in pk.OPS[op]])
def test_our_triton_kernels_pass_in_the_interpreter(op: str) -> None:
    assert failed(check(pk.OPS[op]["triton"], op, quick=True)) == {}


HALF = [torch.bfloat16]
EVERY_STRIDE = {f"strides: {layout}" for layout in ("transposed", "heads first", "every second element")}


@pytest.mark.parametrize(
    ("name", "expected", "reason"),
    [
        ("wrong_gradient", {"gradient of gate, float32"}, "the float64 twin has"),
        ("overwrites_incoming_gradient", {"incoming gradients unchanged"}, "incoming gradient of product"),
        ("overwrites_input_in_backward", {"inputs unchanged"}, "the backward wrote to gate"),
        ("overwrites_saved", {"backward twice"}, "after a first backward, up changed"),
        ("writes_to_an_input", {"inputs unchanged"}, "the forward wrote to up"),
        ("aliases_an_input", {"outputs do not alias inputs", "inputs unchanged"}, "product shares memory with up"),
        ("different_every_time", {"same bits in every run"}, "runs differ in their bits"),
        ("ignores_strides", EVERY_STRIDE, "the float64 twin has"),
        ("reads_beyond", {"memory outside the inputs"}, "read from outside an input"),
        ("leaves_memory_unwritten", {"uninitialised memory"}, "product was not written everywhere"),
        ("refuses_zero_rows", {"zero rows"}, "RuntimeError: CUDA error: invalid configuration argument"),
        ("breaks_the_graph", {"torch.compile"}, "Unsupported: "),
        ("returns_two", {"forward and gradients"}, "expected a tensor, got (Tensor, Tensor)"),
        ("cuts_the_backward", {"forward and gradients"}, "the backward was cut off"),
        ("second_gradient_only_with_the_first", {"only the gradients asked for"}, "no gradient for up"),
    ],
)
def test_a_wrong_swiglu_fails_the_right_check(name: str, expected: set[str], reason: str) -> None:
    found = failed(check(getattr(WRONG, name), "swiglu", dtypes=[torch.float32], quick=True))
    assert expected <= set(found)
    assert any(reason in said for said in found.values()), found
    assert all("\n" not in said for said in found.values())
    # What is right is not blamed: the forward is correct in all of these but those that return no usable tensor.
    if expected != {"forward and gradients"}:
        assert "forward product, float32" not in found
        assert "NaN stays in its row" not in found


def test_a_wrong_gradient_does_not_blame_the_other_one() -> None:
    found = failed(check(WRONG.wrong_gradient, "swiglu", dtypes=[torch.float32], quick=True))
    assert "gradient of up, float32" not in found
    assert "same bits in every run" not in found


@pytest.mark.parametrize(
    ("name", "dtype", "expected", "reason"),
    [
        ("norm_in_the_input_dtype", torch.float16, "forward normed, float16", "the float64 twin has"),
        ("norm_in_the_input_dtype", torch.bfloat16, "gradient of weight, bfloat16", "the float64 twin has"),
        (
            "norm_without_eps",
            torch.float16,
            "forward normed, float16",
            "NaN at (4, 0) (40 such), the twin has a number",
        ),
        ("norm_scaled_by_the_whole", torch.float32, "NaN stays in its row", "the twin has a number"),
    ],
)
def test_a_wrong_norm_fails_the_right_check(name: str, dtype: torch.dtype, expected: str, reason: str) -> None:
    found = failed(check(getattr(WRONG, name), "rms_norm", dtypes=[dtype]))
    assert reason in found[expected]
    blamed = {check for check in found if not check.startswith(("forward", "gradient"))}
    assert blamed == ({expected} if name == "norm_scaled_by_the_whole" else set())


# Name, op, dtype, the checks that must fail (no others may), and a reason among them.
WRONG_MATRIX_KERNELS = [
    ("attention_sees_one_key_too_many", "attention", torch.float32, None, "the float64 twin has"),
    ("attention_masks_from_the_upper_left", "attention", torch.float32, None, "S 9/30, H 2/1, D 64, causal"),
    ("attention_reads_the_wrong_kv_head", "attention", torch.float32, None, "the float64 twin has"),
    ("attention_forgets_the_scale_of_dq", "attention", torch.float32, {"gradient of q"}, "the float64 twin has"),
    (
        "attention_adds_in_any_order",
        "attention",
        torch.float32,
        {"same bits in every run", "backward twice"},
        "gradient k: runs differ in their bits",
    ),
    ("loss_divides_by_all_tokens", "linear_cross_entropy", torch.float32, None, "the float64 twin has"),
    (
        "loss_lets_ignored_tokens_push",
        "linear_cross_entropy",
        torch.float32,
        {"gradient of hidden", "gradient of weight"},
        "the float64 twin has",
    ),
    (
        "loss_takes_one_gradient_for_all_tokens",
        "linear_cross_entropy",
        torch.float32,
        {"gradient of hidden", "gradient of weight"},
        "reduction none",
    ),
    (
        "loss_forgets_the_gradient_of_z_loss",
        "linear_cross_entropy",
        torch.float32,
        {"gradient of hidden", "gradient of weight"},
        "z_loss 0.01",
    ),
    (
        "loss_sums_the_weight_gradient_in_half_precision",
        "linear_cross_entropy",
        torch.bfloat16,
        {"gradient of weight", "the logits never in memory"},
        "N 2400, d 8, V 5, one label",
    ),
    (
        "loss_holds_the_logits",
        "linear_cross_entropy",
        torch.bfloat16,
        {"the logits never in memory"},
        "a tensor of 51511296 elements where the logits are 51511296",
    ),
]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("name", "op", "dtype", "expected", "reason"), WRONG_MATRIX_KERNELS)
def test_a_wrong_attention_or_loss_fails_the_right_check(
    name: str, op: str, dtype: torch.dtype, expected: set[str] | None, reason: str
) -> None:
    found = failed(check(getattr(WRONG, name), op, dtypes=[dtype]))
    assert any(reason in said for said in found.values()), found
    blamed = {re.sub(r", (float32|bfloat16)$", "", row) for row in found}
    if expected is None:  # the forward is wrong, and all that follows from it
        assert {row.partition(" ")[0] for row in blamed} >= {"forward", "gradient"}
    else:
        assert blamed == expected


def test_a_wrong_dtype_is_named() -> None:
    found = failed(check(WRONG.returns_float32, "swiglu", dtypes=HALF, quick=True))
    assert "expected dtype torch.bfloat16, got dtype torch.float32" in found["forward product, bfloat16"]


def test_int32_offsets_are_caught() -> None:
    found = failed(check(WRONG.offsets_in_int32, "swiglu", dtypes=HALF))
    assert "NaN at (1, 0)" in found["offsets beyond 2^31"]
    assert not [name for name in found if name.startswith(("forward", "gradient", "strides"))]


def test_a_backward_that_needs_every_output_used_is_caught() -> None:
    found = failed(check(WRONG.needs_both_outputs_used, "add_rms_norm", dtypes=[torch.float32], quick=True))
    assert "TypeError" in found["only the gradients asked for"]


def test_the_settings_it_changes_are_restored() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    check(pk.OPS["swiglu"]["torch"], "swiglu", dtypes=HALF, quick=True)
    assert (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory) == before


@pytest.mark.parametrize(("name", "said"), [("reference", "this is the twin"), ("torch", "")])
def test_the_twin_may_hold_the_logits_and_says_so(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "CHECKS", {"memory": conformance.CHECKS["memory"]})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (result,) = check(pk.OPS["linear_cross_entropy"][name], "linear_cross_entropy", dtypes=[torch.float32, *HALF])
    assert result.passed
    assert result.skipped == bool(said)
    assert result.reason.startswith(said)


def test_bad_arguments_of_the_function() -> None:
    with pytest.raises(ValueError, match=re.escape("check: op: expected one of rms_norm, ")):
        check(torch.add, "rmsnorm")
    with pytest.raises(ValueError, match="check: dtypes: expected at least one dtype, got none"):
        check(torch.add, "swiglu", dtypes=[])


def test_the_command_prints_a_table_and_its_status_tells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert conformance.main(["torch", "--op", "swiglu", "--quick", "--dtype", "fp32,bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "forward product, float32" in printed
    assert "float16  " not in printed.replace("bfloat16", "")
    assert re.search(r"\n(\d+) of \1 checks passed", printed)
    monkeypatch.syspath_prepend(HERE)
    assert conformance.main(["wrong_kernels:wrong_gradient", "--op", "swiglu", "--quick", "--dtype", "fp32"]) == 1
    assert re.search(r"gradient of gate, float32 +FAILED +\S+ +\S+  \S+ at \(", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch", "--op", "rmsnorm"], "--op: expected one of rms_norm, add_rms_norm, rope, swiglu, attention, "),
        (["torch", "--op", "rmsnorm"], "did you mean 'rms_norm'?"),
        (["no_such_module:fn", "--op", "swiglu"], "cannot import 'no_such_module:fn': ModuleNotFoundError"),
        (["tritn", "--op", "swiglu"], "swiglu: no implementation 'tritn'"),
        (["math:pi", "--op", "swiglu"], "'math:pi' is not callable but float"),
        (["torch", "--op", "swiglu", "--dtype", "bf61"], "--dtype: expected some of float32, bfloat16, float16"),
        (["torch", "--op", "swiglu", "--device", "warp"], "--device: 'warp' cannot be used"),
        (["torch"], "the following arguments are required: --op"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        conformance.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def _documented(name: str) -> str:
    """The Python listing that docs/kernels.md says to save under this name."""
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    return re.search(rf"Save this as `{name}`.*?```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.mark.parametrize("name", ["my_kernels", "my_triton_kernels"])
def test_the_documented_examples_pass(name: str, tmp_path: Path) -> None:
    if "triton" in name and triton_problem("cpu") is not None:
        pytest.skip("Triton's interpreter is not available")
    (tmp_path / f"{name}.py").write_text(_documented(f"{name}.py"), encoding="utf-8")
    command = [sys.executable, "-m", "pico_kernels.conformance", f"{name}:my_rms_norm", "--op", "rms_norm", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_documentation_names_every_check() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    listed = text[text.index("| check |") : text.index("A float32 weight's gradient")]
    for result in check(pk.OPS["add_rms_norm"]["reference"], "add_rms_norm", dtypes=HALF):
        assert re.split(r": | of |forward ", result.check)[0] in listed, result.check
