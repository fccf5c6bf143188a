"""gram_accumulate: the definition and the Triton kernel against float64."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, LAYOUTS, SHAPES, assert_as_good_as, laid_out, least_eigenvalue
from torch import Tensor

from gfwsvd_kernels import gram, gram_accumulate, reference, tiles

SMALL = tiles.Tile(16, 16, 16, 4, 2)


def triton(out: Tensor, x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> None:
    gram.gram_accumulate(out, x, weight, other, tile=SMALL, splits=1)


def triton_split(out: Tensor, x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> None:
    gram.gram_accumulate(out, x, weight, other, tile=SMALL, splits=3)


IMPLEMENTATIONS = pytest.mark.parametrize("accumulate", [gram_accumulate, triton, triton_split])


def oracle(x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> Tensor:
    left, right = x.double(), (x if other is None else other).double()
    return ((left if weight is None else left * weight.double()[:, None]).mT @ right).tril()


def by_torch(x: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted in the dtype of x, as the kernel does, then summed without further error."""
    return oracle(x if weight is None else (x.float() * weight.sqrt()[:, None]).to(x.dtype))


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_lower_triangle_grows_by_the_gram_matrix(accumulate, shape, dtype, weighted):
    num_tokens, width = SHAPES[shape]
    x = torch.randn(num_tokens, width, device=DEVICE).to(dtype)
    weight = torch.rand(num_tokens, device=DEVICE) if weighted else None
    start = torch.randn(width, width, device=DEVICE)
    out = start.clone()
    accumulate(out, x, weight)
    expected = start.tril() + oracle(x, weight)
    assert_as_good_as(start.tril() + by_torch(x, weight), out.tril(), expected)
    assert torch.equal(out.triu(1), start.triu(1))


@IMPLEMENTATIONS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_and_neighbours_in_memory_are_not_read(accumulate, layout):
    x = laid_out(torch.randn(37, 45, device=DEVICE), layout)
    weight = laid_out(torch.rand(37, 1, device=DEVICE), layout)[:, 0]
    out = laid_out(torch.zeros(45, 45, device=DEVICE), "sliced")
    accumulate(out, x, weight)
    assert_as_good_as(oracle(x, weight), out.tril(), oracle(x, weight))


@IMPLEMENTATIONS
def test_the_upper_triangle_of_out_is_left_alone(accumulate):
    above = torch.ones(45, 45, device=DEVICE, dtype=torch.bool).triu(1)
    out = torch.zeros(45, 45, device=DEVICE).masked_fill(above, float("nan"))
    x = torch.randn(20, 45, device=DEVICE)
    accumulate(out, x)
    assert torch.equal(out.isnan(), above)


@IMPLEMENTATIONS
def test_two_operands_give_their_product(accumulate):
    x, root = torch.randn(50, 40, device=DEVICE), torch.randn(50, 50, dtype=torch.float64, device=DEVICE)
    other = (root @ root.mT @ x.double()).float()  # so that the product is symmetric
    weight = torch.full((50,), 0.25, device=DEVICE)
    out = torch.zeros(40, 40, device=DEVICE)
    accumulate(out, x, weight, other)
    assert_as_good_as((x.mT @ other).tril() / 4, out, oracle(x, weight, other))


@IMPLEMENTATIONS
def test_no_tokens_change_nothing(accumulate):
    out = torch.randn(20, 20, device=DEVICE)
    before = out.clone()
    accumulate(out, torch.empty(0, 20, device=DEVICE), torch.empty(0, device=DEVICE))
    assert torch.equal(out, before)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weighted_sum_of_few_tokens_is_positive_semidefinite(accumulate, dtype):
    x = torch.randn(8, 40, device=DEVICE).to(dtype)  # rank 8 of 40: 32 eigenvalues are zero
    out = torch.zeros(40, 40, device=DEVICE)
    accumulate(out, x, torch.rand(8, device=DEVICE))
    assert least_eigenvalue(out) > -1e-6


@IMPLEMENTATIONS
def test_half_precision_products_beyond_its_range_do_not_overflow(accumulate):
    x = torch.full((30, 20), 3e4, device=DEVICE, dtype=torch.float16)
    out = torch.zeros(20, 20, device=DEVICE)
    accumulate(out, x)
    assert_as_good_as(oracle(x), out, oracle(x))


@IMPLEMENTATIONS
def test_chunks_of_tokens_add_up_and_their_order_does_not_matter(accumulate):
    x, weight = torch.randn(70, 33, device=DEVICE), torch.rand(70, device=DEVICE)
    out = torch.zeros(33, 33, device=DEVICE)
    for rows in torch.randperm(70, device=DEVICE).split(17):
        accumulate(out, x[rows], weight[rows])
    assert_as_good_as(oracle(x, weight), out, oracle(x, weight))


@pytest.mark.parametrize("accumulate", [gram_accumulate, triton])
def test_a_repeat_is_equal_bit_for_bit(accumulate):
    x, weight = torch.randn(70, 45, device=DEVICE), torch.rand(70, device=DEVICE)
    results = [torch.zeros(45, 45, device=DEVICE) for _ in range(2)]
    for out in results:
        accumulate(out, x, weight)
    assert torch.equal(*results)


def test_the_definition_is_exact_in_float64_over_blocks_and_chunks():
    x = torch.randn(reference.CHUNK + 9, 2 * reference.BLOCK + 45, dtype=torch.float64)
    weight = torch.rand(len(x), dtype=torch.float64)
    out = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    gram_accumulate(out, x, weight)
    torch.testing.assert_close(out, oracle(x, weight), rtol=1e-12, atol=1e-10)


def test_the_shipped_tiles_give_the_gram_matrix():
    for dtype, (num_tokens, width) in ((torch.float16, (160, 272)), (torch.float32, (70, 131))):
        x = torch.randn(num_tokens, width, device=DEVICE).to(dtype)
        out = torch.zeros(width, width, device=DEVICE)
        gram.gram_accumulate(out, x)
        assert_as_good_as(oracle(x), out, oracle(x))


def test_operands_of_different_dtypes_are_multiplied_in_float32():
    x = torch.randn(40, 30, device=DEVICE).to(torch.bfloat16)
    other = x.float() * (1 + 2.0**-12)  # would round back to x
    out = torch.zeros(30, 30, device=DEVICE)
    gram.gram_accumulate(out, x, other=other, tile=SMALL)
    assert_as_good_as(oracle(x, None, other), out, oracle(x, None, other))


def test_deterministic_mode_keeps_the_tokens_together(monkeypatch):
    asked = []
    monkeypatch.setattr(tiles, "token_splits", lambda *args: asked.append(args) or 2)
    x, out = torch.randn(70, 20, device=DEVICE), torch.zeros(20, 20, device=DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        gram.gram_accumulate(out, x, tile=SMALL)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not asked
    assert_as_good_as(oracle(x), out, oracle(x))
