"""Options that several commands share, each stated once."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from .methods import METHODS
from .quantise import BITS
from .ranks import RANKS, STORAGE
from .statistics import LABELS, UNITS

DTYPES = ("float32", "bfloat16", "float16")


def one_of(names: Iterable[str]) -> str:
    return f"<{'|'.join(names)}>"


TEXT_HELP = (
    "a .txt, .raw, .jsonl or .parquet file (FILE:FIELD names the field), a dataset on the hub as "
    "OWNER/NAME[:CONFIG[:SPLIT]], or 'pydoc:calibration' / 'pydoc:heldout', text that comes with Python"
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help="a hub name, a transformers folder, or a .gguf file")]
Text = Annotated[str, typer.Option("--text", metavar="TEXT", help=TEXT_HELP)]
Sequences = Annotated[int, typer.Option("--sequences", min=1, help="sequences drawn from the text")]
SeqLen = Annotated[int, typer.Option("--seq-len", min=2, help="tokens of a sequence")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="sequences in a batch: memory against speed")]
Unit = Annotated[str, typer.Option("--unit", metavar=one_of(UNITS), help="what one gradient sample of the Fisher is")]
Labels = Annotated[
    str,
    typer.Option("--labels", metavar=one_of(LABELS), help="the text's own next tokens, or drawn from the model"),
]
Sweeps = Annotated[int, typer.Option("--sweeps", min=1, help="passes over the text that refine the Kronecker factors")]
Clip = Annotated[
    float, typer.Option("--clip", min=0, help="most that one token's gradient counts, in medians; 0 for no limit")
]
Seed = Annotated[int, typer.Option("--seed", help="chooses the sequences, their order and sampled labels")]
Exclude = Annotated[
    list[str], typer.Option("--exclude", metavar="REGEX", help="leave out layers whose name matches; may be repeated")
]
Bounds = Annotated[
    list[str],
    typer.Option(
        "--bound",
        metavar="REGEX=LOW[:HIGH]",
        help="a layer whose name matches stores at least LOW and at most HIGH of its own parameters; 1 keeps it dense; "
        "may be repeated, the last match counts",
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        "--bits",
        metavar=one_of(map(str, BITS)),
        help="of the factors, 4 with --storage factors; default: the model's dtype",
    ),
]
Latency = Annotated[
    Path | None,
    typer.Option("--latency", metavar="FILE", help="table of gfwsvd latency: --keep is then a share of time"),
]
Window = Annotated[int, typer.Option("--window", min=2, help="tokens of a window")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="most windows to take; default: all")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar=one_of(DTYPES), help="of the weights; default: the model's own"),
]
Device = Annotated[str, typer.Option("--device", help="such as cpu, cuda or cuda:1")]
SpreadDevice = Annotated[
    str,
    typer.Option(
        "--device", help="such as cpu, cuda or cuda:1; auto spreads a model larger than one over GPUs, host and disk"
    ),
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="on a GPU: the same bits at every run, at some cost of time")
]
_ROUNDS = "allocate ranks so often again, by how far predictions on {} are from the dense ones"
_GAINS = "steps of fitting a gain of each output, so that predictions on {} stay the dense ones"
Rounds = Annotated[int, typer.Option("--rounds", min=0, help=_ROUNDS.format("--text"))]
Gains = Annotated[int, typer.Option("--gains", min=0, help=_GAINS.format("--text"))]
CalibrationText = Annotated[
    str | None,
    typer.Option("--calibration-text", metavar="TEXT", help=f"what --rounds and --gains measure by: {TEXT_HELP}"),
]
_BYTES = "in bytes or as 80G, 1.5T, 512M"
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        "--device-memory", metavar="SIZE", help=f"stay within it, by collecting some layers at a time; {_BYTES}"
    ),
]
HostMemory = Annotated[
    str | None, typer.Option("--host-memory", metavar="SIZE", help=f"the same for the memory of the host; {_BYTES}")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line, and no table")]
Epochs = Annotated[int, typer.Option("--epochs", min=1, help="passes over the sequences")]
LearningRate = Annotated[float, typer.Option("--learning-rate", help="the highest, after the warm-up")]
Products = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="<float32|bfloat16>", help="of the products in training; default: bfloat16 on a GPU alone"
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the output folder as a whole if it exists")]

# Of an evaluation, on a text or on tasks
OptionalText = Annotated[str | None, typer.Option("--text", metavar="TEXT", help=TEXT_HELP)]
Stride = Annotated[
    int | None,
    typer.Option("--stride", help="tokens from one window's start to the next; default: the window, no overlap"),
]
TaskNames = Annotated[
    str | None,
    typer.Option("--tasks", metavar="NAME[,NAME...]", help="of the lm-evaluation-harness: pip install 'gfwsvd[eval]'"),
]
TaskFolder = Annotated[
    Path | None, typer.Option("--task-folder", metavar="DIR", help="YAML files of tasks, in place of the harness's own")
]
Fewshot = Annotated[
    int | None, typer.Option("--num-fewshot", min=0, help="examples before a question; default: what the task says")
]
EvalLimit = Annotated[
    int | None, typer.Option("--limit", min=1, help="most windows, and most questions of a task; default: all")
]
EvalBatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="windows, or a task's requests, in a batch")]

# Of a sweep, each of which may be given several times
Methods = Annotated[list[str], typer.Option("--method", metavar=one_of(METHODS), help="may be repeated; default: all")]
RowRounds = Annotated[
    int, typer.Option("--rounds", min=0, help=f"in rows of their own, {_ROUNDS.format('--calibration-text')}")
]
RowGains = Annotated[
    int, typer.Option("--gains", min=0, help=f"in rows of their own, {_GAINS.format('--calibration-text')}")
]
Keeps = Annotated[list[float], typer.Option("--keep", help="share to store; may be repeated")]
RankWays = Annotated[list[str], typer.Option("--ranks", metavar=one_of(RANKS), help="may be repeated")]
Storages = Annotated[list[str], typer.Option("--storage", metavar=one_of(STORAGE), help="may be repeated")]
ALL_METHODS, FRONTIER, GLOBAL, PIVOTED = list(METHODS), [0.9, 0.8, 0.7, 0.6, 0.5], ["global"], ["pivoted"]
