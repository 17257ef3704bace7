"""The modeling file of a checkpoint, loaded by transformers as a user does, against transformers' own Llama."""

from types import SimpleNamespace

import pytest
import torch
from pico_kernels import KernelSet

from pico_fast.config import ModelConfig
from pico_fast.interop.huggingface import export_model, import_model
from pico_fast.interop.llama import llama_config_dict, to_llama_state
from pico_fast.model.decoder import PicoDecoder

VOCABULARY = 97
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def random_state(config: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    kv_dim, hidden = config.head_dim * config.attention_n_kv_heads, config.activation_hidden_dim

    def drawn(*shape, scale):
        return scale * torch.randn(shape, generator=generator)

    d = config.d_model
    state = {"embedding_proj.weight": drawn(config.vocab_size, d, scale=1.0)}
    for layer in range(config.n_layers):
        for name, rows in (("q", d), ("k", kv_dim), ("v", kv_dim), ("o", d)):
            state[f"layers.{layer}.attention.{name}_proj.weight"] = drawn(rows, d, scale=0.3)
        for name, shape in (("w_0", (hidden, d)), ("w_1", (hidden, d)), ("w_2", (d, hidden))):
            state[f"layers.{layer}.swiglu.{name}.weight"] = drawn(*shape, scale=0.2)
        for name in ("attention_norm", "swiglu_norm"):
            state[f"layers.{layer}.{name}.weight"] = 1 + drawn(d, scale=0.1)
    state["output_norm.weight"] = 1 + drawn(d, scale=0.1)
    state["de_embedding_proj.weight"] = drawn(config.vocab_size, d, scale=0.2)
    return state


@pytest.fixture(scope="module", params=[4, 2], ids=["mha", "gqa"])
def pair(request, tmp_path_factory):
    """A checkpoint, transformers' Llama with the same weights, and ``load(implementation)`` for the checkpoint."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, dynamic_module_utils

    config = ModelConfig(
        d_model=32,
        n_layers=2,
        vocab_size=VOCABULARY,
        max_seq_len=64,
        attention_n_heads=4,
        attention_n_kv_heads=request.param,
        activation_hidden_dim=48,
        norm_eps=1e-5,
        position_emb_theta=500.0,
    )
    state = random_state(config)
    folder = tmp_path_factory.mktemp("checkpoint")
    export_model(folder, state, config)
    llama = LlamaForCausalLM(LlamaConfig(**llama_config_dict(config))).eval()
    llama.load_state_dict(to_llama_state(state, config))

    def load(implementation="sdpa", auto_class=AutoModelForCausalLM, folder=folder):
        return auto_class.from_pretrained(folder, trust_remote_code=True, attn_implementation=implementation)

    with pytest.MonkeyPatch.context() as patch:  # transformers copies the modeling file here, not into the user's cache
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield SimpleNamespace(config=config, folder=folder, llama=llama, load=load)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request, pair):
    loaded = pair.load(request.param)
    assert loaded.config._attn_implementation == request.param
    return loaded.eval()


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(2))


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@torch.no_grad()
def test_logits_are_llamas(pair, model, ids):
    logits = model(ids).logits
    assert logits.dtype == torch.float32
    close(logits, pair.llama(ids).logits)


@torch.no_grad()
def test_logits_are_the_trained_models(pair, model, ids):
    decoder = PicoDecoder(pair.config, KernelSet.from_config({"default": "reference"}, device="cpu"), torch.float32)
    decoder.load_state_dict(import_model(pair.folder)[1])
    close(model(ids).logits, decoder(ids))


def test_loss_and_gradients_are_llamas(pair, model, ids):
    labels = ids.clone()
    labels[:, :4] = -100
    ours, theirs = model(ids, labels=labels).loss, pair.llama(ids, labels=labels).loss
    close(ours, theirs, 1e-5)
    model.zero_grad()
    pair.llama.zero_grad()
    ours.backward()
    theirs.backward()
    gradients = {name.removeprefix("pico_decoder."): p.grad for name, p in model.named_parameters()}
    for name, gradient in to_llama_state(gradients, pair.config).items():
        close(gradient, pair.llama.get_parameter(name).grad, 1e-5)


@torch.no_grad()
def test_loss_over_a_given_number_of_items(model, ids):
    total = model(ids, labels=ids).loss * 3 * 19
    close(model(ids, labels=ids, num_items_in_batch=torch.tensor(10)).loss, total / 10)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 20, [5, 7, 1, 1, 6], [20]])
def test_pieces_through_the_cache_give_the_same_logits(model, ids, pieces):
    cache, logits = None, []
    for piece in ids.split(pieces, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert cache.get_seq_length() == 20
    close(torch.cat(logits, 1), model(ids).logits)


@torch.no_grad()
def test_padding_changes_nothing(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    mask[1, 15:] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    close(logits[0, 7:], model(ids[:1, 7:]).logits[0])
    close(logits[1, :15], model(ids[1:2, :15]).logits[0])
    close(logits[2], model(ids[2:]).logits[0])


def test_padding_under_autocast(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    labels = ids.masked_fill(mask == 0, -100)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    close(loss, model(ids, attention_mask=mask, labels=labels).loss, 0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_position_ids_are_followed(pair, model, ids):
    positions = torch.arange(20) * 2 + torch.tensor([[0], [3], [5]])
    expected = pair.llama(ids, position_ids=positions).logits
    close(model(ids, position_ids=positions).logits, expected)
    assert (expected - pair.llama(ids).logits).abs().max() > 0.1  # the test would notice


@torch.no_grad()
def test_a_four_dimensional_mask_is_used_as_given(model, ids):
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    own_token_only = torch.eye(20, dtype=torch.bool)
    expected = model(ids).logits
    close(model(ids, attention_mask=causal.expand(3, 1, 20, 20)).logits, expected)
    added = torch.zeros(3, 1, 20, 20).masked_fill(~causal, float("-inf"))
    close(model(ids, attention_mask=added).logits, expected)
    alone = model(ids, attention_mask=own_token_only.expand(3, 1, 20, 20)).logits
    close(alone[:, 9], model(ids[:, 9:10]).logits[:, 0])


@torch.no_grad()
def test_a_mask_of_the_wrong_length_is_refused(model, ids):
    cache = model(ids[:, :12], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"20 tokens expected \(12 cached, 8 new\), 8 given"):
        model(ids[:, 12:], past_key_values=cache, attention_mask=torch.ones(3, 8))


@torch.no_grad()
def test_some_logits_hidden_states_and_attentions(pair, model, ids):
    output = model(ids, logits_to_keep=2, output_hidden_states=True, output_attentions=True)
    close(output.logits, model(ids).logits[:, -2:], 1e-5)
    theirs = pair.llama.model(ids, output_hidden_states=True).hidden_states
    assert len(output.hidden_states) == len(theirs) == 3
    for ours, llamas in zip(output.hidden_states, theirs, strict=True):
        close(ours, llamas)
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, 20, 20)] * 2
    close(output.attentions[0].sum(-1), torch.ones(3, 4, 20))
    assert isinstance(model(ids, return_dict=False), tuple)


@torch.no_grad()
def test_embeddings_in_place_of_ids(model, ids):
    embedded = model.get_input_embeddings()(ids)
    close(model(inputs_embeds=embedded).logits, model(ids).logits, 0.0)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embedded)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generates_as_llama(pair, model, ids, options):
    prompt = {"input_ids": ids[:, :6], "attention_mask": torch.ones(3, 6, dtype=torch.int64)}
    ours = model.generate(**prompt, **GREEDY, **options)
    assert ours.shape == (3, 14)
    assert torch.equal(ours, pair.llama.generate(**prompt, **GREEDY, **options))


def test_greedy_generation_takes_the_most_likely_token(model, ids):
    written = model.generate(ids[:1, :6], attention_mask=torch.ones(1, 6, dtype=torch.int64), **GREEDY)
    with torch.no_grad():
        assert torch.equal(model(written).logits.argmax(-1)[0, 5:-1], written[0, 6:])


def test_left_padded_prompts_generate_as_alone(model, ids):
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[0, :5] = 0
    mask[1, :2] = 0
    together = model.generate(ids[:, :8], attention_mask=mask, **GREEDY)
    for row, start in ((0, 5), (1, 2), (2, 0)):
        prompt = ids[row : row + 1, start:8]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
        assert torch.equal(together[row, 8:], alone[0, 8 - start :])


@torch.no_grad()
def test_saved_by_transformers_it_loads_again(pair, ids, tmp_path):
    from transformers import AutoModel

    model = pair.load(auto_class=AutoModel)
    model.save_pretrained(tmp_path)
    assert import_model(tmp_path)[0] == pair.config
    close(pair.load(folder=tmp_path)(ids).logits, model(ids).logits, 0.0)


def test_a_new_model_is_initialised_as_torch_does(pair):
    model = type(pair.load())(pair.load().config)
    decoder = model.pico_decoder
    assert decoder.embedding_proj.weight.std().item() == pytest.approx(1.0, rel=0.1)
    bound = decoder.layers[0].swiglu.w_0.in_features ** -0.5
    assert decoder.layers[0].swiglu.w_0.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    assert torch.equal(decoder.output_norm.weight, torch.ones(32))
