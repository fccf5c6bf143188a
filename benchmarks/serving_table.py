"""The generation that `benchmarks.serve` measured on a GPU, as a Markdown table."""

from collections.abc import Iterable
from typing import Any

ENGINES = {"dense": "dense", "naive": "two products a layer", "fused": "`gfwsvd.fuse`, pivoted"}
HEADINGS = ("engine", "keep", "batch", "decode, tokens/s", "x dense", "first token, ms", "measured on, date, commit")
UNMEASURED = "No generation has been measured on a GPU yet."


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Of each engine, share and batch the last row, beside the dense model of the same run."""
    measured = [row for row in rows if row.get("benchmark") == "serve" and row["gpu"] and row["engine"] in ENGINES]
    measured.sort(key=lambda row: row["date"])
    dense = {(row["model"], row["commit"], row["batch"]): row for row in measured if row["engine"] == "dense"}
    last = {(row["model"], row["engine"], row["keep"], row["batch"]): row for row in measured}
    if not last:
        return UNMEASURED
    order = sorted(last, key=lambda key: (key[0], key[3], -key[2], list(ENGINES).index(key[1])))
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for row in map(last.__getitem__, order):
        beside = dense[row["model"], row["commit"], row["batch"]]
        where = f"{row['gpu']}, driver {row['driver']}, torch {row['torch']}, {row['date']}, {row['commit']}"
        speed = row["decode_tokens_s"] / beside["decode_tokens_s"]
        lines.append(
            (
                ENGINES[row["engine"]], "" if row is beside else f"{row['keep']:g}", str(row["batch"]),
                f"{row['decode_tokens_s']:.0f}", f"{speed:.2f}", f"{1000 * row['first_token_s']:.3g}", where,
            )
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
