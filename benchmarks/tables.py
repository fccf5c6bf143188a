"""What was measured, as a Markdown table, a roofline picture, and the tables of kernels and generation in the README.

    python -m benchmarks.tables FILE --markdown kernels.md --roofline roofline.png
    python -m benchmarks.tables benchmarks/results/{kernels,serving}-*.jsonl --readme README.md

Of several rows on the same problem the last one counts. The picture has each operator's TFLOP/s over its operations
per byte, under the copy bandwidth and the matrix products that the same run measured; it shows the last run. The README
has ours in bfloat16 on the headline cases of each operator, measured on a GPU, and says so where there are none; and
the generation that `benchmarks.serve` measured on a GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record, serving_table
from benchmarks.registry import OPS
from benchmarks.run import HEADINGS, OK, cells, digits

KEY = ("gpu", "machine", "op", "shape", "dtype", "provider")  # of a problem and who solved it where
COLUMNS = HEADINGS[1:]  # the operator is the title of its table
UNMEASURED = (
    "No GPU figure has been measured yet: the kernels are checked in an interpreter and by compiling them ahead of\n"
    "time, and `make gpu` will measure them."
)


def latest(*paths: Path) -> list[dict[str, Any]]:
    """The last row of every provider on every problem, in the order in which they came first."""
    rows = [row for path in paths for row in record.read(path) if row.get("benchmark") == "kernels"]
    rows.sort(key=lambda row: row["date"])
    return list({tuple(row[key] for key in KEY): row for row in rows}.values())


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One table for each operator, under a line of what measured it; what has no times is named below its table."""
    lines = []
    for run in dict.fromkeys(_run(row) for row in rows):
        lines += [run, ""]
        of_run = [row for row in rows if _run(row) == run]
        for op in dict.fromkeys(row["op"] for row in of_run):
            timed = [row for row in of_run if row["op"] == op and row["status"] == OK]
            rest = [row for row in of_run if row["op"] == op and row["status"] != OK]
            if timed:
                base = timed[0]["base"]
                lines += [f"### {op} (base: {base})", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
                lines += [_line(cells(row)[1:]) for row in timed] + [""]
            notes = dict.fromkeys(f"{row['provider']}: {row['note'] or row['status']}" for row in rest)
            lines += [f"{op}, not timed: " + "; ".join(notes) + ".", ""] if notes else []
    return "\n".join(lines)


def _run(row: dict[str, Any]) -> str:
    where = row["gpu"] or row["machine"]
    driver = f", driver {row['driver']}" if row["driver"] else ""
    versions = f"torch {row['torch']}, Triton {row['triton']}"
    return f"{where}{driver}, {versions}, commit {row['commit']}, {row['date']}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def readme_table(rows: Sequence[dict[str, Any]]) -> str:
    """The headline cases that were timed on a GPU, one line each, or the sentence that there are none."""
    ours = [row for row in rows if row["gpu"] and row["status"] == OK and row["provider"] == "ours"]
    headlines = [(op, case.label, "bf16") for op, spec in OPS.items() for case in spec.headlines]
    lines = [
        [
            f"`{row['op']}`", row["shape"], digits(row["us_p50"]), f"{row['of_ceiling']:.0%}",
            "" if row["over_base"] is None else f"{row['over_base']:.2f}x {row['base']}",
            f"{row['gpu']}, {row['date']}, {row['commit']}",
        ]
        for headline in headlines
        for row in ours
        if (row["op"], row["shape"], row["dtype"]) == headline
    ]  # fmt: skip
    if not lines:
        return UNMEASURED
    headings = ("operator, bfloat16", "shape", "µs", "% of ceiling", "speed", "measured on, date, commit")
    return "\n".join(_line(line) for line in (headings, ["---"] * len(headings), *lines))


def marks(what: str) -> tuple[str, str]:
    """The lines of a README between which a table stands."""
    return f"<!-- {what}: python -m benchmarks.tables writes this -->", f"<!-- /{what} -->"


def with_tables(readme: str, *paths: Path) -> str:
    """The text of a README with what was measured between its marks."""
    rows = [row for path in paths for row in record.read(path)]
    for what, table in {"kernels": readme_table(latest(*paths)), "generation": serving_table.table(rows)}.items():
        first, last = marks(what)
        before, begin, rest = readme.partition(first)
        _, end, after = rest.partition(last)
        if not begin or not end:
            raise SystemExit(f"the README must have a line {first} and after it a line {last}")
        readme = f"{before}{first}\n\n{table}\n\n{last}{after}"
    return readme


def roofline(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw what the last run timed: ours, one colour an operator, and hollow the rows of its base."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if row["status"] == OK and row["provider"] in ("ours", row["base"])]
    if not timed:
        raise SystemExit("no provider was timed in these results: nothing to draw")
    timed = [row for row in timed if _run(row) == _run(timed[-1])]
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    intensities = [row["flops"] / row["bytes"] for row in timed]
    span = [min(intensities) / 2, max(intensities) * 2]
    for dtype in dict.fromkeys(row["dtype"] for row in timed):
        ceilings = next(row["ceilings"] for row in timed if row["dtype"] == dtype)
        top, copy = ceilings[f"{dtype}_tflops"], ceilings["copy_gbs"] / 1e3
        ridge = top / copy
        xs = sorted({span[0], min(max(ridge, span[0]), span[1]), span[1]})
        axes.plot(xs, [min(top, copy * x) for x in xs], color="gray", linewidth=1)
        axes.annotate(f"{dtype} {digits(top)} TFLOP/s", (span[1], min(top, copy * span[1])), ha="right", va="bottom")
    for number, op in enumerate(dict.fromkeys(row["op"] for row in timed)):
        for ours in (True, False):
            points = [row for row in timed if row["op"] == op and (row["provider"] == "ours") == ours]
            axes.plot(
                [row["flops"] / row["bytes"] for row in points],
                [row["tflops"] for row in points],
                "o",
                color=f"C{number}",
                fillstyle="full" if ours else "none",
                label=op if ours else None,
            )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s (hollow: base)")
    axes.set_title(_run(timed[-1]), fontsize="small")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON lines of benchmarks; patterns may match none")
    parser.add_argument("--markdown", type=Path, help="file to write; default: standard output")
    parser.add_argument("--roofline", type=Path, help="picture to draw (needs matplotlib)")
    parser.add_argument(
        "--readme", type=Path, help="file to write the headline cases and generation into, and nothing else"
    )
    arguments = parser.parse_args(argv)
    paths = [path for pattern in arguments.results for path in _files(pattern)]
    if missing := [str(path) for path in paths if not path.exists()]:
        parser.error(f"{', '.join(missing)} does not exist: benchmarks.run writes it")
    if arguments.readme:
        text = arguments.readme.read_text(encoding="utf-8")
        arguments.readme.write_text(with_tables(text, *paths), encoding="utf-8")
        return 0
    rows = latest(*paths)
    if not rows:
        parser.error(f"{', '.join(map(str, arguments.results))}: no rows of benchmarks.run")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows) + "\n", encoding="utf-8")
    else:
        print(markdown(rows))
    if arguments.roofline:
        roofline(rows, arguments.roofline)
    return 0


def _files(pattern: Path) -> list[Path]:
    """What a pattern matches, where the shell left it as it is; a path without a pattern is itself."""
    return sorted(pattern.parent.glob(pattern.name)) if "*" in pattern.name else [pattern]


if __name__ == "__main__":
    sys.exit(main())
