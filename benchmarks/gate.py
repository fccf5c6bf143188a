"""Correctness first: nothing is timed before its result agrees with float64."""

import torch
from torch import Tensor

from benchmarks.providers import Call, Inputs, Provider
from benchmarks.registry import Op
from benchmarks.shapes import Case

# Half-precision operands, intermediates and results may be rounded; float32 must be float32: TF32 is off by 3e-4.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
WORST = 50  # one entry may be off by that many times the limit, in units of the root mean square of the entries
MAX_TOKENS = {"cuda": 4096, "cpu": 128}  # more would only take longer


class Gate:
    """The float64 result of one case, with fewer tokens where there are many, and who agrees with it."""

    def __init__(self, op: Op, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.op, self.limit = op, LIMITS[dtype]
        self.inputs = op.inputs(case.with_tokens(min(case.tokens, MAX_TOKENS[device.type])), dtype, device)
        self.expected = self._relevant(op.oracle(self.inputs))

    def _relevant(self, result: Tensor) -> Tensor:
        return result.double().tril() if self.op.lower and result.ndim == 2 else result.double()

    def _fresh(self) -> Inputs:
        return self.inputs | ({"out": self.inputs["out"].clone()} if self.op.lower else {})

    def error(self, provider: Provider, call: Call) -> float:
        """Relative error of what a provider computes; infinity where that is not finite.

        The error in the Frobenius norm, or, so that one tile of a large matrix cannot hide in it, a part of the error
        of the worst entry, whichever is larger.
        """
        if not self.op.lower:
            # The memory of the first result, NaN by then, is likely to be that of the second
            call(self._fresh()).fill_(float("nan"))
        result = self._relevant(call(self._fresh()))
        if not provider.adds:
            result += self._relevant(self.inputs["out"])
        result -= self.expected
        norm = torch.linalg.vector_norm(self.expected)
        entries = result.numel() / 2 if self.op.lower and result.ndim == 2 else result.numel()
        worst = torch.linalg.vector_norm(result, ord=float("inf")) * entries**0.5 / WORST
        error = (torch.maximum(torch.linalg.vector_norm(result), worst) / norm).item()
        return error if error < float("inf") else float("inf")
