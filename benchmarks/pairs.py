"""Pairs of texts that belong together, for benchmarks of sentence encoders."""

import os
from collections.abc import Sequence
from pathlib import Path

import gfwsvd
from gfwsvd.errors import GfwsvdError
from gfwsvd.texts import load_rows

PARAGRAPH = 60  # characters of the shortest block of a text that counts as a paragraph


def load_pairs(spec: str) -> list[tuple[str, str]]:
    """Pairs of texts, every text in one pair only, so that each has one right partner.

    Args:
        spec: two fields of a file of rows, `FILE.jsonl:FIELD:FIELD`, without the first and last lines that all rows
            share, such as the frame around an instruction; or what `gfwsvd.load_text` takes, for each two of its
            paragraphs.

    Raises:
        GfwsvdError: when there is no such text, file or field, a file of rows comes without two fields, or there are
            fewer than two pairs.
    """
    file, *fields = spec.rsplit(":", 2)
    if len(fields) == 2 and Path(file).is_file():
        sides = zip(*load_rows(Path(file), (fields[0], fields[1])), strict=True)
        found = list(zip(*map(_without_frame, sides), strict=True))
    elif Path(spec.partition(":")[0]).suffix == ".jsonl":
        raise GfwsvdError(f"there are no pairs {spec}: expected a file and two of its fields, FILE.jsonl:FIELD:FIELD")
    else:
        blocks = _paragraphs(gfwsvd.load_text(spec))
        found = list(zip(blocks[::2], blocks[1::2], strict=False))
    pairs: list[tuple[str, str]] = []
    seen = {""}
    for pair in found:
        if len(seen | set(pair)) == len(seen) + 2:
            pairs.append(pair)
            seen.update(pair)
    if len(pairs) < 2:
        raise GfwsvdError(f"{spec} has {len(pairs)} pairs of texts that differ, expected at least two")
    return pairs


def _without_frame(texts: Sequence[str]) -> list[str]:
    """The texts without the whole lines at both ends that all of them share, nor space around what is left."""
    first = os.path.commonprefix(texts)
    last = os.path.commonprefix([text[::-1] for text in texts])
    start, end = first.rfind("\n") + 1, last.rfind("\n") + 1
    return [text[start : len(text) - end].strip() for text in texts]


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, each once, with their lines joined."""
    blocks = (" ".join(block.split()) for block in text.split("\n\n"))
    return list(dict.fromkeys(block for block in blocks if len(block) >= PARAGRAPH))
