"""How much memory and disk a compression takes, counted from the code as `effort.py` counts its steps."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch

from .batches import HELDOUT_SHARE
from .calibration import CLIP
from .calibration import check_settings as check_calibration
from .effort import NO_SPECTRUM, Ranks, Shape
from .gains import HELDOUT_TOKENS as JUDGED_TOKENS
from .gains import STEP_TOKENS, check_gains
from .hardware import Hardware
from .layers import LowRankLinear
from .losses import CHUNK_LOGITS
from .methods import GRADIENTS, INPUTS, KRONECKER, method_named
from .quantise import check_bits
from .ranks import Candidate, check_keep, check_storage
from .refine import ROUND_TOKENS, check_rounds
from .statistics import HELDOUT_TOKENS
from .whiten import batch_size

_PANEL = 1 << 26  # most products of two tokens that are in memory at a time


@dataclass(frozen=True)
class Settings:
    """Of the work: see `calibrate` and `compress`. By default all statistics are collected, as `gfwsvd calibrate` does;
    for a method that needs none, none."""

    keep: float = 0.8
    sequences: int = 64
    seq_len: int = 512
    batch_size: int = 4
    sweeps: int = 1
    method: str = "gfwsvd"
    storage: str = "pivoted"
    bits: int | None = None
    rounds: int = 0
    gains: int = 0
    unit: str = "token"
    collect: frozenset[str] = frozenset({INPUTS, GRADIENTS, KRONECKER})

    @property
    def batch_tokens(self) -> int:
        return min(self.batch_size, self.sequences) * self.seq_len

    @property
    def sample_tokens(self) -> int | None:
        """Tokens of a gradient sample of the Fisher information; None where each token is one."""
        return {"token": None, "sequence": self.seq_len, "batch": self.batch_tokens}[self.unit]

    @property
    def heldout(self) -> int:
        """Sequences that are held out."""
        return self.sequences // HELDOUT_SHARE

    @property
    def heldout_tokens(self) -> int:
        """Tokens of them that are kept of each layer."""
        return self.heldout and self.heldout * min(self.seq_len, max(1, HELDOUT_TOKENS // self.heldout))

    @property
    def round_batches(self) -> float:
        """Batches that the loss is measured on before and after each round, the last of the text perhaps not full."""
        return min(math.ceil(ROUND_TOKENS / self.batch_tokens), self._batches)

    @property
    def judged_batches(self) -> float:
        """Batches that gains are judged by."""
        return min(math.ceil(JUDGED_TOKENS / self.batch_tokens), self._batches // 2)

    @property
    def step_batches(self) -> float:
        """Batches that a step of gains is fitted to."""
        return min(math.ceil(STEP_TOKENS / self.batch_tokens), self._batches - self.judged_batches)

    @property
    def _batches(self) -> float:
        return self.sequences * self.seq_len / self.batch_tokens

    @property
    def sides(self) -> tuple[bool, bool]:
        """Whether the left and the right metric of the method are full matrices."""
        left, right = method_named(self.method).matrices
        return left is not None, right is not None


def check_settings(settings: Settings) -> None:
    """GfwsvdError for a share, method, storage, bits, rounds, gains, unit or sweeps that `compress` would not take."""
    check_calibration(settings.unit, "empirical", settings.sweeps, CLIP)
    check_keep(settings.keep)
    check_storage(settings.storage)
    check_bits(settings.bits)
    check_rounds(settings.rounds, "global", method_named(settings.method))
    check_gains(settings.gains, method_named(settings.method))


def uniform_ranks(shape: Shape, settings: Settings) -> Ranks:
    """The rank of each layer at the same share; None where it stays dense, for none stores less."""
    pivoted = settings.storage == "pivoted"
    ranks = {}
    for name, (d_in, d_out) in shape.linears.items():
        candidate = Candidate(d_out, d_in, NO_SPECTRUM, pivoted)
        ranks[name] = candidate.largest_within(int(settings.keep * candidate.dense)) if settings.keep < 1 else 0
    return {name: rank or None for name, rank in ranks.items()}


def saved_bytes(shape: Shape, settings: Settings) -> int:
    """Bytes by which the compressed layers are smaller than the dense ones, as they are stored at uniform ranks."""
    pivoted = settings.storage == "pivoted"
    saved = 0
    for name, rank in uniform_ranks(shape, settings).items():
        if rank is not None:
            d_in, d_out = shape.linears[name]
            form = Candidate(d_out, d_in, NO_SPECTRUM, pivoted).pivots(rank), settings.bits
            saved += d_in * d_out * shape.itemsize - _layer_bytes(d_in, d_out, rank, *form, shape.dtype)
    return saved


def round_bytes(shape: Shape, settings: Settings) -> int:
    """Device memory of a round beside the model: all low-rank layers as two factors, what a batch keeps for the
    backward pass, its logits, those of the dense model and their gradient; in float32 five numbers for each of a chunk
    of them and, for the widest layer, both outputs, their difference and its product with the gradient."""
    ranks = uniform_ranks(shape, settings).items()
    layers = sum(_layer_bytes(*shape.linears[name], rank, False, None, shape.dtype) for name, rank in ranks if rank)
    logits = shape.vocabulary * settings.batch_tokens
    in_float32 = 5 * min(CHUNK_LOGITS, logits) + 4 * shape.widest * settings.batch_tokens
    return layers + _kept_bytes(shape, settings) + 3 * logits * shape.itemsize + 4 * in_float32


def gain_bytes(shape: Shape, settings: Settings) -> int:
    """Device memory of gains beside the model: that of a round, and another copy of the up factors."""
    ranks = uniform_ranks(shape, settings).items()
    return round_bytes(shape, settings) + sum(
        shape.linears[name][1] * rank * shape.itemsize for name, rank in ranks if rank
    )


@cache
def _layer_bytes(d_in: int, d_out: int, rank: int, pivoted: bool, bits: int | None, dtype: str) -> int:
    """Of a low-rank layer without bias."""
    kind = getattr(torch, dtype)
    layer = LowRankLinear(d_in, d_out, rank, pivoted=pivoted, bits=bits, bias=False, device="meta", dtype=kind)
    return sum(tensor.nbytes for tensor in layer.state_dict().values())


def activation_bytes(shape: Shape, settings: Settings) -> int:
    """Device memory of a batch: what the forward pass keeps for the backward pass, and the loss's copies of logits."""
    return _kept_bytes(shape, settings) + _logit_bytes(shape, settings)


def _kept_bytes(shape: Shape, settings: Settings) -> int:
    """Of a batch, what the forward pass keeps for the backward pass, but for the loss."""
    inputs = sum(d_in for name, (d_in, _) in shape.linears.items() if shape.leads(name))
    outputs = sum(d_out for _, d_out in shape.running.values())
    # In each block the activation of the MLP, and the norms' inputs and outputs in float32
    block = shape.widest * shape.itemsize + 2 * 2 * 4 * shape.hidden
    return settings.batch_tokens * ((inputs + outputs) * shape.itemsize + shape.blocks * block)


def recomputed_bytes(shape: Shape, settings: Settings) -> int:
    """The same where blocks keep their inputs alone and one at a time runs again."""
    of_block = _kept_bytes(shape, settings) // shape.blocks
    kept = settings.batch_tokens * shape.blocks * shape.hidden * shape.itemsize
    return of_block + _logit_bytes(shape, settings) + kept


def _logit_bytes(shape: Shape, settings: Settings) -> int:
    return 4 * 4 * shape.vocabulary * settings.batch_tokens


def sample_bytes(shape: Shape, settings: Settings) -> int:
    """Device memory by which the step of the largest layer exceeds the copies of logits, which are gone by then, where
    gradient samples are sequences or batches. In float32: a metric in full, the gradient of a sample with its square
    and its product with the metric, products of its tokens with each other, the rows of both sides."""
    if (sample := settings.sample_tokens) is None:
        return 0
    metric, tokens = settings.sweeps > 1, settings.batch_tokens
    pairs = min(sample**2, _PANEL)
    largest = max(
        metric * max(sizes) ** 2 + (2 + metric) * math.prod(sizes) + tokens * sum(sizes)
        for sizes in shape.linears.values()
    )
    return max(0, 4 * (largest + pairs) - _logit_bytes(shape, settings))


@dataclass(frozen=True)
class Placed:
    """Bytes of weights on each device, and of those that wait on the host and on disk until they run."""

    device: int
    host: int
    disk: int

    @property
    def waiting(self) -> int:
        return self.host + self.disk


def placed(shape: Shape, hardware: Hardware) -> Placed:
    """Where the weights are: spread, they take half of the memory of each place, as `cli_app.placement` has it."""
    weights = shape.parameters * shape.itemsize
    if not hardware.spread:
        return Placed(weights, 0, 0)
    device = min(-(-weights // hardware.gpus), hardware.device_memory // 2)
    rest = max(0, weights - hardware.gpus * device)
    host = min(rest, hardware.host_memory // 2) if hardware.device != "cpu" else 0
    return Placed(device, host, rest - host)


def statistics_on_disk(shape: Shape, settings: Settings, names: Iterable[str]) -> int:
    """Bytes of some layers' statistics in files: packed triangles and vectors in float32, held-out tokens in half."""
    total = 0
    for name in names:
        d_in, d_out = shape.linears[name]
        leads, factors = shape.leads(name), KRONECKER in settings.collect
        for width, own, moments in (
            (d_in, leads, leads and INPUTS in settings.collect),
            (d_out, True, GRADIENTS in settings.collect),
        ):
            total += 4 * (factors + moments) * width * (width + 1) // 2
            total += width * (4 * moments + 2 * own * settings.heldout_tokens)
    return total


def workspace_bytes(shape: Shape, settings: Settings, device: str) -> int:
    """Memory of the factorisation at its peak on a kind of device, in float64: of a layer, copies of the metrics
    that are full, of the whitened weight and of its Gram matrix; or before it, of the layers whose roots are found
    together, these, copies of the metrics of a side and what their condition is estimated by."""
    most = 0
    for (d_in, d_out), count in Counter(shape.linears.values()).items():
        left, right = (full * width**2 for full, width in zip(settings.sides, (d_out, d_in), strict=True))
        widest, together = max(left, right), min(count, batch_size(d_out, d_in, device))
        alone = 5 * widest + 2 * min(d_in, d_out) ** 2 + 3 * d_in * d_out
        most = max(most, 8 * alone, 8 * together * (left + right + 3 * widest))
    return most


def factor_bytes(shape: Shape, settings: Settings) -> int:
    """Bytes of all layers' factors as they are kept until ranks are chosen: float32, of the largest ranks."""
    pivoted = settings.storage == "pivoted"
    ranks = {sizes: Candidate(*sizes[::-1], NO_SPECTRUM, pivoted).largest_rank for sizes in shape.linears.values()}
    return 4 * sum(ranks[sizes] * sum(sizes) for sizes in shape.linears.values())
