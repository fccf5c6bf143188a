"""LowRankGroup: layout, definition and Triton kernels against the projections in float64."""

import pytest
import torch
from group_cases import GROUPS, by_torch, group_of, oracle
from kernel_cases import DEVICE, DTYPES, assert_as_good_as
from torch import Tensor

from gfwsvd_kernels import LowRankGroup, decode, tiles

# name -> (launcher, tokens that it takes)
LAUNCHERS = {
    "definition": (None, (1, 5, 20)),
    "split_rank": (decode.split_rank, (1, 5, 8)),
    "persistent": (decode.persistent, (1, 17, 64)),
    "matmuls": (decode.matmuls, (1, 65)),
}
CASES = [(name, num_tokens) for name, (_, counts) in LAUNCHERS.items() for num_tokens in counts]


def run(name: str, group: LowRankGroup, x: Tensor) -> Tensor:
    launch, _ = LAUNCHERS[name]
    if launch is None:
        return group(x)
    return launch(x, group.down, group.up, group.bias, group.table, group.workspace, group.layout)


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("launcher, num_tokens", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_computes_its_projections(case, launcher, num_tokens, dtype):
    projections, activation = group_of(case, dtype)
    x = torch.randn(num_tokens, projections[0].down.shape[1], device=DEVICE).to(dtype)
    y = run(launcher, LowRankGroup(projections, activation=activation), x)
    assert y.dtype == dtype
    assert_as_good_as(by_torch(x, projections, activation), y, oracle(x, projections, activation))
