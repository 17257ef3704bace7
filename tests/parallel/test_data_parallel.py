"""Every layout computes what one process computes: gradients, losses, norms; whatever the micro-batches."""

import pytest
import torch

from pico_fast.evaluate import evaluate_perplexity
from pico_fast.parallel.slices import local
from tests.parallel.tiny_training import (
    LAYOUTS,
    MICRO_BATCHES,
    SEQUENCE,
    Training,
    relative_difference,
    some_rows,
    start,
    tiny_config,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def ten_steps(training: Training) -> torch.Tensor:
    """Loss and gradient norm (10, 2) of ten steps, clipped at about half of the first norm."""
    numbers = [training.step(some_rows(step), step, max_grad_norm=0.5) for step in range(10)]
    return torch.tensor([(float(step.loss), float(step.grad_norm)) for step in numbers])


def perplexities(training: Training) -> torch.Tensor:
    """Of documents of all lengths, more than one round of batches and not the same number on every rank."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, SEQUENCE + 2, (23,), generator=generator).tolist()
    documents = [torch.randint(50, (length,), generator=generator).numpy() for length in lengths]
    result = evaluate_perplexity(training.model, documents, batch_size=3, device="cpu", parallel=training.parallel)
    assert result.documents + result.skipped == 23
    return torch.tensor([result.document_mean, result.token_weighted], dtype=torch.float64)


def same_as_one_process(world_size: int) -> dict[str, dict[str, float]]:
    """For every layout: the largest relative difference of any gradient, and of ten losses and norms."""
    whole = start(tiny_config())
    expected = {micro: whole.gradients(some_rows(micro_batches=micro)) for micro in (1, MICRO_BATCHES)}
    clipped = whole.gradients(some_rows(), max_grad_norm=0.1)
    perplexity = perplexities(whole)
    trajectory = ten_steps(whole)
    found = {}
    for name, sizes in LAYOUTS[world_size].items():
        training = start(tiny_config(), sizes)
        assert {n: local(p).shape for n, p in training.model.named_parameters()} == {
            n: training.part(n, whole.model.get_parameter(n)).shape for n in expected[1]
        }
        differences = {}
        for label, wanted, settings in (
            ("gradients", expected[MICRO_BATCHES], {}),
            ("gradients of one micro-batch", expected[1], {"micro_batches": 1}),
            ("clipped gradients", clipped, {"max_grad_norm": 0.1}),
        ):
            rows = some_rows(micro_batches=settings.pop("micro_batches", MICRO_BATCHES))
            got = training.gradients(rows, **settings)
            assert got.keys() == wanted.keys()
            differences[label] = max(
                relative_difference(got[n], training.part(n, wanted[n]), scale=wanted[n]) for n in wanted
            )
        differences["perplexities"] = float(((perplexities(training) - perplexity).abs() / perplexity).max())
        error = (ten_steps(training) - trajectory).abs() / trajectory
        differences |= {"losses": float(error[:, 0].max()), "norms": float(error[:, 1].max())}
        differences["first norm"] = float(error[0, 1])
        found[name] = differences
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_layout_gives_the_gradients_losses_and_norms_of_one_process(world_size):
    per_rank = run_ranks(same_as_one_process, world_size, world_size, timeout=180)
    for rank, layouts in enumerate(per_rank):
        assert layouts.keys() == LAYOUTS[world_size].keys()
        for layout, differences in layouts.items():
            for what, difference in differences.items():
                limit = 1e-6 if what in ("first norm", "perplexities") else 1e-5
                assert difference <= limit, f"{layout}, rank {rank}: {what} differ by {difference:.2g}"
