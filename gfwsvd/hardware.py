"""What a machine can do, measured in a few seconds: how long its operations take by size, its memory and its disk."""

import hashlib
import itertools
import math
import os
import shutil
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gfwsvd_kernels import gram_accumulate, symmetrize

from .errors import GfwsvdError
from .statistics import PART_PROBES

_LONG = 0.06  # seconds: an operation that took so long is not measured at a larger size
_SIZES = [64 << power for power in range(7)]
_BYTES = [1 << power for power in range(14, 31, 2)]
_FILE = 1 << 25  # bytes
_CACHED = 1 << 25  # bytes that may still be in a cache; tensors that are passed over come from memory


@dataclass(frozen=True)
class Curve:
    """How long an operation takes by its size.

    Attributes:
        points: (size, seconds), ascending.
        power: with what power of the size the time grows above the last point.
    """

    points: tuple[tuple[float, float], ...]
    power: float

    def seconds(self, size: float) -> float:
        """Between the points by powers of the size, below the first as there: what is left is the call itself."""
        sizes = [point[0] for point in self.points]
        place = bisect_left(sizes, size)
        if place == 0:
            return self.points[0][1]
        low, before = self.points[place - 1]
        if place == len(sizes):
            return before * (size / low) ** self.power
        high, after = self.points[place]
        return before * (after / before) ** (math.log(size / low) / math.log(high / low))


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Attributes:
        device: the kind of device that the model is on, "cpu" or "cuda".
        name: of the device, for people.
        curves: by operation. "matmul DTYPE" of square matrices, "thin DTYPE" of one and `PART_PROBES` columns and, in
            float64, "cholesky", "eigh", "qr", "lu" and "solve" (a triangle and as many right-hand sides) by the number
            of rows; on a CPU "gram", a packed triangle that grows by as many rows as it has, and "fold", one that grows
            by a single row, by the rows it has; "symmetrize", a packed triangle made full, likewise; "move", one number
            times another into new memory, by the bytes that are read.
        disk_read, disk_write, digest: bytes a second, from and to the disk and through SHA-256.
        device_memory, host_memory, disk: free bytes; the first two are the same on a CPU.
        gpus: GPUs that are here, of the same memory; 1 on a CPU.
        link: bytes a second from the host to a GPU.
        spread: whether weights go to all GPUs, the host and the disk ("--device auto").
    """

    device: str
    name: str
    curves: Mapping[str, Curve]
    disk_read: float
    disk_write: float
    digest: float
    device_memory: int
    host_memory: int
    disk: int
    gpus: int = 1
    link: float = math.inf
    spread: bool = False

    @property
    def ceilings(self) -> dict[str, float]:
        """The best that was measured: TFLOP/s of products by dtype, GB/s of memory (read and written), of the link to a
        GPU where there is one, of the disk and of SHA-256."""
        found = {}
        for name, curve in self.curves.items():
            kind, _, dtype = name.partition(" ")
            if kind == "matmul":
                found[f"{dtype} TFLOP/s"] = max(2 * size**3 / taken for size, taken in curve.points) / 1e12
        found["memory GB/s"] = max(2 * size / taken for size, taken in self.curves["move"].points) / 1e9
        rates = {"link": self.link, "disk read": self.disk_read, "disk write": self.disk_write, "SHA-256": self.digest}
        return found | {f"{name} GB/s": rate / 1e9 for name, rate in rates.items() if math.isfinite(rate)}


def measure(device: torch.device | str, dtype: torch.dtype, folder: str | os.PathLike[str] = ".") -> Hardware:
    """Measures what a compression does most, for about three seconds: an idle machine gives the best estimate.

    Args:
        device: where the model will be; "auto" for the GPUs that are here, the host and the disk.
        dtype: of its weights.
        folder: on the disk that will be written to; a file of 32 MiB is there for a moment.

    Raises:
        GfwsvdError: for a device that is not here, or a folder that cannot be written to.
    """
    spread = device == "auto"
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if spread else device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise GfwsvdError(
            f"there is no device {device} here ({reason}): plan on the machine that will do the work, or give another "
            "--device"
        ) from error
    kinds = {str(kind).removeprefix("torch."): kind for kind in (torch.float32, dtype)}
    operations = {f"matmul {name}": _matmul(kind) for name, kind in kinds.items()}
    curves = {name: _curve(start, _SIZES, 3, device) for name, start in (operations | _FLOAT64).items()}
    curves |= {f"thin {name}": _curve(_matmul(kind, PART_PROBES), _SIZES, 2, device) for name, kind in kinds.items()}
    if device.type == "cpu":  # where blocks of a triangle are slower than whole products, and are copied into place
        curves["gram"] = _curve(_gram(None), _SIZES, 3, device)
        curves["fold"] = _curve(_gram(1), _SIZES, 2, device)
    curves["symmetrize"] = _curve(_symmetrize, _SIZES, 2, device)
    curves["move"] = _curve(_move, _BYTES, 1, device)
    read, write = _disk_rates(Path(folder))
    on_gpu = device.type == "cuda"
    host = _host_memory()
    return Hardware(
        device=device.type,
        name=torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        curves=curves,
        disk_read=read,
        disk_write=write,
        digest=_digest_rate(),
        device_memory=torch.cuda.mem_get_info(device)[0] if on_gpu else host,
        host_memory=host,
        disk=shutil.disk_usage(folder).free,
        gpus=torch.cuda.device_count() if on_gpu else 1,
        link=_link_rate(device) if on_gpu else math.inf,
        spread=spread,
    )


Start = Callable[[int, torch.device], Callable[[], object]]  # what prepares an operation of a size on a device


def _matmul(dtype: torch.dtype, columns: int | None = None) -> Start:
    """A square matrix times itself, or its first `columns`."""

    def start(size: int, device: torch.device) -> Callable[[], object]:
        left = torch.ones(size, size, dtype=dtype, device=device)
        right = left[:, :columns].contiguous()
        return lambda: left @ right

    return start


def _gram(count: int | None) -> Start:
    """A packed triangle that grows by `count` rows, or as many as it has."""

    def start(size: int, device: torch.device) -> Callable[[], object]:
        rows = torch.ones(count or size, size, device=device)
        out = torch.zeros(size * (size + 1) // 2, device=device)
        return lambda: gram_accumulate(out, rows)

    return start


def _symmetrize(size: int, device: torch.device) -> Callable[[], object]:
    packed = torch.ones(size * (size + 1) // 2, device=device)
    return lambda: symmetrize(packed)


def _on_square(operation: Callable[[Tensor], object]) -> Start:
    """An operation on a well-conditioned symmetric matrix in float64."""

    def start(size: int, device: torch.device) -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(size, size, generator=generator, dtype=torch.float64).to(device)
        square = root + root.T
        square.diagonal().add_(4 * size**0.5)  # more than its least eigenvalue is below zero
        return lambda: operation(square)

    return start


_FLOAT64: dict[str, Start] = {
    "matmul float64": _matmul(torch.float64),
    "cholesky": _on_square(torch.linalg.cholesky_ex),
    "eigh": _on_square(torch.linalg.eigh),
    "qr": _on_square(torch.linalg.qr),
    "lu": _on_square(torch.linalg.lu_factor),
    "solve": _on_square(lambda square: torch.linalg.solve_triangular(square, square, upper=False)),
}


def _move(size: int, device: torch.device) -> Callable[[], object]:
    values = itertools.cycle([torch.ones(size // 4, device=device) for _ in range(min(64, -(-_CACHED // size)))])
    return lambda: next(values) * 2.0


def _curve(start: Start, sizes: list[int], power: float, device: torch.device) -> Curve:
    points: list[tuple[float, float]] = []
    for size in sizes:
        operation = start(size, device)
        seconds = _timed(operation, device, 1)
        if seconds < _LONG or not points:  # a first call is longer: libraries, workspaces, new pages of memory
            # The mean and not the best, since the work will meet no better moments
            seconds = _timed(operation, device, 3 if seconds > _LONG / 10 else 10)
        points.append((size, seconds))
        if seconds > _LONG:
            break
    return Curve(tuple(points), power)


def _timed(operation: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of one of `repeats` calls in a row. On a CPU those of this thread alone, whose share of an operation is
    that of any other: what else runs on the machine does not count."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    _synchronize(device)
    began = clock()
    for _ in range(repeats):
        operation()
    _synchronize(device)
    return (clock() - began) / repeats


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes a second that a file is read with, from the disk rather than from memory, and written with."""
    block = os.urandom(_FILE)  # which no file system makes smaller
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            began = time.perf_counter()
            file.write(block)
            os.fsync(file.fileno())
            written = time.perf_counter() - began
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            began = time.perf_counter()
            file.read()
            return _FILE / (time.perf_counter() - began), _FILE / written
    except OSError as error:
        raise GfwsvdError(
            f"no file can be written to {folder.resolve()}: {error}; start where the output is to go"
        ) from error


def _link_rate(device: torch.device) -> float:
    """Bytes a second from the host's memory, as a module's weights come from there."""
    source = torch.ones(_FILE, dtype=torch.uint8)
    source.to(device)
    return _FILE / _timed(lambda: source.to(device), device, 3)


def _digest_rate() -> float:
    block = bytes(_FILE // 4)
    began = time.perf_counter()
    hashlib.sha256(block).digest()
    return len(block) / (time.perf_counter() - began)


def _host_memory() -> int:
    """Bytes of memory that a new process can have without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
