"""Every layout computes what one process computes: gradients, losses, norms; whatever the micro-batches."""

import pytest
import torch
import torch.distributed as dist

from pico_fast.evaluate import evaluate_perplexity
from pico_fast.model.generate import generate
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

# The first norm is the same sum in another order. Later losses and norms are of weights that Adam has updated: it
# divides each gradient by its own size, so that the last bits (6e-8) of small ones move weights; ten updates at a
# learning rate of 1e-2 bring the norms 7e-6 apart, and a gradient element is small beside the largest: 1e-5 for these
LIMITS = {"first norm": 1e-6, "perplexities": 1e-6, "bf16 gradients of a frequent token": 2e-2}


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


def continuations(training: Training) -> list[torch.Tensor]:
    """Greedy, sampled with a seed, and with an end that rows reach at different times."""
    prompt = some_rows(9)[0, :, :3].long()
    given = ({"temperature": 0}, {"seed": 5, "top_p": 0.9}, {"seed": 5, "eos_id": 7})
    return [generate(training.model, prompt, 8, **settings) for settings in given]


def unseeded_continuations_agree(training: Training) -> bool:
    """Every rank draws another seed; those that share the model must go on, and end, with the same tokens."""
    drawn = generate(training.model, some_rows(9)[0, :, :3].long(), 8, eos_id=7)
    wanted = drawn.clone()
    for group in training.model.shared_over:
        dist.broadcast(wanted, group=group, group_src=0)
    return torch.equal(drawn, wanted)


def frequent_token(training: Training) -> dict[str, torch.Tensor]:
    """Gradients of 8192 tokens that are nearly all the same one."""
    rows = torch.full((1, 512, SEQUENCE + 1), 7, dtype=torch.int32)
    rows[0, :, ::5] = torch.arange(50, dtype=torch.int32)[:, None].repeat(11, 1)[:512]
    return training.gradients(rows)


def same_as_one_process(world_size: int) -> dict[str, dict[str, float]]:
    """For every layout: the largest relative difference of any gradient, and of ten losses and norms."""
    whole = start(tiny_config())
    expected = {micro: whole.gradients(some_rows(micro_batches=micro)) for micro in (1, MICRO_BATCHES)}
    clipped = whole.gradients(some_rows(), max_grad_norm=0.1)
    perplexity, continued = perplexities(whole), continuations(whole)
    whole_bf16 = start(tiny_config("bf16-mixed"))
    frequent = frequent_token(whole_bf16)
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
        assert all(map(torch.equal, continuations(training), continued)), name
        assert unseeded_continuations_agree(training), name
        narrow = start(tiny_config("bf16-mixed"), sizes)
        differences["bf16 gradients of a frequent token"] = max(
            relative_difference(gradient, narrow.part(n, frequent[n]), scale=frequent[n])
            for n, gradient in frequent_token(narrow).items()
        )
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
                limit = LIMITS.get(what, 1e-5)
                assert difference <= limit, f"{layout}, rank {rank}: {what} differ by {difference:.2g}"
