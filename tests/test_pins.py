"""The pinned versions: exact, each once, of all that the project needs, those that are installed, and their digests."""

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
OWN_ENVIRONMENT = {"vllm.txt": "that of `make test-vllm`", "audit.txt": "that of `make audit`"}
LOCKS = {
    "dev.lock": ["dev.txt", "models.txt"],
    "vllm.lock": ["vllm.txt", "models.txt"],
    "audit.lock": ["audit.txt"],
}


def lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


def pins(file: Path) -> dict[str, str]:
    found = [Requirement(line) for line in lines(file)]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in found}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_requirement_is_pinned_exactly_and_once(file):
    for line in lines(file):
        name, _, version = line.partition(";")[0].partition("==")
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name), f"{line!r}: expected NAME==VERSION, perhaps a marker"
        Version(version)
    assert len(pins(file)) == len(lines(file)), "some name stands there twice"


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_but_torch_has_the_digests_of_its_files(name):
    """As pip reads them: a requirement goes on over all lines that end in a backslash."""
    lock = "\n".join(lines(ROOT / "requirements" / name)).replace("\\\n", " ")
    locked = {}
    for requirement, *digests in (re.split(r"\s+--hash=", line) for line in lock.splitlines()):
        pin = Requirement(requirement)
        locked[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
        assert digests and all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for digest in digests), requirement
    pinned = {key: version for file in LOCKS[name] for key, version in pins(ROOT / "requirements" / file).items()}
    assert locked == {name: version for name, version in pinned.items() if name != "torch"}


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
