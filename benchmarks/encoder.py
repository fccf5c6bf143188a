"""Retrieval by a sentence encoder that was compressed for the loss of its own task.

    python -m benchmarks.encoder --pairs questions.jsonl:question:answer --stats DIR --results FILE

Some pairs of texts calibrate, with the contrastive loss: among the partners in a batch each query has to find its own.
Others are held out; there it has to find it among all. Methods that predict the loss take global ranks, the others
uniform ones. Rows of the same model, pairs and settings in FILE are not computed again.
"""

import argparse
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gfwsvd
from benchmarks import frontier, record
from benchmarks.packaged import packaged_minilm
from benchmarks.pairs import load_pairs
from gfwsvd.batches import data_sha256
from gfwsvd.calibration import Batch, Statistics
from gfwsvd.progress import bar
from gfwsvd.sweep import Run, compressed_models

SCALE = 20.0  # of cosine similarities in the loss, as the model was trained
FIGURES = {"recall_at_1": "recall@1", "mrr": "MRR", "cosine": "cosine to dense"}


def pair_batches(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, *, batch_pairs: int, max_tokens: int
) -> list[dict[str, Tensor]]:
    """Batches of padded texts, query and partner in turn: one forward pass sees both, under one attention mask."""
    texts = [text for pair in pairs for text in pair]
    parts = (texts[start : start + 2 * batch_pairs] for start in range(0, len(texts), 2 * batch_pairs))
    options = {"padding": True, "truncation": True, "max_length": max_tokens, "return_tensors": "pt"}
    return [dict(tokenizer(part, **options)) for part in parts]


def embeddings(model: nn.Module, batch: Batch) -> Tensor:
    """The mean of the last hidden states over the tokens of each text, of norm one, (B, D)."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def contrastive_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Nats that each query of the batch needs to name its partner among all partners there, (B / 2,)."""
    queries, partners = embeddings(model, batch).unflatten(0, (-1, 2)).unbind(1)
    right = torch.arange(len(queries), device=queries.device)
    return F.cross_entropy(SCALE * queries @ partners.T, right, reduction="none")


@torch.inference_mode()
def embed(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """The embeddings of all batches, (2 N, D)."""
    return torch.cat([embeddings(model, batch) for batch in batches])


def retrieval(embedded: Tensor, reference: Tensor) -> dict[str, float]:
    """How well queries find their partners among all N, and the mean cosine to the embeddings `reference`, (2 N, D).

    A partner that is not clearly worse than the right one, or not a number, counts as found before it.
    """
    queries, partners = embedded.unflatten(0, (-1, 2)).unbind(1)
    scores = queries @ partners.T
    ranks = (~(scores < scores.diagonal()[:, None])).sum(1).double()
    return {
        "recall_at_1": (ranks == 1).double().mean().item(),
        "mrr": (1 / ranks).mean().item(),
        "cosine": (embedded * reference).sum(-1).mean().item(),
    }


def compressed_rows(
    model: nn.Module, statistics: Statistics, runs: Iterable[Run], heldout: list[Batch], reference: Tensor
) -> Iterator[frontier.Row]:
    """The row of each run: what was compressed, and what it retrieves."""
    for _, compressed, _, row in compressed_models(model, statistics, runs, track=bar):
        yield {**row, **retrieval(embed(compressed, heldout), reference)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="an encoder, see gfwsvd.load_model; default: all-MiniLM-L6-v2")
    parser.add_argument(
        "--pairs", default="pydoc", help="FILE.jsonl:FIELD:FIELD, or a text, for neighbouring paragraphs of it"
    )
    parser.add_argument("--calibration-pairs", type=int, default=400)
    parser.add_argument("--heldout-pairs", type=int, default=250)
    parser.add_argument("--batch-pairs", type=int, default=32, help="pairs among which the loss has a query choose")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a text; the rest is cut off")
    parser.add_argument("--unit", default="token", help="of the Fisher information, see gfwsvd.calibrate")
    parser.add_argument("--exclude", nargs="*", default=["pooler"], help="layers that the embeddings do not depend on")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.6, 0.5])
    parser.add_argument("--methods", nargs="+", choices=list(gfwsvd.METHODS), default=list(gfwsvd.METHODS))
    parser.add_argument("--stats", type=Path, required=True, help="statistics directory, made if it is not there")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines to add to")
    parser.add_argument("--plot", type=Path, help="also draw recall and cosine against the ratio into this file")
    parser.add_argument("--markdown", type=Path, help="also write the rows as a Markdown table into this file")
    arguments = parser.parse_args()

    made = record.provenance()  # now: the sources may be another commit's by the time the last row is written
    pairs = load_pairs(arguments.pairs)
    wanted = arguments.calibration_pairs + arguments.heldout_pairs
    if len(pairs) < wanted:
        raise SystemExit(f"{arguments.pairs} has {len(pairs)} pairs, {wanted} were asked for: ask for fewer")
    random.Random(0).shuffle(pairs)
    calibration, heldout = pairs[: arguments.calibration_pairs], pairs[arguments.calibration_pairs : wanted]
    model, tokenizer, name = gfwsvd.load_model(arguments.model or str(packaged_minilm()))
    sizes = {"batch_pairs": arguments.batch_pairs, "max_tokens": arguments.max_tokens}
    batches = pair_batches(calibration, tokenizer, **sizes)
    heldout.sort(key=lambda pair: max(map(len, pair)))  # alike in length: little padding
    questions = pair_batches(heldout, tokenizer, **sizes)
    options = {"unit": arguments.unit, "loss": contrastive_loss, "exclude": arguments.exclude}
    statistics = frontier.statistics_in(arguments.stats, model, batches, **options)
    about = {
        "benchmark": "encoder",
        "model": name if arguments.model else "all-MiniLM-L6-v2",  # its folder has no name of its own
        "pairs": Path(arguments.pairs).name,
        "calibration_pairs": len(calibration),
        "calibration_sha256": statistics.data_sha256,
        "heldout_pairs": len(heldout),
        "heldout_sha256": data_sha256(questions),
        **sizes,
        "exclude": arguments.exclude,
        "settings": statistics.settings,
    }
    reference = embed(model, questions)
    rows = frontier.complete(
        arguments.results,
        about,
        made,
        [Run(method, _ranks(method), keep) for keep in arguments.keep for method in arguments.methods],
        dense=lambda: {"name": "dense", "method": "dense", "keep": 1.0, "kept": 1.0, **retrieval(reference, reference)},
        compressed=lambda runs: compressed_rows(model, statistics, runs, questions, reference),
        shown=tuple(FIGURES),
    )
    table = markdown(rows)
    print(table, end="")
    if arguments.plot is not None:
        plot(rows, arguments.plot)
    if arguments.markdown is not None:
        arguments.markdown.write_text(table, encoding="utf-8")


def _ranks(method: str) -> str:
    return "global" if gfwsvd.METHODS[method].predicts_loss else "uniform"


def _series(rows: list[frontier.Row]) -> dict[str, list[frontier.Row]]:
    """The compressed rows by method, in the order of the methods."""
    return {
        f"{method}, {_ranks(method)}": found
        for method in gfwsvd.METHODS
        if (found := sorted((row for row in rows if row["method"] == method), key=lambda row: -row["keep"]))
    }


def markdown(rows: list[frontier.Row]) -> str:
    """Recall@1, MRR and cosine to the dense embeddings in each cell: rows by method, columns by ratio."""
    dense = frontier.dense_of(rows)
    columns = [str(keep) for keep in sorted({row["keep"] for row in rows if row is not dense}, reverse=True)]
    cells = {name: {str(row["keep"]): _cell(row) for row in series} for name, series in _series(rows).items()}
    return frontier.markdown(f"{' / '.join(FIGURES.values())}; dense {_cell(dense)}", columns, cells)


def _cell(row: frontier.Row) -> str:
    return " / ".join(f"{row[figure]:.3f}" for figure in FIGURES)


def plot(rows: list[frontier.Row], path: Path) -> None:
    """Recall@1 and the cosine to the dense embeddings against the kept share, one line per method."""
    dense = frontier.dense_of(rows)
    panels = {
        FIGURES[figure]: (
            dense[figure],
            {name: [(row["kept"], row[figure]) for row in series] for name, series in _series(rows).items()},
        )
        for figure in ("recall_at_1", "cosine")
    }
    frontier.plot(panels, path, ylabel="held-out pairs")


if __name__ == "__main__":
    main()
