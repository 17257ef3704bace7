"""The configuration: dataclasses that *are* the YAML schema.

The first six sections (``data``, ``model``, ``training``, ``evaluation``, ``monitoring``, ``checkpointing``) carry
pico-train's keys and defaults (github.com/pico-lm/pico-train), so its YAML files run unchanged. Keys that
pico-train does not have stand after the comment ``pico-fast``; ``kernels``, ``parallel`` and ``runtime`` are sections
of our own.

A field's bounds and choices stand in its metadata (see :func:`setting`), rules between fields in :func:`problems`.
Reading, overriding, checking and writing YAML is in :mod:`pico_fast.config_io`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import Any, Literal

from pico_fast.parallel.layout import layout_of, layout_problems


def setting(
    default: Any,
    *,
    choices: Sequence[Any] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field and its bounds: one of ``choices``, at least ``low``, more than ``above``, at most ``high``."""
    metadata = {"choices": tuple(choices), "low": low, "above": above, "high": high}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DatasetConfig:
    """Rows of ``max_seq_len + 1`` token ids: a local folder of parquet files, or a Hugging Face dataset."""

    name: str = "pico-lm/pretokenized-dolma"
    # pico-fast
    split: str = "train"
    revision: str | None = None


@dataclass
class DataLoaderConfig:
    """``batch_size`` is the global number of rows of one optimizer step."""

    batch_size: int = setting(1024, low=1)
    # pico-fast
    prefetch: int = setting(4, low=1)


@dataclass
class TokenizerConfig:
    """A Hugging Face name, a folder, or a ``tokenizers`` JSON file; training itself needs none.

    ``vocab_size`` is unused, as in pico-train: ``model.vocab_size`` decides.
    """

    name: str = "allenai/OLMo-7B-0724-hf"
    vocab_size: int = setting(50304, low=1)


@dataclass
class DataConfig:
    """What is trained on."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    dataloader: DataLoaderConfig = field(default_factory=DataLoaderConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


@dataclass
class ModelConfig:
    """Shape of the decoder. ``batch_size`` is unused, as in pico-train."""

    model_type: str = setting("pico_decoder", choices=("pico_decoder",))
    d_model: int = setting(768, low=1)
    n_layers: int = setting(12, low=1)
    vocab_size: int = setting(50304, low=1)
    batch_size: int = setting(1024, low=1)
    max_seq_len: int = setting(2048, low=1)
    attention_n_heads: int = setting(12, low=1)
    attention_n_kv_heads: int = setting(4, low=1)
    activation_hidden_dim: int = setting(3072, low=1)
    norm_eps: float = setting(1e-6, above=0)
    position_emb_theta: float = setting(10000.0, above=0)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.attention_n_heads


@dataclass
class FabricConfig:
    """``num_nodes`` and ``num_devices`` describe pico's cluster; torchrun's world size wins."""

    num_nodes: int = setting(1, low=1)
    num_devices: int = setting(1, low=1)
    precision: str = setting("bf16-mixed", choices=("bf16-mixed", "bf16-true", "32-true"))
    accelerator: str = setting("cuda", choices=("cuda", "gpu", "cpu", "mps", "auto"))


@dataclass
class OptimizationConfig:
    """One optimizer step sees ``data.dataloader.batch_size`` rows in ``gradient_accumulation_steps`` micro-batches."""

    optimizer: str = setting("adamw", choices=("adamw",))
    lr: float = setting(3e-4, low=0)
    lr_scheduler: str = setting("linear_with_warmup", choices=("linear_with_warmup", "cosine", "wsd", "constant"))
    lr_warmup_steps: int = setting(2500, low=0)
    gradient_accumulation_steps: int = setting(128, low=1)
    # pico-fast
    lr_min_ratio: float = setting(0.0, low=0, high=1)  # cosine and wsd end at lr * lr_min_ratio
    lr_decay_steps: int | None = setting(None, low=1)  # wsd: length of the final decay; null is a tenth of max_steps
    weight_decay: float = setting(0.01, low=0)  # on every parameter, as torch's default in pico's published runs
    beta1: float = setting(0.9, low=0)
    beta2: float = setting(0.999, low=0)
    eps: float = setting(1e-8, above=0)
    max_grad_norm: float | None = setting(None, above=0)  # null: no clipping, as the published runs
    skip_nonfinite: bool = False  # leave weights and moments as they were when the loss is NaN or infinite
    max_nonfinite_in_a_row: int | None = setting(None, low=1)  # stop with an error after so many; null: only count


@dataclass
class TrainingConfig:
    """How long, on what, and how."""

    fabric: FabricConfig = field(default_factory=FabricConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    max_steps: int = setting(200_000, low=1)


@dataclass
class PalomaConfig:
    """Perplexity of documents: rows with ``text`` (tokenised here, as pico-train does) or ``input_ids``."""

    dataset_name: str = "pico-lm/pretokenized-paloma-tinsy"
    dataset_split: str = "val"
    max_length: int = setting(2048, low=2)
    batch_size: int = setting(16, low=1)
    # pico-fast
    column: str = setting("auto", choices=("auto", "text", "input_ids"))  # auto: text if the data has it
    limit: int | None = setting(None, low=1)  # only the first so many documents
    revision: str | None = None


@dataclass
class EvaluationConfig:
    """``metrics: []`` turns evaluation off."""

    metrics: list[str] | None = setting(["paloma"], choices=("paloma",))
    paloma: PalomaConfig = field(default_factory=PalomaConfig)
    # pico-fast
    every_n_steps: int | None = setting(None, low=1)  # null: at every checkpoint, as pico-train


@dataclass
class LoggingConfig:
    """``log_every_n_steps``: one metrics entry (mean loss of the interval) every so many steps."""

    log_level: str = setting("INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    log_every_n_steps: int = setting(100, low=1)


@dataclass
class WandbConfig:
    """Weights & Biases; needs the package (``pip install 'pico-fast[wandb]'``) and, online, WANDB_API_KEY."""

    project: str | None = ""
    entity: str | None = ""
    # pico-fast
    mode: str = setting("online", choices=("online", "offline", "disabled"))


@dataclass
class MonitoringConfig:
    """What the user sees while it runs."""

    logging: LoggingConfig = field(default_factory=LoggingConfig)
    save_to_wandb: bool = False
    wandb: WandbConfig = field(default_factory=WandbConfig)
    # pico-fast
    progress: str = setting("auto", choices=("auto", "bar", "plain", "off"))  # auto: a bar on a terminal


@dataclass
class HFCheckpointConfig:
    """Where pico-train uploads checkpoints."""

    repo_id: str | None = ""
    collection_slug: str | None = None


@dataclass
class CheckpointingTrainingConfig:
    """``auto_resume``: go on from the newest good checkpoint of the run directory, if there is one."""

    auto_resume: bool = True


@dataclass
class CheckpointingEvaluationConfig:
    """Folder names, as in pico-train."""

    eval_results_dir: str = "eval_results"


@dataclass
class LearningDynamicsConfig:
    """What pico-train records of the training dynamics."""

    layer_suffixes: list[str] = setting(["attention.v_proj", "attention.o_proj", "swiglu.w_2"])
    sequence_idx: int = -1
    batch_size: int = setting(8, low=1)
    eval_data: str | None = "pico-lm/pretokenized-paloma-tinsy"


@dataclass
class CheckpointingConfig:
    """The run directory ``runs_dir/run_name`` and what is kept in it."""

    run_name: str | None = None
    runs_dir: str = "runs"
    checkpoints_dir: str = "checkpoints"
    logs_dir: str = "logs"
    fabric_checkpoint_dir: str = "fabric_state"  # pico-train's own state: read to resume an old run
    fabric_checkpoint_filename: str = "checkpoint.pt"
    learning_dynamics_dir: str = "learning_dynamics"
    save_every_n_steps: int = setting(1000, low=1)
    save_to_hf: bool = False
    hf_checkpoint: HFCheckpointConfig = field(default_factory=HFCheckpointConfig)
    training: CheckpointingTrainingConfig = field(default_factory=CheckpointingTrainingConfig)
    evaluation: CheckpointingEvaluationConfig = field(default_factory=CheckpointingEvaluationConfig)
    learning_dynamics: LearningDynamicsConfig = field(default_factory=LearningDynamicsConfig)
    # pico-fast
    log_spaced: bool = False  # also save at 1, 2, 4, 8, ... up to save_every_n_steps, as Pythia
    keep_last: int | None = setting(None, low=1)  # null: keep all
    keep_every: int | None = setting(None, low=1)  # with keep_last: never delete multiples of this
    max_failed_saves: int = setting(3, low=1)  # stop after so many failed saves in a row


@dataclass
class KernelsConfig:
    """Each op's implementation: ``auto``, one of the op's own (``reference``, ``torch``), ``package.module:function``.

    An op left null uses ``default``.
    """

    default: str = "auto"
    rms_norm: str | None = None
    add_rms_norm: str | None = None
    rope: str | None = None
    swiglu: str | None = None
    attention: str | None = None
    linear_cross_entropy: str | None = None


@dataclass
class ParallelConfig:
    """How the processes that torchrun starts share the work: ``dp_replicate * dp_shard * tp`` of them.

    Activation checkpointing recomputes in the backward pass what it does not keep: whole blocks, or their attention.
    """

    tp: int = setting(1, low=1)  # ranks that split heads, hidden units and tokens; 1, 2 or 4 for Pico's models
    dp_replicate: int | Literal["auto"] = setting("auto", low=1)  # ranks with all weights; auto fills the world
    dp_shard: int = setting(1, low=1)  # ranks that hold a shard of the weights each (FSDP2)
    timeout_s: int = setting(600, low=1)  # a collective that takes longer ends the run: a rank has died or hangs
    activation_checkpointing: str = setting("none", choices=("none", "block", "attention"))
    symmetric_memory: bool = False  # products fused with their communication, over NVLink


@dataclass
class RuntimeConfig:
    """The process itself."""

    seed: int = setting(42, low=0, high=2**63 - 1)  # pico-train's fixed seed; decides the initial weights
    threads: int | None = setting(None, low=1)  # CPU threads of torch; null: this node's cores / its processes


@dataclass
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @property
    def eval_every_n_steps(self) -> int:
        """Steps between evaluations: pico-train's save interval unless given."""
        return self.evaluation.every_n_steps or self.checkpointing.save_every_n_steps


def _values_out_of_bounds(section: Any, prefix: str) -> Iterator[str]:
    for f in fields(section):
        value, key = getattr(section, f.name), f"{prefix}{f.name}"
        if hasattr(value, "__dataclass_fields__"):
            yield from _values_out_of_bounds(value, f"{key}.")
            continue
        choices, low, above, high = (f.metadata.get(name) for name in ("choices", "low", "above", "high"))
        for item in value if isinstance(value, list) else [value]:
            if choices and item is not None and item not in choices:
                yield f"{key}: {item!r} is not one of {', '.join(map(str, choices))}"
            if not isinstance(item, (int, float)):  # null, or a word such as auto
                continue
            if low is not None and not item >= low:
                yield f"{key}: {item} must be at least {low}"
            if above is not None and not item > above:
                yield f"{key}: {item} must be greater than {above}"
            if high is not None and not item <= high:
                yield f"{key}: {item} must be at most {high}"


def problems(config: Config, world_size: int | None = None) -> list[str]:
    """What is wrong with the values of ``config``: messages with dotted keys.

    ``world_size`` is the number of processes that are to train; None where nothing is, so that a tool of one process
    reads the configuration of a parallel run.
    """
    found = list(_values_out_of_bounds(config, ""))
    model, optimization = config.model, config.training.optimization
    if not any(_values_out_of_bounds(config.parallel, "parallel.")):
        unfitting = layout_problems(config, world_size)
        found += unfitting
        sizes = config.data.dataloader.batch_size, optimization.gradient_accumulation_steps
        if min(sizes) > 0 and not unfitting:  # else into how many shares rows are dealt is not known
            found += _batch_problems(config, world_size)
    if min(model.d_model, model.attention_n_heads, model.attention_n_kv_heads) > 0:
        found += _head_problems(model)
    if optimization.beta1 >= 1 or optimization.beta2 >= 1:
        found.append(f"training.optimization.beta1, beta2: {optimization.beta1}, {optimization.beta2} must be below 1")
    name = config.checkpointing.run_name
    if name is not None and (not name or name in {".", ".."} or "/" in name or "\\" in name):
        found.append(f"checkpointing.run_name: {name!r} must be one folder name, without '/'")
    return found + list(_folder_problems(config.checkpointing))


def _folder_problems(checkpointing: CheckpointingConfig) -> Iterator[str]:
    """The folders of a run must lie in it, under its lock, and apart from each other."""
    inside_run = ("checkpoints_dir", "logs_dir")
    inside_step = ("fabric_checkpoint_dir", "learning_dynamics_dir")
    folders = {f"checkpointing.{name}": getattr(checkpointing, name) for name in (*inside_run, *inside_step)}
    folders["checkpointing.evaluation.eval_results_dir"] = checkpointing.evaluation.eval_results_dir
    for key, folder in folders.items():
        parts = PurePath(folder).parts
        if not parts or PurePath(folder).is_absolute() or ".." in parts:
            yield f"{key}: {folder!r} must be a folder inside the run directory, such as {key.rsplit('.', 1)[1]!r}"
    if len({PurePath(folder) for folder in folders.values()}) < len(folders):
        yield f"{', '.join(folders)}: {', '.join(folders.values())} must be different folders"


def _batch_problems(config: Config, world_size: int | None) -> Iterator[str]:
    batch = config.data.dataloader.batch_size
    accumulation = config.training.optimization.gradient_accumulation_steps
    dp_size = layout_of(config.parallel, world_size).dp_size
    unit = accumulation * dp_size
    if batch % unit:
        below = batch // unit * unit
        yield (
            f"data.dataloader.batch_size: {batch} rows do not divide into training.optimization."
            f"gradient_accumulation_steps = {accumulation} micro-batches on {dp_size} data-parallel process(es); "
            f"give a multiple of {unit}, such as {f'{below} or ' if below else ''}{below + unit}"
        )


def _head_problems(model: ModelConfig) -> Iterator[str]:
    heads, kv_heads = model.attention_n_heads, model.attention_n_kv_heads
    if model.d_model % heads:
        yield f"model.attention_n_heads: {heads} heads do not divide model.d_model = {model.d_model}"
    elif model.head_dim % 2:
        yield (
            f"model.attention_n_heads: {heads} heads of model.d_model = {model.d_model} give the odd head width "
            f"{model.head_dim}; rotary embeddings need an even one"
        )
    if heads % kv_heads:
        yield f"model.attention_n_kv_heads: {kv_heads} does not divide model.attention_n_heads = {heads}"
