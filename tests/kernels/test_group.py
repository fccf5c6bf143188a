"""LowRankGroup: layout, definition and Triton kernels against the projections in float64."""

import pytest
import torch
from group_cases import GROUPS, by_torch, dense, factors, group_of, oracle
from kernel_cases import DEVICE, DTYPES, assert_as_good_as

from gfwsvd_kernels import Factors, LowRankGroup, layout


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5)])
def test_a_group_computes_its_projections(name, dtype, shape):
    projections, activation = group_of(name, dtype)
    x = torch.randn(*shape, projections[0].down.shape[1], device=DEVICE).to(dtype)
    y = LowRankGroup(projections, activation=activation)(x)
    assert y.dtype == dtype
    assert_as_good_as(by_torch(x, projections, activation), y, oracle(x, projections, activation))
