"""lowrank_linear against float64, and its gradients."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, LAYOUTS, assert_as_good_as, laid_out
from torch import Tensor

from gfwsvd_kernels import lowrank_linear

# tokens, D_IN, R, D_OUT
SIZES = {
    "ones": (1, 1, 1, 1),
    "decode": (3, 70, 17, 50),
    "odd": (37, 45, 5, 51),
    "tiles": (64, 32, 16, 48),
    "many": (150, 90, 40, 130),
}


def operands(size: str, dtype: torch.dtype) -> list[Tensor]:
    num_tokens, d_in, rank, d_out = SIZES[size]
    shapes = ((num_tokens, d_in), (rank, d_in), (d_out, rank), (d_out,))
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def oracle(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ down.double().mT @ up.double().mT
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_two_stages_give_the_product(size, dtype, with_bias):
    x, down, up, bias = operands(size, dtype)
    tensors = (x, down, up, bias) if with_bias else (x, down, up)
    y = lowrank_linear(*tensors)
    assert y.dtype == dtype
    peer = torch.nn.functional.linear(torch.nn.functional.linear(x, down), up, bias if with_bias else None)
    assert_as_good_as(peer, y, oracle(*tensors))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_and_neighbours_in_memory_are_not_read(layout):
    x, down, up, bias = operands("odd", torch.float32)
    y = lowrank_linear(*(laid_out(tensor, layout) for tensor in (x, down, up)), laid_out(bias[:, None], layout)[:, 0])
    assert_as_good_as(oracle(x, down, up, bias), y, oracle(x, down, up, bias))


def test_leading_dimensions_are_kept():
    x, down, up, bias = operands("odd", torch.float32)
    expected = lowrank_linear(x[:24], down, up, bias)
    assert torch.equal(lowrank_linear(x[:24].reshape(2, 3, 4, -1), down, up, bias), expected.reshape(2, 3, 4, -1))
    torch.testing.assert_close(lowrank_linear(x[0], down, up, bias), expected[0])
    assert lowrank_linear(x[:0].reshape(0, 4, 45), down, up, bias).shape == (0, 4, 51)


def test_sums_beyond_the_range_of_half_precision_do_not_overflow_on_the_way():
    x = torch.full((4, 64), 60.0, device=DEVICE, dtype=torch.float16)
    down = torch.full((1, 64), 60.0, device=DEVICE, dtype=torch.float16)
    down[:, 32:] *= -1  # the partial sum is 115200, the sum 0
    assert lowrank_linear(x, down, torch.ones(3, 1, device=DEVICE, dtype=torch.float16)).abs().max() == 0


def test_gradients_are_those_of_the_formula():
    tensors = [tensor.double().cpu().requires_grad_() for tensor in operands("decode", torch.float32)]
    assert torch.autograd.gradcheck(lowrank_linear, tensors)
    assert torch.autograd.gradcheck(lowrank_linear, tensors[:3])
    assert torch.autograd.gradgradcheck(lowrank_linear, tensors)


def test_gradients_keep_leading_dimensions_and_skip_what_needs_none():
    x, down, up, bias = operands("odd", torch.float32)
    x = x[:24].reshape(2, 12, -1).requires_grad_()
    lowrank_linear(x, down, up.requires_grad_(), bias).square().sum().backward()
    gradients = x.grad, up.grad
    x.grad = up.grad = None
    torch.nn.functional.linear(x @ down.mT, up, bias).square().sum().backward()
    torch.testing.assert_close(gradients, (x.grad, up.grad))
    assert down.grad is None and bias.grad is None
