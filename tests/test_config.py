"""The configuration: pico's files unchanged, every mistake named at once."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from pico_fast.config import Config
from pico_fast.config_io import ConfigError, load_config, to_yaml
from pico_fast.parallel.layout import layout_of

ROOT = Path(__file__).parents[1]


def problems_of(tmp_path, text="", overrides=(), world_size=1):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides, world_size=world_size)
    return error.value.problems


def test_no_file_means_picos_defaults():
    config = load_config()
    assert config.data.dataset.name == "pico-lm/pretokenized-dolma"
    assert config.data.dataloader.batch_size == 1024
    assert config.model.d_model == 768
    assert config.training.optimization.gradient_accumulation_steps == 128
    assert config.checkpointing.learning_dynamics.layer_suffixes == [
        "attention.v_proj",
        "attention.o_proj",
        "swiglu.w_2",
    ]


def test_the_golden_run_of_pico_loads_unchanged(golden, tmp_path):
    given = json.loads((golden / "golden.json").read_text())["config"]
    path = tmp_path / "pico.yaml"
    path.write_text(yaml.safe_dump(given))
    loaded = dataclasses.asdict(load_config(path))

    def contained(part, whole):
        return all(contained(v, whole[k]) if isinstance(v, dict) else whole[k] == v for k, v in part.items())

    assert contained(given, loaded)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_the_project_is_valid(path):
    assert isinstance(load_config(path), Config)


def test_written_yaml_reads_back_as_the_same_config(tmp_path):
    config = load_config(None, ["model.d_model=96", "checkpointing.keep_last=3", "training.optimization.lr=1e-3"])
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "written.yaml") == config


@pytest.mark.parametrize("written", ["3e-4", "'3e-4'", "3.0e-4", "0.0003"])
def test_a_learning_rate_is_a_number_however_it_is_written(tmp_path, written):
    (tmp_path / "config.yaml").write_text(f"training: {{optimization: {{lr: {written}}}}}")
    assert load_config(tmp_path / "config.yaml").training.optimization.lr == pytest.approx(3e-4)


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {d_model: 96, n_layers: 2}")
    config = load_config(tmp_path / "config.yaml", ["model.n_layers=3", "evaluation.metrics=[]"])
    assert (config.model.d_model, config.model.n_layers, config.evaluation.metrics) == (96, 3, [])


def test_every_problem_is_listed_at_once_with_its_key(tmp_path):
    found = problems_of(
        tmp_path,
        """
        model: {d_modle: 96, n_layers: twelve, attention_n_heads: 7, norm_eps: 0}
        data: {dataloader: {batch_size: 1000}}
        training:
        monitoring: {logging: {log_level: LOUD}}
        checkpointing: {save_to_hf: 3, run_name: ../elsewhere}
        """,
        ["kernals.rope=torch", "nonsense"],
    )
    expected = [
        "model.d_modle: unknown key; did you mean 'd_model'?",
        "model.n_layers: an integer expected, 'twelve' given",
        "model.attention_n_heads: 7 heads do not divide model.d_model = 768",
        "model.attention_n_kv_heads: 4 does not divide model.attention_n_heads = 7",
        "model.norm_eps: 0.0 must be greater than 0",
        "data.dataloader.batch_size: 1000 rows do not divide",
        "training: empty section",
        "monitoring.logging.log_level: 'LOUD' is not one of DEBUG, INFO, WARNING, ERROR",
        "checkpointing.save_to_hf: true or false expected, 3 given",
        "checkpointing.run_name: '../elsewhere' must be one folder name",
        "kernals: unknown key; did you mean 'kernels'?",
        "'nonsense': an override is section.key=value",
    ]
    for start in expected:
        assert any(problem.startswith(start) for problem in found), (start, found)
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: 3", "model: a section with keys expected, 3 given"),
        ("- a list", "sections with keys expected, list given"),
        ("model: {d_model: 1, d_model: 2}", "repeated or unusable key 'd_model'"),
        ("model: {", "not valid YAML"),
        ("model: {d_model: 1.5}", "model.d_model: an integer expected, 1.5 given"),
        ("model: {d_model: true}", "model.d_model: an integer expected, true given"),
        ("model: {n_layers: 0}", "model.n_layers: 0 must be at least 1"),
        ("model: {attention_n_heads: 256}", "odd head width 3"),
        ("training: {optimization: {lr: fast}}", "training.optimization.lr: a number expected, 'fast' given"),
        ("training: {optimization: {lr: .nan}}", "training.optimization.lr: nan must be at least 0"),
        ("training: {fabric: {precision: fp8}}", "'fp8' is not one of bf16-mixed, bf16-true, 32-true"),
        ("evaluation: {metrics: [blimp]}", "'blimp' is not one of paloma"),
    ],
)
def test_bad_values_are_named(tmp_path, text, problem):
    assert problem in "\n".join(problems_of(tmp_path, text))


def test_batch_must_divide_over_all_processes(tmp_path):
    text = "data: {dataloader: {batch_size: 24}}\ntraining: {optimization: {gradient_accumulation_steps: 4}}"
    (tmp_path / "config.yaml").write_text(text)
    load_config(tmp_path / "config.yaml", world_size=3)
    load_config(tmp_path / "config.yaml", ["parallel.tp=2"], world_size=4)  # two of the four read the same rows
    assert "give a multiple of 16, such as 16 or 32" in "\n".join(problems_of(tmp_path, text, world_size=4))


@pytest.mark.parametrize(
    ("settings", "world_size", "layout"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 8, (8, 1, 1)),
        ({"tp": 4}, 8, (2, 1, 4)),
        ({"tp": 2, "dp_shard": 2}, 8, (2, 2, 2)),
        ({"dp_shard": 8}, 8, (1, 8, 1)),
        ({"tp": 2, "dp_replicate": 4}, 8, (4, 1, 2)),
        ({"dp_replicate": "auto"}, 2, (2, 1, 1)),
        ({"tp": 2, "dp_shard": 2}, None, (1, 2, 2)),
    ],
)
def test_layouts(settings, world_size, layout):
    overrides = [f"parallel.{key}={value}" for key, value in settings.items()]
    parallel = load_config(None, overrides, world_size=world_size).parallel
    found = layout_of(parallel, world_size)
    assert (found.dp_replicate, found.dp_shard, found.tp) == layout
    assert world_size in (None, found.world_size)


@pytest.mark.parametrize(
    ("overrides", "world_size", "problem"),
    [
        (
            ["parallel.tp=3"],
            3,
            "parallel.tp: 3 does not divide model.attention_n_kv_heads = 4, model.max_seq_len = 2048; with this model "
            "tp may be 1, 2 or 4",
        ),
        (
            ["parallel.tp=8", "model.max_seq_len=2049"],
            8,
            "parallel.tp: 8 does not divide model.attention_n_heads = 12, model.attention_n_kv_heads = 4, "
            "model.max_seq_len = 2049; with this model tp may be 1",
        ),
        (
            ["parallel.tp=2"],
            1,
            "parallel: tp = 2 x dp_shard = 1 needs a multiple of 2 processes, 1 was started; start 2, or give sizes "
            "whose product divides 1 (1)",
        ),
        (
            ["parallel.tp=2", "parallel.dp_shard=2"],
            6,
            "parallel: tp = 2 x dp_shard = 2 needs a multiple of 4 processes, 6 were started; start 4 or 8, or give "
            "sizes whose product divides 6 (1, 2, 3 or 6)",
        ),
        (
            ["parallel.tp=2", "parallel.dp_replicate=3"],
            8,
            "parallel: tp = 2 x dp_shard = 1 x dp_replicate = 3 is 6 processes, 8 were started; start 6, or give "
            "parallel.dp_replicate=auto (here 4)",
        ),
        (["parallel.tp=0"], 1, "parallel.tp: 0 must be at least 1"),
        (["parallel.dp_replicate=0"], 1, "parallel.dp_replicate: 0 must be at least 1"),
        (["parallel.dp_replicate=some"], 1, "parallel.dp_replicate: an integer or auto expected, 'some' given"),
        (["parallel.activation_checkpointing=layer"], 1, "'layer' is not one of none, block, attention"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_with_what_would(overrides, world_size, problem):
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides, world_size=world_size)
    (found,) = error.value.problems
    assert problem in found


def test_a_tool_of_one_process_reads_the_config_of_a_parallel_run(tmp_path):
    config = load_config(None, ["parallel.tp=2", "parallel.dp_replicate=2"], world_size=4)
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "written.yaml") == config


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Config)])
def test_every_choice_of_every_field_can_be_written(tmp_path, field):
    """YAML 1.1 reads off, on, yes and no as booleans; ``monitoring.progress: off`` means the word."""

    def choices(section, prefix):
        for f in dataclasses.fields(section):
            value = getattr(section, f.name)
            if dataclasses.is_dataclass(value):
                yield from choices(value, f"{prefix}{f.name}.")
            elif not isinstance(value, list):
                for choice in f.metadata.get("choices", ()):
                    yield f"{prefix}{f.name}", choice

    for key, choice in choices(getattr(Config(), field), f"{field}."):
        value = load_config(None, [f"{key}={choice}"])
        for part in key.split("."):
            value = getattr(value, part)
        assert value == choice


def test_words_that_look_like_numbers_stay_words():
    names = ["2024", "2025-01-01", "0x10", "1_000", "no"]
    assert [load_config(None, [f"checkpointing.run_name={name}"]).checkpointing.run_name for name in names] == names


def test_anchors_and_merge_keys_are_read_as_pico_train_reads_them(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "data: {dataloader: &loader {batch_size: 256}}\nmodel: {<<: *loader, d_model: 96}\n"
    )
    config = load_config(tmp_path / "config.yaml")
    assert (config.data.dataloader.batch_size, config.model.batch_size, config.model.d_model) == (256, 256, 96)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("checkpointing.checkpoints_dir=/elsewhere", "must be a folder inside the run directory"),
        ("checkpointing.logs_dir=../logs", "must be a folder inside the run directory"),
        ("checkpointing.logs_dir=checkpoints", "must be different folders"),
        ("runtime.seed=99999999999999999999", "must be at most"),
    ],
)
def test_folders_and_seeds_out_of_range(override, problem):
    with pytest.raises(ConfigError, match=problem):
        load_config(None, [override])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)absent\.yaml.*cannot be read"):
        load_config(tmp_path / "absent.yaml")
