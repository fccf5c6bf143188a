"""The optional compiled extension, built where GFWSVD_BUILD_CUDA=1; everything else is declared in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildExtension(build_ext):
    """Leaves the work to csrc/build_extension.py."""

    def build_extension(self, extension: Extension) -> None:
        sys.path.insert(0, str(ROOT / "csrc"))
        import build_extension

        into = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        into.mkdir(parents=True, exist_ok=True)
        try:
            build_extension.build(into, Path(self.build_temp).resolve())
        except build_extension.BuildError as error:
            sys.exit(f"{error}\nWithout GFWSVD_BUILD_CUDA=1 the package is installed without the extension.")


options = {}
if os.environ.get("GFWSVD_BUILD_CUDA") == "1":
    sources = [f"csrc/{name}" for name in ("bindings.cpp", "decode.cu", "persistent.cu", "device.cu")]
    options = {
        "ext_modules": [Extension("gfwsvd_kernels._C", sources)],
        "cmdclass": {"build_ext": BuildExtension},
    }

setup(**options)
