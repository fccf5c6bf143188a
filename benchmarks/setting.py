"""What the benchmarks of quality start from: a model, its statistics on one text, and windows of another."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import gfwsvd
from benchmarks import frontier
from benchmarks.packaged import packaged_smollm2


@dataclass(frozen=True)
class Setting:
    """Attributes:
    about: what every row says of it.
    """

    model: nn.Module
    statistics: gfwsvd.Statistics
    windows: Tensor
    about: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `prepare` reads."""
    parser.add_argument("--model", default=None, help="see gfwsvd.load_model; default: SmolLM2-135M")
    parser.add_argument("--calibration", required=True, help="calibration text, see gfwsvd.load_text")
    parser.add_argument("--evaluation", required=True, help="evaluation text")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--exclude", nargs="*", default=[], help="regular expressions of layers to leave out")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=40, help="evaluation windows")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the evaluation")
    parser.add_argument("--stats", type=Path, required=True, help="statistics directory, made if it is not there")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines to add to")


def prepare(arguments: argparse.Namespace) -> Setting:
    """Loads the model and the texts, and calibrates unless that was done before."""
    model, tokenizer, name = gfwsvd.load_model(arguments.model or str(packaged_smollm2()))
    batches = gfwsvd.token_batches(
        gfwsvd.load_text(arguments.calibration),
        tokenizer,
        sequences=arguments.sequences,
        seq_len=arguments.seq_len,
        batch_size=4,
        seed=0,
    )
    statistics = frontier.statistics_in(arguments.stats, model, batches, exclude=arguments.exclude)
    windows = gfwsvd.windows(
        gfwsvd.load_text(arguments.evaluation), tokenizer, window=arguments.window, limit=arguments.limit
    )
    about = {
        "model": name,
        "calibration": Path(arguments.calibration).name,
        "calibration_tokens": statistics.num_sequences * arguments.seq_len,
        "calibration_sha256": statistics.data_sha256,
        "settings": statistics.settings,
        "evaluation": Path(arguments.evaluation).name,
        "windows": list(windows.shape),
        "evaluation_dtype": arguments.dtype,
    }
    if arguments.exclude:
        about["exclude"] = arguments.exclude
    return Setting(model, statistics, windows, about)
