"""``--dry-run``: build everything that training would, say what it is and costs, train and write nothing."""

from __future__ import annotations

from pico_fast.checkpoint.state import state_tensors
from pico_fast.config import Config
from pico_fast.data.errors import DataError, TokenizerError
from pico_fast.flops import FLOPS_CONVENTION, flops_per_token, parameter_counts, training_memory
from pico_fast.model.build import build_kernels, build_model
from pico_fast.optim import build_optimizer, learning_rate
from pico_fast.parallel.layout import Layout, layout_of
from pico_fast.parallel.mesh import Axis, Parallel
from pico_fast.parallel.traffic import step_traffic
from pico_fast.runtime import Runtime, start_runtime, world_size
from pico_fast.setup_run import open_inputs, shown_kernels


def print_dry_run(config: Config) -> None:
    """Build model and optimizer, open data and tokenizer; print parameters, memory, FLOPs and the batch arithmetic.

    Of several processes one is enough: it builds rank 0's part and waits for no other. Where the data cannot be opened,
    all that does not depend on them is printed before the DataError is raised.
    """
    runtime = start_runtime(config)
    layout = layout_of(config.parallel, world_size())
    kernels = build_kernels(config, runtime)
    try:
        inputs, failure = open_inputs(config, runtime, kernels), None
    except (DataError, TokenizerError) as error:
        inputs, failure = None, error
    model = build_model(config, kernels, runtime, Parallel(world_size=layout.world_size, tp=Axis(layout.tp)))
    optimizer = build_optimizer(model, config.training.optimization)

    shape, training = config.model, config.training
    batch, accumulation = config.data.dataloader.batch_size, training.optimization.gradient_accumulation_steps
    rows, length = (
        batch // accumulation // layout.dp_size,
        shape.max_seq_len if inputs is None else inputs.rows.row_len - 1,
    )
    counts = parameter_counts(shape)
    flops = flops_per_token(shape, length)
    recomputed = config.parallel.activation_checkpointing
    memory = training_memory(
        shape,
        precision=training.fabric.precision,
        rows=rows,
        seq_len=length,
        micro_batches=accumulation,
        layout=layout,
        recomputed=recomputed,
    )
    built = sum(tensor.numel() for tensor in state_tensors(model, optimizer).values())
    total_tokens = training.max_steps * batch * length
    rates = [learning_rate(training, step) for step in (0, training.max_steps // 2, training.max_steps - 1)]
    n_rows = None if inputs is None else inputs.rows.n_rows_known
    known = "rows not counted" if n_rows is None else f"{n_rows:,} rows"
    lines = [
        *(f"warning: {warning}" for warning in (runtime.warnings if inputs is None else inputs.warnings)),
        f"device       {runtime.device}, {training.fabric.precision}, {runtime.threads} CPU threads",
        f"kernels      {shown_kernels(kernels)}",
        *_layout_lines(config, layout, runtime, rows * length, built),
        f"parameters   {counts.total:,}: embedding {counts.embedding:,}, head {counts.head:,}, "
        f"blocks {counts.non_embedding:,}",
        f"FLOPs        {flops / 1e6:,.1f} M per token, {flops * batch * length:.3g} per step, "
        f"{flops * total_tokens:.3g} in all ({FLOPS_CONVENTION})",
        f"batch        {batch} rows x {length} tokens = {batch * length:,} tokens per step: {accumulation} "
        f"micro-batch(es) of {rows} rows ({rows * length:,} tokens)"
        + (f" on each of {layout.dp_size} data-parallel ranks" if layout.dp_size > 1 else ""),
        f"training     {training.max_steps:,} steps, {total_tokens:,} tokens; learning rate "
        f"{rates[0]:.3g} at the first step, {rates[1]:.3g} halfway, {rates[2]:.3g} at the last",
        f"data         {config.data.dataset.name}: {known}",
        f"memory       {memory.total / 1e9:.2f} GB estimated{' per process' if layout.world_size > 1 else ''}: "
        f"weights {memory.weights / 1e9:.2f}, gradients {memory.gradients / 1e9:.2f}, Adam {memory.moments / 1e9:.2f}, "
        f"activations {memory.activations / 1e9:.2f}",
        "dry run: nothing was trained or written",
    ]
    print("\n".join(lines), flush=True)
    if failure is not None:
        raise failure


def _layout_lines(config: Config, layout: Layout, runtime: Runtime, tokens: int, built: int) -> list[str]:
    """What several processes share and say to each other; nothing of one process."""
    if layout.world_size == 1:
        return []
    traffic = step_traffic(
        config.model,
        layout,
        micro_batches=config.training.optimization.gradient_accumulation_steps,
        tokens=tokens,
        activation_bytes=runtime.compute_dtype.itemsize,
        recomputed=config.parallel.activation_checkpointing,
    )
    return [
        f"processes    {layout.world_size}: {layout}; each holds {built // layout.dp_shard:,} parameters",
        f"traffic      {traffic.total / 1e6:,.1f} MB sent per process and step: tp {traffic.tp / 1e6:,.1f}, dp_shard "
        f"{traffic.dp_shard / 1e6:,.1f}, dp_replicate {traffic.dp_replicate / 1e6:,.1f}",
    ]
