"""Launches of a Triton kernel at little cost to the host, for calls as short as a token's.

`kernel[grid](...)` derives from its arguments what to compile for, each time anew, which takes the host longer than a
launch takes a GPU (docs/kernels.md). Here arguments of the kinds that were launched before find the compiled kernel.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Launcher:
    """A kernel with its flags (its constants) and options of compilation; called with a grid and all other arguments.

    Triton's interpreter, and whatever else compiles nothing, is called each time.
    """

    def __init__(self, kernel: Any, flags: dict[str, Any], options: dict[str, Any]) -> None:
        self.kernel, self.named = kernel, flags | options
        self.constants = tuple(flags[name] for name in kernel.arg_names if name in flags)
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, grid: tuple[int, int, int], *args: Tensor | int | None) -> None:
        kinds = tuple(map(_kind, args))
        compiled: Any = self.compiled.get(kinds)
        if compiled is not None:
            compiled[grid](*args, *self.constants)
        elif (compiled := self.kernel[grid](*args, **self.named)) is not None:
            self.compiled[kinds] = compiled


def _kind(argument: Tensor | int | None) -> Any:
    """Arguments of one kind are the same to Triton's compiler: it looks for multiples of 16, ones and wide integers."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.get_device(), argument.data_ptr() % 16 == 0
    return argument if argument is None or argument == 1 else (argument % 16 == 0, argument >> 31)
