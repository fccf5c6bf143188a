"""Builds `gfwsvd_kernels._C`: nvcc and a C++ compiler, run by ninja. Without arguments, into kernels/gfwsvd_kernels.

    python csrc/build_extension.py [--archs 80,90a,100a] [--into FOLDER] [--work FOLDER]

What the assembler says of registers, stack and spills is left beside each object, in *.ptxas; `resources` reads it.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parent
KERNELS = ("decode", "persistent", "device")
ARCHS = os.environ.get("GFWSVD_CUDA_ARCHS", "80,90a,100a")
NAME = "_C" + sysconfig.get_config_var("EXT_SUFFIX")


class BuildError(RuntimeError):
    """What is missing, or what the compiler said."""


class Edge(NamedTuple):
    """One command of a build: the rule, what it makes and of what, and the rule's variables."""

    rule: str
    output: Path
    inputs: tuple[Path, ...]
    variables: dict[str, str] = {}


RULES = {
    "cxx": "$cxx -MMD -MF $out.d -std=$std -fPIC -fvisibility=hidden $flags -c $in -o $out",
    "nvcc": "$nvcc -MMD -MF $out.d -std=c++17 -O3 $codes -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v"
    " -c $in -o $out 2> $out.ptxas || { cat $out.ptxas; exit 1; }",
    "link": "$linker -shared $in -o $out $flags",
    "program": "$cxx -MMD -MF $out.d -std=$std $flags $in -o $out",
}


def build(into: Path, work: Path, archs: str = ARCHS) -> Path:
    """Compile and link into a folder, reusing what `work` holds of an earlier build."""
    codes = " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs.split(","))
    objects = [Edge("nvcc", work / f"{name}.o", (SOURCE / f"{name}.cu",), {"codes": codes}) for name in KERNELS]
    flags = {"flags": f"-O2 {include_flags()} '-DGFWSVD_ARCHS=\"{archs}\"'", "std": "c++17"}
    objects.append(Edge("cxx", work / "bindings.o", (SOURCE / "bindings.cpp",), flags))
    library = into / NAME
    link = {"linker": nvcc(), "flags": "-cudart static"}
    run(work, [*objects, Edge("link", library, tuple(edge.output for edge in objects), link)], nvcc=nvcc())
    return library


def run(work: Path, edges: Iterable[Edge], **variables: str) -> None:
    """Write build.ninja into `work` and run it."""
    work.mkdir(parents=True, exist_ok=True)
    lines = [f"{name} = {value}" for name, value in {"cxx": compiler(), **variables}.items()]
    for name, command in RULES.items():
        lines += [f"rule {name}", f"  command = {command}"]
        lines += [] if name == "link" else ["  depfile = $out.d", "  deps = gcc"]
    for edge in edges:
        lines.append(f"build {_escaped(edge.output)}: {edge.rule} {' '.join(map(_escaped, edge.inputs))}")
        lines += [f"  {name} = {value}" for name, value in edge.variables.items()]
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    result = subprocess.run([ninja(), "-C", str(work)], capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"the build in {work} failed:\n{result.stdout}{result.stderr}")


class Resources(NamedTuple):
    """What the assembler made of one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int


def resources(work: Path) -> list[Resources]:
    """Of all kernels that were compiled in `work`."""
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = []
    for report in sorted(work.glob("*.ptxas")):
        for name, arch, stack, stores, loads, registers in re.findall(pattern, report.read_text(), re.DOTALL):
            found.append(Resources(readable(name), arch, int(registers), int(stack), int(stores) + int(loads)))
    return found


def readable(symbol: str) -> str:
    """decode_kernel<BFloat16> of its mangled name, of which there is one form each."""
    kernel, dtype, _, tiles = re.search(r"\d((?:decode|persistent)_kernel)INS_\d+(\w+?16)E(Li(\d+)E)?", symbol).groups()
    return f"{kernel}<{dtype}{', ' + tiles if tiles else ''}>"


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    places = [os.path.join(home, "bin")] if home else [None, "/usr/local/cuda/bin"]  # None is PATH
    found = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    return found or _missing("nvcc", "the CUDA toolkit, on PATH or under CUDA_HOME")


def ninja() -> str:
    found = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    return found or _missing("ninja", "`pip install ninja`")


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    return found or _missing("a C++ compiler", "g++, or CXX naming another")


def include_flags() -> str:
    """Of Python and pybind11; torch brings the headers of the latter, too."""
    folders = [sysconfig.get_path("include")]
    for package, folder in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        if spec and spec.origin and (Path(spec.origin).parent / folder / "pybind11/pybind11.h").exists():
            folders.append(str(Path(spec.origin).parent / folder))
            break
    else:
        _missing("pybind11", "`pip install pybind11`")
    return " ".join(f"-isystem {_escaped(folder)}" for folder in folders)


def _missing(what: str, remedy: str) -> str:
    raise BuildError(f"the extension gfwsvd_kernels._C needs {what}, which was not found: install {remedy}")


def _escaped(path: Path | str) -> str:
    return re.sub(r"([ :$])", r"$\1", str(path))


def main() -> None:
    root = SOURCE.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default=ARCHS, help=f"default {ARCHS}; GFWSVD_CUDA_ARCHS sets another")
    parser.add_argument("--into", type=Path, default=root / "kernels/gfwsvd_kernels")
    parser.add_argument("--work", type=Path, default=root / "build/extension")
    options = parser.parse_args()
    try:
        print(build(options.into.resolve(), options.work.resolve(), options.archs))
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
