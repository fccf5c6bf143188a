"""The linear layers that a compression is of, and whether model, statistics and method fit each other."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from .bounds import bounds_of
from .calibration import Statistics
from .errors import GfwsvdError
from .layers import LowRankLinear, find_linears, fingerprint, weight_shape
from .methods import Method
from .ranks import Candidate


def check_dense(model: nn.Module) -> None:
    """GfwsvdError where the model has low-rank layers already."""
    if any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise GfwsvdError("the model has low-rank layers already; expected a dense one: compress the original again")


def blank_candidates(
    model: nn.Module,
    statistics: Statistics | None,
    exclude: Iterable[str],
    bounds: Mapping[str, tuple[float, float]],
    *,
    pivoted: bool,
) -> dict[str, Candidate]:
    """The layers that will be compressed, before anything is computed: their spectra are zero."""
    if statistics is None:
        shapes = {name: weight_shape(module) for name, module in find_linears(model, exclude=exclude).items()}
    else:
        shapes = {name: (stats.d_out, stats.d_in) for name, stats in statistics.layers.items()}
    limits = bounds_of(shapes, bounds)
    return {name: Candidate(*shape, torch.zeros(min(shape)), pivoted, limits[name]) for name, shape in shapes.items()}


def checked_linears(model: nn.Module, statistics: Statistics, row: Method) -> dict[str, nn.Module]:
    """The model's layers that the statistics are about; GfwsvdError unless they fit each other and the method."""
    missing = row.needs - statistics.collected
    if missing:
        raise GfwsvdError(
            f"method {row.name} needs the statistics {', '.join(sorted(row.needs))}; these hold "
            f"{', '.join(sorted(statistics.collected)) or 'none'}: calibrate again"
        )
    linears = find_linears(model)
    advice = "the statistics belong to another model; calibrate this one"
    for name, stats in statistics.layers.items():
        found = weight_shape(linears[name]) if name in linears else "no linear layer"
        if found != (stats.d_out, stats.d_in):
            raise GfwsvdError(
                f"expected a layer {name} of weight {(stats.d_out, stats.d_in)}, the model has {found} there: {advice}"
            )
    linears = {name: linears[name] for name in statistics.layers}
    if fingerprint(linears) != statistics.model_sha256:
        raise GfwsvdError(f"the model's weights are not those that were calibrated, or rounded to float16: {advice}")
    return linears
