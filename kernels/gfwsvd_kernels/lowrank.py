"""`lowrank_linear` on a GPU: y = (x downᵀ) upᵀ + bias, two matrix products of the BLAS.

No kernel of ours was faster, from one token to thousands (docs/log.md); a few tokens through many layers are the
business of `lowrank_group`. The intermediate x downᵀ goes through memory in the dtype of x.
"""

from gfwsvd_kernels.reference import lowrank_linear

__all__ = ["lowrank_linear"]
