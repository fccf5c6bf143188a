"""Kernels of gfwsvd: torch operators with a plain-torch definition and Triton implementations for NVIDIA GPUs.

Importing this package imports torch and nothing heavier: Triton is imported when an operator first meets a CUDA tensor.
"""

from gfwsvd_kernels.group import Factors, LowRankGroup
from gfwsvd_kernels.ops import (
    gram_accumulate,
    lowrank_linear,
    quadratic_form,
    quadratic_form_scale,
    sequence_unit_step,
)
from gfwsvd_kernels.reference import pack, symmetrize

__all__ = [
    "Factors",
    "LowRankGroup",
    "gram_accumulate",
    "lowrank_linear",
    "pack",
    "quadratic_form",
    "quadratic_form_scale",
    "sequence_unit_step",
    "symmetrize",
]
