"""Kernels of the Pico decoder: each op a public function, with implementations that can be swapped by name.

Depends on torch only. The functions validate their arguments; :class:`KernelSet` holds the bare implementations.
"""

from pico_kernels.attention import attention
from pico_kernels.kernel_set import OPS, KernelSet
from pico_kernels.linear_cross_entropy import linear_cross_entropy
from pico_kernels.rms_norm import add_rms_norm, rms_norm
from pico_kernels.rope import rope, rope_tables
from pico_kernels.swiglu import swiglu

__all__ = [
    "OPS",
    "KernelSet",
    "add_rms_norm",
    "attention",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "rope_tables",
    "swiglu",
]
