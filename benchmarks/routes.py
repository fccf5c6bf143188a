"""Two routes to the Kronecker factors of one layer from its recorded tokens, and one measure of their fit.

`published` stores the gradient of every sample and takes the leading singular triplet by Lanczos; `streamed` sweeps.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gfwsvd.calibration import Batch
from gfwsvd.hooks import frozen, watch
from gfwsvd.kronecker import Sweep
from gfwsvd.layers import find_linears
from gfwsvd.losses import next_token_loss
from gfwsvd.statistics import LayerStatistics, power_of_two_scale, sequences
from gfwsvd_kernels import symmetrize

Found = tuple[dict[str, Any], Tensor, Tensor]  # what it cost, left, right
TOKENS_AT_ONCE = 512


def recorded(model: nn.Module, layer: str, batches: list[Batch]) -> tuple[Tensor, Tensor, float]:
    """Inputs (T, D_IN) and scaled output gradients (T, D_OUT) of a layer, float32, and the seconds they took."""
    xs: list[Tensor] = []
    gs: list[Tensor] = []
    began = time.perf_counter()

    def keep(name: str, x: Tensor, g: Tensor) -> None:
        xs.append(x.flatten(0, -2).float())
        gs.append(g.flatten(0, -2).float())

    loss = next_token_loss("empirical", 0)
    with frozen(model), torch.enable_grad():
        module = find_linears(model)[layer]
        with watch({layer: module}, on_input=lambda name, x: None, on_gradient=keep):
            for batch in batches:
                loss(model, batch).sum().backward()
    seconds = time.perf_counter() - began
    x, g = torch.cat(xs), torch.cat(gs)
    return x, g * power_of_two_scale(g), seconds


def fit_residual(x: Tensor, g: Tensor, offsets: Tensor, left: Tensor, right: Tensor, scale: float) -> float:
    """`||F - scale left ⊗ right|| / ||F||` for the Fisher block F of the samples between `offsets`, in float64.

    `<G_i, G_j>` is the sum of `(g_t g_s)(x_t x_s)` over their tokens t and s, and `||F||²` that of all its squares:
    neither F nor a gradient is formed.
    """
    x, g, left, right = x.double(), g.double(), left.double(), right.double()
    counts = offsets.diff()
    sample = torch.repeat_interleave(torch.arange(len(counts)), counts)
    energy = inner = 0.0
    for part in sequences(offsets):
        products = (g[part] @ g.mT * (x[part] @ x.mT)).sum(0)
        energy += torch.zeros(len(counts), dtype=torch.float64).index_add_(0, sample, products).square().sum().item()
        inner += ((g[part] @ left @ g[part].mT) * (x[part] @ right @ x[part].mT)).sum().item()
    size = scale * torch.linalg.vector_norm(left).item() * torch.linalg.vector_norm(right).item()
    return (max(energy - 2 * scale * inner + size**2, 0.0) / energy) ** 0.5


def stored_gradients(x: Tensor, g: Tensor, offsets: Tensor, folder: Path) -> None:
    """One file for each sample, (D_OUT, D_IN) float32."""
    for number, part in enumerate(sequences(offsets)):
        save_file({"gradient": g[part].mT @ x[part]}, folder / f"{number}.safetensors")


def by_lanczos(folder: Path) -> tuple[Tensor, Tensor, float]:
    """`left (D_OUT, D_OUT)`, `right (D_IN, D_IN)` of norm one and their singular value, of the gradients in `folder`.

    As ARPACK gives them, so both may be negative; to the precision of float32.
    """
    try:
        from scipy.sparse.linalg import LinearOperator, svds
    except ImportError:
        raise SystemExit("the published route needs scipy, which gfwsvd does not: pip install scipy") from None
    paths = sorted(folder.iterdir())
    d_out, d_in = load_file(paths[0])["gradient"].shape
    gradients = torch.empty(len(paths), d_out, d_in)
    for gradient, path in zip(gradients, paths, strict=True):
        gradient.copy_(load_file(path)["gradient"])

    def summed(vector: Any, matrices: Tensor) -> Any:
        rows, columns = matrices.shape[1:]
        metric, total = torch.from_numpy(vector.astype("float32")).reshape(columns, columns), torch.zeros(rows, rows)
        for matrix in matrices:
            total += matrix @ metric @ matrix.mT
        return total.flatten().numpy()

    rearranged = LinearOperator(
        (d_out**2, d_in**2),
        matvec=lambda vector: summed(vector, gradients),
        rmatvec=lambda vector: summed(vector, gradients.mT),
        dtype="float32",
    )
    start = torch.randn(min(d_out, d_in) ** 2, generator=torch.Generator().manual_seed(0))
    left, values, right = svds(rearranged, k=1, v0=start.numpy())
    pair = (torch.from_numpy(side.copy()).reshape(width, width) for side, width in ((left, d_out), (right, d_in)))
    return *pair, float(values[0])


def published(x: Tensor, g: Tensor, offsets: Tensor, sweeps: int) -> Iterator[Found]:
    """What it cost and gave, once; `sweeps` mean nothing to it."""
    with tempfile.TemporaryDirectory() as name:
        began = time.perf_counter()
        stored_gradients(x, g, offsets, Path(name))
        stored = time.perf_counter() - began
        left, right, scale = by_lanczos(Path(name))
        seconds = time.perf_counter() - began
        num_bytes = sum(path.stat().st_size for path in Path(name).iterdir())
    cost = {"passes": 1, "seconds": seconds, "of_storing": stored, "disk_bytes": num_bytes, "scale": scale}
    yield cost, left, right


def streamed(x: Tensor, g: Tensor, offsets: Tensor, sweeps: int) -> Iterator[Found]:
    """What each number of sweeps, up to `sweeps`, cost and gave."""
    unit = "token" if len(offsets) == len(x) + 1 else "sequence"
    stats = LayerStatistics(x.shape[1], g.shape[1])
    seconds = 0.0
    for passes in range(1, sweeps + 1):
        began = time.perf_counter()
        sweep = Sweep(stats, unit=unit)
        for samples in torch.arange(len(offsets) - 1).split(TOKENS_AT_ONCE if unit == "token" else 1):
            part = offsets[samples[0] : samples[-1] + 2]
            sweep.accumulate(x[part[0] : part[-1]], g[part[0] : part[-1]], part - part[0])
        sweep.finish()
        seconds += time.perf_counter() - began
        assert stats.left is not None and stats.right is not None
        cost = {"passes": passes, "seconds": seconds, "disk_bytes": 0, "scale": stats.scale}
        yield cost, symmetrize(stats.left), symmetrize(stats.right)


ROUTES: dict[str, Callable[[Tensor, Tensor, Tensor, int], Iterator[Found]]] = {
    "published": published,
    "streamed": streamed,
}
