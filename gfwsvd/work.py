"""Work in progress on disk: what a long phase has found so far, so that it goes on after any interruption."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import GfwsvdError
from .folders import check_seal, locked_folder, read_json, sealed, write_text
from .host import to_host
from .ranked import rank, shared_errors

_ABOUT, _DESCRIPTION = "about.json", "gfwsvd"
_REMOVED = ".removed.json"  # what becomes of the first, before anything else is removed


class Work:
    """An open folder of work in progress: named states, each of which is on disk whole, as it was, or not at all.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Writes a state, over an earlier one of that name: tensors of any device, and plain JSON values.

        Raises:
            GfwsvdError: when it cannot be written; the earlier state is then as it was.
        """
        file = self.file(name)
        temporary = file.with_suffix(".tmp")  # the folder is locked: no other process writes here
        stored = to_host(tensors)
        described = sealed({"values": dict(values), "sha256": _digests(stored)})
        try:
            save_file(stored, temporary, {_DESCRIPTION: json.dumps(described, allow_nan=False)})
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            temporary.replace(file)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise GfwsvdError(
                f"could not keep the work in {self.path}: {error}; what was kept before is there, and the same command "
                "goes on from it"
            ) from error

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and values of a state, on the CPU; None where there is none.

        Raises:
            GfwsvdError: for a file that is not as `save` wrote it.
        """
        if not self.has(name):
            return None
        with self._reader(name) as (reader, described):
            tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
            if _digests(tensors) != described["sha256"]:
                raise ValueError("its tensors do not have the digests recorded in it")
        return tensors, described["values"]

    def values(self, name: str) -> dict[str, Any]:
        """The values of a state that is there, without a look at its tensors; GfwsvdError as `load`."""
        with self._reader(name) as (_, described):
            return described["values"]

    def digests(self, name: str) -> dict[str, str]:
        """The digests of the tensors of a state that is there, as `digest_of` makes them; GfwsvdError as `load`."""
        with self._reader(name) as (_, described):
            return described["sha256"]

    def has(self, name: str) -> bool:
        """Whether there is a state of that name."""
        return self.file(name).exists()

    def discard(self, name: str) -> None:
        """Removes a state, if there is one."""
        self.file(name).unlink(missing_ok=True)

    def file(self, name: str) -> Path:
        """Where a state lies."""
        return self.path / f"{name}.safetensors"

    @contextlib.contextmanager
    def _reader(self, name: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The reader of a state's tensors, and what `save` described it by."""
        file = self.file(name)
        try:
            with safe_open(file, framework="pt") as reader:
                described = json.loads((reader.metadata() or {})[_DESCRIPTION])
                check_seal(file, described)
                yield reader, described
        except (OSError, SafetensorError, AttributeError, KeyError, ValueError) as error:
            raise GfwsvdError(f"{file} is no state of work in progress ({error}); remove it to do it again") from error


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing lets go of the interpreter lock
        return dict(zip(tensors, pool.map(digest_of, tensors.values()), strict=True))


def digest_of(tensor: Tensor) -> str:
    """The digest of the dtype, shape and values of a contiguous tensor on the CPU."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Claim:
    """A folder for work in progress that no other process can claim, before it is known what the work depends on.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, about: Mapping[str, Any]) -> Work:
        """The work in the folder, on all ranks of a job together. Each rank keeps states of names that are its own.

        Args:
            about: plain JSON values, all that the work depends on: where something was kept with others, it is refused.

        Raises:
            GfwsvdError: for a folder that holds something else, or that cannot be written.
        """
        with shared_errors():
            if rank() == 0:
                _describe(self.path, json.loads(json.dumps(dict(about), allow_nan=False)))  # as it will be read back
        return Work(self.path)


@contextlib.contextmanager
def claimed(path: str | os.PathLike[str] | Claim) -> Iterator[Claim]:
    """A folder for work in progress, made where there is none; no other process can claim it until the block ends. If
    anything was kept in it, it stays, whatever happens; `remove_work` removes it. The ranks of a job see the same
    folder and claim it together: rank 0 holds its lock. A claim that the caller has is left as it is.

    Raises:
        GfwsvdError: for a folder that another process has claimed, or that cannot be made.
    """
    if isinstance(path, Claim):
        yield path
        return
    with contextlib.ExitStack() as stack:
        with shared_errors():
            if rank() == 0:
                path = stack.enter_context(locked_folder(path))
        claim = Claim(Path(path).expanduser().resolve())
        try:
            yield claim
        finally:
            if rank() == 0 and claim.path.exists() and {entry.name for entry in claim.path.iterdir()} <= {_ABOUT}:
                shutil.rmtree(claim.path)


@contextlib.contextmanager
def open_work(path: str | os.PathLike[str] | Claim, about: Mapping[str, Any]) -> Iterator[Work]:
    """`Claim.open` of a folder that is `claimed` until the block ends; GfwsvdError as there."""
    with claimed(path) as claim:
        yield claim.open(about)


def _describe(folder: Path, about: dict[str, Any]) -> None:
    if (folder / _REMOVED).exists():
        _empty(folder)
    # A begun `write_text` leaves a file with a dot. Where nothing was kept, a mistyped setting binds nobody.
    if all(entry.name.startswith(".") or entry.name == _ABOUT for entry in folder.iterdir()):
        write_text(folder / _ABOUT, json.dumps(about, indent=2) + "\n", what="description of work in progress")
    elif not (folder / _ABOUT).exists():
        raise GfwsvdError(f"{folder} holds something else than work in progress; name another folder")
    begun = read_json(folder / _ABOUT)
    if differing := sorted(key for key in begun.keys() | about.keys() if begun.get(key) != about.get(key)):
        changes = ", ".join(f"{key} was {begun.get(key)!r} and is {about.get(key)!r}" for key in differing)
        raise GfwsvdError(
            f"{folder} holds the work of an interrupted run with other settings ({changes}): run it as before to "
            "go on, or remove the folder to start anew"
        )


def remove_work(path: str | os.PathLike[str]) -> None:
    """Removes a folder of work in progress, if it is one; what is left of it after a kill binds no later run."""
    folder = Path(path).expanduser()
    if (folder / _ABOUT).exists():
        (folder / _ABOUT).replace(folder / _REMOVED)
        _empty(folder)
        folder.rmdir()


def _empty(folder: Path) -> None:
    """Removes all that was kept, then what says that it is to be removed."""
    for entry in list(folder.iterdir()):
        if entry.name != _REMOVED:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (folder / _REMOVED).unlink()
