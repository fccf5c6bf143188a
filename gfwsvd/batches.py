"""Batches of sequences: their parts, and what becomes of those that do not fit into memory or are not finite."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from .errors import GfwsvdError
from .losses import Batch

Result = TypeVar("Result")
HELDOUT_SHARE = 16  # one sequence of so many is held out


class NotFinite(GfwsvdError):
    """NaN or inf in a forward pass: nothing of its batch is in any sum."""


def num_rows(batch: Batch) -> int:
    """Sequences of a batch."""
    return next(iter(batch.values())).shape[0]


def num_tokens(batch: Batch) -> int:
    """Entries of a batch's first tensor."""
    return next(iter(batch.values())).numel()


def split_rows(batches: Iterable[Batch], most: int, skip: int = 0) -> list[Batch]:
    """The batches without their first `skip` rows, in parts of at most `most` rows (0 for no limit)."""
    parts: list[Batch] = []
    for batch in batches:
        rows = num_rows(batch)
        first, skip = min(skip, rows), max(0, skip - rows)
        for start in range(first, rows, most or rows):
            parts.append({name: value[start : start + (most or rows)] for name, value in batch.items()})
    return parts


def hold_out(batches: Sequence[Batch], heldout: int | None, *, whole: bool) -> tuple[list[Batch], list[Batch]]:
    """The batches without the last `heldout` sequences, and these; with `whole`, no batch is cut, since its rows may
    belong together."""
    total = sum(map(num_rows, batches))
    count = total // HELDOUT_SHARE if heldout is None else heldout
    if not 0 <= count < total:
        raise GfwsvdError(f"heldout must be from 0 to less than the {total} sequences there are, got {heldout}")
    if whole:
        last = len(batches)
        while (left := count - num_rows(batches[last - 1])) >= 0:
            last, count = last - 1, left
        return list(batches[:last]), list(batches[last:])
    kept: list[Batch] = []
    held: list[Batch] = []
    seen = 0
    for batch in batches:
        first = total - count - seen  # of the held-out rows of this batch
        seen += num_rows(batch)
        for part, rows in ((kept, slice(0, max(first, 0))), (held, slice(max(first, 0), None))):
            if num_rows(chosen := {name: value[rows] for name, value in batch.items()}):
                part.append(chosen)
    return kept, held


def data_sha256(batches: Iterable[Batch]) -> str:
    """A digest of the names, shapes and values of all tensors of `batches`, whatever their split into batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for row in range(num_rows(batch)):
            for name in sorted(batch):
                value = batch[name][row].detach().cpu().contiguous()
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fitted(
    run: Callable[[list[Batch]], Result], batches: Sequence[Batch], most: int, *, splits: bool
) -> tuple[Result, int]:
    """What `run` makes of the batches in parts of at most `most` rows (0 for no limit), and that number. Whenever the
    device's memory is too short, it is halved, and `run` called again.

    Raises:
        GfwsvdError: as `halved`.
    """
    while True:
        parts = split_rows(batches, most)
        try:
            return run(parts), most
        except torch.OutOfMemoryError as error:
            reason = str(error)  # the error itself would keep the memory of the batch
        most = halved(parts, reason, splits=splits)


def halved(batches: Iterable[Batch], reason: str, *, splits: bool) -> int:
    """Half the rows of the largest of the batches, for which memory was too short; warns.

    Args:
        reason: what said so.
        splits: whether batches may be split.

    Raises:
        GfwsvdError: where batches are of one row, or may not be split.
    """
    rows = max(map(num_rows, batches))
    if rows == 1 or not splits:
        raise GfwsvdError(
            f"out of memory with {rows} sequences in a batch{'' if splits else ', which belong together'}: "
            f"take fewer or shorter ones, or a device memory budget ({reason.splitlines()[0]})"
        )
    warnings.warn(f"out of memory with batches of {rows} sequences: going on with {rows // 2}", stacklevel=2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows // 2


def run_finite(run: Callable[[Batch], None], batches: Iterable[Batch], *, splits: bool) -> tuple[int, str]:
    """Calls `run` with each batch; where it raises `NotFinite` and batches may be split, with its sequences one by one.
    Returns how many sequences are left out, and why the last of them is."""
    left_out, why = 0, ""
    for batch in batches:
        try:
            run(batch)
            continue
        except NotFinite as error:
            reason = str(error)  # the error itself would keep the memory of the batch
        rows = num_rows(batch)
        if splits and rows > 1:
            rows, reason = run_finite(run, split_rows([batch], 1), splits=splits)
        left_out, why = left_out + rows, reason or why
    return left_out, why
