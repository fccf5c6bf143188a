"""Factors in four bits: rounding with feedback and its optimality, the layer, checkpoints, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import is_exact_product
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import gfwsvd
from gfwsvd.cli import app
from gfwsvd.compress import compress
from gfwsvd.convert import in_bits, merge
from gfwsvd.errors import GfwsvdError
from gfwsvd.factorize import decompose
from gfwsvd.feedback import four_bits, rounded
from gfwsvd.hf import inspect, save_pretrained
from gfwsvd.layers import LowRankLinear
from gfwsvd.methods import METHODS
from gfwsvd.metrics import objective
from gfwsvd.outcome import CompressionReport
from gfwsvd.quantise import GROUP, grouped_numbers, pack, unpack
from gfwsvd.solve import blank_layer
from gfwsvd.tune import tune
from gfwsvd.whiten import Root, root
from tiny_models import random_tokens, tiny_model

transformers = pytest.importorskip("transformers")
Q = "model.layers.0.self_attn.q_proj"


def correlated(width: int) -> Tensor:
    """A metric (width, width) with a condition of some thousands."""
    directions = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    return (directions * torch.logspace(0, -3.5, width, dtype=torch.float64)) @ directions.T


def by_nearest(matrix: Tensor) -> Tensor:
    return grouped_numbers(*rounded(matrix, None, dtype=torch.bfloat16), torch.float64)


def cost(error: Tensor, metric: Tensor) -> float:
    return objective(error, None, metric)


# ------------------------------------------------------------------------------------------------------------- rounding


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_packing_loses_no_step(rows, width, seed):
    steps = torch.randint(-7, 9, (rows, width), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack(steps)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, (width + 1) // 2)
    assert torch.equal(unpack(packed)[:, :width], steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_metric_each_number_goes_to_the_nearest_of_its_group(dtype):
    matrix = torch.randn(9, 150, dtype=torch.float64) * torch.logspace(-2, 2, 9, dtype=torch.float64)[:, None]
    steps, scales = rounded(matrix, None, dtype=dtype)
    assert scales.shape == (9, 3) and torch.equal(scales.double(), scales.bfloat16().double()), "the same in any dtype"
    for number in range(3):
        part, own = (m[:, GROUP * number :][:, :GROUP] for m in (matrix, steps))
        scale = scales[:, number : number + 1].double()
        grid = scale[..., None] * torch.arange(-7, 9) / 8
        assert torch.equal((part[..., None] - grid).abs().argmin(2) - 7, own.long())
        largest = part.gather(1, part.abs().argmax(1, keepdim=True))
        torch.testing.assert_close(scale, largest, rtol=2**-8, atol=0)


@pytest.mark.parametrize("width", [5, 150])
def test_each_step_is_the_best_for_errors_made_and_columns_still_free(width):
    """Against the Schur complement: what the errors of later columns ask of one, where those before it make up for the
    rest."""
    matrix, metric = torch.randn(4, width, dtype=torch.float64), correlated(width)
    steps, scales = rounded(matrix, root(metric, damping=0, name="").unit_triangle(), dtype=torch.float64)
    errors = grouped_numbers(steps, scales, torch.float64) - matrix
    clipped = (steps == -7) | (steps == 8)
    for column in range(width):
        free, fixed = slice(0, column), slice(column, width)
        left = metric[fixed, fixed] - metric[fixed, free] @ torch.linalg.solve(metric[free, free], metric[free, fixed])
        wanted = -errors[:, column + 1 :] @ left[1:, 0] / left[0, 0]
        half = scales[:, column // GROUP].abs() / 16
        assert ((errors[:, column] - wanted).abs() <= half * (1 + 1e-6)).logical_or(clipped[:, column]).all()


def test_feedback_loses_less_than_the_nearest_of_all_roundings_and_no_less_than_the_best():
    """Of 3 numbers all 4096 roundings can be tried; the nearest is one of them."""
    steps = torch.cartesian_prod(*[torch.arange(-7, 9, dtype=torch.float64)] * 3)
    found = best = nearest = 0.0
    for _ in range(20):
        matrix, metric = torch.randn(1, 3, dtype=torch.float64), correlated(3)
        own, scales = rounded(matrix, root(metric, damping=0, name="").unit_triangle(), dtype=torch.float64)
        errors = steps * scales / 8 - matrix
        best += (errors @ metric * errors).sum(1).min().item()
        found += cost(own * scales / 8 - matrix, metric)
        nearest += cost(by_nearest(matrix) - matrix, metric)
    assert best <= found < 0.75 * nearest


def test_a_metric_is_its_triangle_times_a_diagonal():
    metric = correlated(6)
    values, vectors = torch.linalg.eigh(metric)
    indefinite = metric - (values[0] + 1e-6) * torch.outer(vectors[:, 0], vectors[:, 0])
    for each, route in ((metric, "cholesky"), (indefinite, "eigh")):
        found = root(each, damping=0, name="")
        assert found.route == route
        triangle = found.unit_triangle()
        assert torch.equal(triangle, triangle.tril()) and torch.equal(triangle.diagonal(), torch.ones(6).double())
        identity = torch.eye(6, dtype=torch.float64)
        whole = found.times(identity) @ found.times(identity).T
        middle = torch.linalg.solve(triangle, torch.linalg.solve(triangle, whole).T)
        torch.testing.assert_close(middle, middle.diagonal().diag(), rtol=0, atol=1e-9)
    assert Root("identity").unit_triangle() is None
    assert root(torch.ones(3), damping=0, name="").unit_triangle() is None


def test_both_factors_lose_a_fraction_of_what_nearest_rounding_loses():
    left, right = correlated(90), correlated(150)
    weight = correlated(150)[:90]
    found = decompose(weight, left, right, damping=1e-2, name="")
    up, down = found.factors(weight, 40)
    layer = LowRankLinear.from_factors(
        *(four := four_bits(up, down, found.right, dtype=torch.bfloat16))[:2], scales=four[2]
    )
    lost = objective(layer.product(torch.float64) - up @ down, left, right)
    assert lost < 0.4 * objective(by_nearest(up) @ by_nearest(down) - up @ down, left, right)
    without = four_bits(up, down, Root("identity"), dtype=torch.bfloat16)
    other = LowRankLinear.from_factors(*without[:2], scales=without[2]).product(torch.float64)
    assert lost < objective(other - up @ down, left, right), "the metric has to help"


def test_up_is_the_rounded_least_squares_fit_to_the_rounded_down():
    right = root(correlated(90), damping=0, name="")
    up, down = torch.randn(33, 7, dtype=torch.float64), torch.randn(7, 90, dtype=torch.float64)
    up_bytes, down_bytes, scales = four_bits(up, down, right, dtype=torch.float64)
    down_scales, up_scales = scales[:14].view(7, 2), scales[14:].view(33, 1)
    weighed = right.times(grouped_numbers(unpack(down_bytes), down_scales, torch.float64))
    fit = torch.linalg.lstsq(weighed.T, right.times(up @ down).T).solution.T
    steps, expected_scales = rounded(
        fit, root(weighed @ weighed.T, damping=0, name="").unit_triangle(), dtype=torch.float64
    )
    assert torch.equal(unpack(up_bytes)[:, :7], steps) and torch.equal(up_scales, expected_scales)


@pytest.mark.parametrize("true_rank", [0, 1])
def test_factors_of_less_than_their_rank_stay_finite_and_close(true_rank):
    up, down = torch.randn(20, true_rank, dtype=torch.float64), torch.randn(true_rank, 70, dtype=torch.float64)
    up, down = F.pad(up, (0, 4 - true_rank)), F.pad(down, (0, 0, 0, 4 - true_rank))
    metric = correlated(70)
    four = four_bits(up, down, root(metric, damping=1e-2, name=""), dtype=torch.float16)
    found = LowRankLinear.from_factors(*four[:2], scales=four[2])
    assert (found.scales != 0).all() and found.scales.isfinite().all()
    assert cost(found.product(torch.float64) - up @ down, metric) <= 0.05 * cost(up @ down, metric)


# ------------------------------------------------------------------------------------------------------------ the layer


def layer(rank: int = 67, dtype: torch.dtype = torch.float64) -> LowRankLinear:
    """150 inputs, 90 outputs and an odd rank: groups of 64, and shorter ones."""
    up, down = torch.randn(90, rank, dtype=torch.float64), torch.randn(rank, 150, dtype=torch.float64)
    up_bytes, down_bytes, scales = four_bits(up, down, Root("identity"), dtype=dtype)
    return LowRankLinear.from_factors(up_bytes, down_bytes, torch.randn(90, dtype=dtype), None, scales)


def test_the_layer_is_the_dense_layer_of_what_its_bytes_say():
    low = layer()

    def numbers(packed: Tensor, scales: Tensor, width: int) -> Tensor:
        found = torch.empty(len(packed), width, dtype=torch.float64)
        groups = -(-width // 64)
        for row in range(len(packed)):
            for column in range(width):
                byte = int(packed[row, column // 2])
                nibble = byte >> 4 if column % 2 else byte & 15
                found[row, column] = (8 - nibble) / 8 * scales[row * groups + column // 64]
        return found

    assert low.weight.shape == (67, 75) and low.up.shape == (90, 34) and low.scales.shape == (67 * 3 + 90 * 2,)
    down, up = numbers(low.weight, low.scales[:201], 150), numbers(low.up, low.scales[201:], 67)
    x = torch.randn(2, 3, 150, dtype=torch.float64)
    torch.testing.assert_close(low(x), F.linear(x, up @ down, low.bias), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(low.product(), up @ down, rtol=1e-12, atol=1e-12)
    assert low.bits == 4 and low.stored == 67 * 150 + 90 * 67 + 381


def test_another_dtype_changes_neither_the_bytes_nor_what_the_scales_say():
    low = layer()
    before = {name: tensor.clone() for name, tensor in low.state_dict().items() if name != "bias"}
    low.bfloat16()
    assert low.up.dtype == low.weight.dtype == torch.uint8 and low.scales.dtype == low.dtype == torch.bfloat16
    x = torch.randn(5, 150)
    exact = F.linear(x.double(), low.product(torch.float64), low.bias.double())
    assert (low(x.bfloat16()).double() - exact).norm() < 2e-2 * exact.norm()
    low.double()
    assert all(torch.equal(low.state_dict()[name], tensor) for name, tensor in before.items())


# ---------------------------------------------------------------------------------------------------------- checkpoints


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": part} for part in random_tokens(16, 24).split(4)]


def small(bits: int | None = 4) -> tuple[nn.Module, CompressionReport]:
    """A compressed tiny Llama with one dense layer and odd ranks, and its report."""
    model = tiny_model("llama")
    options = {"ranks": "uniform", "storage": "factors", "bounds": {"0.self_attn.k_proj": (1.0, 1.0)}}
    return model, compress(model, batches(), method="svd_llm", keep=0.66, bits=bits, rank_multiple=1, **options)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[Path, nn.Module, CompressionReport]:
    folder = tmp_path_factory.mktemp("four") / "small"
    model, report = small()
    save_pretrained(model, folder, report=report, max_shard_size="50KB")
    return folder, model, report


def load(folder: Path, **options: object) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(random_tokens(2, 17)).logits


def test_the_reloaded_model_gives_bit_equal_logits_and_tells_its_bytes(original):
    folder, model, report = original
    assert {(entry.kind, entry.bits) for entry in report.layers} == {("lowrank", 4), ("dense", None)}
    assert any(entry.rank % 2 for entry in report.layers if entry.bits)
    assert torch.equal(logits(load(folder)), logits(model))
    found = inspect(folder)
    assert found["format_version"] == 2 and found["model_bytes"] == report.model_bytes
    for count in ("stored", "dense", "model_stored", "model_dense"):
        assert found[count] == getattr(report, count), count
    tensors = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    assert found["model_bytes"] == sum(tensor.nbytes for tensor in tensors)
    first = report.layers[0]
    assert first.stored == first.rank * (64 + 64) + first.rank + 64, "numbers, not bytes, and a scale a row"
    half = load(folder, dtype=torch.bfloat16)
    assert half.get_submodule(Q).weight.dtype == torch.uint8 and half.get_submodule(Q).scales.dtype == torch.bfloat16
    assert (logits(half).float() - logits(model)).norm() < 0.05 * logits(model).norm()


def test_a_layer_before_its_numbers_has_the_tensors_of_the_built_one(original):
    for entry in original[2].layers:
        if entry.bits:
            blank = blank_layer(tiny_model("llama").get_submodule(entry.name), entry.rank, pivoted=False, bits=4)
            built = original[1].get_submodule(entry.name)
            tensors = ({k: (v.shape, v.dtype) for k, v in each.state_dict().items()} for each in (blank, built))
            assert next(tensors) == next(tensors)


def test_saved_again_the_model_is_the_same_and_merged_the_exact_product(original, tmp_path):
    folder, model, _ = original
    load(folder).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    merge(str(folder), tmp_path / "dense")
    assert is_exact_product(load(tmp_path / "dense"), model)


def test_rounding_costs_a_small_part_of_each_layers_objective_and_less_by_its_metric(original, tmp_path):
    model, _ = small(bits=None)
    report = original[2]
    entries = [entry for entry in report.layers if entry.bits]
    for entry in entries:
        assert 0 < entry.rounding_loss < 0.25 * entry.predicted_loss
    statistics = gfwsvd.calibrate(tiny_model("llama"), batches(), collect={"inputs"})
    total = 0.0
    for entry in entries:
        low = model.get_submodule(entry.name)
        moment = METHODS["svd_llm"].right(statistics.layers[entry.name])
        total += cost(low.in_bits(4).product(torch.float64) - low.product(torch.float64), moment)
    assert sum(entry.rounding_loss for entry in entries) < total


def test_a_mixed_model_is_fused_but_for_its_layers_in_four_bits(original):
    model = load(original[0])
    with pytest.raises(GfwsvdError, match="not in four bits"):
        gfwsvd.fuse(model)
    low = model.get_submodule(Q)
    model.set_submodule(Q, LowRankLinear.from_factors(*low.factors()))
    before = logits(model)
    torch.testing.assert_close(logits(gfwsvd.fuse(model)), before, rtol=1e-4, atol=1e-4)
    assert not isinstance(model.get_submodule(Q), LowRankLinear)


def test_compress_and_convert_take_the_bits(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    arguments = ["compress", str(tmp_path / "model"), "--method", "svd", "--keep", "0.6", "--storage", "factors"]

    def run(*words: object) -> str:
        result = CliRunner().invoke(app, [*map(str, words)])
        return f"{result.exit_code} {' '.join(result.output.split())}"

    assert run(*arguments, "--bits", 4, "--out", tmp_path / "four").startswith("0")
    assert {entry["bits"] for entry in inspect(tmp_path / "four")["layers"] if entry["rank"]} == {4}
    assert "compress with --storage factors" in run(*arguments[:-2], "--bits", 4, "--out", tmp_path / "no")
    assert run(*arguments, "--out", tmp_path / "sixteen").startswith("0")
    assert run("convert", tmp_path / "sixteen", "--bits", 4, "--out", tmp_path / "converted").startswith("0")
    # By method svd there is no metric either
    assert torch.equal(logits(load(tmp_path / "converted")), logits(load(tmp_path / "four")))
    assert run(*arguments[:-2], "--out", tmp_path / "pivoted").startswith("0")
    assert "compress with --storage factors" in run(
        "convert", tmp_path / "pivoted", "--bits", 4, "--out", tmp_path / "no"
    )
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------------------------------------------------- refusals


def changed(original: Path, folder: Path, *, entry: dict | None = None, **tensors: object) -> Path:
    """A copy in one file, without the manifest whose digests would tell of the change first."""
    load(original).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    layers[Q] = layers[Q] | (entry or {})
    (folder / "config.json").write_text(json.dumps(config))
    stored = load_file(folder / "model.safetensors")
    for leaf, change in tensors.items():
        stored[f"{Q}.{leaf}"] = change(stored[f"{Q}.{leaf}"])
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items() if tensor is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entry": {"kind": "pivoted"}}, "or 4 of kind 'lowrank'"),
        ({"entry": {"bits": 8}}, r"should be of type I8, got U8"),
        ({"entry": {"bits": 2}}, "bits 8, or 4"),
        ({"scales": lambda old: None}, "scales is missing"),
        ({"scales": lambda old: old[:-1]}, r"scales should be \(\d+,\)"),
        ({"scales": lambda old: old[None]}, r"scales should be \(\d+,\)"),
        ({"scales": lambda old: old * 0}, "scales should be finite and not zero"),
        ({"scales": lambda old: old / 0}, "scales should be finite and not zero"),
        ({"weight": lambda old: old[:, :-1]}, r"weight should be \(\d+, 32\)"),
        ({"weight": lambda old: old.view(torch.int8)}, "weight should be of type U8, got I8"),
        ({"up": lambda old: old.repeat(1, 2)}, r"up should be \(64, \d+\)"),
    ],
)
def test_a_checkpoint_that_says_something_else_is_refused(original, tmp_path, change, message):
    with pytest.raises(GfwsvdError, match=message):
        load(changed(original[0], tmp_path / "changed", **change))


def test_what_cannot_be_in_four_bits_says_so(original, tmp_path):
    with pytest.raises(GfwsvdError, match="holds two inputs in 4 bits, but the layer has 7: exclude it"):
        LowRankLinear(7, 9, 3, bits=4)
    with pytest.raises(GfwsvdError, match="the layer in the pivoted form: compress with --storage factors"):
        LowRankLinear(8, 9, 3, bits=4, pivoted=True)
    with pytest.raises(GfwsvdError, match=r"got layer \S+q_proj in the pivoted form"):
        compress(tiny_model("llama"), method="svd", bits=4)
    tokens = random_tokens(2, 8)
    with pytest.raises(GfwsvdError, match="in 4 bits cannot be trained: .* convert --bits 4"):
        tune(load(original[0]), tokens, tokens, tmp_path / "work")
    with pytest.raises(GfwsvdError, match="in eight or four bits already"):
        in_bits(str(original[0]), tmp_path / "out", bits=8)
