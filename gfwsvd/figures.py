"""Figures of the report, each an inline SVG whose colours follow the page's light or dark style."""

import hashlib
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .outcome import CompressionReport, LayerReport
from .sweep import marks

# Drawn in these, then renamed to what the page's style defines: the series, the text and lines, and the grid.
_SERIES = tuple(f"#0000a{number}" for number in range(8))
_INK, _GRID = "#0000b0", "#0000b1"
_CSS = {color: f"var(--series-{number})" for number, color in enumerate(_SERIES)}
_CSS |= {_INK: "currentColor", _GRID: "var(--grid)"}
_MARKERS = "osD^vPX*"
_DASHES: Any = ("-", ":", "-.", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)))
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "path",  # text as shapes: the same on every machine; screen readers get the label
    "text.parse_math": False,  # a dollar sign in a name is one
    "svg.hashsalt": "gfwsvd",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "axes.titlesize": 10,
    "lines.markersize": 4,
    "lines.linewidth": 1.4,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
_DEPTHS = LinearSegmentedColormap.from_list("depth", ["#3b82f6", "#8b5cf6", "#ec4899", "#f97316"])  # on both grounds
_MAX_KINDS = 12
_DIAGNOSTICS = {
    "kronecker_residual": ("share of energy the Kronecker fit misses", False),
    "convergence": ("turn of the last sweep (sine)", True),
    "condition_left": ("condition number, output side", True),
    "condition_right": ("condition number, input side", True),
    "damping_left": ("relative damping, output side", True),
    "damping_right": ("relative damping, input side", True),
}


def layers_by_kind(layers: Sequence[LayerReport]) -> dict[str, list[tuple[int, LayerReport]]]:
    """Layers by what they are called apart from their number in the model, with that number: their depth.

    Kinds go by the shortest end of their names that tells them apart. Past 12 kinds, the rest go together as "other".
    """
    stems: dict[str, list[tuple[int, LayerReport]]] = {}
    for position, layer in enumerate(layers):
        numbers = re.findall(r"(?<!\w)\d+(?!\w)", layer.name)
        depth = int(numbers[0]) if numbers else position
        stems.setdefault(re.sub(r"(?<!\w)\d+(?!\w)", "*", layer.name), []).append((depth, layer))
    kinds: dict[str, list[tuple[int, LayerReport]]] = {}
    for number, (stem, members) in enumerate(stems.items()):
        few = len(stems) <= _MAX_KINDS or number < _MAX_KINDS - 1
        kinds.setdefault(_short(stem, stems) if few else "other", []).extend(members)
    return kinds


def stored_share(layer: LayerReport) -> float:
    """Numbers stored over those of the dense weight; 1 for a dense layer."""
    return layer.stored / layer.dense


def perplexity_by_size(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity against the parameters of the whole model, a line for each method, way to choose ranks, and what else
    rows differ in, as rounds and gains; "" when there is nothing to draw. Colours and markers tell methods, dashes the
    others; markers of uniform ranks are hollow."""
    sized = [row for row in evaluations if _positive(row.get("perplexity")) and _positive(row.get("model_stored"))]
    dense = [row for row in evaluations if row.get("method") == "dense" and _positive(row.get("perplexity"))]
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in sized:
        if row.get("method") != "dense":
            group = (str(row.get("method") or row.get("name")), str(row.get("ranks") or ""), *marks(row))
            groups.setdefault(group, []).append((row["model_stored"] / 1e6, row["perplexity"]))
    if not groups:
        return ""
    methods = list(dict.fromkeys(method for method, *_ in groups))
    ways = list(dict.fromkeys(tuple(way) for _, *way in groups))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (method, *way), points in groups.items():
            style = _series(methods.index(method), ", ".join(filter(None, (method, *way))))
            if number := ways.index(tuple(way)):
                style["linestyle"] = _DASHES[number % len(_DASHES)]
            if way[0] == "uniform":
                style["markerfacecolor"] = "none"
            axes.plot(*zip(*sorted(points), strict=True), **style, markersize=7)
        for row in dense[:1]:
            axes.axhline(row["perplexity"], color=_INK, linestyle="--", label="dense")
            if _positive(row.get("model_stored")):  # its size also keeps the axis from magnifying tiny differences
                axes.plot(row["model_stored"] / 1e6, row["perplexity"], "*", color=_INK, markersize=11)
        axes.set(xlabel="parameters of the whole model, millions", ylabel="perplexity (log)")
        _log(axes)
        axes.margins(0.08, 0.12)
        _legend(figure, axes)

    return _svg(draw, "Perplexity against model size", (8, 4.4))


def stored_shares(report: CompressionReport) -> str:
    """What the layers store over depth, as shares of their dense weights."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _lines(axes, report.layers, stored_share)
        axes.axhline(1, color=_INK, linestyle="--", linewidth=1, label="dense")
        axes.set(ylim=(0, 1.06), ylabel="stored / dense")
        _legend(figure, axes)

    return _svg(draw, f"Stored share by layer, {_run(report)}", (8, 4.2))


def predicted_losses(report: CompressionReport) -> str:
    """The method's objective at the chosen ranks over depth; "" where all are zero."""
    if not any(layer.predicted_loss > 0 for layer in report.layers):
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _lines(axes, report.layers, lambda layer: layer.predicted_loss)
        unit = "predicted loss, nats per token" if report.predicts_loss else "whitened squared error"
        axes.set_ylabel(f"{unit} (log)")
        _log(axes)
        _legend(figure, axes)

    return _svg(draw, f"Predicted loss by layer, {_run(report)}", (8, 4.2))


def spectra(report: CompressionReport) -> str:
    """Whitened singular values, a panel for each kind of layer, the chosen ranks marked; "" where there are none."""
    kinds = {
        kind: [(d, layer) for d, layer in members if any(value > 0 for value in layer.spectrum)]
        for kind, members in layers_by_kind(report.layers).items()
    }
    kinds = {kind: members for kind, members in kinds.items() if members}
    if not kinds:
        return ""
    columns = min(len(kinds), 3)
    rows = math.ceil(len(kinds) / columns)
    depths = [depth for members in kinds.values() for depth, _ in members]
    first, last = min(depths), max(depths)

    def color(depth: int) -> str:
        return to_hex(_DEPTHS((depth - first) / max(last - first, 1)))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (kind, members) in zip(panels, kinds.items(), strict=False):
            for depth, layer in members:
                _spectrum(axes, layer, color(depth))
            axes.set_title(_readable(kind))
            _log(axes)
        for axes in panels[len(kinds) :]:
            axes.remove()
        figure.supxlabel("index of the singular value", fontsize=10)
        figure.supylabel("whitened singular value (log)", fontsize=10)
        handles = [
            Line2D([], [], color=color(depth), label=f"depth {depth}")
            for depth in sorted({first, (first + last) // 2, last})
        ]
        handles.append(Line2D([], [], color=_INK, marker="o", linestyle="none", label="chosen rank"))
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))

    return _svg(draw, f"Whitened spectra by layer type, {_run(report)}", (9, 0.9 + 2.4 * rows))


def diagnostics(report: CompressionReport) -> str:
    """Kronecker fit, convergence, conditions and damping over depth, a panel for each; "" where there are none."""
    shown = [name for name in _DIAGNOSTICS if any(_positive(getattr(layer, name)) for layer in report.layers)]
    if not shown:
        return ""
    rows = math.ceil(len(shown) / 2)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, 2, squeeze=False).flatten()
        for axes, name in zip(panels, shown, strict=False):
            title, logarithmic = _DIAGNOSTICS[name]
            _lines(axes, report.layers, lambda layer, name=name: getattr(layer, name))  # type: ignore[misc]
            axes.set_title(title)
            if logarithmic:
                _log(axes)
            else:
                axes.set_ylim(bottom=0)
        for axes in panels[len(shown) :]:
            axes.remove()
        _legend(figure, panels[0])

    return _svg(draw, f"Quality of the metrics by layer, {_run(report)}", (9, 0.8 + 2.3 * rows))


def _spectrum(axes: Axes, layer: LayerReport, color: str) -> None:
    points = [(index, value) for index, value in zip(layer.spectrum_index, layer.spectrum, strict=True) if value > 0]
    if not points:
        return
    axes.plot(*zip(*points, strict=True), color=color, linewidth=0.9, alpha=0.8)
    if layer.rank is not None:
        rank = layer.rank
        index, value = min(points, key=lambda point: abs(point[0] - rank))
        axes.plot(index, value, "o", color=color, markersize=4)


def _lines(axes: Axes, layers: Sequence[LayerReport], value: Callable[[LayerReport], float | None]) -> None:
    """A line for each kind of layer over depth; values that are missing or not positive leave gaps."""
    for number, (kind, members) in enumerate(layers_by_kind(layers).items()):
        depths, of_kind = zip(*sorted(members, key=lambda member: member[0]), strict=True)
        values = [v if (v := value(layer)) is not None and _positive(v) else math.nan for layer in of_kind]
        axes.plot(depths, values, **_series(number, kind))
    axes.set_xlabel("depth")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _log(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 30 * low:  # hardly a power of ten inside: label more ticks
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the plot, in rows of about equal length that fit its width."""
    handles, labels = axes.get_legend_handles_labels()
    fitting = max(1, 112 // (7 + max(map(len, labels))))  # letters of a row, of a column besides its label
    rows = math.ceil(len(labels) / fitting)
    figure.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / rows))


def _series(number: int, label: str) -> dict[str, Any]:
    """How line `number` of a plot looks: told apart by marker as well as by colour."""
    return {
        "color": _SERIES[number % len(_SERIES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": "-" if number < len(_SERIES) else ":",
        "label": _readable(label),
    }


def _readable(text: str) -> str:
    """At most 48 letters that can be drawn; no "_" at the start, which would keep it out of the legend."""
    text = " ".join(text.encode("utf-8", "replace").decode().split()) or "(no name)"
    return (" " if text.startswith("_") else "") + (text if len(text) <= 48 else f"…{text[-47:]}")


def _run(report: CompressionReport) -> str:
    return f"{report.method} at keep {report.keep:g} with {report.ranks} ranks"


def _short(stem: str, stems: Mapping[str, Any]) -> str:
    parts = stem.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in stems) == 1), stem)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _svg(draw: Callable[[Figure], None], label: str, size: tuple[float, float]) -> str:
    """An `<svg>` element to stand in a page: colours of the page's style, and no id that another figure has."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root, _, body = re.sub(r"<!--.*?-->", "", file.getvalue(), flags=re.DOTALL).partition("<svg")[2].partition(">")
    view = re.search(r'viewBox="[^"]*"', root)
    assert view is not None, "matplotlib gives every SVG a viewBox"
    prefix = f"f{hashlib.sha256(body.encode()).hexdigest()[:8]}-"
    body = re.sub(r'( id="|href="#|url\(#)', lambda match: match[1] + prefix, body)
    body = re.sub(r"#0000[0-9a-f]{2}", lambda match: _CSS.get(match[0], match[0]), body)
    return f'<svg {view[0]} role="img" aria-label="{html.escape(label)}">{body.strip()}'
