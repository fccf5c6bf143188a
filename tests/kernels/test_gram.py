"""gram_accumulate: the definition and the Triton kernel against float64."""

import pytest
import torch
import triton.language as tl
from kernel_cases import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_as_good_as,
    far_apart,
    laid_out,
    least_eigenvalue,
    places,
)
from torch import Tensor
from triton import jit

from gfwsvd_kernels import gram, gram_accumulate, pack, reference, symmetrize, tiles

SMALL = tiles.Tile(16, 16, 16, 4, 2)
WIDE = tiles.Tile(16, 32, 16, 4, 2)
TALL = tiles.Tile(64, 16, 16, 4, 2)
THREE_SMS = tiles.Target(90, 3)  # whole tiles in several waves, and shares of the rest


def triton(out: Tensor, x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> None:
    gram.gram_accumulate(out, x, weight, other, tile=SMALL)


def triton_wide(out: Tensor, x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> None:
    gram.gram_accumulate(out, x, weight, other, tile=WIDE, target=THREE_SMS)


IMPLEMENTATIONS = pytest.mark.parametrize("accumulate", [gram_accumulate, triton, triton_wide])


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
def test_operands_may_span_more_than_two_to_the_31_elements(accumulate):
    x = far_apart(torch.randn(300, 20, device=DEVICE).half())
    out = torch.zeros(20, 20, device=DEVICE)
    accumulate(out, x)
    assert_as_good_as(oracle(x), out, oracle(x))


def test_rows_too_far_apart_for_32_bit_offsets_are_refused_before_a_launch():
    far = torch.empty(4, 2**23, device="meta").mT[:4]
    for arguments in ((far, far.mT), (torch.empty(4, 4, device="meta"), far)):
        with pytest.raises(ValueError, match="must have strides below 8388608 elements on a GPU"):
            gram.gram_accumulate(*arguments)


@IMPLEMENTATIONS
def test_the_upper_triangle_of_out_is_left_alone(accumulate):
    above = torch.ones(45, 45, device=DEVICE, dtype=torch.bool).triu(1)
    out = torch.zeros(45, 45, device=DEVICE).masked_fill(above, float("nan"))
    x = torch.randn(20, 45, device=DEVICE)
    accumulate(out, x)
    assert torch.equal(out.isnan(), above)


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_triangle_grows_by_the_same(accumulate, shape, dtype):
    num_tokens, width = SHAPES[shape]
    x, weight = torch.randn(num_tokens, width, device=DEVICE).to(dtype), torch.rand(num_tokens, device=DEVICE)
    start = torch.randn(width, width, device=DEVICE)
    around = torch.full((width * (width + 1) // 2 + 8,), float("nan"), device=DEVICE)
    out = around[4:-4].copy_(pack(start))
    accumulate(out, x, weight)
    expected = start.tril() + oracle(x, weight)
    assert_as_good_as(start.tril() + by_torch(x, weight), symmetrize(out).tril(), expected)
    assert around[:4].isnan().all() and around[-4:].isnan().all()


@pytest.mark.parametrize("accumulate", [triton, triton_wide])
def test_a_kernel_gives_a_packed_triangle_the_bits_of_a_full_one(accumulate):
    x, start = torch.randn(70, 45, device=DEVICE), torch.randn(45, 45, device=DEVICE)
    packed, full = pack(start), start.clone()
    torch.use_deterministic_algorithms(True)
    try:
        accumulate(packed, x)
        accumulate(full, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(packed, pack(full))


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
    packed = torch.zeros_like(pack(out))
    gram_accumulate(packed, x, weight)
    torch.testing.assert_close(packed, pack(oracle(x, weight)), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_copy_engine_reads_rows_that_are_no_whole_tiles(dtype):
    """Widths and tokens that end within a tile, and neighbours in memory that are NaN."""
    around = torch.full((50, 112), float("nan"), device=DEVICE, dtype=dtype)
    x = around[3:44, 16:86]
    x.copy_(torch.randn(41, 70, device=DEVICE))
    assert tiles.by_descriptors(tiles.H200, x)
    for tile in (SMALL, WIDE, TALL):
        for target in (THREE_SMS, tiles.Target(90, 40)):
            out = torch.zeros(70, 80, device=DEVICE)[:, :70]
            gram.gram_accumulate(out, x, tile=tile, target=target)
            assert_as_good_as(oracle(x), out, oracle(x))


def test_weighted_rows_are_added_in_chunks_of_bounded_memory(monkeypatch):
    x, weight = torch.randn(200, 40, device=DEVICE).half(), torch.rand(200, device=DEVICE)
    monkeypatch.setattr(gram, "WEIGHTED_BYTES", 64 * 48 * 2)
    out, expected = torch.zeros(2, 40, 40, device=DEVICE)
    gram.gram_accumulate(out, x, weight, tile=SMALL)
    scaled = (x.float() * weight.sqrt()[:, None]).half()
    gram.gram_accumulate(expected, scaled, tile=SMALL)
    assert_as_good_as(expected, out, oracle(x, weight))


def test_a_negative_weight_gives_nan():
    out = torch.zeros(20, 20, device=DEVICE)
    gram.gram_accumulate(out, torch.ones(3, 20, device=DEVICE), torch.tensor([1.0, -1.0, 1.0], device=DEVICE))
    assert out[torch.ones_like(out, dtype=torch.bool).tril()].isnan().all()


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


def test_operands_longer_than_the_plan_of_one_program_are_walked_whole():
    """Whole tiles in waves, then blocks of steps of the last one; and a range of steps across two tiles."""
    for tile, num_tokens, width, num_sms in ((SMALL, 333, 45, 5), (WIDE, 811, 30, 3)):
        x = torch.randn(num_tokens, width, device=DEVICE)
        out = torch.zeros(width, width, device=DEVICE)
        gram.gram_accumulate(out, x, tile=tile, target=tiles.Target(90, num_sms))
        assert_as_good_as(oracle(x), out, oracle(x))


def three_bfloat16(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel makes of a float32 operand beside a bfloat16 one, which the interpreter cannot run."""
    high = y.bfloat16()
    rest = y - high.float()
    middle = rest.bfloat16()
    return high, middle, (rest - middle.float()).bfloat16()


def test_a_float32_operand_is_the_sum_of_three_bfloat16_numbers_exactly():
    y = torch.randn(1000, 100) * 10.0 ** torch.randint(-20, 20, (1000, 1))
    assert torch.equal(sum(part.double() for part in three_bfloat16(y)), y.double())


def test_a_sum_of_few_tokens_by_three_bfloat16_products_is_positive_semidefinite():
    x, g = torch.randn(8, 30).bfloat16().float(), torch.randn(8, 40).bfloat16().float()
    e = (x @ x.mT) @ g
    out = sum(g.mT @ part.float() for part in three_bfloat16(e))
    assert least_eigenvalue(out) > -1e-6
    assert_as_good_as(g.mT @ e, out, g.double().mT @ (x.double() @ x.double().mT) @ g.double())


@jit
def places_kernel(
    row_ptr,
    col_ptr,
    first,
    edge,
    PER_ROW: tl.constexpr,
    PER_COL: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = first + tl.arange(0, BLOCK)
    row, col = gram.place(tile, edge, PER_ROW, PER_COL, GROUP)
    tl.store(row_ptr + tl.arange(0, BLOCK), row)
    tl.store(col_ptr + tl.arange(0, BLOCK), col)


@pytest.mark.parametrize("tile", [tiles.Tile(128, 128, 16, 4, 2), WIDE, TALL], ids=["square", "wide", "tall"])
def test_tile_numbers_cover_the_triangle_block_by_block(tile):
    per_row, per_col = max(tile.rows // tile.cols, 1), max(tile.cols // tile.rows, 1)
    side = max(tile.rows, tile.cols)
    for edge in (1, 2, 7, 8, 9, 20, 41):
        expected = places(tile, edge * side)
        assert len(set(expected)) == len(expected) == tile.in_triangle(edge * side)
        rows, cols = torch.empty(2, 4096, dtype=torch.int32, device=DEVICE)
        places_kernel[(1,)](rows, cols, 0, edge, PER_ROW=per_row, PER_COL=per_col, GROUP=tile.group, BLOCK=4096)
        found = zip((rows * tile.rows).tolist(), (cols * tile.cols).tolist(), strict=True)
        assert list(found)[: len(expected)] == expected[:4096]


def test_places_are_right_where_float32_is_no_longer_exact():
    edge, group = 2**14 + 5, 8
    for first in (2**24 - 2048, 2**27):
        rows, cols = torch.empty(2, 4096, dtype=torch.int32, device=DEVICE)
        places_kernel[(1,)](rows, cols, first, edge, PER_ROW=1, PER_COL=1, GROUP=group, BLOCK=4096)
        rows, cols = rows.long(), cols.long()
        band = rows // group * group
        height = (edge - band).clamp(max=group)
        inside = cols // group * group * height + cols % group * height + rows % group
        diagonal = band * height + (rows - band) * (rows - band + 1) // 2 + cols - band
        numbers = band * (band + 1) // 2 + torch.where(cols < band, inside, diagonal)
        assert torch.equal(numbers, first + torch.arange(4096, device=DEVICE)) and (cols <= rows).all()
