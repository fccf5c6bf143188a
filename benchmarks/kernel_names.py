"""The names of all kernels of this project, one a line: the GPU's tools are told to watch these and not torch's.

python -m benchmarks.kernel_names
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRITON = re.compile(r"^@(?:triton|gluon)\.jit(?:\(.*\))?\ndef (\w+_kernel)\(", re.MULTILINE)


def kernel_names(root: Path = ROOT) -> list[str]:
    """Kernels end in `_kernel`."""
    sources = root.glob("kernels/gfwsvd_kernels/*.py")
    return sorted({name for path in sources for name in TRITON.findall(path.read_text())})


if __name__ == "__main__":
    print("\n".join(kernel_names()))
