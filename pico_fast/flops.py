"""Parameters, floating-point operations and memory of a Pico decoder, and what the device could do at best."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from pico_fast.config import ModelConfig
from pico_fast.parallel.layout import Layout


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; ``total`` is embedding, head (they are untied) and the rest.

    ``split`` are those of the rest that tensor parallelism splits: all but the norms.
    """

    total: int
    embedding: int
    head: int
    non_embedding: int
    split: int


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Parameters of the decoder with this shape; the projections have no bias."""
    attention_dim = config.attention_n_heads * config.head_dim
    key_value_dim = config.attention_n_kv_heads * config.head_dim
    attention = config.d_model * (2 * attention_dim + 2 * key_value_dim)
    swiglu = 3 * config.d_model * config.activation_hidden_dim
    split = config.n_layers * (attention + swiglu)
    non_embedding = split + (2 * config.n_layers + 1) * config.d_model
    vocabulary = config.vocab_size * config.d_model
    return ParameterCounts(2 * vocabulary + non_embedding, vocabulary, vocabulary, non_embedding, split)


#: How :func:`flops_per_token` counts, for the user who reads an MFU.
FLOPS_CONVENTION = "PaLM's count, 6 N + 12 L h T FLOPs per token, attention not halved for causality"


def flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = False) -> int:
    """FLOPs of one token's forward and backward pass in a sequence of ``seq_len`` tokens.

    PaLM's convention (Chowdhery et al. 2022, appendix B): 6 per parameter other than the embedding, which is a look-up,
    and 12 · layers · heads · head_dim · seq_len for the attention scores and their product with the values. ``causal``
    counts only the (seq_len + 1) / 2 keys that a token sees on average. Recomputation is not counted.
    """
    counts = parameter_counts(config)
    attention_dim = config.attention_n_heads * config.head_dim
    twice_keys = seq_len + 1 if causal else 2 * seq_len
    return 6 * (counts.total - counts.embedding) + 6 * config.n_layers * attention_dim * twice_keys


@dataclass(frozen=True)
class TrainingMemory:
    """Estimated bytes on one device."""

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.moments + self.activations


def training_memory(
    config: ModelConfig,
    *,
    precision: str,
    rows: int,
    seq_len: int,
    micro_batches: int = 1,
    layout: Layout = Layout(),  # noqa: B008 (frozen)
    recomputed: str = "none",
) -> TrainingMemory:
    """Estimate for AdamW and ``micro_batches`` of ``rows`` sequences of ``seq_len`` tokens on each data-parallel rank.

    ``precision`` is ``training.fabric.precision``, ``recomputed`` ``parallel.activation_checkpointing``. Weights
    include the bf16 copies that ``bf16-mixed`` keeps for the backward pass (with FSDP2 those of one block and of
    embedding and head, which it gathers in any precision). FSDP2 sums gradients over the ranks after the last
    micro-batch only, and holds whole ones in float32 until then. Activations are the tensors that fused kernels save
    for the backward pass; plain PyTorch operations save somewhat more, and the loss's working memory (a chunk of
    logits, never all) comes on top.
    """
    counts = parameter_counts(config)
    on_rank = counts.total - counts.split + counts.split // layout.tp
    stored = 2 if precision == "bf16-true" else 4
    computed = 4 if precision == "32-true" else 2
    copied = on_rank if precision == "bf16-mixed" else 0
    if layout.dp_shard > 1:
        copied = counts.embedding + counts.head + counts.split // layout.tp // config.n_layers
    shard = on_rank // layout.dp_shard
    whole_gradients = 4 * on_rank if layout.dp_shard > 1 and micro_batches > 1 else 0
    per_token = _saved_per_token(config, computed, recomputed)
    return TrainingMemory(
        weights=shard * stored + copied * computed,
        gradients=shard * stored + whole_gradients,
        moments=2 * shard * stored,
        activations=rows * seq_len * per_token // layout.tp,
    )


def _saved_per_token(config: ModelConfig, computed: int, recomputed: str) -> int:
    """Bytes that the forward pass keeps of one token: its residual stream, norms, heads and hidden units."""
    attention_dim = config.attention_n_heads * config.head_dim
    key_value_dim = config.attention_n_kv_heads * config.head_dim
    # q and the attention's output, k and v, and the log-sum-exp of each head
    attention = (2 * attention_dim + 2 * key_value_dim) * computed + 4 * config.attention_n_heads
    # two residuals and their norms, and gate, up and their product
    rest = (4 * config.d_model + 3 * config.activation_hidden_dim) * computed
    ends = 2 * config.d_model * computed
    if recomputed == "block":  # each block's two inputs, and one block in full while it is computed again
        return config.n_layers * 2 * config.d_model * computed + attention + rest + ends
    if recomputed == "attention":
        return config.n_layers * rest + attention + ends
    return config.n_layers * (attention + rest) + ends


#: Dense bf16 peak of one device with fp32 accumulation, FLOP/s, by a pattern of its name as the driver reports it; from
#: the vendors' data sheets (their larger figures are for 2:4 sparsity). The first match counts. Variants whose clocks
#: differ (laptop, "D", MIG slices) match none and are measured.
_VENDOR_PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bMIG\b", 0.0),
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bH[12]00 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\b(G?H200|H100)\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX A6000\b", 154.8e12),
    (r"\bRTX 4090$", 165.2e12),
    (r"\bRTX 3090$", 71e12),
    (r"\bMI3(00|25)X\b", 1307.4e12),
)


def vendor_peak(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the vendor's data sheet for the name of a CUDA or ROCm device; None if it is not listed."""
    for pattern, peak in _VENDOR_PEAKS:
        if re.search(pattern, device_name.strip()):
            return peak or None
    return None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Best rate, FLOP/s, of square matrix products within about ``seconds``, with torch's present thread count.

    The size doubles until one product takes 10 ms, or 8192 columns are reached, so that it suits both a laptop and an
    accelerator.
    """

    def product_seconds(a: torch.Tensor, out: torch.Tensor) -> float:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        _synchronize(device)
        return max(time.perf_counter() - start, 1e-9)

    generator = torch.Generator().manual_seed(0)  # the global generator decides the initial weights: leave it alone
    size = 512
    while True:
        a = torch.rand(size, size, generator=generator).to(device, dtype)
        out = torch.empty_like(a)
        product_seconds(a, out)
        fastest = product_seconds(a, out)
        if fastest >= 0.01 or size >= 8192:
            break
        size *= 2
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        fastest = min(fastest, product_seconds(a, out))
    return 2.0 * size**3 / fastest


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s of one device, what that is): the vendor's dense 16-bit peak if the device is listed, else measured.

    The text completes "41 % …", for example "of the vendor's dense bf16 peak, 989 TFLOP/s (NVIDIA H200)".
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        peak = vendor_peak(name)
        if peak is not None:
            return peak, f"of the vendor's dense bf16 peak, {peak / 1e12:.0f} TFLOP/s ({name})"
    rate = measured_matmul_flops(device, dtype)
    name = str(dtype).removeprefix("torch.")
    return rate, f"of the {name} matmul rate measured at start, {format_flops(rate)}"


def format_flops(rate: float) -> str:
    """``rate`` FLOP/s as text of three digits, for example "187 GFLOP/s"."""
    unit, scale = ("TFLOP/s", 1e12) if rate >= 1e12 else ("GFLOP/s", 1e9)
    return f"{rate / scale:.3g} {unit}"
