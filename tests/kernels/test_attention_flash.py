"""The flash_attn provider with stand-ins for the three packages: their signatures, the reference's arithmetic.

The stand-ins take exactly the arguments of the real functions (flash-attn 2.8, FlashAttention-3's hopper interface,
flash-attn-4 4.0.0b36); what the real kernels compute is seen only on a GPU with the packages.
"""

import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator

import pico_kernels as pk
import pytest
import torch
from pico_kernels import _flash_packages as packages
from pico_kernels._attention_documents import document_mask, lower_right_mask
from pico_kernels.attention import ATTENTION, attention_reference

flash = sys.modules["pico_kernels.attention_flash"]

PACKED = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
AFTER_2 = "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
FORWARD_2 = f"q k v {AFTER_2} return_softmax"
VARLEN_FORWARD_2 = (
    f"q k v {PACKED} dropout_p softmax_scale causal window_size_left=-1 window_size_right=-1 softcap=0.0 "
    "alibi_slopes=None return_softmax=False block_table=None leftpad_k=None seqused_k=None"
)
BACKWARD_2 = f"dout q k v out softmax_lse dq dk dv {AFTER_2} deterministic rng_state=None"
VARLEN_BACKWARD_2 = f"dout q k v out softmax_lse dq dk dv {PACKED} {AFTER_2} deterministic rng_state=None"
FORWARD_3 = (
    "q k v k_new=None v_new=None qv=None out_=None cu_seqlens_q=None cu_seqlens_k=None cu_seqlens_k_new=None "
    "seqused_q=None seqused_k=None max_seqlen_q=None max_seqlen_k=None page_table=None kv_batch_idx=None "
    "leftpad_k=None rotary_cos=None rotary_sin=None seqlens_rotary=None q_descale=None k_descale=None v_descale=None "
    "softmax_scale=None causal=False window_size_left=-1 window_size_right=-1 attention_chunk=0 softcap=0.0 "
    "rotary_interleaved=True scheduler_metadata=None num_splits=1 pack_gqa=None sm_margin=0"
)
BACKWARD_3 = (
    "dout q k v out softmax_lse cu_seqlens_q=None cu_seqlens_k=None sequed_q=None sequed_k=None max_seqlen_q=None "
    "max_seqlen_k=None dq=None dk=None dv=None softmax_scale=None is_causal=False window_size_left=-1 "
    "window_size_right=-1 softcap=0.0 deterministic=False sm_margin=0"
)
FORWARD_4 = (
    "q k v qv=None cu_seqlens_q=None cu_seqlens_k=None seqused_q=None seqused_k=None max_seqlen_q=None "
    "max_seqlen_k=None min_seqlen_k=None page_table=None softmax_scale=None causal=False softcap=None "
    "window_size_left=None window_size_right=None learnable_sink=None num_splits=1 pack_gqa=None return_lse=False"
)
BACKWARD_4 = (
    "q k v out dout lse softmax_scale=None causal=False softcap=0.0 window_size_left=None window_size_right=None "
    "cu_seqlens_q=None cu_seqlens_k=None seqused_q=None seqused_k=None max_seqlen_q=None max_seqlen_k=None "
    "deterministic=False dq=None dk=None dv=None dlse=None learnable_sink=None"
)


def stand_in(signature: str, body: Callable[[dict], object], calls: list[dict]) -> Callable:
    """A function with these parameters that hands them, by name, to ``body`` and to ``calls``."""
    parameters = []
    for word in signature.split():
        name, _, default = word.partition("=")
        value = {"None": None, "False": False, "True": True, "-1": -1, "0": 0, "1": 1, "0.0": 0.0}[default or "None"]
        kept = value if default else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=kept))
    accepted = inspect.Signature(parameters)

    def function(*args: object, **kwargs: object) -> object:
        bound = accepted.bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(dict(bound.arguments))
        return body(bound.arguments)

    return function


def padded(given: dict) -> tuple[list[torch.Tensor], dict]:
    """q, k and v with a batch dimension, and the keywords of the reference."""
    starts = given.get("cu_seqlens_q")
    if starts is not None:
        assert given["q"].dim() == 3
        assert starts.dtype == torch.int32
        assert torch.equal(starts, given["cu_seqlens_k"])
        assert given["max_seqlen_q"] == given["max_seqlen_k"] >= int(starts.diff().max())
    assert given["softmax_scale"] > 0
    causal = given["is_causal"] if "is_causal" in given else given["causal"]
    qkv = [given[name] if starts is None else given[name][None] for name in "qkv"]
    return qkv, {"causal": causal, "scale": given["softmax_scale"], "cu_seqlens": starts}


def forward(given: dict) -> tuple[torch.Tensor | None, ...]:
    qkv, keywords = padded(given)
    out, lse = attention_reference(*qkv, **keywords, return_lse=True)
    return (out, lse, None, None) if given["q"].dim() == 4 else (out[0], lse[0], None, None)


def backward(given: dict) -> tuple[torch.Tensor, ...]:
    """FlashAttention's: from the output and the log-sum-exp; written to dq, dk and dv where they are given."""
    (q, k, v), keywords = padded(given)
    starts, queries, keys = keywords["cu_seqlens"], q.shape[1], k.shape[1]
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.float().transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    lse = given["softmax_lse"] if "softmax_lse" in given else given["lse"]
    dout, out = (given[name].float().transpose(-3, -2) for name in ("dout", "out"))
    weights = torch.exp(q @ k.mT * keywords["scale"] - lse[..., None])
    if starts is not None:
        weights = weights * document_mask(starts, queries, keywords["causal"])
    elif keywords["causal"]:
        weights = weights * lower_right_mask(queries, keys, q.device)
    scores = weights * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * keywords["scale"]
    of_heads = (scores @ k, scores.mT @ q, weights.mT @ dout)
    grads = []
    for name, grad in zip("qkv", of_heads, strict=True):
        heads = given[name].shape[-2]
        grad = grad.unflatten(1, (heads, -1)).sum(2).transpose(1, 2)
        grads.append(grad.reshape(given[name].shape).to(given[name].dtype))
        if given[f"d{name}"] is not None:
            given[f"d{name}"].copy_(grads[-1])
    return tuple(grads)


SIGNATURES = {
    "flash_attn.flash_attn_interface": {
        "_flash_attn_forward": (FORWARD_2, forward),
        "_flash_attn_varlen_forward": (VARLEN_FORWARD_2, forward),
        "_flash_attn_backward": (BACKWARD_2, backward),
        "_flash_attn_varlen_backward": (VARLEN_BACKWARD_2, backward),
    },
    "flash_attn_interface": {
        "_flash_attn_forward": (FORWARD_3, forward),
        "_flash_attn_backward": (BACKWARD_3, backward),
    },
    "flash_attn.cute.interface": {"_flash_attn_fwd": (FORWARD_4, forward), "_flash_attn_bwd": (BACKWARD_4, backward)},
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[dict]]]:
    """``install(module, ..., capability=9)`` puts stand-ins where imports find them, returns their calls."""
    packages.import_package.cache_clear()

    def add(*modules: str, capability: int = 9) -> list[dict]:
        calls: list[dict] = []
        for name in modules:
            module = types.ModuleType(name)
            for function, (signature, body) in SIGNATURES[name].items():
                setattr(module, function, stand_in(signature, body, calls))
            monkeypatch.setitem(sys.modules, name, module)
            for parent in ("flash_attn", "flash_attn.cute"):
                if name.startswith(f"{parent}."):
                    monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setattr(flash, "cuda_capability", lambda device: capability)
        return calls

    yield add
    packages.import_package.cache_clear()


EVERY = pytest.mark.parametrize("module", list(SIGNATURES))
STARTS = torch.tensor([0, 3, 3, 8, 14])


def draw(queries: int = 7, keys: int = 7, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = [(2, queries, 6, 16), (2, keys, 2, 16), (2, keys, 2, 16)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def results(call: Callable, inputs: list[torch.Tensor], lse_weight: float = 0.0) -> list[torch.Tensor]:
    """Output, log-sum-exp, and the gradients of a weighted sum of both."""
    out, lse = call(*inputs, return_lse=True)
    generator = torch.Generator().manual_seed(1)
    total = (out.float() * torch.randn(out.shape, generator=generator)).sum()
    if lse_weight:
        total = total + lse_weight * (lse * torch.randn(lse.shape, generator=generator)).sum()
    return [out, lse, *torch.autograd.grad(total, inputs)]


def assert_equals_the_reference(call: Callable, inputs: list[torch.Tensor], lse_weight: float, **keywords) -> None:
    got = results(lambda *a, **k: call(*a, **k, **keywords), inputs, lse_weight)
    want = results(lambda *a, **k: attention_reference(*a, **k, **keywords), inputs, lse_weight)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=4e-3, atol=4e-3)  # an ulp of float16 at 2 is 0.002
        assert a.is_contiguous()


@EVERY
@pytest.mark.parametrize("lse_weight", [0.0, 2.0])
@pytest.mark.parametrize(
    ("keys", "keywords"),
    [(7, {}), (12, {}), (12, {"causal": False, "scale": 0.4}), (7, {"cu_seqlens": STARTS}), (7, {"scale": -0.3})],
    ids=["square", "cache", "full", "documents", "negative scale"],
)
def test_equals_the_reference(install: Callable, module: str, keys: int, keywords: dict, lse_weight: float) -> None:
    calls = install(module)
    assert_equals_the_reference(ATTENTION["flash_attn"], draw(7, keys), lse_weight, **keywords)
    assert len(calls) == (2 if lse_weight == 0 else 4)
    assert all(given.get("deterministic", True) for given in calls)
    assert all("deterministic" in given for given in calls if "dout" in given)


@EVERY
@pytest.mark.parametrize("keywords", [{}, {"cu_seqlens": STARTS.int()}], ids=["square", "documents"])
def test_traces_as_one_graph(install: Callable, module: str, keywords: dict) -> None:
    install(module)
    traced = torch.compile(ATTENTION["flash_attn"], backend="aot_eager", fullgraph=True)
    assert_equals_the_reference(traced, draw(), 2.0, **keywords)


@pytest.mark.parametrize("starts", [None, STARTS])
def test_the_registered_ops(install: Callable, starts: torch.Tensor | None) -> None:
    install("flash_attn.flash_attn_interface")
    inputs = draw()
    out, lse = torch.ops.pico_kernels.flash_attention(*inputs, starts, 0.25, True)
    torch.library.opcheck(torch.ops.pico_kernels.flash_attention.default, (*inputs, starts, 0.25, True))
    detached = [t.detach() for t in (out, *inputs, out, lse)]
    torch.library.opcheck(torch.ops.pico_kernels.flash_attention_backward.default, (*detached, starts, 0.25, True))


def test_only_the_log_sum_exp_has_a_gradient(install: Callable) -> None:
    install("flash_attn.cute.interface")
    inputs = draw()
    got = torch.autograd.grad(ATTENTION["flash_attn"](*inputs, return_lse=True)[1].sum(), inputs[:2])
    want = torch.autograd.grad(attention_reference(*inputs, return_lse=True)[1].sum(), inputs[:2])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=4e-3, atol=4e-3)


def test_zero_rows_call_no_kernel(install: Callable) -> None:
    calls = install("flash_attn_interface")
    q, k, v = draw(0, 0)
    out, lse = ATTENTION["flash_attn"](q, k, v, return_lse=True)
    assert (out.shape, lse.shape) == (q.shape, (2, 6, 0))
    out.sum().backward()
    assert k.grad.shape == k.shape
    assert not calls


def test_the_best_package_for_the_device(install: Callable) -> None:
    install(*SIGNATURES)
    chosen = {capability: packages.flash_package(capability, 64) for capability in (7, 8, 9, 10, 12)}
    names = {capability: found.name if found else None for capability, found in chosen.items()}
    two = "flash-attn 2.7 or newer"
    assert names == {7: None, 8: two, 9: "FlashAttention-3", 10: "flash-attn-4", 12: two}
    assert packages.flash_package(10, 256).name == two
    assert packages.flash_package(9, 60) is None


def test_a_call_that_no_package_can_take(install: Callable) -> None:
    install("flash_attn_interface", capability=8)
    message = "q: expected for impl='flash_attn' a head_dim that is a multiple of 8 and a GPU a package has kernels for"
    with pytest.raises(ValueError, match=re.escape(message) + ".*head_dim 16 on a GPU of compute capability 8"):
        ATTENTION["flash_attn"](*draw())
    with pytest.raises(ValueError, match=r"q: expected for impl='flash_attn' bfloat16 or float16, got torch.float32"):
        ATTENTION["flash_attn"](*draw(dtype=torch.float32))


def test_packages_that_do_not_import_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    packages.import_package.cache_clear()
    old = types.ModuleType("flash_attn_interface")
    old._flash_attn_forward = print
    monkeypatch.setitem(sys.modules, "flash_attn_interface", old)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    problem = packages.flash_attn_problem()
    assert "FlashAttention-3: flash_attn_interface lacks _flash_attn_backward" in problem
    assert "flash-attn-4: cannot import flash_attn.cute.interface: ModuleNotFoundError" in problem
    assert "flash-attn 2.7 or newer: cannot import flash_attn.flash_attn_interface: ModuleNotFoundError" in problem
    with pytest.raises(ValueError, match="attention: implementation 'flash_attn' cannot run: FlashAttention-3: flash_"):
        pk.KernelSet.from_config({"attention": "flash_attn"}, "cuda")
    with pytest.raises(ValueError, match="'flash_attn' cannot run: FlashAttention needs a GPU; the device is cpu"):
        pk.attention(*draw(), impl="flash_attn")
    packages.import_package.cache_clear()
