"""What each step of the method brings, on how many tokens, of which text: every row by one command that resumes.

    python -m benchmarks.ablation --calibration wiki.train.raw --other c4.txt --evaluation wiki.valid.raw \\
        --stats DIR --results FILE

The rows of `STUDIES` are computed one after the other, each collection of statistics once. Rows that FILE holds, of the
same model, texts and settings, are not computed again. `keep` is the share of the linear layers' weights that is
stored; ranks are not rounded to multiples, so that all rows of one `keep` store the same.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gfwsvd
from benchmarks import frontier, record
from benchmarks.packaged import packaged_smollm2
from gfwsvd.calibration import about_calibration
from gfwsvd.cli_app import beside, kept_work
from gfwsvd.progress import bar
from gfwsvd.sweep import Run, compressed_rows, dense_row


@dataclass(frozen=True)
class Study:
    """Some compressions from one collection of statistics.

    Attributes:
        share: of --sequences, how many sequences to calibrate on.
        calibration: further arguments of `gfwsvd.calibrate`; "seed" also chooses the sequences.
        other: whether the sequences come from the other text.
        steps: names of `STEPS`.
    """

    name: str
    share: float
    steps: tuple[str, ...]
    keeps: tuple[float, ...] = (0.8, 0.6)
    calibration: tuple[tuple[str, Any], ...] = ()
    other: bool = False


_BARE: dict[str, Any] = {"damping": 1e-2, "guard": False}
_FACTORS: dict[str, Any] = {"ranks": "global", "storage": "factors", **_BARE}
_PIVOTED: dict[str, Any] = {"ranks": "global", "storage": "pivoted", **_BARE}
STEPS: dict[str, dict[str, Any]] = {
    "svd_llm": {"method": "svd_llm", **_FACTORS, "ranks": "uniform"},
    "kfac": {"method": "kfac", **_FACTORS, "ranks": "uniform"},
    "kfac, global": {"method": "kfac", **_FACTORS},
    "kfac, global, pivoted": {"method": "kfac", **_PIVOTED},
    "gfwsvd, global, pivoted": {"method": "gfwsvd", **_PIVOTED},
    "kfac + 2 rounds": {"method": "kfac", **_PIVOTED, "rounds": 2},
    "gfwsvd + 2 rounds": {"method": "gfwsvd", **_PIVOTED, "rounds": 2},
    "kfac + gains": {"method": "kfac", **_PIVOTED, "gains": 8},
    "gfwsvd + gains": {"method": "gfwsvd", **_PIVOTED, "gains": 8},
    "kfac + 2 rounds + gains": {"method": "kfac", **_PIVOTED, "rounds": 2, "gains": 8},
    "gfwsvd + 2 rounds + gains": {"method": "gfwsvd", **_PIVOTED, "rounds": 2, "gains": 8},
    "+ guard": {"method": "gfwsvd", **_PIVOTED, "guard": True},
}
_PEERS = ("kfac, global, pivoted", "gfwsvd, global, pivoted")
_ONE = ("gfwsvd, global, pivoted",)
_ROUNDS = ("gfwsvd + 2 rounds", "kfac + 2 rounds")
_BY_LOSS = (
    "gfwsvd + 2 rounds + gains",
    "kfac + 2 rounds + gains",
    "gfwsvd + gains",
    "gfwsvd + 2 rounds",
    "kfac + gains",
    "kfac + 2 rounds",
)
_EACH = tuple(step for step in STEPS if step not in _BY_LOSS)
STUDIES = (
    Study("steps", 1, _EACH),
    Study("steps, another seed", 1, _EACH, calibration=(("seed", 1),)),
    Study("by the loss", 1, _BY_LOSS),
    Study("by the loss, another seed", 1, _BY_LOSS, calibration=(("seed", 1),)),
    Study("frontier", 1, ("svd_llm", "kfac, global, pivoted", "+ guard"), keeps=(0.9, 0.7, 0.5)),
    Study("frontier, by the loss", 1, ("gfwsvd + 2 rounds + gains",), keeps=(0.9, 0.7, 0.5)),
    Study("a quarter of the tokens", 1 / 4, _PEERS),
    Study("another seed", 1 / 4, _PEERS, calibration=(("seed", 1),)),
    Study("a tenth of the tokens", 1 / 10, (*_ONE, "+ guard")),
    Study("a tenth of the tokens, another seed", 1 / 10, _ONE, calibration=(("seed", 1),)),
    Study("sampled labels", 1 / 10, _ONE, calibration=(("labels", "sampled"),)),
    Study("sampled labels, another seed", 1 / 10, _ONE, calibration=(("labels", "sampled"), ("seed", 1))),
    Study("no clipping", 1 / 10, _ONE, calibration=(("clip", 0.0),)),
    Study("clipped at the median", 1 / 10, _ONE, calibration=(("clip", 1.0),)),
    Study("other text, clipped at the median", 1 / 10, _ONE, calibration=(("clip", 1.0),), other=True),
    Study("unit sequence", 1 / 10, _ONE, calibration=(("unit", "sequence"),)),
    Study("unit batch", 1 / 10, _ONE, calibration=(("unit", "batch"),)),
    Study("online", 1 / 10, _ONE, calibration=(("online", True),)),
    Study("two sweeps", 1 / 10, _ONE, calibration=(("sweeps", 2),)),
    Study("other text", 1 / 10, (*_PEERS, "gfwsvd + gains", "+ guard"), other=True),
    Study("half the tokens", 1 / 2, _PEERS),
    Study("more tokens", 2.5, ("svd_llm", *_PEERS)),
    Study("ranks by the loss", 1 / 4, _ROUNDS),
    Study("ranks by the loss, another seed", 1 / 4, _ROUNDS, calibration=(("seed", 1),)),
    Study("more tokens, ranks by the loss", 2.5, _ROUNDS),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="see gfwsvd.load_model; default: SmolLM2-135M")
    parser.add_argument("--calibration", required=True, help="calibration text, see gfwsvd.load_text")
    parser.add_argument("--other", help="calibration text of another kind")
    parser.add_argument("--evaluation", required=True, help="evaluation text")
    parser.add_argument("--sequences", type=int, default=160)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=16, help="evaluation windows")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the evaluation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--studies", nargs="+", choices=[study.name for study in STUDIES], help="default: all")
    parser.add_argument("--keep", type=float, nargs="+", help="of the studies' shares; default: all")
    parser.add_argument("--steps", nargs="+", choices=STEPS, help="of the studies' steps; default: all")
    parser.add_argument("--stats", type=Path, required=True, help="folder of the statistics directories")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines to add to")
    parser.add_argument("--markdown", type=Path, help="also write the rows as a Markdown table into this file")
    parser.add_argument("--plot", type=Path, help="also draw the steps of three ratios and more into this file")
    arguments = parser.parse_args()

    made = record.provenance()  # now: the sources may be another commit's by the time the last row is written
    model, tokenizer, name = gfwsvd.load_model(arguments.model or str(packaged_smollm2()), device=arguments.device)
    windows = gfwsvd.windows(
        gfwsvd.load_text(arguments.evaluation), tokenizer, window=arguments.window, limit=arguments.limit
    )
    about = {"model": name, "evaluation": Path(arguments.evaluation).name, "windows": list(windows.shape)}
    about["evaluation_dtype"] = arguments.dtype
    dtype = getattr(torch, arguments.dtype)
    if not any(row["method"] == "dense" for row in _rows(arguments.results, about)):
        row = dense_row(model, windows, track=bar, dtype=dtype)
        record.append(arguments.results, {**row, **about, **made})
    for study in STUDIES:
        if study.name in (arguments.studies or [study.name]) and (arguments.other or not study.other):
            for row in _run(study, model, tokenizer, windows, arguments, about):
                record.append(arguments.results, {**row, **about, **made})
    rows = _rows(arguments.results, about)
    text = markdown(rows)
    print(text)
    if arguments.plot is not None:
        plot(rows, arguments.plot)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text, encoding="utf-8")


def _rows(results: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `results` of the same model, windows and, where `about` has them, calibration."""
    return [row for row in record.read(results) if all(row.get(key) == value for key, value in about.items())]


def _run(
    study: Study,
    model: Any,
    tokenizer: Any,
    windows: torch.Tensor,
    arguments: argparse.Namespace,
    about: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """The rows of a study that are not there yet, as they come."""
    text = arguments.other if study.other else arguments.calibration
    options = dict(study.calibration)
    sequences = max(2, round(study.share * arguments.sequences))
    mine = {
        "calibration": Path(text).name,
        "calibration_tokens": sequences * arguments.seq_len,
        "calibration_options": options,
    }
    done = {(row["step"], row["keep"]) for row in _rows(arguments.results, about | mine)}
    wanted = {
        Run(keep=keep, **STEPS[step]): step
        for step in study.steps
        for keep in study.keeps
        if (step, keep) not in done
        and keep in (arguments.keep or study.keeps)
        and step in (arguments.steps or study.steps)
    }
    if not wanted:
        return
    words = [Path(text).stem, str(sequences), *(f"{key}-{value}" for key, value in options.items())]
    folder = arguments.stats / "-".join(words)
    batches = gfwsvd.token_batches(
        gfwsvd.load_text(text),
        tokenizer,
        sequences=sequences,
        seq_len=arguments.seq_len,
        batch_size=4,
        seed=options.get("seed", 0),
    )
    if not folder.exists():
        with kept_work(beside(folder, "work")) as claim:
            work = claim.open(about_calibration(model, batches, **options))
            gfwsvd.save_statistics(gfwsvd.calibrate(model, batches, work=work, track=bar, **options), folder)
    statistics, _ = gfwsvd.load_statistics(folder)
    mine["calibration_sha256"] = statistics.data_sha256
    dtype = getattr(torch, arguments.dtype)
    for row, report in compressed_rows(model, statistics, wanted, windows, batches=batches, track=bar, dtype=dtype):
        chosen = [layer.metrics for layer in report.layers]
        step = wanted[Run(**{key: row[key] for key in Run.__dataclass_fields__})]
        seen = {
            "one_sided": len(chosen) - chosen.count("two-sided"),
            "round_losses": report.round_losses,
            "gain_losses": report.gain_losses,
        }
        yield {"study": study.name, "step": step, **row, **seen, **mine}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Perplexity and, in brackets, the gap to dense in log-perplexity: a row for each step of each study."""
    dense = next(row for row in rows if row["method"] == "dense")
    keeps = sorted({row["keep"] for row in rows if row is not dense}, reverse=True)
    found: dict[tuple[str, str], dict[float, str]] = {}
    for row in rows:
        if row is not dense:
            gap = math.log(row["perplexity"] / dense["perplexity"])
            found.setdefault((row["study"], row["step"]), {})[row["keep"]] = f"{row['perplexity']:.2f} ({gap:.3f})"
    lines = [
        f"| dense {dense['perplexity']:.2f} | | {' | '.join(map(str, keeps))} |",
        f"|---|---|{'---|' * len(keeps)}",
    ]
    order = [study.name for study in STUDIES]
    for (study, step), cells in sorted(found.items(), key=lambda item: order.index(item[0][0])):
        lines.append(f"| {study} | {step} | {' | '.join(cells.get(keep, '') for keep in keeps)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against the kept share, of all tokens and the first seed, a line for each step of three shares."""
    studies = {study.name for study in STUDIES if study.share == 1 and not (study.calibration or study.other)}
    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        if row.get("study") in studies:
            lines.setdefault(row["step"], {})[row["keep"]] = row["perplexity"]
    names = {"+ guard": "gfwsvd, global, pivoted, guard (default)"}
    points = {names.get(step, step): list(line.items()) for step, line in lines.items() if len(line) >= 3}
    dense = frontier.dense_of(rows)
    title = f"{dense['model'].partition('.')[0]}, {dense['windows'][0]} windows of {dense['evaluation']}"
    frontier.plot({title: (dense["perplexity"], points)}, path, ylabel="perplexity", yscale="log")


if __name__ == "__main__":
    main()
