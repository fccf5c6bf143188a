"""Compression of a model in memory: statistics, spectra, ranks, factors, and only then the new layers."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .bounds import check_bounds
from .calibration import CLIP, Batch, Loss, Statistics, about_calibration, calibrate
from .errors import GfwsvdError
from .gains import Fitted, check_gains, fitted_gains, spread
from .latency import LatencyTable
from .layers import LowRankLinear, dense_weight, find_linears, fingerprint, model_size
from .methods import method_named
from .outcome import CompressionReport, layer_report
from .quantise import check_bits, check_form
from .ranks import Candidate, Cost, allocate, check_keep, check_ranks, check_storage, why_dense
from .refine import Refined, check_rounds, refined
from .solve import with_gains
from .spread import build_layers, curvatures, solve_layers
from .subject import blank_candidates, check_dense, checked_linears
from .track import Track, silent
from .whiten import check_damping
from .work import Work

DAMPING = 1e-2
RANK_MULTIPLE = 8


def compress(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    method: str = "gfwsvd",
    keep: float = 0.8,
    ranks: str = "global",
    rank_multiple: int = RANK_MULTIPLE,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    latency: LatencyTable | None = None,
    rounds: int = 0,
    gains: int = 0,
    storage: str = "pivoted",
    bits: int | None = None,
    damping: float = DAMPING,
    guard: bool = True,
    statistics: Statistics | None = None,
    unit: str = "token",
    labels: str = "empirical",
    sweeps: int = 1,
    clip: float = CLIP,
    seed: int = 0,
    exclude: Iterable[str] = (),
    loss: Loss | None = None,
    device_memory: int | None = None,
    host_memory: int | None = None,
    work: Work | None = None,
    track: Track = silent,
) -> CompressionReport:
    """Replaces linear layers of `model`, in place, by low-rank ones; on an error the model keeps all its layers.

    In a job of several processes (`ranked.joined`), each with the same model and arguments, every rank solves a share
    of the layers, and all end with the same model, to the last bit that of one process with as many threads.

    Args:
        batches: calibration data, see `calibrate`; not needed for method "svd", nor, without `rounds`, with
            `statistics`.
        method: a row of `METHODS`.
        keep: stored over dense parameters of the compressed linear layers, in (0, 1]; with `latency`, time instead.
        ranks: "uniform" or "global", see `allocate`.
        rank_multiple: ranks are multiples of it.
        bounds: by regular expression, the shares (low, high) of its own dense parameters that a layer whose name it
            matches (`re.search`) stores at least and at most; the last match counts. 1 and 1 keep it dense. Where no
            rank lies between, it is the last one below `high`.
        latency: global ranks minimise the predicted loss within the share `keep` of the layers' time by this table.
        rounds: so many times global ranks are allocated again, by what the errors of the layers cost at the compressed
            model (`refine.py`): by how far its predictions are from the dense one's on the first of `batches`, or by a
            `loss` that is given. The model is in memory twice meanwhile.
        gains: so many steps of fitting one gain for each output of the low-rank layers, on `batches`, by the same
            (`gains.py`). They are part of the factors afterwards. The model is in memory twice meanwhile.
        storage: "pivoted" stores a low-rank layer as some of its rows and the coefficients of the others, hence more
            ranks in the same size, except where two factors are smaller or rounding to half precision would cost more
            than the ranks bring; "factors" stores two factors everywhere.
        bits: 8 or 4 stores the factors as whole numbers of so many bits with scales (`quantise.py`), which count in
            what is stored, beyond `keep`. 4 takes `storage` "factors", and fits both to each other (`feedback.py`).
            Layers that stay dense, biases and all others keep their dtype.
        damping: added to each metric's diagonal, relative to its mean.
        guard: where a method weighs both sides and the statistics have held-out tokens, factor each layer by whichever
            of `guard.CHOICES` costs least there: both metrics, both shrunk, the input's alone, or none.
        statistics: of an earlier `calibrate` of this model, in place of the arguments from `unit` to `loss`.
        unit, labels, sweeps, clip, seed, exclude, loss, device_memory, host_memory: see `calibrate`.
        work: of `open_work` with `about_work` of these arguments: each layer solved, and gains after each step, are
            kept there, and taken from there by a later call. Factors are then on disk, up to 8 bytes for each weight,
            and not in memory.
        track: wraps long loops to show progress.

    Raises:
        GfwsvdError: for any argument out of range, bounds that match no layer or contradict `keep`, a table that lacks
            a layer's shape, calibration that fails, statistics that lack what the method needs
            or belong to other layers, or a layer whose metrics cannot be whitened.
    """
    row = method_named(method)
    check_keep(keep)
    check_ranks(ranks, rank_multiple)
    check_storage(storage)
    check_bits(bits)
    check_damping(damping)
    check_bounds(bounds or {})
    check_rounds(rounds, ranks, row)
    check_gains(gains, row)
    if latency is not None and ranks != "global":
        raise GfwsvdError(f"a latency table serves global ranks, got {ranks}: leave the table out or the ranks global")
    if latency is not None and bits is not None:
        raise GfwsvdError(f"a latency table has no times of factors in {bits} bits: leave out the table or the bits")
    check_dense(model)
    blanks = blank_candidates(model, statistics, exclude, bounds or {}, pivoted=storage == "pivoted")
    for name, blank in blanks.items():
        check_form(f"layer {name}", bits, d_in=blank.d_in, pivoted=blank.pivoted)
    if latency is not None:
        latency.check((blank.d_out, blank.d_in) for blank in blanks.values())
    cost: Cost = Candidate.stored if latency is None else latency.cost
    if rounds or gains:
        batches = list(batches or ())  # read twice
        if not batches:
            raise GfwsvdError(
                "rounds and gains measure the loss of the compressed model on batches: give some, or neither of them"
            )
    if statistics is None:
        if row.needs and batches is None:
            raise GfwsvdError(f"method {method} needs calibration: give batches or statistics")
        statistics = calibrate(
            model,
            batches or (),
            collect=row.needs,
            unit=unit,
            labels=labels,
            sweeps=sweeps,
            clip=clip,
            seed=seed,
            exclude=exclude,
            loss=loss,
            device_memory=device_memory,
            host_memory=host_memory,
            work=work,
            track=track,
        )
    began = time.perf_counter()
    linears = checked_linears(model, statistics, row)
    spend: dict[str, Any] = {"keep": keep, "ranks": ranks, "rank_multiple": rank_multiple, "cost": cost}
    allocate({name: blanks[name] for name in linears}, **spend)  # what cannot be is refused before the long part
    solutions, factors = solve_layers(
        linears, statistics, row, blanks=blanks, keep=keep, damping=damping, guard=guard, work=work, track=track
    )
    candidates = {name: solution.candidate for name, solution in solutions.items()}
    form: dict[str, Any] = {"solutions": solutions, "factors": factors, "multiple": rank_multiple, "cost": cost}
    form["track"] = track

    def plain(ranks: Mapping[str, int | None]) -> dict[str, LowRankLinear]:
        built = build_layers(linears, statistics, row, ranks=ranks, bits=None, plain=True, **form)
        return {name: layer for name, (layer, _) in built.items()}

    found = Refined(allocate(candidates, **spend), [], {})
    if rounds:
        found = refined(
            model,
            linears,
            candidates,
            list(batches or ()),
            rounds=rounds,
            allocate=lambda scaled: allocate(scaled, **spend),
            build=plain,
            loss=loss,
            track=track,
        )
    fitted = Fitted({}, [])
    low_rank = plain(found.ranks) if gains else {}
    if low_rank:
        fitted = fitted_gains(
            model,
            linears,
            low_rank,
            list(batches or ()),
            steps=gains,
            curvatures=curvatures(low_rank, statistics, row),
            deviation=spread(candidates[name].lost_share(layer.rank) for name, layer in low_rank.items()),
            loss=loss,
            work=work,
            track=track,
        )
        form["factors"] = {name: with_gains(given, fitted.gains.get(name)) for name, given in factors.items()}
    del low_rank  # before the last ones are built
    layers = build_layers(linears, statistics, row, ranks=found.ranks, bits=bits, **form)
    before = model_size(model)
    for name, (layer, _) in layers.items():
        model.set_submodule(name, layer)
    after = model_size(model)
    reports = [
        layer_report(
            name,
            solutions[name],
            layers.get(name),
            statistics.layers[name],
            row,
            loss_scale=found.scales.get(name),
            gains=fitted.gains.get(name),
        )
        for name in linears
    ]
    for report in reports:
        if report.kind == "dense":
            candidate = candidates[report.name]
            report.reason = why_dense(candidate, keep=keep, rank_multiple=rank_multiple, cost=cost)
    stored, dense = sum(layer.stored for layer in reports), sum(layer.dense for layer in reports)
    return CompressionReport(
        method=method,
        keep=keep,
        kept=stored / dense,
        ranks=ranks,
        rank_multiple=rank_multiple,
        storage=storage,
        bits=bits,
        damping=damping,
        guard=guard,
        stored=stored,
        dense=dense,
        model_stored=after.numbers,
        model_dense=before.numbers,
        model_bytes=after.bytes,
        model_dense_bytes=before.bytes,
        round_losses=found.losses,
        gain_losses=fitted.losses,
        predicts_loss=row.predicts_loss,
        seconds=time.perf_counter() - began,
        layers=reports,
        provenance={
            "settings": statistics.settings,
            "num_losses": statistics.num_losses,
            "num_sequences": statistics.num_sequences,
            "data_sha256": statistics.data_sha256,
            "model_sha256": statistics.model_sha256,
            "calibration_seconds": list(statistics.seconds),
            "unreached": list(statistics.unreached),
            **({} if latency is None else {"latency": latency.about()}),
        },
        time_kept=None
        if latency is None
        else latency.share(((layer.d_out, layer.d_in), layer.kind, layer.rank or 0) for layer in reports),
    )


def about_work(
    model: nn.Module, batches: Iterable[Batch] = (), *, statistics: Statistics | None = None, **settings: Any
) -> dict[str, Any]:
    """What the solutions depend on in a `compress` of these arguments, for `open_work`.

    Args:
        batches, statistics: as `compress` takes them; batches are read here too.
        settings: plain JSON values: `method`, `keep`, `damping`, `guard`, `storage`, and what a calibration depends on.

    Raises:
        GfwsvdError: for a model without linear layers, or with low-rank ones.
    """
    check_dense(model)
    if statistics is None:
        return about_calibration(model, list(batches), **settings)
    linears = find_linears(model)
    return {
        "model_sha256": fingerprint(linears),
        "dtypes": sorted({str(dense_weight(module).dtype) for module in linears.values()}),
        "data_sha256": statistics.data_sha256,
        "calibration": statistics.settings,
        **settings,
    }
