"""The layers of the project: who may import whom, and what a bare import brings along."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Every module stands here with its layer. A module imports from its own layer and those below.
LAYERS = {
    "gfwsvd_kernels": 0,
    "gfwsvd.errors": 0,
    "gfwsvd.checks": 1,
    "gfwsvd.folders": 1,
    "gfwsvd.work": 1,
    "gfwsvd.host": 1,
    "gfwsvd.ranked": 1,
    "gfwsvd.track": 1,
    "gfwsvd.interrupts": 1,
    "gfwsvd.metrics": 1,
    "gfwsvd.whiten": 1,
    "gfwsvd.pivot": 1,
    "gfwsvd.quantise": 1,
    "gfwsvd.feedback": 1,
    "gfwsvd.bounds": 1,
    "gfwsvd.ranks": 1,
    "gfwsvd.factorize": 1,
    "gfwsvd.statistics": 2,
    "gfwsvd.kronecker": 2,
    "gfwsvd.budget": 2,
    "gfwsvd.packed": 2,
    "gfwsvd.layers": 2,
    "gfwsvd.layouts": 2,
    "gfwsvd.methods": 2,
    "gfwsvd.guard": 2,
    "gfwsvd.hooks": 3,
    "gfwsvd.losses": 3,
    "gfwsvd.batches": 3,
    "gfwsvd.memory": 3,
    "gfwsvd.collector": 3,
    "gfwsvd.passes": 3,
    "gfwsvd.calibration": 3,
    "gfwsvd.latency": 3,
    "gfwsvd.hardware": 3,
    "gfwsvd.effort": 3,
    "gfwsvd.collecting": 3,
    "gfwsvd.footprint": 3,
    "gfwsvd.plan": 4,
    "gfwsvd.subject": 4,
    "gfwsvd.solve": 4,
    "gfwsvd.spread": 4,
    "gfwsvd.outcome": 4,
    "gfwsvd.joint": 3,
    "gfwsvd.refine": 3,
    "gfwsvd.gains": 3,
    "gfwsvd.compress": 4,
    "gfwsvd.fuse": 4,
    "gfwsvd.checkpoint": 4,
    "gfwsvd.store": 4,
    "gfwsvd.shards": 4,
    "gfwsvd.card": 4,
    "gfwsvd.registration": 5,
    "gfwsvd.hf": 5,
    "gfwsvd.convert": 5,
    "gfwsvd.adapter": 5,
    "gfwsvd.texts": 5,
    "gfwsvd.progress": 5,
    "gfwsvd.sources": 5,
    "gfwsvd.skeleton": 5,
    "gfwsvd.logits": 5,
    "gfwsvd.evaluate": 5,
    "gfwsvd.tasks": 5,
    "gfwsvd.figures": 5,
    "gfwsvd.report": 5,
    "gfwsvd.options": 5,
    "gfwsvd.output": 5,
    "gfwsvd.sweep": 5,
    "gfwsvd.serve": 5,
    "gfwsvd.decoding": 5,
    "gfwsvd.serving_vllm": 5,
    "gfwsvd.tune": 5,
    "gfwsvd.cli_app": 5,
    "gfwsvd.cli_make": 5,
    "gfwsvd.cli_change": 5,
    "gfwsvd.cli_measure": 5,
    "gfwsvd.cli_plan": 5,
    "gfwsvd.cli": 5,
    "gfwsvd.__main__": 5,
    "gfwsvd": 5,
}
TOP = max(LAYERS.values())
# What the lower layers may use of other projects, the kernels, and the highest layer.
LIGHT = {"torch", "safetensors"}
KERNELS = {"torch", "triton"}
DECLARED = {
    "accelerate", "datasets", "gguf", "huggingface_hub", "matplotlib", "numpy", "rich", "safetensors", "torch",
    "transformers", "typer",
}  # fmt: skip
# An optional dependency has one module that knows it.
OPTIONAL = {"gfwsvd.tasks": {"lm_eval"}, "gfwsvd.serving_vllm": {"vllm"}}


def source_files() -> dict[str, Path]:
    """Every module of both packages by its full name."""
    files = {}
    for top in (ROOT, ROOT / "kernels"):
        for package in ("gfwsvd", "gfwsvd_kernels"):
            for path in (top / package).rglob("*.py"):
                parts = path.relative_to(top).with_suffix("").parts
                files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = source_files()


def layer(module: str) -> int:
    """The layer of a module: of the kernels' modules their package's, of one that is not named yet the highest."""
    return LAYERS.get("gfwsvd_kernels" if module.partition(".")[0] == "gfwsvd_kernels" else module, TOP)


def imported(module: str, source: str) -> Iterator[str]:
    """Full names of what the source of `module` imports, wherever in it: modules, or attributes of our packages."""
    package = module if module in ("gfwsvd", "gfwsvd_kernels") else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            levels = package.split(".")
            base = ".".join([*levels[: len(levels) - node.level + 1], *filter(None, [node.module])])
            origin = base if node.level else str(node.module)
            if origin in ("gfwsvd", "gfwsvd_kernels"):  # `from . import name`: a module, or an attribute of the package
                yield from (f"{origin}.{alias.name}" for alias in node.names)
            else:
                yield origin


def complaints(module: str, source: str) -> list[str]:
    """What the imports in the source of `module` break."""
    found = []
    kernels = module.partition(".")[0] == "gfwsvd_kernels"
    allowed = KERNELS if kernels else DECLARED | OPTIONAL.get(module, set()) if layer(module) == TOP else LIGHT
    for name in imported(module, source):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or name == "gfwsvd.__version__":
            continue
        if top in ("gfwsvd", "gfwsvd_kernels"):
            target = name if name in FILES else top
            if kernels and top == "gfwsvd":
                found.append(f"{module} imports {name}: the kernels stand without gfwsvd")
            elif layer(target) > layer(module):
                found.append(f"{module} (layer {layer(module)}) imports {target} (layer {layer(target)})")
        elif top not in allowed:
            found.append(f"{module} (layer {layer(module)}) imports {top}")
    return found


def test_every_module_has_a_layer():
    modules = {name for name in FILES if name.partition(".")[0] == "gfwsvd"}
    assert modules - LAYERS.keys() == set(), "name the module in LAYERS, with its layer"


@pytest.mark.parametrize("module", sorted(FILES))
def test_module_imports_from_its_own_layer_and_below(module):
    assert complaints(module, FILES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gfwsvd.metrics", "from .statistics import LayerStatistics"),
        ("gfwsvd.metrics", "from . import compress"),
        ("gfwsvd.layers", "def late():\n    import transformers"),
        ("gfwsvd.hooks", "from gfwsvd.checkpoint import sha256_file"),
        ("gfwsvd.compress", "import gfwsvd.hf"),
        ("gfwsvd.compress", "from gfwsvd import save_pretrained"),
        ("gfwsvd.statistics", "import triton"),
        ("gfwsvd.cli", "import undeclared"),
        ("gfwsvd.cli", "import lm_eval.tasks"),
        ("gfwsvd_kernels.ops", "import gfwsvd"),
        ("gfwsvd_kernels.ops", "from transformers.utils import logging"),
    ],
)
def test_an_import_across_the_layers_is_noticed(module, source):
    assert len(complaints(module, source)) == 1


def run_python(code: str, cwd: Path) -> str:
    """What `code` prints in a fresh interpreter that starts in the folder `cwd`."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", ["gfwsvd", "gfwsvd_kernels"])
def test_import_is_light(package, tmp_path):
    heavy = {"triton", "transformers", "datasets", "matplotlib", "typer", "rich", "accelerate", "gguf", "lm_eval"}
    code = f"import sys, torch\nimport {package}\n"
    code += f"print(sorted(sys.modules.keys() & {heavy!r}), torch.cuda.is_initialized())"
    assert run_python(code, tmp_path) == "[] False"


@pytest.mark.parametrize("package", ["gfwsvd", "gfwsvd_kernels"])
def test_a_folder_of_the_packages_name_does_not_hide_it(package, tmp_path):
    (tmp_path / package).mkdir()
    assert run_python(f"import {package}; print({package}.__file__)", tmp_path) == str(FILES[package])
