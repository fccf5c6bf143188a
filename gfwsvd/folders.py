"""Folders on disk: written whole or not at all, and read with every file checked before anything is allocated."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from .errors import GfwsvdError

_AT_FDCWD = -100  # <fcntl.h>: paths relative to the working directory
_RENAME_EXCHANGE = 2  # <linux/fs.h>: swap the two names in one step
_SEAL = "seal"


class TensorInfo(NamedTuple):
    """Where a stored tensor lies and what it is, from the header of its file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        width = re.search(r"\d+", self.dtype)  # all types of safetensors are named by their bits, but BOOL
        return self.numbers * int(width[0] if width else 8) // 8


def check_output_folder(path: str | os.PathLike[str], *, overwrite: bool = False, marker: str | None = None) -> Path:
    """The absolute path of an output folder that `atomic_folder` would accept; call it before a long computation.

    Args:
        path: the folder to write. A link to a folder means the folder it points to.
        overwrite: accept a folder that holds something, which will be replaced as a whole.
        marker: a file which every folder of the kind to be written holds. With it, `overwrite` refuses to replace a
            folder that lacks the file, so that a mistyped path does not cost a folder of something else.

    Raises:
        GfwsvdError: when the path is a file, a non-empty folder that may not be replaced, or the working directory, or
            nothing can be written there.
    """
    target = Path(path).expanduser().resolve()
    _check_writable(target)
    if not target.exists():
        return target
    if not target.is_dir():
        raise GfwsvdError(f"{target} is a file; expected the path of a new or an empty folder")
    if any(target.iterdir()):
        if not overwrite:
            raise GfwsvdError(f"the folder {target} is not empty; choose another one, empty it, or ask to overwrite it")
        if marker is not None and not (target / marker).exists():
            raise GfwsvdError(f"will not replace the folder {target}: it has no {marker}, so it is none of ours")
    if Path.cwd().is_relative_to(target):
        raise GfwsvdError(f"cannot replace {target}, the working directory is in it; start from another folder")
    return target


def check_output_file(path: str | os.PathLike[str]) -> None:
    """GfwsvdError unless a file could be written there, its missing parent folders too; replacing one is fine."""
    target = Path(path).expanduser().absolute()
    _check_writable(target)
    if target.is_dir():
        raise GfwsvdError(f"could not write {target}: it is a folder; expected the path of a file")


def _check_writable(target: Path) -> None:
    above = next(parent for parent in target.parents if os.path.exists(parent))  # False too where it cannot be seen
    if not above.is_dir():
        raise GfwsvdError(f"could not write {target}: {above} is a file; expected a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise GfwsvdError(f"could not write {target}: no permission to write in {above}; choose another place")


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike[str], *, overwrite: bool = False, marker: str | None = None
) -> Iterator[Path]:
    """Write a folder that appears whole or not at all.

    Yields a new empty folder `.NAME.tmp-PID-...` beside the target. When the block ends, its files are flushed to the
    disk and it takes the target's name in one step; when the block fails in any way, Ctrl-C too, it is removed. A
    killed process leaves the old folder as it was, and a temporary which the next write of the same folder removes: a
    living writer is told from a dead one by its lock, which ends with the process. On a file system that cannot swap
    two names, a folder to be replaced becomes `NAME.old-...` for a moment; on one without locks on folders (some
    network ones), dead temporaries stay.

    Args:
        path, overwrite, marker: see `check_output_folder`. Missing parent folders are made.

    Raises:
        GfwsvdError: what `check_output_folder` raises; and any error of writing (disk full, no permission), in place of
            the OSError or SafetensorError.
    """
    target = check_output_folder(path, overwrite=overwrite, marker=marker)
    prefix = f".{target.name}.tmp-"
    temporary = target.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}")
    lock = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.iterdir():
            if stale.name.startswith(prefix) and (stale_lock := _lock(stale)) is not None:
                shutil.rmtree(stale, ignore_errors=True)
                os.close(stale_lock)
        temporary.mkdir()
        lock = _lock(temporary)
        yield temporary
        _flush(temporary)
        _move_into_place(temporary, target, overwrite=overwrite)
        _fsync(target.parent)
    except (OSError, SafetensorError) as error:
        raise GfwsvdError(f"could not write the folder {target}: {error}; nothing half-written is left") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # the failed new folder, or the replaced old one
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """As `lock_folder`, or None where it cannot be locked."""
    try:
        return lock_folder(folder)
    except OSError:
        return None


def lock_folder(folder: Path) -> int:
    """A descriptor that holds the lock of `folder` until it is closed or the process ends.

    Raises:
        BlockingIOError: when another process, or another descriptor of this one, has it.
        FileNotFoundError: where there is no such folder, or no more: its last holder has just removed it.
        OSError: where the file system has no locks on folders.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, "another folder has its name", str(folder))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def locked_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder, made where there is none, that no other process can lock until the block ends; its absolute path.

    On a file system without locks on folders (some network ones) others are not kept out.

    Raises:
        GfwsvdError: when another process has it locked, or it cannot be made.
    """
    folder = Path(path).expanduser().resolve()
    lock = _make_and_lock(folder)
    try:
        yield folder
    finally:
        if lock is not None:
            os.close(lock)


def _make_and_lock(folder: Path) -> int | None:
    """As `lock_folder`, or None on a file system without locks; GfwsvdError as `locked_folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GfwsvdError(f"could not make the folder {folder}: {error}; name another one") from error
    try:
        return lock_folder(folder)
    except BlockingIOError as error:
        raise GfwsvdError(f"another process is at work in {folder}: wait for it, or write to another folder") from error
    except FileNotFoundError:
        return _make_and_lock(folder)
    except OSError:
        return None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(folder: Path) -> None:
    """Force the files of `folder` to the disk, so that the rename cannot survive a power cut which they do not."""
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _move_into_place(temporary: Path, target: Path, *, overwrite: bool) -> None:
    """Give `temporary` the name `target`; what had it, if anything, ends up under the name of `temporary`."""
    try:
        temporary.rename(target)  # also over an empty folder
    except OSError as error:
        if not overwrite or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(temporary, target):
            old = target.with_name(f"{target.name}.old-{secrets.token_hex(4)}")
            target.rename(old)
            try:
                temporary.rename(target)
            except BaseException:
                old.rename(target)
                raise
            old.rename(temporary)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), os.fspath(second))


def write_text(path: Path, text: str, *, what: str) -> None:
    """Write a file, beside its final place and then renamed, so that it is whole or as before; makes missing folders.

    Args:
        what: the file is, for the error.

    Raises:
        GfwsvdError: when it cannot be written.
    """
    file = path.expanduser()
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", errors="replace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        raise GfwsvdError(f"could not write the {what} {file}: {error}; nothing half-written is left") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, for use inside `atomic_folder`.

    Raises:
        GfwsvdError: when `value` holds something that JSON has no form for, NaN and infinities included.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GfwsvdError(f"{path.name} can hold plain JSON values only: {error}") from error
    path.write_text(text + "\n", encoding="utf-8")


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` and the digest of what it says, for `check_seal` to find after it was read back."""
    return {**value, _SEAL: _seal(value)}


def check_seal(path: Path, value: Mapping[str, Any]) -> None:
    """GfwsvdError unless the object `value`, read from `path`, is as `sealed` made it."""
    if value.get(_SEAL) != _seal({name: entry for name, entry in value.items() if name != _SEAL}):
        raise GfwsvdError(
            f"{path} is not what was written there: its content does not have the digest recorded in it; copy it again "
            "or write it anew"
        )


def _seal(value: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(value, default=str)  # what JSON has no form for is for `write_json` to refuse
    except RecursionError as error:
        raise GfwsvdError("cannot take the digest of JSON values that are nested so deeply") from error
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        GfwsvdError: when there is no such file or it does not hold one JSON object of finite numbers.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except OSError as error:
        raise GfwsvdError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise GfwsvdError(f"{path} is not JSON, it was cut short or changed: {error}") from error
    if not isinstance(value, dict):
        raise GfwsvdError(f"{path} should hold one JSON object, got {type(value).__name__}")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def read_headers(files: Iterable[str | os.PathLike[str]]) -> dict[str, TensorInfo]:
    """Name, shape and dtype of every tensor in some safetensors files, from their headers: no tensor is read.

    Raises:
        GfwsvdError: when a file is missing, is not safetensors, is shorter or longer than its header says, or two of
            them hold a tensor of the same name.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in map(Path, files):
        try:
            with safe_open(file, framework="pt") as reader:
                names = reader.keys()
                for name in names:
                    if name in tensors:
                        raise GfwsvdError(f"tensor {name} is both in {tensors[name].file} and in {file}")
                    entry = reader.get_slice(name)
                    tensors[name] = TensorInfo(file, tuple(entry.get_shape()), entry.get_dtype())
        except FileNotFoundError as error:
            raise GfwsvdError(f"{file} is missing; copy the folder again, all files of it") from error
        except (OSError, SafetensorError) as error:
            raise GfwsvdError(
                f"{file} is not a whole safetensors file ({error}); copy it again or write it anew"
            ) from error
    return tensors


def check_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Compare files of `folder` with their recorded SHA-256 digests, `digests[file name]`; a few files at a time.

    Raises:
        GfwsvdError: when a file is missing or its bytes are not the recorded ones.
    """
    for name, digest in digests_of(folder / name for name in digests).items():
        if digest != digests[name]:
            raise GfwsvdError(
                f"{folder / name} is not the file that was written there: its SHA-256 digest is {digest}, recorded "
                f"is {digests[name]}; copy it again or write it anew"
            )


def digests_of(files: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 digests of files by their names, a few at a time; GfwsvdError for one that cannot be read."""
    files = list(files)
    with ThreadPoolExecutor(max_workers=4) as pool:  # reading and hashing let go of the interpreter lock
        return dict(zip((file.name for file in files), pool.map(_digest, files), strict=True))


def _digest(file: Path) -> str:
    try:
        return sha256_file(file)
    except OSError as error:
        raise GfwsvdError(f"cannot read {file}: {error.strerror}; copy the folder again, all files of it") from error
