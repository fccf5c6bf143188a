"""Speed of generation: dense, two plain matrix products a layer, and our layers, side by side in one run.

    python -m benchmarks.serve --results FILE                                            # SmolLM2-135M
    python -m benchmarks.serve --shape llama-3.1-8b --dtype bfloat16 --device cuda --compile --results FILE

Every low-rank engine stores the share `keep` of each linear layer, at uniform ranks, with random factors: speed does
not depend on their values. "naive" is two `nn.Linear` in a row, "pivoted" the layer that checkpoints load, "fused" the
same in grouped operations (`gfwsvd.fuse`), which are for GPUs: on a CPU they are plain definitions. All models are in
memory at once and take turns, round by round, so that a slow spell of the machine meets all of them. Prefill is one
forward pass over the prompts and the first tokens; decoding is one token a step and sequence with a static cache
(`gfwsvd.GraphDecoder`), on a GPU in a CUDA graph. With --compile, torch.compile makes one kernel of each norm and of
the rotary embedding, in every engine alike.
"""

import argparse
import copy
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import gfwsvd
from benchmarks import record
from benchmarks.measure import forget_peak, memory_bytes
from benchmarks.packaged import packaged_smollm2
from benchmarks.random_models import SHAPES, random_model
from gfwsvd.layers import LowRankLinear, find_linears, weight_shape
from gfwsvd.ranks import Candidate

RANK_MULTIPLE = 8
Key = tuple[str, float]  # of an engine and a share


def _low_rank(
    model: nn.Module, keep: float, make: Callable[[nn.Module, int], nn.Module], *, pivoted: bool
) -> nn.Module:
    for name, module in find_linears(model).items():
        d_out, d_in = weight_shape(module)
        rank = Candidate(d_out, d_in, torch.empty(0), pivoted).largest_within(int(keep * d_out * d_in))
        layer = make(module, max(rank // RANK_MULTIPLE * RANK_MULTIPLE, 1))
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        model.set_submodule(name, layer)
    return model


def _two_products(module: nn.Module, rank: int) -> nn.Module:
    (d_out, d_in), like = weight_shape(module), module.weight
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    layers = (
        nn.Linear(d_in, rank, bias=False, **options),
        nn.Linear(rank, d_out, bias=module.bias is not None, **options),
    )
    return nn.Sequential(*layers)


def _pivoted(module: nn.Module, rank: int) -> nn.Module:
    (d_out, d_in), like = weight_shape(module), module.weight
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    layer = LowRankLinear(d_in, d_out, rank, pivoted=True, bias=module.bias is not None, **options)
    assert layer.order is not None
    layer.order.copy_(torch.randperm(d_out))
    return layer


ENGINES: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    "dense": lambda model, keep: model,
    "naive": lambda model, keep: _low_rank(model, keep, _two_products, pivoted=False),
    "pivoted": lambda model, keep: _low_rank(model, keep, _pivoted, pivoted=True),
    "fused": lambda model, keep: gfwsvd.fuse(_low_rank(model, keep, _pivoted, pivoted=True)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="see gfwsvd.load_model; default: SmolLM2-135M")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape in place of a model")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to decode after the first")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), help="default: all, on a CPU all but fused")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines to add to")
    arguments = parser.parse_args()

    made = record.provenance()
    on_cpu = torch.device(arguments.device).type == "cpu"
    engines = arguments.engines or [name for name in ENGINES if not (on_cpu and name == "fused")]
    dense, name = _model(arguments)
    if arguments.compile:
        _compile_rotary_embedding(dense)
    models = {}
    for engine in engines:
        for keep in [1.0] if engine == "dense" else arguments.keep:
            models[engine, keep] = ENGINES[engine](dense if engine == "dense" else copy.deepcopy(dense), keep).eval()
            if arguments.compile:
                _compile_norms(models[engine, keep])
    del dense
    rows: list[dict[str, Any]] = []
    for batch in arguments.batch:
        for (engine, keep), found in measure(models, batch, arguments).items():
            row = {"benchmark": "serve", "model": name, "engine": engine, "keep": keep, "batch": batch}
            row |= {"prompt": arguments.prompt, "new": arguments.new, "rounds": arguments.rounds}
            row |= {"dtype": arguments.dtype, "compile": arguments.compile, **found}
            rows.append(row)
            record.append(arguments.results, {**row, **made})
    Console().print(table(rows))


def _model(arguments: argparse.Namespace) -> tuple[nn.Module, str]:
    dtype = getattr(torch, arguments.dtype)
    if arguments.shape is None:
        source = arguments.model or str(packaged_smollm2())
        model, _, name = gfwsvd.load_model(source, dtype=arguments.dtype, device=arguments.device)
        return model, name
    model = random_model(arguments.shape, dtype=dtype, device=arguments.device)
    return model, f"{arguments.shape}, random weights"


def _compile_norms(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.compile()


def _compile_rotary_embedding(model: nn.Module) -> None:
    code: Any = sys.modules[type(model).__module__]
    if hasattr(code, "apply_rotary_pos_emb"):
        code.apply_rotary_pos_emb = torch.compile(code.apply_rotary_pos_emb)


@torch.inference_mode()
def measure(models: Mapping[Key, Any], batch: int, arguments: argparse.Namespace) -> dict[Key, dict[str, Any]]:
    """Of each model the seconds to the first token and tokens per second of both phases, the median over rounds after
    one to warm up; bytes of the weights, and what the process took at its most beyond them: cache and activations."""
    device = torch.device(arguments.device)
    vocabulary = next(iter(models.values())).config.vocab_size
    ids = torch.randint(vocabulary, (batch, arguments.prompt), device=device)
    decoders, more = {}, {}
    for key, model in models.items():
        before = _held(device)
        decoders[key] = gfwsvd.GraphDecoder(model, batch_size=batch, max_length=arguments.prompt + arguments.new)
        _timed(decoders[key], ids, arguments.new)
        more[key] = _peak(device) - before
    times: dict[Key, list[tuple[float, float]]] = {key: [] for key in models}
    for _ in range(arguments.rounds):
        for key, decoder in decoders.items():
            times[key].append(_timed(decoder, ids, arguments.new))
    found = {}
    for key, model in models.items():
        firsts, decodes = zip(*times[key], strict=True)
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
        found[key] = {
            "clock": _clock(device),
            "first_token_s": statistics.median(firsts),
            "first_token_s_spread": [min(firsts), max(firsts)],
            "prefill_tokens_s": batch * arguments.prompt / statistics.median(firsts),
            "decode_tokens_s": batch * arguments.new / statistics.median(decodes),
            "decode_s_spread": [min(decodes), max(decodes)],
            "weights_bytes": sum(tensors.values()),
            "extra_peak_bytes": more[key],
        }
    return found


def _timed(decoder: gfwsvd.GraphDecoder, ids: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds to the first token, and of all steps after it."""
    began = _now(ids.device)
    token = decoder.prefill(ids).argmax(-1)
    first = _now(ids.device)
    for _ in range(new):
        token = decoder.step(token).argmax(-1)
    return first - began, _now(ids.device) - first


def _held(device: torch.device) -> int:
    """Bytes in use now; `_peak` counts from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the process keeps of the memory that was freed would hide what comes
    forget_peak()
    return memory_bytes("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory_bytes("VmHWM")


def _clock(device: torch.device) -> str:
    """Of one thread on a CPU the time that it runs, which what else runs on the machine does not lengthen."""
    return "processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"processor": time.thread_time, "wall": time.perf_counter}[_clock(device)]()


def table(rows: list[dict[str, Any]]) -> Table:
    """Each row, and how much faster it is than the dense one of its batch where that was measured."""
    dense = {row["batch"]: row for row in rows if row["engine"] == "dense"}
    found = Table(
        "engine", "keep", "batch", "first token, ms", "prefill, tokens/s", "decode, tokens/s", "weights, MB", "more, MB"
    )
    for row in rows:
        cells = [f"{row['first_token_s'] * 1e3:.1f}"]
        for phase in ("prefill_tokens_s", "decode_tokens_s"):
            base = dense.get(row["batch"])
            cells.append(f"{row[phase]:.1f}" + (f" ({row[phase] / base[phase]:.2f} x)" if base else ""))
        sizes = (f"{row[key] / 1e6:.1f}" for key in ("weights_bytes", "extra_peak_bytes"))
        found.add_row(row["engine"], f"{row['keep']}", str(row["batch"]), *cells, *sizes)
    return found


if __name__ == "__main__":
    main()
