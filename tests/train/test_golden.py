"""Training equals the original pico-train: same data, config and seed, float32 on a CPU (tests/data/golden)."""

import json
import re

import pytest
import yaml

from pico_fast.interop.huggingface import import_model
from pico_fast.train import main


@pytest.fixture(scope="module")
def run_dir(golden, tmp_path_factory):
    """A run of pico's own config file; only the paths are ours."""
    folder = tmp_path_factory.mktemp("golden")
    config = json.loads((golden / "golden.json").read_text())["config"]
    config["data"]["dataset"]["name"] = str(golden / "train")
    config["data"]["tokenizer"]["name"] = str(golden / "tokenizer")
    config["evaluation"]["paloma"]["dataset_name"] = str(golden / "val")
    config["checkpointing"]["runs_dir"] = str(folder)
    (folder / "pico.yaml").write_text(yaml.safe_dump(config))
    assert main(["--config", str(folder / "pico.yaml")]) == 0
    return folder / config["checkpointing"]["run_name"]


@pytest.fixture(scope="module")
def of_pico(golden):
    return json.loads((golden / "golden.json").read_text())


def logged(run_dir, pattern):
    (log,) = (run_dir / "logs").glob("log_*.log")
    return re.findall(pattern, log.read_text())


def test_losses_in_picos_log_lines(run_dir, of_pico):
    losses = [float(loss) for loss in logged(run_dir, r"├── Loss: (\d+\.\d{4})\n")]
    assert losses == pytest.approx(of_pico["losses_logged"], abs=2e-4)


def test_learning_rates_in_picos_log_lines(run_dir, of_pico):
    assert logged(run_dir, r"├── Learning Rate: (\S+)\n") == of_pico["learning_rates_logged"]


@pytest.mark.parametrize("step", [0, 2, 4, 6])
def test_weights(run_dir, of_pico, step):
    _, state = import_model(run_dir / "checkpoints" / f"step_{step}")
    expected = of_pico["weights"][str(step)]
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.double().norm().item() == pytest.approx(expected[name]["l2"], rel=1e-5), name
        assert tensor.flatten()[:4].tolist() == pytest.approx(expected[name]["first"], abs=2e-5), name


@pytest.mark.parametrize("step", [0, 2, 4, 6])
def test_paloma(run_dir, of_pico, step):
    result = json.loads((run_dir / "eval_results" / f"step_{step}.json").read_text())
    assert result["paloma"] == pytest.approx(of_pico["paloma_mean_document_perplexity"][str(step)], rel=1e-3)
