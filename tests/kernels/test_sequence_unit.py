"""sequence_unit_step: the definition and the Triton kernels against the gradients of every sequence in float64."""

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    assert_as_good_as,
    laid_out,
    least_eigenvalue,
    positive_semidefinite,
    with_nan_above_diagonal,
)
from torch import Tensor

from gfwsvd_kernels import pack, reference, sequence, sequence_unit_step, symmetrize, tiles


def triton(out: Tensor, x: Tensor, g: Tensor, A: Tensor | None, cu_seqlens: Tensor) -> None:
    sequence.sequence_unit_step(out, x, g, A, cu_seqlens, tile=tiles.Tile(16, 16, 16, 4, 2))


IMPLEMENTATIONS = pytest.mark.parametrize("step", [sequence_unit_step, triton])
LENGTHS = {
    "one": [50],
    "single_tokens": [1] * 20,
    "ragged": [3, 0, 16, 1, 30, 0, 0, 12],
    "tiles": [16, 32],
    "last": [7, 0],
}


def offsets(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(dtype)


def oracle(x: Tensor, g: Tensor, A: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    metric = torch.eye(x.shape[1], dtype=torch.float64, device=x.device) if A is None else A.double()
    total = torch.zeros(g.shape[1], g.shape[1], dtype=torch.float64, device=x.device)
    for start, stop in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        G = g[start:stop].double().mT @ x[start:stop].double()
        total += G @ metric @ G.mT
    return total.tril()


@pytest.fixture
def nan_in_new_memory():
    """Memory from torch.empty holds NaN: what a kernel reads without having written it shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@IMPLEMENTATIONS
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_metric", [False, True])
def test_the_sum_over_sequences_is_that_of_their_gradients(step, lengths, dtype, with_metric, nan_in_new_memory):
    cu_seqlens = offsets(LENGTHS[lengths])
    x = torch.randn(cu_seqlens[-1], 21, device=DEVICE).to(dtype)
    g = torch.randn(cu_seqlens[-1], 35, device=DEVICE).to(dtype)
    A = positive_semidefinite(21) if with_metric else None
    start = torch.randn(35, 35, device=DEVICE)
    out = start.clone()
    step(out, x, g, None if A is None else with_nan_above_diagonal(A), cu_seqlens)
    expected = start.tril() + oracle(x, g, A, cu_seqlens)
    assert_as_good_as(expected, out.tril(), expected)
    assert torch.equal(out.triu(1), start.triu(1))


@IMPLEMENTATIONS
def test_the_metric_and_the_sum_may_be_packed(step):
    cu_seqlens, A = offsets([3, 0, 16, 31]), positive_semidefinite(21)
    x, g = torch.randn(50, 21, device=DEVICE), torch.randn(50, 35, device=DEVICE)
    out = torch.zeros(35 * 36 // 2, device=DEVICE)
    step(out, x, g, pack(A), cu_seqlens)
    assert_as_good_as(oracle(x, g, A, cu_seqlens), symmetrize(out).tril(), oracle(x, g, A, cu_seqlens))


@IMPLEMENTATIONS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_and_neighbours_in_memory_are_not_read(step, layout):
    x, g, A = torch.randn(37, 20, device=DEVICE), torch.randn(37, 33, device=DEVICE), positive_semidefinite(20)
    cu_seqlens = offsets([30, 7], torch.int32)
    out = torch.zeros(33, 33, device=DEVICE)
    step(out, laid_out(x, layout), laid_out(g, layout), laid_out(with_nan_above_diagonal(A), layout), cu_seqlens)
    assert_as_good_as(oracle(x, g, A, cu_seqlens), out, oracle(x, g, A, cu_seqlens))


@IMPLEMENTATIONS
def test_the_sum_is_positive_semidefinite(step):
    """Three gradients of rank at most 4 in 40 dimensions: most eigenvalues are zero."""
    x, g = torch.randn(12, 30, device=DEVICE), torch.randn(12, 40, device=DEVICE)
    out = torch.zeros(40, 40, device=DEVICE)
    step(out, x, g, positive_semidefinite(30), offsets([4, 4, 4]))
    assert least_eigenvalue(out) > -1e-6


@IMPLEMENTATIONS
def test_sequences_do_not_mix_and_their_order_does_not_matter(step):
    x, g = torch.randn(40, 20, device=DEVICE), torch.randn(40, 30, device=DEVICE)
    cu_seqlens = offsets([25, 15])
    together, apart = torch.zeros(30, 30, device=DEVICE), torch.zeros(30, 30, device=DEVICE)
    step(together, x, g, None, cu_seqlens)
    step(apart, x[25:], g[25:], None, offsets([15]))
    step(apart, x[:25], g[:25], None, offsets([25]))
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-4)


@IMPLEMENTATIONS
def test_no_tokens_change_nothing(step):
    out = torch.randn(20, 20, device=DEVICE)
    before = out.clone()
    for cu_seqlens in (offsets([]), offsets([0, 0])):
        step(out, torch.empty(0, 9, device=DEVICE), torch.empty(0, 20, device=DEVICE), None, cu_seqlens)
    assert torch.equal(out, before)


@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("num_tokens", [5, 60, 400])
def test_both_routes_of_the_definition_give_the_same_sum(monkeypatch, with_metric, num_tokens):
    monkeypatch.setattr(reference, "CHUNK", 32)  # so that K is formed in several row blocks
    x, g = torch.randn(num_tokens, 40, dtype=torch.float64), torch.randn(num_tokens, 70, dtype=torch.float64)
    A = positive_semidefinite(40).double().cpu() if with_metric else None
    for in_token_space in (False, True):
        monkeypatch.setattr(reference, "token_space_is_cheaper", lambda *args, answer=in_token_space: answer)
        out = torch.zeros(70, 70, dtype=torch.float64)
        sequence_unit_step(out, x, g, A, torch.tensor([0, num_tokens]))
        expected = oracle(x, g, A, torch.tensor([0, num_tokens]))
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-8)


def test_short_sequences_stay_in_token_space_and_long_ones_leave_it():
    assert reference.token_space_is_cheaper(64, 576, 1536, True)
    assert not reference.token_space_is_cheaper(4096, 576, 576, True)


def test_panels_of_the_workspace_join_without_a_seam(monkeypatch, nan_in_new_memory):
    monkeypatch.setattr(sequence, "PANEL_ROWS", 32)
    monkeypatch.setattr(sequence, "PANEL_ELEMENTS", 1)
    x, g = torch.randn(90, 20, device=DEVICE), torch.randn(90, 33, device=DEVICE)
    cu_seqlens = offsets([50, 5, 35])
    out = torch.zeros(33, 33, device=DEVICE)
    triton(out, x, g, None, cu_seqlens)
    assert_as_good_as(oracle(x, g, None, cu_seqlens), out, oracle(x, g, None, cu_seqlens))


def test_the_shipped_tiles_give_the_same_sum(nan_in_new_memory):
    for dtype, width in ((torch.float16, 144), (torch.float32, 131)):
        x, g = (torch.randn(160, width, device=DEVICE).to(dtype) for _ in range(2))
        A, cu_seqlens = positive_semidefinite(width), offsets([100, 60])
        out = torch.zeros(width, width, device=DEVICE)
        sequence.sequence_unit_step(out, x, g, with_nan_above_diagonal(A), cu_seqlens)
        assert_as_good_as(oracle(x, g, A, cu_seqlens), out, oracle(x, g, A, cu_seqlens))
