"""`import gfwsvd` teaches transformers the format, without importing transformers.

transformers knows its quantizers by a table in `transformers.quantizers.auto`, which `from_pretrained` consults. The
entry is made when that module is first executed, or at once where it already was. Importing `gfwsvd.hf` makes it.
"""

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


class _AfterImport:
    """An import finder that imports `gfwsvd.hf` after the module with transformers' table of quantizers."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TABLE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("gfwsvd.hf")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register the format with transformers now or, if it is not imported yet, once it is. Call it once."""
    if _TABLE in sys.modules:
        importlib.import_module("gfwsvd.hf")
    else:
        sys.meta_path.insert(0, _AfterImport())
