"""What the data must be for a layout; what the model must be is in tests/test_config.py."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pico_fast.config_io import load_config
from pico_fast.model.build import build_kernels
from pico_fast.runtime import Runtime, UsageError
from pico_fast.setup_run import open_inputs

CPU = Runtime(torch.device("cpu"), torch.float32, torch.float32, 1)


@pytest.mark.parametrize(
    ("settings", "world_size", "refused"),
    [
        ({"data.dataloader.batch_size": 2}, 2, "1 of them is 15 tokens, which parallel.tp = 2"),
        ({"data.dataloader.batch_size": 4}, 4, "1 of them is 15 tokens, which parallel.tp = 2"),
        ({"data.dataloader.batch_size": 12}, 4, "3 of them is 45 tokens, which parallel.tp = 2"),
        ({"data.dataloader.batch_size": 4}, 2, None),  # 30 tokens
        ({"data.dataloader.batch_size": 4, "parallel.tp": 1}, 2, None),
    ],
)
def test_rows_that_tp_does_not_divide_are_refused(tmp_path, small_run, monkeypatch, settings, world_size, refused):
    """Rows of 16 ids under a max_seq_len of 16, so that the layout alone would do."""
    folder = tmp_path / "short" / "data"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"input_ids": [list(range(16))] * 20}), folder / "train-00000-of-00001.parquet")
    file = small_run(**{"data.dataset.name": str(folder.parent), "parallel.tp": 2, **settings})
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    config = load_config(file, ["evaluation.metrics=[]"], world_size=world_size)
    kernels = build_kernels(config, CPU)
    if refused is None:
        assert open_inputs(config, CPU, kernels).rows.row_len == 16
        return
    with pytest.raises(UsageError, match=r"short has rows of 15 tokens; .* tp may be 1$") as caught:
        open_inputs(config, CPU, kernels)
    assert refused in str(caught.value)
