"""Perplexity of documents on the live weights: pico-train's ``paloma``, and the token-weighted figure beside it.

pico-train reloads each checkpoint in float32 through transformers and calls its Space ``pico-lm/perplexity`` (a fork of
Hugging Face's ``evaluate-metric/perplexity``). That tokenises ``text`` without special or start tokens, cuts it to
``max_length``, takes exp of each document's mean negative log-likelihood over its tokens but the first, and the
**arithmetic mean over documents**: a few unlikely documents decide it, whatever their length. The same numbers come
out of here from the model in memory, in its own compute dtype (32-true: pico-train's float32; bf16: rounded to it).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pico_fast.parallel.agreement import highest, sum_over_ranks
from pico_fast.parallel.mesh import SINGLE, Parallel

IGNORED = -100  # label that costs nothing


class LossModel(Protocol):
    """What evaluation needs of :class:`pico_fast.model.decoder.PicoDecoder`."""

    def loss(self, input_ids: Tensor, labels: Tensor, *, reduction: str) -> Tensor:
        """Loss (B * S,) float32 per token for ids and labels (B, S) int64 and ``reduction="none"``."""


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of a set of documents.

    Attributes:
        document_mean: mean over documents of exp(mean negative log-likelihood of its tokens), pico's ``paloma``.
        token_weighted: exp(mean negative log-likelihood of all tokens).
        documents: how many counted.
        tokens: how many were predicted: all but the first of each document.
        skipped: documents of fewer than two tokens, which have no perplexity.
        seconds: wall time.
    """

    document_mean: float
    token_weighted: float
    documents: int
    tokens: int
    skipped: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """The figures under the names they have in logs and files."""
        return {"paloma": self.document_mean, "paloma_token_weighted": self.token_weighted}


def evaluate_perplexity(
    model: LossModel,
    documents: Iterable[np.ndarray | Sequence[int]],
    *,
    batch_size: int,
    device: torch.device | str,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
    parallel: Parallel = SINGLE,
) -> PerplexityResult | None:
    """Perplexity of ``documents`` (token ids each, at most the model's ``max_seq_len``), or None if it was stopped.

    At most ``batch_size`` documents are on the device at once. They are taken longest first, so that a batch holds
    little padding and memory that does not suffice shows at once; the result does not depend on it. Nothing is read
    back from the device before the end, and weights, gradients, random state and the model's mode are left alone.

    Several processes: every rank must call it, with the same documents, and gets the same result. The batches are dealt
    out over the data-parallel ranks, each of which does equally many forward passes, since FSDP's are collective.

    Args:
        model: has ``loss``; used as it is.
        documents: their order does not matter.
        batch_size: documents per forward pass of one process.
        device: where the model is.
        should_stop: asked before every batch; True on any rank gives up.
        progress: called with (documents done, all) after every batch has been given to the device.

    Raises ValueError if no document has two tokens.
    """
    start = time.perf_counter()
    device = torch.device(device)
    given = [np.asarray(document) for document in documents]
    counted = sorted((document for document in given if len(document) > 1), key=len, reverse=True)
    if not counted:
        raise ValueError(f"none of the {len(given)} documents has two tokens, the least that has a perplexity")

    sums: list[tuple[int, Tensor]] = []  # number of a batch's first document, losses of its documents
    with torch.no_grad():  # not inference_mode: what an op caches during it could not be used in training afterwards
        for first in range(0, len(counted), batch_size * parallel.dp_size):
            if should_stop is not None and highest(parallel, int(should_stop())) != (0,):
                return None
            mine = first + batch_size * parallel.dp_rank
            documents_now = counted[mine : mine + batch_size]
            # a rank that the last round leaves without documents goes along with one, for the others' sake
            input_ids, labels = _batch(documents_now or counted[-1:], device, multiple_of=parallel.tp.size)
            losses = model.loss(input_ids, labels, reduction="none")
            if documents_now and parallel.tp.rank == 0:  # its neighbours have the same losses
                sums.append((mine, losses.view(labels.shape).sum(1)))
            if progress is not None:
                progress(min(first + batch_size * parallel.dp_size, len(counted)), len(counted))
    losses_of_all = torch.zeros(len(counted), dtype=torch.float64)
    for mine, losses in sums:  # the one wait for the device
        losses_of_all[mine : mine + len(losses)] = losses
    nll = sum_over_ranks(parallel, losses_of_all).numpy()

    tokens = np.array([len(document) - 1 for document in counted])
    with np.errstate(over="ignore"):  # a diverged model has perplexity inf
        return PerplexityResult(
            document_mean=float(np.exp(nll / tokens).mean()),
            token_weighted=float(np.exp(nll.sum() / tokens.sum())),
            documents=len(counted),
            tokens=int(tokens.sum()),
            skipped=len(given) - len(counted),
            seconds=time.perf_counter() - start,
        )


def _batch(documents: Sequence[np.ndarray], device: torch.device, *, multiple_of: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels (B, S) int64 of ``documents``, padded on the right until S is a multiple of ``multiple_of``,
    the number of ranks that share the tokens."""
    length = max(map(len, documents)) - 1
    shape = (len(documents), -(-length // multiple_of) * multiple_of)
    input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for row, document in enumerate(documents):
        ids = torch.from_numpy(document.astype(np.int64))
        input_ids[row, : len(ids) - 1] = ids[:-1]
        labels[row, : len(ids) - 1] = ids[1:]
    return _to(input_ids, device), _to(labels, device)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":  # from pinned memory the copy does not wait for what the device is doing
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def write_eval_results(path: str | Path, result: PerplexityResult) -> None:
    """Write ``result`` as JSON, pico's key first; a reader sees the old file or the new one. Raises OSError.

    A perplexity that is not finite is written as Python writes it (``NaN``, ``Infinity``), as pico-train does.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({**result.metrics(), "documents": result.documents, "tokens": result.tokens}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
