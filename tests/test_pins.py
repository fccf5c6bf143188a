"""The pinned versions: exact, each once, of all that the project needs, and those that are installed."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "requirements").glob("*.txt"))
OWN_ENVIRONMENT = {"vllm.txt": "that of `make test-vllm`"}


def lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


def pins(file: Path) -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines(file))}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_requirement_is_pinned_exactly_and_once(file):
    for line in lines(file):
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[^=*,;\s]+", line), f"{line!r}: expected NAME==VERSION alone"
        Version(line.split("==")[1])
    names = [canonicalize_name(line.split("==")[0]) for line in lines(file)]
    assert len(names) == len(set(names)), "some name stands there twice"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_pinned_versions_are_those_installed(file):
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("these tests run in another environment than that of `make install`")
    if file.name in OWN_ENVIRONMENT:
        pytest.skip(f"these versions are for another environment, {OWN_ENVIRONMENT[file.name]}")
    missing, other = [], []
    for name, version in pins(file).items():
        try:
            found = Version(importlib.metadata.version(name)).public  # without torch's mark of its build
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found != str(Version(version)):
            other.append(f"{name} {found}, pinned {version}")
    assert not other, "run `make install`, or pin what it resolves to"
    if missing:
        pytest.skip(f"not installed, so not compared: {', '.join(missing)}")


def test_all_that_the_project_needs_is_pinned():
    pinned, seen = pins(ROOT / "requirements" / "dev.txt"), set()
    waiting = [Requirement("gfwsvd[dev]")]
    while waiting:
        needed = waiting.pop()
        key = (canonicalize_name(needed.name), frozenset(needed.extras))
        try:
            requires = importlib.metadata.requires(needed.name) or ()
        except importlib.metadata.PackageNotFoundError:  # for another platform, or not installed here
            continue
        if key not in seen:
            seen.add(key)
            extras = ("", *needed.extras)
            waiting += [
                other
                for other in map(Requirement, requires)
                if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in extras)
            ]
    names = {name for name, _ in seen if not name.startswith(("nvidia-", "cuda-"))}  # what builds of torch bring along
    assert {"torch", "transformers", "pytest"} <= names
    assert names - pinned.keys() == {"gfwsvd"}
