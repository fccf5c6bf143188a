"""Hooks that show a layer's inputs and output gradients as they stream by, and are always removed."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

OnInput = Callable[[str, Tensor], None]
OnGradient = Callable[[str, Tensor, Tensor], None]


class _Tap(torch.autograd.Function):
    """The identity on a layer's output, whose backward shows the layer's input and output gradient.

    The input is an ordinary saved tensor: gradient checkpointing drops and recomputes it, in both of its variants, and
    each backward fires once.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, show: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.show = show
        return output.clone()  # a view could not be changed in place by the layers that follow

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.show(x.detach(), gradients[0].detach())
        return gradients[0], None, None


@contextmanager
def watch(
    linears: Mapping[str, nn.Module], *, on_input: OnInput, on_gradient: OnGradient | None = None
) -> Iterator[None]:
    """Within it, `on_input(name, x)` is called whenever a layer runs forward, and `on_gradient(name, x, g)` once when
    its gradient passes. Tensors keep the shape the layer saw, (..., D_IN) and (..., D_OUT). What a callback raises ends
    the forward or backward pass.
    """

    def hook(name: str) -> Callable[..., Tensor]:
        def forward_hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = arguments[0]
            on_input(name, x)
            if on_gradient is None or not torch.is_grad_enabled():
                return output
            if not output.requires_grad:  # the first layers of a frozen model: their outputs start the graph
                output = output.detach().requires_grad_()
            return _Tap.apply(output, x, functools.partial(on_gradient, name))

        return forward_hook

    handles = []
    try:
        for name, module in linears.items():
            handles.append(module.register_forward_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it `model` evaluates: no dropout, and no parameter needs a gradient, which saves about half of a
    backward pass. Gradient checkpointing stays on where it was on. Afterwards all is as it was.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    dropouts: list[tuple[nn.Module, str, float]] = []  # of modules, and of whole layers ("layerdrop")
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    embeddings = _input_embeddings(model)
    handle = None
    if isinstance(embeddings, nn.Module):  # reentrant checkpointing asks that a block's input needs a gradient
        handle = embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_(torch.is_grad_enabled()))
    try:
        model.eval()
        model.requires_grad_(False)
        if use_cache:
            config.use_cache = False
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):  # transformers honours it in training mode only
                module.training = True
                dropouts += [(module, k, v) for k, v in vars(module).items() if "drop" in k and type(v) is float]
        for module, name, _ in dropouts:
            setattr(module, name, 0.0)
        yield
    finally:
        if handle is not None:
            handle.remove()
        if use_cache:
            config.use_cache = use_cache
        for module, name, probability in dropouts:
            setattr(module, name, probability)
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _input_embeddings(model: nn.Module) -> object:
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        return find() if find else None
    except NotImplementedError:  # how transformers says that a model has none
        return None
