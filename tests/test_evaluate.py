"""Perplexity: against a calculation by hand, whatever the batches, and against pico-train's own figure."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pico_kernels import KernelSet

from pico_fast.config import ModelConfig, PalomaConfig
from pico_fast.data.evaluation_documents import load_documents
from pico_fast.data.tokenizer import load_tokenizer
from pico_fast.evaluate import PerplexityResult, evaluate_perplexity, write_eval_results
from pico_fast.model.decoder import PicoDecoder

VOCABULARY = 7


class Bigram(torch.nn.Module):
    """A model whose prediction depends on the last token only; records the shapes it is called with."""

    def __init__(self, scale=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.table = torch.nn.Parameter(scale * torch.randn(VOCABULARY, VOCABULARY, generator=generator))
        self.shapes = []

    def loss(self, input_ids, labels, *, reduction):
        assert reduction == "none"
        assert not torch.is_grad_enabled()
        self.shapes.append(tuple(input_ids.shape))
        return F.cross_entropy(self.table[input_ids].flatten(0, 1), labels.flatten(), reduction="none")

    def nll(self, document):
        log_probabilities = self.table.detach().double().log_softmax(-1)
        return [-log_probabilities[a, b].item() for a, b in itertools.pairwise(document)]


def evaluated(model, documents, batch_size=2, **options):
    return evaluate_perplexity(model, documents, batch_size=batch_size, device="cpu", **options)


def test_by_hand():
    model, documents = Bigram(), [[1, 2, 3, 4], [0, 6], [5, 5, 5, 5, 5, 5]]
    result = evaluated(model, documents)
    nll = [model.nll(document) for document in documents]
    means = [sum(values) / len(values) for values in nll]
    assert result.document_mean == pytest.approx(sum(map(math.exp, means)) / 3, rel=1e-6)
    assert result.token_weighted == pytest.approx(math.exp(sum(map(sum, nll)) / 9), rel=1e-6)
    assert (result.documents, result.tokens, result.skipped) == (3, 9, 0)
    assert result.metrics() == {"paloma": result.document_mean, "paloma_token_weighted": result.token_weighted}
    assert result.document_mean != pytest.approx(result.token_weighted, rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=12), min_size=1, max_size=12).filter(
        lambda documents: any(len(document) > 1 for document in documents)
    ),
    batch_size=st.integers(1, 13),
    order=st.randoms(use_true_random=False),
)
def test_batches_and_order_do_not_matter(documents, batch_size, order):
    model = Bigram()
    one_by_one = evaluated(model, documents, batch_size=1)
    model.shapes.clear()
    shuffled = [np.array(document, dtype=np.int32) for document in order.sample(documents, len(documents))]
    result = evaluated(model, shuffled, batch_size=batch_size)
    assert result.document_mean == pytest.approx(one_by_one.document_mean, rel=1e-6)
    assert result.token_weighted == pytest.approx(one_by_one.token_weighted, rel=1e-6)
    counted = [document for document in documents if len(document) > 1]
    assert (result.documents, result.skipped) == (len(counted), len(documents) - len(counted))
    assert result.tokens == sum(len(document) - 1 for document in counted)
    assert all(rows <= batch_size for rows, _ in model.shapes)
    assert len(model.shapes) == math.ceil(len(counted) / batch_size)


def test_documents_of_like_length_share_a_batch():
    model = Bigram()
    evaluated(model, [[1] * length for length in (2, 9, 3, 8, 2, 9)], batch_size=2)
    assert model.shapes == [(2, 8), (2, 7), (2, 1)]


def test_stopping_and_progress():
    model, documents, seen = Bigram(), [[1, 2, 3]] * 5, []
    answers = iter([False, False, True])
    assert evaluated(model, documents, should_stop=lambda: next(answers)) is None
    assert len(model.shapes) == 2
    assert evaluated(model, documents, progress=lambda done, of: seen.append((done, of))) is not None
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="none of the 2 documents has two tokens"):
        evaluated(Bigram(), [[], [1]])


def test_the_model_is_left_as_it_was():
    model = Bigram()
    model.train()
    before, random = model.table.detach().clone(), torch.get_rng_state()
    evaluated(model, [[1, 2, 3]])
    assert model.training
    assert model.table.grad is None
    assert torch.equal(model.table, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_diverged_model_has_infinite_perplexity(tmp_path):
    result = evaluated(Bigram(scale=1e5), [[1, 2, 3, 4]])
    assert result.document_mean == math.inf
    write_eval_results(tmp_path / "step_0.json", result)
    assert json.loads((tmp_path / "step_0.json").read_text())["paloma"] == math.inf


def test_the_file_is_picos_with_more_behind(tmp_path):
    path = tmp_path / "eval_results" / "step_3.json"
    for value in (1.5, 2.5):
        write_eval_results(path, PerplexityResult(value, 2.0, 3, 40, 1, 0.1))
        expected = {"paloma": value, "paloma_token_weighted": 2.0, "documents": 3, "tokens": 40}
        assert json.loads(path.read_text()) == expected
    assert path.read_text().startswith('{"paloma": ')
    assert list(path.parent.iterdir()) == [path]


def test_equals_pico_train(golden):
    record = json.loads((golden / "golden.json").read_text())
    config = ModelConfig(**record["config"]["model"])
    torch.manual_seed(42)
    model = PicoDecoder(config, KernelSet.from_config({"default": "torch"}, device="cpu"), torch.float32)
    tokenizer = load_tokenizer(str(golden / "tokenizer"))
    data = PalomaConfig(dataset_name=str(golden / "val"), dataset_split="val")
    documents = load_documents(data, tokenizer, config.max_seq_len, config.vocab_size)
    result = evaluated(model, documents, batch_size=4)
    assert result.documents == 8
    assert result.document_mean == pytest.approx(record["paloma_mean_document_perplexity"]["0"], rel=1e-5)
