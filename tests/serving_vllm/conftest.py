"""Settings of vLLM's tests, which `make test-vllm` runs in an environment of their own.

The folder is not called vllm, since one of that name on the path looks like the package where there is none.
"""

import os

# Before vLLM is imported: the engine in this process, so that its errors come through, little memory, no network.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two processes on one NUMA node
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

from collections.abc import Callable
from pathlib import Path

import pytest

from gfwsvd.convert import in_bits
from served_models import save_compressed


@pytest.fixture(scope="session")
def served(tmp_path_factory, smollm2) -> Callable[[str], Path]:
    """The folder of a compressed model: one of `TINY`, or "smollm2"; with "-8" after it in eight bits."""
    root = tmp_path_factory.mktemp("served")

    def folder(kind: str) -> Path:
        if (root / kind).exists():
            return root / kind
        if (plain := kind.removesuffix("-8")) != kind:
            in_bits(str(folder(plain)), root / kind, bits=8)
        else:
            save_compressed(kind, root / kind, smollm2)
        return root / kind

    return folder
