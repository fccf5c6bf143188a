"""Compress language models by generalized Fisher-weighted SVD.

    import gfwsvd

    model, tokenizer, name = gfwsvd.load_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    batches = gfwsvd.token_batches(gfwsvd.load_text("text.txt"), tokenizer, sequences=64, seq_len=512)
    report = gfwsvd.compress(model, batches, method="gfwsvd", keep=0.8)
    gfwsvd.save_pretrained(model, "smaller", report=report, tokenizer=tokenizer)

Once gfwsvd is imported, transformers' `from_pretrained` reads what `save_pretrained` wrote.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import registration
from .calibration import Statistics, calibrate
from .compress import compress
from .errors import GfwsvdError
from .evaluate import evaluate
from .fuse import fuse
from .latency import LatencyTable, measure_latency
from .layers import LowRankLinear
from .methods import METHODS
from .outcome import CompressionReport
from .store import load_statistics, save_statistics

if TYPE_CHECKING:
    from .decoding import GraphDecoder
    from .hf import save_pretrained
    from .report import write_report
    from .sources import load_model, token_batches, windows
    from .texts import load_text

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "CompressionReport",
    "GfwsvdError",
    "GraphDecoder",
    "LatencyTable",
    "LowRankLinear",
    "Statistics",
    "calibrate",
    "compress",
    "evaluate",
    "fuse",
    "load_model",
    "load_statistics",
    "load_text",
    "measure_latency",
    "save_pretrained",
    "save_statistics",
    "token_batches",
    "windows",
    "write_report",
]

_LAZY = {  # on first use, since they bring along transformers or matplotlib
    "GraphDecoder": "decoding",
    "load_model": "sources",
    "load_text": "texts",
    "save_pretrained": "hf",
    "token_batches": "sources",
    "windows": "sources",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


registration.install()
