"""Compiles the kernels of csrc/ for the CPU, against the primitives of emulator.hpp."""

import sys
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER.parents[2] / "csrc"
sys.path.insert(0, str(SOURCE))

import build_extension as build  # noqa: E402

ARCHS = (80, 90)
# 2 warps that compute, not 8: as many boundaries, a third of the threads
FLAGS = f"-DGFWSVD_WARPS=2 -Wall -Wno-unknown-pragmas -I{SOURCE} -I{FOLDER}"
STANDARD = {"std": "c++20"}
SANITIZERS = {"thread": "-fsanitize=thread", "address": "-fsanitize=address,undefined -fno-sanitize-recover"}


def modules(work: Path) -> dict[int, Path]:
    """The Python modules `_emulated80` and `_emulated90`, of the two architectures whose paths differ."""
    edges, found = [], {}
    for arch in ARCHS:
        name = f"_emulated{arch}"
        module = {"flags": f"-O0 {FLAGS} -DGFWSVD_EMULATED -DGFWSVD_MODULE={name} {build.include_flags()}"}
        kernel = {"flags": f"-O2 {FLAGS} -DGFWSVD_EMULATED={arch} -x c++"}
        objects = [build.Edge("cxx", work / f"{name}.o", (SOURCE / "bindings.cpp",), module | STANDARD)]
        for part in build.KERNELS:
            objects.append(build.Edge("cxx", work / f"{part}{arch}.o", (SOURCE / f"{part}.cu",), kernel | STANDARD))
        found[arch] = work / build.NAME.replace("_C", name)
        parts = tuple(edge.output for edge in objects)
        edges += [*objects, build.Edge("link", found[arch], parts, {"linker": build.compiler()})]
    build.run(work, edges)
    return found


def programs(work: Path, sanitizers: Iterable[str], source: Path = SOURCE) -> dict[str, Path]:
    """races.cpp with the kernels of `source`, under each of these sanitizers."""
    found, edges = {}, []
    files = (FOLDER / "races.cpp", *(source / f"{name}.cu" for name in build.KERNELS))
    flags = FLAGS.replace(f"-I{SOURCE}", f"-I{source}")
    for name in sanitizers:
        found[name] = work / f"races_{name}"
        variables = {"flags": f"-O1 {SANITIZERS[name]} {flags} -DGFWSVD_EMULATED=90 -x c++"}
        edges.append(build.Edge("program", found[name], files, variables | STANDARD))
    build.run(work, edges)
    return found
