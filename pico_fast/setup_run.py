"""Setting a run up: its inputs, its directory, its model, and the checkpoint that it goes on from."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pico_kernels import KernelSet

from pico_fast.checkpoint.layout import RunLayout, default_run_name
from pico_fast.checkpoint.load import latest_good
from pico_fast.checkpoint.lock import RunLock
from pico_fast.checkpoint.rng import set_rng_state
from pico_fast.checkpoint.save import remove_leftovers
from pico_fast.checkpoint.state import LoadedState, StateMismatchError, load_state_tensors
from pico_fast.config import Config
from pico_fast.config_io import changes, to_yaml
from pico_fast.data.errors import TokenizerError
from pico_fast.data.evaluation_documents import Documents, load_documents
from pico_fast.data.source import TokenRows, open_rows
from pico_fast.data.tokenizer import Tokenizer, load_tokenizer
from pico_fast.flops import flops_per_token, parameter_counts, peak_flops
from pico_fast.model.build import build_kernels, build_model
from pico_fast.model.decoder import PicoDecoder
from pico_fast.monitor import Monitor, SilentMonitor
from pico_fast.optim import build_optimizer
from pico_fast.parallel.agreement import from_main, ranks_that_differ, together
from pico_fast.parallel.data_parallel import parallelise
from pico_fast.parallel.layout import layout_of, row_problem
from pico_fast.parallel.mesh import SINGLE, Parallel
from pico_fast.run import Run, machine
from pico_fast.runtime import GracefulStop, Runtime, UsageError, world_size


@dataclass(frozen=True)
class Inputs:
    """What the user gave, opened and looked at. ``warnings`` are for the user, one line each."""

    kernels: KernelSet
    rows: TokenRows
    tokenizer: Tokenizer | None
    documents: Documents | None
    warnings: tuple[str, ...]


def open_inputs(config: Config, runtime: Runtime, kernels: KernelSet) -> Inputs:
    """Open data and tokenizer. Raises UsageError, DataError or TokenizerError; writes nothing."""
    warnings = list(runtime.warnings)
    model, dataset = config.model, config.data.dataset
    rows = open_rows(dataset.name, dataset.split, dataset.revision, vocab_size=model.vocab_size)
    if rows.row_len > model.max_seq_len + 1:
        raise UsageError(
            f"data.dataset.name: {dataset.name} has rows of {rows.row_len} ids, model.max_seq_len = "
            f"{model.max_seq_len} allows {model.max_seq_len + 1} (inputs and labels overlap by all but one)"
        )
    if rows.row_len < model.max_seq_len + 1:
        warnings.append(
            f"{dataset.name} has rows of {rows.row_len} ids: the model sees {rows.row_len - 1} tokens at a time, "
            f"less than model.max_seq_len = {model.max_seq_len}"
        )
    problem = row_problem(config, rows.row_len - 1, world_size())
    if problem is not None:
        raise UsageError(f"data.dataset.name: {dataset.name} {problem}")
    tokenizer = None
    try:
        tokenizer = load_tokenizer(config.data.tokenizer.name)
    except TokenizerError as error:
        warnings.append(f"{error}. Training goes on without one; the checkpoints will have no tokenizer files")
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise UsageError(
            f"data.tokenizer.name: {tokenizer.name} has {tokenizer.vocab_size} ids, "
            f"model.vocab_size is {model.vocab_size}"
        )
    documents = None
    if "paloma" in (config.evaluation.metrics or []):
        documents = load_documents(config.evaluation.paloma, tokenizer, model.max_seq_len, model.vocab_size)
    if config.checkpointing.save_to_hf:
        warnings.append("checkpointing.save_to_hf: this version does not upload, checkpoints stay on this disk")
    return Inputs(kernels, rows, tokenizer, documents, tuple(warnings))


@contextlib.contextmanager
def prepare_run(config: Config, runtime: Runtime, stop: GracefulStop, parallel: Parallel = SINGLE) -> Iterator[Run]:
    """Open the inputs, lock the run directory, build the model and load the newest good checkpoint.

    Nothing is written before everything that the user gave has been looked at. Raises UsageError, DataError,
    TokenizerError, MonitorError or RunLockedError for wrong input, CheckpointError if a run has checkpoints and none
    of them is good. What one rank raises all raise.
    """
    if config.checkpointing.run_name is None:
        config.checkpointing.run_name = from_main(parallel, default_run_name)
    layout = RunLayout.from_config(config.checkpointing)
    with together(parallel):
        inputs = open_inputs(config, runtime, build_kernels(config, runtime))
        fingerprint = inputs.rows.fingerprint()
    _require_same_data(config, fingerprint, parallel)
    with contextlib.ExitStack() as stack:
        yield _enter_run(stack, config, runtime, layout, inputs, fingerprint, stop, parallel)


def _require_same_data(config: Config, fingerprint: str, parallel: Parallel) -> None:
    """Raises UsageError, on all ranks, where one has other data: its node has other files."""
    others = ranks_that_differ(parallel, fingerprint)
    if others:
        raise UsageError(
            f"rank(s) {', '.join(map(str, others))} have another dataset (data.dataset.name: "
            f"{config.data.dataset.name}) than rank 0; give every node the same"
        )


@contextlib.contextmanager
def _blaming_run_dir(layout: RunLayout) -> Iterator[None]:
    """Raises UsageError for an OSError: only the run directory is written to."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{error.filename or layout.root}: {error.strerror or error}; the run directory must be writable "
            "(checkpointing.runs_dir, checkpointing.run_name) and its disk not full"
        ) from None


def _enter_run(
    stack: contextlib.ExitStack,
    config: Config,
    runtime: Runtime,
    layout: RunLayout,
    inputs: Inputs,
    fingerprint: str,
    stop: GracefulStop,
    parallel: Parallel,
) -> Run:
    """Lock, model, checkpoint and monitor; ``stack`` gives back what was taken. Rank 0 alone locks and writes."""
    with together(parallel), _blaming_run_dir(layout):
        if parallel.is_main:
            stack.enter_context(RunLock(layout))
            remove_leftovers(layout)
        model = build_model(config, inputs.kernels, runtime, parallel)
    loss_function = parallelise(model, runtime, parallel)
    optimizer = build_optimizer(model, config.training.optimization)
    notes = list(inputs.warnings)
    found = latest_good(layout, parallel)
    counters: dict[str, Any] = {"step": 0}
    if found is not None:
        step, state, rejected = found
        notes += [f"step_{damaged} was passed over: {reason}" for damaged, reason in rejected]
        with together(parallel):
            notes += _resume(config, runtime, layout, state, model, optimizer, fingerprint, parallel)
        latest = from_main(parallel, layout.latest_step)
        durable = step if state.source == "pico-fast" and latest == step else None
        counters = {"step": step, "saved_step": durable, "resumed_step": step}
        counters |= {name: state.meta.get(name, 0) for name in ("nonfinite", "nonfinite_in_a_row")}
    monitor: Monitor | SilentMonitor = SilentMonitor(config)
    with together(parallel), _blaming_run_dir(layout):
        if parallel.is_main:
            seq_len = inputs.rows.row_len - 1
            monitor = stack.enter_context(open_monitor(config, runtime, layout, seq_len, counters, parallel))
            introduce(monitor, config, runtime, layout, inputs, parallel, resumed=found is not None)
            for note in notes:
                monitor.warning(note)
            write_config(layout, config)
    return Run(
        config=config,
        runtime=runtime,
        layout=layout,
        stop=stop,
        monitor=monitor,
        model=model,
        loss_function=loss_function,
        optimizer=optimizer,
        rows=inputs.rows,
        data_fingerprint=fingerprint,
        tokenizer=inputs.tokenizer,
        documents=inputs.documents,
        parallel=parallel,
        **counters,
    )


def _resume(
    config: Config,
    runtime: Runtime,
    layout: RunLayout,
    state: LoadedState,
    model: PicoDecoder,
    optimizer: Any,
    fingerprint: str,
    parallel: Parallel,
) -> list[str]:
    """Load ``state``; returns what differs from the run that saved it. Raises UsageError where it cannot go on."""
    if not config.checkpointing.training.auto_resume:
        raise UsageError(
            f"{layout.root} has a checkpoint of step {state.step} and checkpointing.training.auto_resume is false: "
            "give another checkpointing.run_name, or resume"
        )
    notes = list(state.warnings)
    before = state.meta.get("config")
    if before is not None:
        changed = list(changes(before, dataclasses.asdict(config)))
        if any(key.startswith("model.") for key, _, _ in changed):
            raise UsageError(
                f"{layout.step_dir(state.step)} is of another model: "
                + "; ".join(f"{key} was {old}, now {new}" for key, old, new in changed if key.startswith("model."))
                + "; give the old values or another checkpointing.run_name"
            )
        notes += [f"changed since the last checkpoint: {key} was {old!r}, now {new!r}" for key, old, new in changed]
    for name, old, new in changes(state.meta.get("machine", {}), machine(config, runtime, parallel)):
        notes.append(f"{name} was {old}, now {new}: the run goes on, but not bit for bit as it would have there")
    if state.source == "pico-train":
        saved, now = state.meta["param_groups"][0], optimizer.param_groups[0]
        differing = [key for key in ("weight_decay", "betas", "eps") if saved.get(key, now[key]) != now[key]]
        notes += [f"pico-train ran with {key} = {saved[key]}, the configuration has {now[key]}" for key in differing]
    if state.meta.get("data_fingerprint", fingerprint) != fingerprint:
        notes.append(
            f"data.dataset.name: {config.data.dataset.name} is not what the run was trained on before; "
            f"step {state.step} goes on with rows counted in the new data"
        )
    try:
        load_state_tensors(model, optimizer, state.tensors, parallel)
    except StateMismatchError as error:
        raise UsageError(f"{layout.step_dir(state.step)}: {error}") from None
    unset = set_rng_state(state.meta.get("rng", {}))
    if unset:
        notes.append(f"random generators not in the checkpoint, left as they are: {', '.join(unset)}")
    return notes


def open_monitor(
    config: Config,
    runtime: Runtime,
    layout: RunLayout,
    seq_len: int,
    counters: Mapping[str, Any],
    parallel: Parallel = SINGLE,
) -> Monitor:
    """The run's monitor; measures the device's matmul rate (0.2 s) where no vendor figure is known."""
    peak, source = peak_flops(runtime.device, runtime.compute_dtype)
    if parallel.active:
        peak, source = peak * parallel.world_size, f"{source}, times {parallel.world_size} processes"
    return Monitor(
        config,
        run_dir=layout.root,
        metrics_file=layout.metrics,
        logs_dir=layout.logs,
        wandb_id_file=layout.wandb_id,
        start_step=counters["step"],
        tokens_per_step=config.data.dataloader.batch_size * seq_len,
        flops_per_token=flops_per_token(config.model, seq_len),
        peak=(peak, source),
        device=runtime.device,
        resumed="resumed_step" in counters,
        nonfinite_before=counters.get("nonfinite", 0),
    )


def introduce(
    monitor: Monitor,
    config: Config,
    runtime: Runtime,
    layout: RunLayout,
    inputs: Inputs,
    parallel: Parallel,
    *,
    resumed: bool,
) -> None:
    """Say what runs, on what, where, and what of the configuration this version does not do."""
    wanted = config.training.max_steps * config.data.dataloader.batch_size
    monitor.info(
        f"{layout.root}: {parameter_counts(config.model).total:,} parameters, "
        f"{config.training.fabric.precision} on {runtime.device} with {runtime.threads} CPU threads"
    )
    if parallel.active:
        monitor.info(f"{parallel.world_size} processes: {layout_of(config.parallel, parallel.world_size)}")
    monitor.info(f"kernels: {shown_kernels(inputs.kernels)}")
    n_rows = inputs.rows.n_rows_known  # of a hub dataset unknown: it would cost a request per shard
    if n_rows is not None and n_rows < wanted:
        monitor.info(
            f"{config.data.dataset.name} has {n_rows:,} rows, training reads {wanted:,}: "
            f"{wanted / n_rows:.1f} passes in the same order"
        )
    if inputs.documents is not None:
        shorter = [ids for ids in inputs.documents if len(ids) < 2]
        monitor.info(
            f"evaluation: {len(inputs.documents) - len(shorter)} documents of {inputs.documents.name}, "
            f"{inputs.documents.truncated} of them cut to their first tokens, {len(shorter)} too short to count"
        )
    monitor.info(
        "learning dynamics (checkpointing.learning_dynamics) are not recorded by this version; "
        "weights of every checkpoint are"
    )
    if resumed:
        monitor.info("resuming; metrics.jsonl goes on, and its last word on a step counts")


def shown_kernels(kernels: KernelSet) -> str:
    """``torch`` where every op has the same implementation, else ``rope reference, swiglu torch, ...``."""
    chosen = kernels.describe()
    names = set(chosen.values())
    return names.pop() if len(names) == 1 else ", ".join(f"{op} {name}" for op, name in chosen.items())


def write_config(layout: RunLayout, config: Config) -> None:
    """Write ``training_config.yaml`` anew, atomically. Raises OSError."""
    temporary = layout.training_config.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(to_yaml(config))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, layout.training_config)
