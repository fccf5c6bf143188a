"""The commands that start from a compressed model: tune, convert."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import sources
from .checkpoint import inspect as inspect_checkpoint
from .cli_app import app, beside, check_dtype, kept_work, mendable, summary, versions
from .errors import GfwsvdError
from .folders import check_output_folder
from .options import (
    BatchSize,
    Bits,
    Device,
    Dtype,
    Epochs,
    Json,
    LearningRate,
    Overwrite,
    Products,
    Seed,
    SeqLen,
    Sequences,
    Text,
)
from .outcome import read_report
from .output import print_values
from .progress import bar
from .quantise import check_bits
from .texts import text_name


@app.command("tune")
@mendable
def tune_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that gfwsvd compress wrote")],
    text: Text,
    out: Annotated[Path, typer.Option("--out", metavar="DIR2", help="where to write the trained model")],
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="MODEL", help="the dense model, to learn its predictions: give it"),
    ] = None,
    sequences: Sequences = 256,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    epochs: Epochs = 1,
    learning_rate: LearningRate = 1e-4,
    seed: Seed = 0,
    dtype: Products = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """Train the factors of a compressed model for a while, to recover quality at the same size.

    Its checkpoints are in DIR2.tune until DIR2 is written: the same command goes on after an interruption. The end of
    the text is held out; if the training does not lower the loss there, DIR2 gets the factors of DIR.
    """
    from .hf import save_pretrained
    from .tune import check_training, training_tokens, tune

    check_training(epochs, learning_rate, dtype)
    target = check_output_folder(out, overwrite=overwrite, marker="config.json")
    inspect_checkpoint(directory)
    report = read_report(directory)
    with kept_work(beside(target, "tune")) as claim:
        loaded, tokenizer, name = sources.load_model(str(directory), device=device)
        dense, dense_name = None, None
        if reference is not None:
            dense, _, dense_name = sources.load_model(reference, device=device)
        train, heldout = training_tokens(
            sources.load_text(text), tokenizer, sequences=sequences, seq_len=seq_len, seed=seed
        )
        tuning = tune(
            loaded,
            train,
            heldout,
            claim,
            reference=dense,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            dtype=dtype,
            track=bar,
        )
        about = {"source": name, "text": text_name(text), "reference": dense_name, **tuning.to_json(), **versions()}
        report.provenance["tuned"] = [*report.provenance.get("tuned", ()), about]
        save_pretrained(loaded, out, report=report, tokenizer=tokenizer, overwrite=overwrite)
    if not tuning.improved:
        print(f"gfwsvd: the training did not lower the held-out loss: {out} has the factors of {name}", file=sys.stderr)
    print_values({"out": str(out), **about}, json_output)


@app.command("convert")
@mendable
def convert_command(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="a folder of gfwsvd compress, or factors that others published")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="where to write the converted model")],
    to_dense: Annotated[
        bool, typer.Option("--merge", help="multiply the factors of gfwsvd's own form out: an ordinary dense model")
    ] = False,
    to_adapter: Annotated[
        bool,
        typer.Option("--lora", help="an adapter for peft, which makes the dense model of --base the compressed one"),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="the dense model: of --lora, or whose factors, by others, SOURCE is"
        ),
    ] = None,
    bits: Bits = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """Write a compressed model in another form: dense, as an adapter, in few bits, or from the factors of others to
    gfwsvd's form.

    With --lora, an adapter over --base makes it compute what SOURCE computes, to compare them; it saves nothing. It is
    refused where it would not be exact up to rounding, as after gfwsvd tune.

    With --base alone, SOURCE is a .safetensors file, a state dict saved with torch.save, or a folder of either, with
    the tensor names of SVD-LLM, ASVD, LEMS or PIFA. Pickled models are refused: to read one is to run its code.
    """
    check_dtype(dtype)
    check_bits(bits)
    options: dict[str, Any] = {"dtype": dtype, "overwrite": overwrite, "track": bar}
    match to_dense, to_adapter, bits, base:
        case True, False, None, None:
            from .convert import merge

            found: dict[str, Any] = {"out": str(out), "merged_layers": merge(source, out, **options)}
        case False, True, None, str():
            from .adapter import write_adapter

            adapter = write_adapter(source, out, base=base, **options)
            found = {"out": str(out), "adapted_layers": len(adapter.ranks), **adapter._asdict()}
            found["ranks"] = [min(adapter.ranks.values()), max(adapter.ranks.values())]
        case False, False, int(), None:
            from .convert import in_bits

            found = summary(in_bits(source, out, bits=bits, **options), out)
        case False, False, None, str():
            from .convert import import_published

            found = summary(import_published(source, out, base=base, **options), out)
        case _:
            raise GfwsvdError(
                "give either --merge, to make a dense model, or --lora and --base MODEL, to make an adapter, or --bits "
                "N, to round the factors, or --base MODEL alone, to read what others published"
            )
    print_values(found, json_output)
