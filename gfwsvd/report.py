"""The report: one HTML file that needs nothing else, with the table, the plots and where the numbers come from."""

import html
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .errors import GfwsvdError
from .figures import diagnostics, perplexity_by_size, predicted_losses, spectra, stored_share, stored_shares
from .folders import write_text
from .outcome import CompressionReport, LayerReport

_OPEN_REPORTS = 3  # with more, each is folded away until it is clicked
_LIGHT = "#1d4ed8 #b45309 #15803d #9333ea #dc2626 #0e7490 #854d0e #475569".split()
_DARK = "#7aa2ff #ffa657 #5fd38d #d2a8ff #ff7b72 #56d4dd #e3b341 #a8b3c0".split()
_MISSING = "–"
_KINDS = {"dense": "left dense, each because ", "lowrank": "of low rank stored as "}  # what comes before a reason


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    reports: Sequence[CompressionReport],
    evaluations: Sequence[Mapping[str, Any]] = (),
    samples: Mapping[str, str] | None = None,
) -> None:
    """Writes the report as one HTML file, beside its final place and then renamed, so that it is whole or as before.

    Args:
        path: of the file; missing folders are made.
        reports: each gets its plots, a table of its layers, and its provenance.
        evaluations: rows of the table and points of the plot of perplexity against size, with any of the keys name,
            method ("dense" for the model before), ranks, storage, rounds, gains, keep, kept, stored, model_stored,
            perplexity, kl, top1 and seconds. Without any, the table is of `reports`.
        samples: texts to compare, by the name of the model that wrote them.

    Raises:
        GfwsvdError: when there is nothing to report, or the file cannot be written.
    """
    if not reports and not evaluations:
        raise GfwsvdError("a report needs at least one compression report or evaluation, got none")
    write_text(Path(path), _page(title, reports, evaluations, samples or {}), what="report")


def _page(
    title: str,
    reports: Sequence[CompressionReport],
    evaluations: Sequence[Mapping[str, Any]],
    samples: Mapping[str, str],
) -> str:
    rows = evaluations or [{"name": report.method, **vars(report)} for report in reports]
    parts = [
        f"<h1>{_text(title)}</h1>",
        "<h2>Comparison</h2>",
        _comparison(rows),
        _figure(
            perplexity_by_size(evaluations),
            "Perplexity against size. Lower is better; the dashed line is the dense model.",
        ),
    ]
    if samples:
        parts += ["<h2>What the models write</h2>", *map(_sample, samples.items())]
    parts += [_report(report, unfolded=len(reports) <= _OPEN_REPORTS) for report in reports]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, parts))
        + f"\n</main>\n<footer>Written by gfwsvd {_text(__version__)}.</footer>\n</body>\n</html>\n"
    )


def _comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    return _table(
        "Size and quality of each model. Keep is the share of the parameters of the compressed linear layers that is "
        "stored; KL (nats per token) and top-1 agreement are to the dense model.",
        ["model", "method", "ranks", "keep asked", "keep achieved", "parameters of linears", "parameters of the model"]
        + ["perplexity", "KL", "top-1", "seconds"],
        (
            [
                _text(row.get("name")),
                _text(row.get("method")),
                _text(row.get("ranks")),
                _number(row.get("keep"), "g"),
                _number(row.get("kept"), ".4f"),
                _number(row.get("stored"), ","),
                _number(row.get("model_stored"), ","),
                _number(row.get("perplexity"), ".4g" if _large(row.get("perplexity")) else ".2f"),
                _number(row.get("kl"), ".4f"),
                _number(row.get("top1"), ".1%"),
                _number(row.get("seconds"), ".1f"),
            ]
            for row in rows
        ),
        texts=3,
    )


_ROUNDS = (
    "Ranks were allocated again {steps} times by the compressed model's divergence from the dense one, or the loss "
    "that was given: {losses}; those of the lowest were taken."
)
_GAINS = (
    "Gains of outputs were fitted in {steps} steps. The divergence from the dense model, or the loss that was given, "
    "on held-out text: {losses}."
)


def _report(report: CompressionReport, *, unfolded: bool) -> str:
    losses = (
        "Predicted loss by layer: what the chosen rank costs, in nats per predicted token; the sum is "
        f"{_number(sum(layer.predicted_loss for layer in report.layers), '.4g')}. Dense layers cost nothing."
        if report.predicts_loss
        else "Error that the chosen rank leaves in each layer, as this method weighs it; no prediction of the loss."
    )
    reasons = Counter((layer.kind, layer.reason) for layer in report.layers if layer.reason)
    parts = [
        f"<p>{_summary(report)}</p>",
        *(f"<p>{count} {_KINDS[kind]}{_text(reason)}.</p>" for (kind, reason), count in reasons.items()),
        _guard(report),
        _steps(report.round_losses, _ROUNDS),
        _steps(report.gain_losses, _GAINS),
        _figure(stored_shares(report), "What each layer stores, as a share of its dense weight."),
        _figure(predicted_losses(report), losses),
        _figure(spectra(report), "Singular values of the whitened weights; what lies right of a dot is dropped."),
        _figure(diagnostics(report), "How sound the metrics are: Kronecker fit, convergence, conditions, damping."),
        "<details><summary>All layers</summary>" + _layers(report.layers) + "</details>",
        "<details><summary>Provenance</summary>" + _provenance(report.provenance) + "</details>",
    ]
    heading = f"{_text(report.method)}, keep {_number(report.keep, 'g')}, {_text(report.ranks)} ranks"
    return (
        f'<details class="run"{" open" if unfolded else ""}><summary><h2>{heading}</h2></summary>'
        + "\n".join(filter(None, parts))
        + "</details>"
    )


def _summary(report: CompressionReport) -> str:
    dense = sum(layer.rank is None for layer in report.layers)
    share = report.model_stored / max(report.model_dense, 1)
    num_bytes = (
        ""
        if report.model_bytes is None
        else f", or {_number(report.model_bytes, ',')} of {_number(report.model_dense_bytes, ',')} bytes"
    )
    time = (
        ""
        if report.time_kept is None
        else f"By the latency table they take {_number(report.time_kept, '.2%')} of the dense layers' time; keep is "
        "a share of that. "
    )
    return (
        f"{len(report.layers)} linear layers, {dense} of them dense. Their weights hold {report.stored:,} of "
        f"{report.dense:,} parameters ({_number(report.kept, '.2%')}), the whole model {report.model_stored:,} of "
        f"{report.model_dense:,} ({_number(share, '.2%')}){num_bytes}. "
        f"{time}Ranks are multiples of {report.rank_multiple}; factorising took {_number(report.seconds, '.1f')} s."
    )


def _guard(report: CompressionReport) -> str:
    """Which metrics the layers were factored by, where held-out tokens judged that, or why they did not."""
    if report.metrics is None:
        return f"<p>Metrics were not judged: {_text(report.unjudged)}.</p>" if report.unjudged else ""
    judged = [layer for layer in report.layers if layer.heldout_losses]
    chosen = sum(layer.heldout_losses[layer.metrics] for layer in judged)
    first = sum(next(iter(layer.heldout_losses.values())) for layer in judged)
    return (
        f"<p>Judged by held-out tokens, {len(judged)} layers were factored by these metrics: "
        f"{_text(', '.join(f'{choice} {count}' for choice, count in report.metrics.items()))}. At the ranks they were "
        f"judged at, that lowers their summed loss from {_number(first, '.4g')} to {_number(chosen, '.4g')}.</p>"
    )


def _steps(losses: Sequence[float], text: str) -> str:
    """A `text` on the `losses` before and after each of some `steps`; nothing where there were none."""
    found = ", ".join(_number(loss, ".4f") for loss in losses)
    return f"<p>{text.format(steps=len(losses) - 1, losses=found)}</p>" if losses else ""


def _layers(layers: Sequence[LayerReport]) -> str:
    return _table(
        "The linear layers in the model's order",
        ["layer", "in", "out", "rank", "share stored", "bound", "parameters", "predicted loss"]
        + [
            "metrics",
            "loss on held-out tokens",
            "two-sided",
            "Kronecker misfit",
            "last turn",
            "condition, out",
            "condition, in",
            "damping, out",
            "damping, in",
        ],
        (
            [
                _text(layer.name),
                _number(layer.d_in, ","),
                _number(layer.d_out, ","),
                "dense" if layer.rank is None else _number(layer.rank, ","),
                _number(stored_share(layer), ".3f"),
                _MISSING if layer.bound is None else "{:g} to {:g}".format(*layer.bound),
                _number(layer.stored, ","),
                _number(layer.predicted_loss, ".3g"),
                _text(layer.metrics),
                _number(layer.heldout_losses.get(layer.metrics), ".3g"),
                _number(layer.heldout_losses.get("two-sided"), ".3g"),
                _number(layer.kronecker_residual, ".3f"),
                _number(layer.convergence, ".2g"),
                _number(layer.condition_left, ".2g"),
                _number(layer.condition_right, ".2g"),
                _number(layer.damping_left, ".2g"),
                _number(layer.damping_right, ".2g"),
            ]
            for layer in layers
        ),
        texts=1,
    )


def _provenance(values: Mapping[str, Any]) -> str:
    rows = ([_text(name), _text(value)] for name, value in _flat(values))
    return _table("Where the numbers come from", ["what", "value"], rows, texts=2)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{name}", value


def _sample(sample: tuple[str, str]) -> str:
    name, text = sample
    return f"<h3>{_text(name)}</h3>\n<pre>{_text(text)}</pre>"


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int) -> str:
    """A table of cells that are HTML already; the first `texts` columns hold text, the others numbers."""
    kinds = ["text" if column < texts else "number" for column in range(len(heads))]
    lines = [f'<th scope="col" class="{kind}">{head}</th>' for kind, head in zip(kinds, heads, strict=True)]
    body = []
    for row in rows:
        first, *others = (f'class="{kind}">{cell}' for kind, cell in zip(kinds, row, strict=True))
        body.append(f'<tr><th scope="row" {first}</th>' + "".join(f"<td {cell}</td>" for cell in others) + "</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}"><table><caption>{_text(caption)}'
        f"</caption>\n<thead><tr>{''.join(lines)}</tr></thead>\n<tbody>\n"
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>" if svg else ""


def _text(value: Any) -> str:
    return _MISSING if value is None or value == "" else html.escape(str(value))


def _number(value: Any, form: str) -> str:
    if value is None or math.isnan(value):
        return _MISSING
    return format(value, form) if math.isfinite(value) else "∞"


def _large(value: Any) -> bool:
    return value is not None and value >= 1e4


def _style() -> str:
    def colors(series: Sequence[str]) -> str:
        return "".join(f"--series-{number}:{color};" for number, color in enumerate(series))

    return f"""
:root {{ color-scheme: light dark; --ground:#fff; --ink:#1f2328; --faint:#57606a; --line:#d0d7de; --grid:#d0d7de80;
  --panel:#f6f8fa; {colors(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ground:#0d1117; --ink:#e6edf3; --faint:#9aa4af; --line:#30363d;
  --grid:#30363d; --panel:#161b22; {colors(_DARK)} }} }}
body {{ margin:0; background:var(--ground); color:var(--ink); font:16px/1.5 system-ui, sans-serif; }}
main, footer {{ max-width:72rem; margin:auto; padding:1rem; }}
h1 {{ font-size:1.8rem; }} h2 {{ font-size:1.3rem; margin:1.5rem 0 .5rem; }}
h3 {{ font-size:1rem; margin:1rem 0 .3rem; }}
summary {{ cursor:pointer; }} summary h2 {{ display:inline; }}
.run {{ border-top:1px solid var(--line); padding:1rem 0; }}
figure {{ margin:1.2rem 0; }} svg {{ display:block; width:100%; max-width:60rem; height:auto; margin:auto; }}
figcaption, caption, footer {{ color:var(--faint); font-size:.9rem; }}
figcaption {{ text-align:center; margin-top:.3rem; }} caption {{ text-align:left; padding-bottom:.4rem; }}
.scroll {{ overflow-x:auto; margin:.8rem 0; }} table {{ border-collapse:collapse; font-size:.85rem; }}
th, td {{ padding:.3rem .6rem; border-bottom:1px solid var(--line); text-align:left; font-weight:normal; }}
tbody th, td.number {{ white-space:nowrap; }} td.text {{ max-width:40rem; overflow-wrap:break-word; }}
thead th {{ font-weight:600; vertical-align:bottom; }}
.number {{ text-align:right; font-variant-numeric:tabular-nums; }}
pre {{ background:var(--panel); border-radius:6px; padding:.8rem; white-space:pre-wrap; overflow-wrap:anywhere; }}
"""
