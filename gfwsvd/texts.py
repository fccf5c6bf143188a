"""Texts for calibration and evaluation: files, datasets on the hub, and the text that comes with Python."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import GfwsvdError

TEXT_FIELDS = (
    ("text",),
    ("content",),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)

_SUFFIXES = (".txt", ".raw", ".jsonl", ".parquet")


def load_text(spec: str) -> str:
    """A text as one string.

    Args:
        spec: one of
            - a .txt file (UTF-8), taken as it is, or a .raw file in WikiText's layout, its rows joined as the hub's;
            - a .jsonl or .parquet file of rows, or `FILE:FIELD` for the field to take;
            - a dataset on the hub, `owner/name[:config[:split]]`, split "train" by default;
            - `pydoc`, the language reference that every Python brings along; `pydoc:calibration` and `pydoc:heldout`,
              about three quarters and one quarter of it, share no paragraph.
            Where no field is given, a row's text is the first of `TEXT_FIELDS` that the first row has, two fields of
            one entry joined by a newline. Rows are joined by an empty line.

    Raises:
        GfwsvdError: when there is no such file, field or dataset, it cannot be read, or it is empty.
    """
    if spec == "pydoc" or spec.startswith("pydoc:"):
        text = _pydoc_text(spec.partition(":")[2])
    elif (file_and_field := _local_file(spec)) is not None:
        text = _read_file(*file_and_field)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:.*)?", spec) and Path(spec.partition(":")[0]).suffix not in _SUFFIXES:
        text = _joined(_fields(_dataset_rows(*spec.split(":", 2)), (), spec))
    else:
        raise GfwsvdError(
            f"there is no text {spec}: expected a .txt, .raw, .jsonl or .parquet file that exists, a dataset "
            "owner/name[:config[:split]], or pydoc"
        )
    if not text.strip():
        raise GfwsvdError(f"the text {spec} is empty")
    return text


def load_rows(file: Path, fields: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The texts of all rows of a .jsonl or .parquet file.

    Args:
        fields: which to take of each row; by default the first of `TEXT_FIELDS` that the first row has.

    Raises:
        GfwsvdError: when the file cannot be read, or a row lacks a field or has something other than text in it.
    """
    with _reading(file):
        rows = _json_rows(file) if file.suffix == ".jsonl" else _dataset_rows("parquet", data_files=str(file))
        return list(_fields(rows, fields, str(file)))


def text_name(spec: str) -> str:
    """How reports call the text `spec`: a file by its name, without the folders of this machine."""
    found = _local_file(spec)
    return spec if found is None else ":".join(filter(None, (found[0].name, found[1])))


def _local_file(spec: str) -> tuple[Path, str | None] | None:
    """The file that `spec` names and the field after it, None if there is no such file."""
    if (whole := Path(spec).expanduser()).is_file():
        return whole, None
    name, _, field = spec.rpartition(":")
    file = Path(name).expanduser()
    return (file, field) if field and file.is_file() else None


def _read_file(file: Path, field: str | None) -> str:
    if file.suffix in (".jsonl", ".parquet"):
        return _joined(load_rows(file, (field,) if field else ()))
    if file.suffix in (".txt", ".raw") and field is None:
        with _reading(file):
            text = file.read_text(encoding="utf-8")
        return _wikitext_rows(text) if file.suffix == ".raw" else text
    raise GfwsvdError(
        f"cannot take a text from {file}: expected FILE.txt, FILE.raw, FILE.jsonl[:FIELD] or FILE.parquet[:FIELD]"
    )


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise GfwsvdError(f"{file} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise GfwsvdError(f"cannot read {file}: {error}") from error


def _wikitext_rows(text: str) -> str:
    """The text that perplexities on WikiText are published for: the hub's rows joined by an empty line. Each line of a
    .raw file is a row, a space standing for the empty one."""
    rows = text.removesuffix("\n").split("\n")
    return "\n\n".join("" if row == " " else row + "\n" for row in rows)


def _json_rows(file: Path) -> Iterator[Any]:
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise GfwsvdError(f"{file}, line {number}: not JSON, the file was cut short or changed") from error


def _dataset_rows(name: str, config: str | None = None, split: str = "train", **where: Any) -> Iterator[Any]:
    import datasets

    try:
        yield from datasets.load_dataset(name, config or None, split=split, streaming=True, **where)
    except Exception as error:  # of many kinds, from the network, the hub and the files
        file = where.get("data_files")
        source = file or f"dataset {name} (config {config or 'default'}, split {split})"
        unreachable = None if file else hub_out_of_reach(error)
        raise GfwsvdError(f"cannot read {source}: {unreachable or one_line(error)}") from error


def hub_out_of_reach(error: BaseException) -> str | None:
    """Why the hub could not be asked and what to do, where `error` comes from that; None where it does not."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    offline = constants.is_offline_mode()
    missed = offline and isinstance(causes[-1], OSError)  # a file that the cache has not, where nothing was asked for
    if not missed and not any(isinstance(cause, ConnectionError | LocalEntryNotFoundError) for cause in causes):
        return None
    why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} does not answer"
    return (
        f"the hub cannot be asked, {why}, and its cache {constants.HF_HUB_CACHE} does not hold all that is needed; "
        f"{'unset it' if offline else 'connect'} for once, fill the cache, or give the path of a local copy"
    )


def one_line(error: BaseException) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())


def _joined(rows: Iterable[tuple[str, ...]]) -> str:
    return "\n\n".join(map("\n".join, rows))


def _fields(rows: Iterable[Any], fields: tuple[str, ...], source: str) -> Iterator[tuple[str, ...]]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise GfwsvdError(f"{source}, row {number}: expected an object of fields, got {type(row).__name__}")
        if not fields:
            fields = next((known for known in TEXT_FIELDS if all(name in row for name in known)), ())
            if not fields:
                raise GfwsvdError(f"{source}: which of the fields {', '.join(row)} is the text? Name it: FILE:FIELD")
        values: tuple[Any, ...] = tuple(row.get(name) for name in fields)
        if not all(isinstance(value, str) for value in values):
            raise GfwsvdError(f"{source}, row {number}: expected text in {' and '.join(fields)}")
        yield values


def _pydoc_text(part: str) -> str:
    from pydoc_data.topics import topics

    if part not in ("", "calibration", "heldout"):
        raise GfwsvdError(f"pydoc has the parts calibration and heldout, got {part!r}")
    paragraphs = {
        name: {words for block in text.split("\n\n") if len(words := " ".join(block.split())) >= 60}
        for name, text in topics.items()
    }
    # Topics contain and overlap one another. One that is contained in another is left out; those that share a
    # paragraph stay together, so that no text of the calibration part is in the other.
    whole = [
        name
        for name, mine in paragraphs.items()
        if not any(mine < other or mine == other and name > twin for twin, other in paragraphs.items() if twin != name)
    ]
    groups: list[tuple[set[str], set[str]]] = []
    for name in whole:
        touching = [group for group in groups if group[1] & paragraphs[name]]
        groups = [group for group in groups if group not in touching]
        names = {name}.union(*(group[0] for group in touching))
        groups.append((names, paragraphs[name].union(*(group[1] for group in touching))))
    sizes = sorted(((sum(len(topics[name]) for name in names), sorted(names)) for names, _ in groups), reverse=True)
    seen, held, heldout = 0, 0, set[str]()
    for size, members in sizes:
        seen += size
        if 4 * (held + size) <= seen:
            held += size
            heldout.update(members)
    return "\n\n".join(topics[name] for name in sorted(whole) if not part or (name in heldout) == (part == "heldout"))
