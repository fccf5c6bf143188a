"""Results as JSON lines: rows are only ever added, each with what made it."""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """The command, machine, versions, commit and date of this run; None for what is not there.

    The environment variable GFWSVD_COMMIT names the commit where the sources are a copy of a checkout.
    """
    on_gpu = torch.cuda.is_available()
    return {
        "command": _command(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "commit": os.environ.get("GFWSVD_COMMIT")
        or _output("git", "describe", "--always", "--dirty", "--abbrev=10")
        or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def file_name(benchmark: str) -> str:
    """The name of a results file of this GPU (or of the CPU), day and commit."""
    about = provenance()
    gpu = (about["gpu"] or "cpu").removeprefix("NVIDIA ").lower()
    words = (re.sub(r"[^a-z0-9._]+", "-", word) for word in (benchmark, gpu, about["date"], about["commit"]))
    return "-".join(words) + ".jsonl"


def _command() -> str:
    """The command line, of absolute paths the last part only: they belong to a machine, not to the result."""
    module = f"{Path(sys.argv[0]).parent.name}.{Path(sys.argv[0]).stem}"
    arguments = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python -m", module, *arguments])


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds one row to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file, none where there is no file yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line that a command prints, run beside the sources; None where it fails or is not there."""
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.partition("\n")[0].strip() or None
