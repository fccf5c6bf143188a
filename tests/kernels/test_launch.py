"""Launches without Triton's own binding: the same arguments reach the compiled kernel, and only where they may."""

import pytest
import torch

from gfwsvd_kernels.launch import Launcher, _kind

ROOM = torch.zeros(64)


class Kernel:
    """Stands for a Triton kernel: "compiles" at each call of its own, and notes what is launched either way."""

    arg_names = ("x_ptr", "count", "FIRST", "SECOND")

    def __init__(self, compiles=True):
        self.compiles, self.bound, self.launched = compiles, [], []

    def __getitem__(self, grid):
        def bind(*args, **named):
            self.bound.append((grid, args, named))
            return Compiled(self.launched) if self.compiles else None

        return bind


class Compiled:
    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((grid, args))


def launcher(kernel):
    return Launcher(kernel, {"SECOND": 2, "FIRST": True}, {"num_warps": 4})


def test_a_second_call_reaches_the_compiled_kernel_with_constants_in_its_own_order():
    kernel = Kernel()
    launch = launcher(kernel)
    launch((3, 1, 1), ROOM, 5)
    launch((7, 2, 1), ROOM[4:], 9)
    assert kernel.bound == [((3, 1, 1), (ROOM, 5), {"SECOND": 2, "FIRST": True, "num_warps": 4})]
    ((grid, (x, *others)),) = kernel.launched
    assert grid == (7, 2, 1) and x.data_ptr() == ROOM[4:].data_ptr() and others == [9, True, 2]


@pytest.mark.parametrize(
    "other",
    [(ROOM.half(), 5), (ROOM[1:], 5), (None, 5), (ROOM, 16), (ROOM, 1), (ROOM, 2**31 + 5)],
)
def test_arguments_of_another_kind_are_compiled_for(other):
    kernel = Kernel()
    launch = launcher(kernel)
    launch((1, 1, 1), ROOM, 5)
    launch((1, 1, 1), *other)
    assert len(kernel.bound) == 2 and not kernel.launched


def test_what_compiles_nothing_is_called_each_time():
    kernel = Kernel(compiles=False)
    launch = launcher(kernel)
    for _ in range(3):
        launch((1, 1, 1), ROOM, 5)
    assert len(kernel.bound) == 3


def test_what_is_of_one_kind_is_of_one_type_and_alignment_to_triton():
    from triton.backends.compiler import BaseBackend
    from triton.runtime.jit import native_specialize_impl

    arguments = [
        None,
        ROOM,
        ROOM[1:],
        ROOM[4:],
        ROOM.half(),
        *(n + d for n in (0, 2**31, 2**32) for d in (1, 2, 5, 16, 32)),
    ]
    arguments += [2**31 - 1, 2**31 - 16, 2**32 - 16, 2**32 - 1]
    found = {}
    for argument in arguments:
        specialised = native_specialize_impl(BaseBackend, argument, False, True, True)
        assert found.setdefault(_kind(argument), specialised) == specialised
