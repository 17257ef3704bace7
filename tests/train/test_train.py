"""The trainer from its command line: what it writes, what it refuses, what it survives."""

import json
import math
import os
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from pico_kernels import OPS
from pico_kernels._dispatch import resolve
from pico_kernels._triton import triton_problem

from pico_fast import run as run_module
from pico_fast.checkpoint.errors import CheckpointError
from pico_fast.checkpoint.layout import RunLayout
from pico_fast.checkpoint.lock import RunLock
from pico_fast.config_io import load_config
from pico_fast.data.errors import DataError
from pico_fast.data.source import TokenRows
from pico_fast.data.stream import BatchStream
from pico_fast.interop.huggingface import import_model
from pico_fast.model.decoder import PicoDecoder
from pico_fast.monitor import read_metrics
from pico_fast.train import main


def layout_of(config_file) -> RunLayout:
    return RunLayout.from_config(load_config(config_file).checkpointing)


def events(layout, kind):
    return [entry for entry in read_metrics(layout.metrics) if entry["event"] == kind]


def test_a_run_learns_and_writes_picos_layout(small_run):
    file = small_run(max_steps=60)
    assert main(["--config", str(file), "checkpointing.save_every_n_steps=30"]) == 0
    layout = layout_of(file)
    assert layout.steps() == [0, 30, 60]
    assert os.readlink(layout.latest) == "step_60"
    written = yaml.safe_load(layout.training_config.read_text())
    assert (written["model"]["d_model"], written["checkpointing"]["save_every_n_steps"]) == (32, 30)
    assert [entry["step"] for entry in events(layout, "train")] == list(range(60))
    assert [entry["step"] for entry in events(layout, "eval")] == [0, 30, 60]
    first, last = (json.loads(layout.eval_results(step).read_text())["paloma"] for step in (0, 60))
    assert first > 40
    assert last < first / 5
    config, state = import_model(layout.step_dir(60))
    assert config.d_model == 32
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_gradients_do_not_depend_on_micro_batches(small_run):
    losses = {}
    for accumulation in (1, 2, 8):
        file = small_run(f"split{accumulation}", **{"training.optimization.gradient_accumulation_steps": accumulation})
        assert main(["--config", str(file)]) == 0
        losses[accumulation] = [entry["loss"] for entry in events(layout_of(file), "train")]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] == pytest.approx(losses[8], rel=1e-5)


def runs_on_a_cpu(op, name):
    """Triton's kernels do in its interpreter, which is chosen where there is no GPU; flash-attn does not."""
    try:
        resolve(op, OPS[op], name, "cpu")
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("op", "implementation"),
    [
        (op, name)
        for op, table in OPS.items()
        for name in table
        if name not in ("reference", "auto") and runs_on_a_cpu(op, name)
    ],
)
def test_a_config_line_swaps_an_op(small_run, op, implementation):
    losses = {}
    for name in (implementation, "reference"):
        # Three steps: the first is taken with a learning rate of 0, so the third loss is the first to see a gradient.
        file = small_run(f"with-{name}", max_steps=3, **{"kernels.default": "reference", f"kernels.{op}": name})
        assert main(["--config", str(file), "evaluation.metrics=[]"]) == 0
        losses[name] = [entry["loss"] for entry in events(layout_of(file), "train")]
    assert losses[implementation] == pytest.approx(losses["reference"], rel=1e-5)


@pytest.mark.skipif(triton_problem("cpu") is not None, reason="Triton's interpreter is not available")
def test_every_op_by_triton_trains_as_the_reference_does(small_run):
    losses, weights = {}, {}
    for name in ("triton", "reference"):
        settings = {"data.dataloader.batch_size": 4, "training.optimization.gradient_accumulation_steps": 1}
        file = small_run(f"all-{name}", max_steps=2, **settings, **{"kernels.default": name})
        assert main(["--config", str(file), "evaluation.metrics=[]"]) == 0
        losses[name] = [entry["loss"] for entry in events(layout_of(file), "train")]
        weights[name] = import_model(layout_of(file).step_dir(2))[1]
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-5)
    for key, expected in weights["reference"].items():
        torch.testing.assert_close(
            weights["triton"][key], expected, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_a_researchers_own_op(small_run, tmp_path, monkeypatch):
    (tmp_path / "my_ops.py").write_text(
        "import torch\n"
        "calls = 0\n"
        "def swiglu(gate, up):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return torch.nn.functional.gelu(gate) * up\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--config", str(small_run(**{"kernels.swiglu": "my_ops:swiglu"}))]) == 0
    import my_ops

    assert my_ops.calls > 0


def test_log_spaced_checkpoints_and_retention(small_run):
    settings = {
        "checkpointing.save_every_n_steps": 8,
        "checkpointing.log_spaced": True,
        "checkpointing.keep_last": 2,
        "checkpointing.keep_every": 8,
        "evaluation.metrics": [],
    }
    file = small_run(max_steps=20, **settings)
    assert main(["--config", str(file), "checkpointing.keep_last=null"]) == 0
    assert layout_of(file).steps() == [0, 1, 2, 4, 8, 16, 20]
    file = small_run("pruned", max_steps=20, **settings)
    assert main(["--config", str(file)]) == 0
    assert layout_of(file).steps() == [0, 8, 16, 20]


def poison(monkeypatch, steps):
    """Make the loss NaN at these optimizer steps (two micro-batches each)."""
    calls = iter(range(10**6))
    original = PicoDecoder.loss

    def loss(self, *arguments, **keywords):
        value = original(self, *arguments, **keywords)
        if not torch.is_grad_enabled():
            return value
        return value * math.nan if next(calls) // 2 in steps else value

    monkeypatch.setattr(PicoDecoder, "loss", loss)


def test_nonfinite_losses_are_counted_and_by_config_skipped(small_run, monkeypatch):
    poison(monkeypatch, {3, 5})
    file = small_run("skipping", **{"training.optimization.skip_nonfinite": True})
    assert main(["--config", str(file)]) == 0
    layout = layout_of(file)
    assert events(layout, "train")[-1]["nonfinite_total"] == 2
    (log,) = layout.logs.glob("*.log")
    assert re.findall(r"└── Inf/NaN count: (\d+)", log.read_text()) == ["0", "0", "0", "1", "0", "1", "0", "0"]
    _, state = import_model(layout.step_dir(8))
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_skipped_step_leaves_weights_and_moments_as_they_were(small_run, monkeypatch):
    from pico_fast.checkpoint.load import latest_good

    poison(monkeypatch, {4})
    settings = {"training.optimization.skip_nonfinite": True, "checkpointing.save_every_n_steps": 1}
    file = small_run("skipping", max_steps=5, **settings)
    assert main(["--config", str(file), "evaluation.metrics=[]"]) == 0
    layout = layout_of(file)
    _, after, _ = latest_good(layout)
    monkeypatch.setattr(RunLayout, "steps", lambda self: [4])
    _, before, _ = latest_good(layout)
    assert (before.step, after.step) == (4, 5)
    for name, tensor in before.tensors.items():
        assert torch.equal(tensor, after.tensors[name]), name


def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped_and_counted(small_run, monkeypatch):
    calls = iter(range(10**6))
    original = PicoDecoder.loss

    def loss(self, *arguments, **keywords):
        value = original(self, *arguments, **keywords)
        if not torch.is_grad_enabled() or next(calls) // 2 != 3:
            return value
        weight = self.output_norm.weight
        return value + (weight - weight.detach()).sqrt().sum()  # 0, and its derivative is infinite

    monkeypatch.setattr(PicoDecoder, "loss", loss)
    file = small_run(**{"training.optimization.skip_nonfinite": True})
    assert main(["--config", str(file)]) == 0
    layout = layout_of(file)
    assert events(layout, "train")[-1]["nonfinite_total"] == 1
    _, state = import_model(layout.step_dir(8))
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_too_many_nonfinite_losses_in_a_row_stop_the_run(small_run, monkeypatch, capsys):
    poison(monkeypatch, {2, 4, 5, 6})
    file = small_run(
        **{"training.optimization.max_nonfinite_in_a_row": 3, "training.optimization.skip_nonfinite": True}
    )
    assert main(["--config", str(file)]) == 1
    error = capsys.readouterr().err
    assert "3 steps in a row, up to step 6" in error
    assert "step_4" in error


FAILING_LOSS = """
import torch
from pico_kernels import linear_cross_entropy

calls = 0

def loss(*arguments, **keywords):
    global calls
    calls += torch.is_grad_enabled()
    if calls > 13:  # two micro-batches a step: the first of step 6
        raise {error}
    return linear_cross_entropy(*arguments, **keywords)
"""


@pytest.mark.parametrize(
    "error",
    [
        "torch.AcceleratorError('CUDA error: device-side assert triggered\\nFor debugging consider ...')",
        "RuntimeError('Triton Error [CUDA]: device-side assert triggered')",
    ],
)
def test_a_device_side_assertion_ends_the_run_with_one_message(small_run, tmp_path, monkeypatch, capsys, error):
    name = f"failing_loss_{error.partition('(')[0].replace('.', '_')}"  # a module is imported once in a process
    (tmp_path / f"{name}.py").write_text(FAILING_LOSS.format(error=error))
    monkeypatch.syspath_prepend(tmp_path)
    file = small_run(**{"kernels.linear_cross_entropy": f"{name}:loss"})
    assert main(["--config", str(file)]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    for part in ("an assertion failed on cpu, in step 6", "device-side assert triggered)", "model.vocab_size = 64)"):
        assert part in shown
    assert "CUDA_LAUNCH_BLOCKING=1" in shown
    assert shown.endswith("the last checkpoint is " + str(layout_of(file).step_dir(4)) + "\n")
    assert main(["--config", str(file), "kernels.linear_cross_entropy=auto"]) == 0
    assert [entry["step"] for entry in events(layout_of(file), "train")] == list(range(8))


def test_other_runtime_errors_of_a_kernel_are_shown_as_they_are(small_run, tmp_path, monkeypatch):
    (tmp_path / "broken_loss.py").write_text(FAILING_LOSS.format(error="RuntimeError('CUDA out of memory')"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        main(["--config", str(small_run(**{"kernels.linear_cross_entropy": "broken_loss:loss"}))])


def test_an_evaluation_that_cannot_be_written_does_not_end_the_run(small_run, capsys):
    file = small_run()
    layout = layout_of(file)
    layout.root.mkdir(parents=True)
    layout.eval_results(0).parent.write_text("in the way")
    assert main(["--config", str(file)]) == 0
    assert "step_4.json was not written" in capsys.readouterr().out
    assert [entry["step"] for entry in events(layout, "eval")] == [0, 4, 8]


def test_a_data_error_in_the_middle_saves_what_was_trained(small_run, monkeypatch, capsys):
    original = BatchStream.__next__
    calls = iter(range(10**6))

    def fail(self):
        if next(calls) == 6:
            raise DataError("shard 3, row 7: id 64")
        return original(self)

    monkeypatch.setattr(BatchStream, "__next__", fail)
    file = small_run()
    assert main(["--config", str(file)]) == 2
    assert "row 7: id 64; step 6 is saved" in capsys.readouterr().err
    assert layout_of(file).latest_step() == 6


def test_the_rows_of_a_remote_dataset_are_not_counted(small_run, monkeypatch, capsys):
    monkeypatch.setattr(TokenRows, "n_rows_known", property(lambda self: None))
    monkeypatch.setattr(TokenRows, "n_rows", property(lambda self: pytest.fail("a request for every shard")))
    assert main(["--config", str(small_run()), "training.max_steps=3"]) == 0
    assert "passes in the same order" not in capsys.readouterr().out


def failing_saves(monkeypatch, steps):
    original = run_module.save_checkpoint

    def save(layout, step, **keywords):
        if step in steps:
            raise CheckpointError(f"step_{step} was not saved: No space left on device (ENOSPC)")
        return original(layout, step, **keywords)

    monkeypatch.setattr(run_module, "save_checkpoint", save)


def test_training_survives_a_failed_save(small_run, monkeypatch, capsys):
    failing_saves(monkeypatch, {4})
    file = small_run()
    assert main(["--config", str(file)]) == 0
    assert "ENOSPC); training goes on (failed save 1 of at most 3)" in capsys.readouterr().out
    assert layout_of(file).steps() == [0, 8]


def test_failing_saves_in_a_row_end_the_run_with_the_error(small_run, monkeypatch, capsys):
    failing_saves(monkeypatch, {2, 3, 4})
    file = small_run(**{"checkpointing.save_every_n_steps": 1})
    assert main(["--config", str(file)]) == 1
    assert "step_4 was not saved" in capsys.readouterr().err
    assert layout_of(file).latest_step() == 1


def test_a_failed_last_save_is_an_error(small_run, monkeypatch, capsys):
    failing_saves(monkeypatch, {8})
    file = small_run()
    assert main(["--config", str(file)]) == 1
    assert "step_8 was not saved" in capsys.readouterr().err


def test_wrong_settings_exit_2_before_anything_is_written(small_run, tmp_path, capsys):
    assert main(["--config", str(small_run()), "model.d_modle=3", "training.max_steps=none"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'd_model'?" in error
    assert "training.max_steps: an integer expected" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kernels.rope=fastest", "rope"),
        ("kernels.swiglu=no_such_module:fn", "no_such_module"),
        ("data.dataset.name=./nowhere", "nowhere"),
        ("data.dataset.split=test", "test"),
        ("model.max_seq_len=8", "17"),
        ("model.vocab_size=32", "32"),
        ("evaluation.paloma.dataset_split=test", "test"),
        ("evaluation.paloma.column=text", "text"),
    ],
)
def test_wrong_inputs_exit_2_before_anything_is_written(small_run, tmp_path, capsys, override, message):
    overrides = [override] + (["evaluation.metrics=[]"] if override.startswith("data") else [])
    code = main(["--config", str(small_run()), *overrides])
    output = capsys.readouterr()
    assert code == 2, output
    assert message in output.err


def test_a_bad_row_deep_in_the_data_is_named_by_file_and_row(small_run, tmp_path, capsys):
    file = small_run()
    path = tmp_path / "dataset" / "data" / "train-00001-of-00002.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[7]["input_ids"][3] = 64
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert main(["--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert path.name in error
    assert "row 7" in error or "row 47" in error
    assert "64" in error


def test_a_second_run_in_the_same_directory_is_refused(small_run, capsys):
    file = small_run()
    with RunLock(layout_of(file)):
        code = subprocess.run(
            [sys.executable, "-m", "pico_fast.train", "--config", str(file)], capture_output=True, text=True
        )
    assert code.returncode == 2
    assert f"process {os.getpid()}" in code.stderr
    assert "Traceback" not in code.stderr


def test_a_run_directory_that_cannot_be_made_exits_2(small_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--config", str(small_run()), f"checkpointing.runs_dir={tmp_path}/file"]) == 2
    error = capsys.readouterr().err
    assert "the run directory must be writable" in error
    assert f"{tmp_path}/file" in error


def test_a_secret_in_the_configuration_is_refused_and_not_repeated(small_run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh12345678")
    assert main(["--config", str(small_run()), "data.dataset.name=./hf_abcdefgh12345678"]) == 2
    error = capsys.readouterr().err
    assert "the value of HF_TOKEN stands in the configuration" in error
    assert "hf_abcdefgh12345678" not in error


def test_a_resume_on_other_threads_is_said(small_run, capsys):
    file = small_run()
    assert main(["--config", str(file), "training.max_steps=4"]) == 0
    assert main(["--config", str(file), "runtime.threads=2"]) == 0
    assert "threads was 1, now 2: the run goes on, but not bit for bit" in capsys.readouterr().out


def test_no_resume_over_an_existing_run(small_run, capsys):
    file = small_run()
    assert main(["--config", str(file)]) == 0
    assert main(["--config", str(file), "checkpointing.training.auto_resume=false"]) == 2
    assert "another checkpointing.run_name" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(small_run, capsys):
    file = small_run()
    assert main(["--config", str(file)]) == 0
    assert main(["--config", str(file), "model.activation_hidden_dim=64"]) == 2
    assert "model.activation_hidden_dim was 48, now 64" in capsys.readouterr().err


def test_picos_cluster_gives_way_to_this_process_with_one_line(small_run, capsys):
    file = small_run(**{"training.fabric.num_nodes": 4, "training.fabric.num_devices": 4})
    assert main(["--config", str(file)]) == 0
    assert capsys.readouterr().out.count("4 node(s) x 4 device(s)") == 1


def test_dry_run_prints_the_arithmetic_and_writes_nothing(small_run, tmp_path, capsys):
    assert main(["--config", str(small_run()), "--dry-run"]) == 0
    output = capsys.readouterr().out
    for part in ("parameters   19,616", "2 micro-batch(es) of 4 rows", "128 tokens per step", "FLOPs", "memory", "GB"):
        assert part in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("size", "parameters"), [("tiny", "11,282,784"), ("small", "64,595,328")])
def test_dry_run_of_a_published_model_says_its_size_even_without_its_data(capsys, tmp_path, size, parameters):
    config = f"{os.path.dirname(__file__)}/../../configs/pico-decoder-{size}.yaml"
    assert main(["--config", config, "--dry-run", f"data.dataset.name={tmp_path}/absent"]) == 2
    output = capsys.readouterr()
    assert parameters in output.out
    assert "absent" in output.err


def test_the_initial_weights_follow_the_seed(small_run):
    weights = {}
    for name, seed in (("a", 42), ("b", 42), ("c", 7)):
        file = small_run(name, max_steps=1, **{"runtime.seed": seed, "evaluation.metrics": []})
        assert main(["--config", str(file)]) == 0
        weights[name] = import_model(layout_of(file).step_dir(0))[1]["embedding_proj.weight"]
    assert torch.equal(weights["a"], weights["b"])
    assert not torch.equal(weights["a"], weights["c"])


def test_early_errors_leave_no_traceback(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "pico_fast.train", "--config", str(tmp_path / "absent.yaml")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "absent.yaml" in result.stderr
    assert "Traceback" not in result.stderr
