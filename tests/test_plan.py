"""What a plan says beforehand, held to what happens."""

import json
from dataclasses import replace

import pytest
import torch
from test_passes import Live
from test_sources import write_gguf
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from gfwsvd import GfwsvdError, calibrate, compress, joint, load_model, save_pretrained, save_statistics, whiten
from gfwsvd import hardware as hardware_module
from gfwsvd.calibration import silent
from gfwsvd.cli import app
from gfwsvd.cli_plan import duration
from gfwsvd.collecting import collection
from gfwsvd.effort import Shape, flops, model_pass
from gfwsvd.footprint import (
    Settings,
    activation_bytes,
    factor_bytes,
    gain_bytes,
    round_bytes,
    uniform_ranks,
    workspace_bytes,
)
from gfwsvd.gains import fitted_gains
from gfwsvd.hardware import Curve, Hardware, measure
from gfwsvd.hooks import frozen
from gfwsvd.kronecker import Sweep
from gfwsvd.layers import LowRankLinear, find_linears, weight_shape
from gfwsvd.losses import divergence, next_token_loss
from gfwsvd.memory import bytes_in_use
from gfwsvd.methods import METHODS
from gfwsvd.plan import estimate, plan
from gfwsvd.ranks import Candidate
from gfwsvd.refine import refined
from gfwsvd.skeleton import model_shape, shape_of
from gfwsvd.spread import solve_layers
from gfwsvd.statistics import LayerStatistics
from gfwsvd.work import open_work
from gfwsvd_kernels import reference
from tiny_models import CAUSAL_KINDS, random_tokens, tiny_model

GIB = 1 << 30
POWERS = {"move": 1.0, "thin float32": 2.0, "fold": 2.0, "symmetrize": 2.0}
NAMES = ("matmul float32", "matmul float64", "cholesky", "eigh", "qr", "lu", "solve", "gram", *POWERS)
# A machine that does everything at a rate of its own, whatever the size
MACHINE = Hardware(
    device="cpu",
    name="made up",
    curves={name: Curve(((1.0, 1e-9),), POWERS.get(name, 3.0)) for name in NAMES},
    disk_read=1e9,
    disk_write=1e9,
    digest=1e9,
    device_memory=GIB,
    host_memory=GIB,
    disk=GIB,
)
CURVES = {**MACHINE.curves} | {f"{kind} bfloat16": MACHINE.curves[f"{kind} float32"] for kind in ("matmul", "thin")}
GPU = replace(MACHINE, device="cuda")
SETTINGS = Settings(sequences=16, seq_len=16, batch_size=4)


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch):
    """A GPU of a few megabytes has no room for the roots of many layers."""
    monkeypatch.setattr(whiten, "BATCH_NUMBERS", {})


@pytest.fixture(scope="module")
def skeletons(tmp_path_factory):
    """Folders of config.json alone, by kind of model."""
    folder = tmp_path_factory.mktemp("skeletons")
    for kind in CAUSAL_KINDS:
        config = tiny_model(kind).config
        config.architectures = [type(tiny_model(kind)).__name__]
        config.save_pretrained(folder / kind)
    return folder


def batches(settings: Settings) -> list[dict[str, torch.Tensor]]:
    ids = random_tokens(settings.sequences, settings.seq_len)
    return [{"input_ids": part} for part in ids.split(settings.batch_size)]


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_a_configuration_alone_gives_the_shape_of_the_model_and_the_inputs_that_layers_share(kind, skeletons):
    shape, name = model_shape(str(skeletons / kind))
    model = tiny_model(kind)
    assert name == kind and shape == shape_of(model)
    assert shape.linears == {name: weight_shape(module)[::-1] for name, module in find_linears(model).items()}
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    found = calibrate(model, batches(SETTINGS), collect=["inputs"]).layers
    for name in found:
        shares = {other for other in found if found[other].input_moment is found[name].input_moment}
        assert {other for other in found if shape.leaders[other] == shape.leaders[name]} == shares


def test_the_dtype_is_that_of_the_configuration_unless_another_is_asked_for(skeletons, tmp_path):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    assert model_shape(str(tmp_path))[0].dtype == "bfloat16"
    shape, _ = model_shape(str(tmp_path), dtype="float32")
    assert (shape.dtype, shape.itemsize) == ("float32", 4)


def test_the_header_of_a_gguf_file_gives_the_shape_of_its_model(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), tokenizer=True)
    assert model_shape(str(tmp_path / "tiny.gguf"))[0] == shape_of(load_model(str(tmp_path / "tiny.gguf"))[0])


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_the_operations_of_a_pass_are_those_that_torch_counts(kind):
    model = tiny_model(kind)
    model.set_attn_implementation("eager")  # whose products are counted
    ids = random_tokens(4, 32)
    with frozen(model), FlopCounterMode(display=False) as counter:
        next_token_loss("empirical", 0)(model, {"input_ids": ids}).sum().backward()
    assert flops(model_pass(shape_of(model), ids.numel(), 32)) == pytest.approx(counter.get_total_flops(), rel=0.15)


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_the_memory_of_a_batch_is_near_what_calibration_finds_in_use(kind):
    model, shape = tiny_model(kind), shape_of(tiny_model(kind))
    with frozen(model):
        run = next_token_loss("empirical", 0)
        found = bytes_in_use(model, find_linears(model), batches(SETTINGS)[0], run, backward=True).kept["cpu"]
    # Activation functions differ: that of gpt2 keeps more than is counted, that of opt less
    assert 0.85 < activation_bytes(shape, SETTINGS) / (found - shape.parameters * 4) < 1.5


@pytest.mark.parametrize("storage", ["pivoted", "factors"])
def test_the_size_of_the_output_is_what_compress_writes(storage, tmp_path):
    settings = replace(SETTINGS, keep=0.7, storage=storage)
    model = tiny_model("llama")
    planned = plan(shape_of(model), settings, MACHINE)
    report = compress(model, batches(settings), keep=0.7, storage=storage, rank_multiple=1)
    save_pretrained(model, tmp_path / "out", report=report)
    assert planned.output_bytes == pytest.approx((tmp_path / "out" / "model.safetensors").stat().st_size, rel=0.03)
    assert planned.dense_bytes == 4 * report.model_dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("keep", [1, 0.6, 0.1])
def test_of_uniform_ranks_the_bytes_and_the_speed_up_are_exact(keep, bits, dtype):
    settings = replace(SETTINGS, keep=keep, method="svd", storage="factors", bits=bits)
    model = tiny_model("llama").to(dtype)
    planned = plan(shape_of(model), settings, replace(MACHINE, curves=CURVES))
    embedding = model.get_input_embeddings().weight.nbytes
    report = compress(model, method="svd", keep=keep, ranks="uniform", rank_multiple=1, storage="factors", bits=bits)
    assert (planned.dense_bytes, planned.output_bytes) == (report.model_dense_bytes, report.model_bytes)
    read = report.model_dense_bytes - embedding, report.model_bytes - embedding
    assert planned.speedup == pytest.approx(read[0] / read[1], rel=1e-12)


def test_the_bytes_of_pivoted_layers_count_their_orders():
    settings = replace(SETTINGS, keep=0.7, method="svd", bits=None)
    model = tiny_model("llama")
    planned = plan(shape_of(model), settings, MACHINE)
    report = compress(model, method="svd", keep=0.7, ranks="uniform", rank_multiple=1)
    assert {layer.kind for layer in report.layers} == {"pivoted"}
    assert planned.output_bytes == report.model_bytes
    halved = plan(shape_of(tiny_model("llama").bfloat16()), settings, replace(MACHINE, curves=CURVES))
    orders = 4 * sum(layer.d_out for layer in report.layers)
    assert 2 * (halved.output_bytes - orders) == planned.output_bytes - orders


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_size_of_the_statistics_is_that_of_their_directory(kind, tmp_path):
    model = tiny_model(kind)
    planned = plan(shape_of(model), SETTINGS, MACHINE)
    save_statistics(calibrate(model, batches(SETTINGS)), tmp_path / "stats")
    files = sum(file.stat().st_size for file in (tmp_path / "stats").glob("*.safetensors"))
    assert planned.statistics_bytes == pytest.approx(files, rel=0.03)


@pytest.mark.parametrize("exclude", [["mlp"], ["q_proj$", r"layers\.1\..*down"]])
def test_layers_that_are_left_out_run_but_have_no_statistics_and_stay_as_they_are(exclude, tmp_path):
    model = tiny_model("llama")
    shape, whole = shape_of(model, exclude=exclude), shape_of(model)
    linears = find_linears(model, exclude=exclude)
    assert set(shape.linears) == set(linears) and {**shape.linears, **shape.others} == whole.linears
    assert flops(model_pass(shape, 64, 16)) == flops(model_pass(whole, 64, 16))
    with frozen(model):
        found = bytes_in_use(model, linears, batches(SETTINGS)[0], next_token_loss("empirical", 0), backward=True).kept
    assert 0.85 < activation_bytes(shape, SETTINGS) / (found["cpu"] - shape.parameters * 4) < 1.5

    statistics = calibrate(model, batches(SETTINGS), exclude=exclude)
    for name, layer in statistics.layers.items():
        shares = {other for other, it in statistics.layers.items() if it.input_moment is layer.input_moment}
        assert {other for other in shape.leaders if shape.leaders[other] == shape.leaders[name]} == shares
    save_statistics(statistics, tmp_path / "stats")
    files = sum(file.stat().st_size for file in (tmp_path / "stats").glob("*.safetensors"))
    assert plan(shape, SETTINGS, MACHINE).statistics_bytes == pytest.approx(files, rel=0.03)

    settings = replace(SETTINGS, method="svd", storage="factors", keep=0.6)
    form = {"ranks": "uniform", "rank_multiple": 1, "storage": "factors", "keep": 0.6}
    report = compress(model, method="svd", exclude=exclude, **form)
    assert plan(shape, settings, MACHINE).output_bytes == report.model_bytes


def test_the_configuration_leaves_out_the_same_layers_and_refuses_to_leave_out_all(skeletons):
    found, _ = model_shape(str(skeletons / "llama"), exclude=["mlp"])
    assert found == shape_of(tiny_model("llama"), exclude=["mlp"]) and found.others
    with pytest.raises(GfwsvdError, match="no linear layer to compress"):
        model_shape(str(skeletons / "llama"), exclude=["."])
    with pytest.raises(GfwsvdError, match="exclude must hold regular expressions"):
        model_shape(str(skeletons / "llama"), exclude=["("])


def one_layer(d_in: int, d_out: int) -> Shape:
    return replace(shape_of(tiny_model("llama")), linears={"a": (d_in, d_out)}, leaders={"a": "a"})


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("unit", "lengths"), [("sequence", [8] * 6), ("sequence", [150] * 2), ("batch", [30] * 4)])
def test_samples_of_several_tokens_take_the_products_that_torch_counts(first, unit, lengths, monkeypatch):
    """On a CPU, by tokens for short samples and by gradients for long ones. Triangles up to 192 are whole squares."""
    d_in, d_out, tokens = 48, 160, sum(lengths)
    monkeypatch.setattr("gfwsvd.kronecker.sequence_unit_step", reference.sequence_unit_step)  # whose products are seen
    stats = LayerStatistics(d_in, d_out)
    if not first:
        stats.left, stats.right = (reference.pack(torch.eye(width)) for width in (d_out, d_in))
    sweep = Sweep(stats, unit=unit, sketch_seed=0 if first else None)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    with FlopCounterMode(display=False) as counter:
        sweep.accumulate(torch.randn(tokens, d_in), torch.randn(tokens, d_out), offsets)
    sample = lengths[0] if unit == "sequence" else tokens
    settings = {"collect": (), "first": first, "on_cpu": True, "times": 1}
    steps = collection(one_layer(d_in, d_out), tokens, sample=sample, **settings)
    planned = sum(step.flops * (2 if step.curve == "gram" else 1) for step in steps)
    assert planned == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_sequences_as_samples_take_what_the_documentation_says_on_a_gpu():
    d_in, d_out, length, count = 4096, 11008, 2048, 4
    settings = {"collect": (), "first": False, "on_cpu": False, "times": 1}
    steps = collection(one_layer(d_in, d_out), count * length, sample=length, **settings)
    products = sum(step.flops for step in steps if step.curve == "matmul float32")
    both = sum(a**2 + length * (a + b) + b**2 / 2 for a, b in ((d_in, d_out), (d_out, d_in)))
    energies = d_in * d_out
    assert products == pytest.approx(count * 2 * length * (both + energies), rel=1e-12)


@pytest.mark.parametrize("unit", ["sequence", "batch"])
def test_the_memory_of_samples_of_several_tokens_is_planned_beyond_that_of_tokens(unit, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).eval()  # whose logits are small
    settings = Settings(sequences=4, seq_len=16, batch_size=2, sweeps=2, unit=unit)
    data = [{"input_ids": part} for part in torch.randint(64, (4, 16)).split(2)]
    with open_work(tmp_path / "work", {}) as work, Live() as live:
        calibrate(model, data, sweeps=2, unit=unit, work=work)
    taken = sum(value.nbytes for value in model.parameters()) + live.peak
    of_tokens, of_unit = (
        estimate(shape_of(model), replace(settings, unit=each), MACHINE).phases[1].host_bytes
        for each in ("token", unit)
    )
    assert of_tokens < taken <= of_unit < 1.1 * taken


def test_less_memory_makes_more_groups_and_passes_and_longer_sweeps():
    shape = shape_of(tiny_model("llama"))
    settings = replace(SETTINGS, sweeps=2)
    at_once = plan(shape, settings, MACHINE)
    assert (at_once.groups, at_once.passes) == (1, 2)
    few = plan(shape, settings, replace(MACHINE, device_memory=3 << 20, host_memory=3 << 20))
    assert few.groups > 1 and few.passes == 2 * few.groups
    assert max(phase.host_bytes for phase in few.phases) <= 3 << 20
    assert few.phases[1].name == at_once.phases[1].name == "calibration sweep 1"
    assert few.phases[1].seconds > at_once.phases[1].seconds


def test_the_memory_of_the_host_limits_the_groups_of_a_gpu_too():
    shape = shape_of(tiny_model("llama"))
    planned = plan(shape, SETTINGS, replace(GPU, host_memory=400_000))
    assert planned.groups > plan(shape, SETTINGS, GPU).groups == 1
    assert max(phase.host_bytes for phase in planned.phases) <= 400_000


def test_a_method_without_statistics_plans_no_passes():
    planned = plan(shape_of(tiny_model("llama")), replace(SETTINGS, method="svd"), MACHINE)
    assert (planned.groups, planned.passes, planned.statistics_bytes) == (0, 0, 0)
    assert not any("calibration" in phase.name for phase in planned.phases)


def test_time_and_operations_grow_as_the_work_does():
    shape = shape_of(tiny_model("llama"))
    once, twice = (plan(shape, replace(SETTINGS, sequences=count), MACHINE) for count in (16, 32))
    assert 1.7 < twice.phases[1].flops / once.phases[1].flops <= 2
    assert 1.5 < twice.phases[1].seconds / once.phases[1].seconds <= 2
    slow = {name: Curve(((1.0, 2e-9),), curve.power) for name, curve in MACHINE.curves.items()}
    rates = {"disk_read": 5e8, "disk_write": 5e8, "digest": 5e8}
    assert plan(shape, SETTINGS, replace(MACHINE, curves=slow, **rates)).seconds == pytest.approx(
        2 * plan(shape, SETTINGS, MACHINE).seconds
    )


def test_a_token_reads_all_of_an_embedding_that_is_the_head_too():
    assert shape_of(tiny_model("gpt2")).embedding == 0
    model = tiny_model("llama")
    assert shape_of(model).embedding == model.get_input_embeddings().weight.numel()


@pytest.mark.parametrize("seq_len", [16, 300])
@pytest.mark.parametrize("rounds", [1, 2])
def test_rounds_take_the_products_that_torch_counts(rounds, seq_len):
    settings = replace(SETTINGS, sequences=10, seq_len=seq_len, batch_size=4, keep=0.5, rounds=rounds)
    model = tiny_model("llama")
    shape = replace(shape_of(model), heads=0, positions=None)  # of attention, half is counted
    ranks = {name: rank for name, rank in uniform_ranks(shape, settings).items() if rank is not None}
    assert ranks.keys() == shape.linears.keys()
    linears, sizes, passes = find_linears(model), set(), []

    def build(chosen):
        layers = {}
        for name, module in linears.items():
            up, down = torch.randn(module.out_features, chosen[name]), torch.randn(chosen[name], module.in_features)
            layers[name] = LowRankLinear.from_factors(up / 100, down)
        sizes.add(sum(tensor.nbytes for layer in layers.values() for tensor in layer.parameters()))
        return layers

    def loss(model, batch):
        passes.append(batch["input_ids"].numel())
        return divergence(lambda model: joint.placed(model, linears))(model, batch)

    candidates = {name: Candidate(*weight_shape(module), torch.ones(64)) for name, module in linears.items()}
    with FlopCounterMode(display=False) as counter:
        refined(
            model,
            linears,
            candidates,
            batches(settings),
            rounds=rounds,
            allocate=lambda _: ranks,
            build=build,
            loss=loss,
            track=silent,
        )
    counted = counter.get_flop_counts()["Global"]
    measured = [phase for phase in plan(shape, settings, MACHINE).phases if phase.name.startswith("loss after")]
    assert len(measured) == rounds + 1
    products = sum(counted.get(product, 0) for product in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert sum(phase.flops for phase in measured) == pytest.approx(products, rel=1e-12)
    assert sum(passes) == (rounds + 1) * settings.round_batches * settings.batch_tokens
    beside = activation_bytes(shape, settings) + settings.batch_tokens * (16 * shape.widest + 8 * shape.vocabulary)
    assert {round_bytes(shape, settings) - beside} == sizes


@pytest.mark.parametrize("steps", [1, 3])
def test_gains_take_the_products_that_torch_counts(steps, monkeypatch):
    monkeypatch.setattr("gfwsvd.plan.JUDGEMENTS", 1)
    monkeypatch.setattr("gfwsvd.gains.TRIES", 1)
    for tokens in ("STEP_TOKENS", "HELDOUT_TOKENS"):
        monkeypatch.setattr(f"gfwsvd.gains.{tokens}", 128)
    monkeypatch.setattr("gfwsvd.footprint.STEP_TOKENS", 128)
    monkeypatch.setattr("gfwsvd.footprint.JUDGED_TOKENS", 128)
    settings = replace(SETTINGS, sequences=40, seq_len=16, batch_size=4, keep=0.5, gains=steps)
    model = tiny_model("llama")
    shape = replace(shape_of(model), heads=0, positions=None)  # of attention, half is counted
    ranks = {name: rank for name, rank in uniform_ranks(shape, settings).items() if rank is not None}
    layers = {
        name: LowRankLinear.from_factors(
            torch.randn(module.out_features, ranks[name]) / 100, torch.randn(ranks[name], module.in_features)
        )
        for name, module in find_linears(model).items()
    }
    curvatures = {name: torch.ones(len(layer.up)) for name, layer in layers.items()}
    with FlopCounterMode(display=False) as counter:
        fitted_gains(
            model,
            find_linears(model),
            layers,
            list(batches(settings)),
            steps=steps,
            curvatures=curvatures,
            track=silent,
        )
    counted = counter.get_flop_counts()["Global"]
    (found,) = (phase for phase in plan(shape, settings, MACHINE).phases if phase.name.endswith("gains"))
    products = sum(counted.get(product, 0) for product in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert found.flops == pytest.approx(products, rel=1e-12)
    assert gain_bytes(shape, settings) > round_bytes(shape, settings)


def test_a_model_that_is_not_twice_in_memory_is_refused_rounds_beforehand():
    tiny = shape_of(tiny_model("llama"))
    leaders = {
        f"{number}.{name}": f"{number}.{leader}" for number in range(20) for name, leader in tiny.leaders.items()
    }
    linears = {name: tiny.linears[name.partition(".")[2]] for name in leaders}
    shape = replace(tiny, linears=linears, leaders=leaders, parameters=tiny.parameters + 19 * tiny.dense)
    settings = replace(SETTINGS, batch_size=1, rounds=1)
    room = 4 * shape.parameters + round_bytes(shape, settings) - activation_bytes(shape, settings)
    with pytest.raises(GfwsvdError, match="loss after 0 of 1 rounds needs .*memory of the device.*: --rounds 0 fits"):
        plan(shape, settings, replace(GPU, device_memory=room))
    assert plan(shape, replace(settings, rounds=0), replace(GPU, device_memory=room))
    assert plan(shape, settings, replace(GPU, device_memory=room + activation_bytes(shape, settings)))


def options(message: str) -> dict[str, str]:
    """The options that an error proposes, and their values."""
    words = message.replace("(", " ").replace(")", " ").split()
    return {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}


@pytest.mark.parametrize(
    ("settings", "machine", "expected"),
    [
        (replace(SETTINGS, batch_size=16), replace(GPU, device_memory=5 << 19), {"--batch-size"}),
        (
            Settings(sequences=16, seq_len=128, batch_size=1),
            replace(GPU, device_memory=2 << 20),
            {"--batch-size", "--seq-len", "--sequences"},
        ),
        (SETTINGS, replace(GPU, device_memory=1 << 20), {"--device-memory", "--device"}),
        (SETTINGS, replace(GPU, host_memory=1 << 18), {"--host-memory"}),
        (SETTINGS, replace(MACHINE, device_memory=1 << 20, host_memory=1 << 20), {"--host-memory"}),
    ],
)
def test_what_does_not_fit_is_refused_with_advice_that_works(settings, machine, expected):
    shape = shape_of(tiny_model("llama"))
    with pytest.raises(GfwsvdError, match="needs .* are there: ") as refusal:
        plan(shape, settings, machine)
    advised = options(str(refusal.value))
    assert set(advised) == expected
    numbers = {
        field: int(advised[option])
        for option, field in (("--batch-size", "batch_size"), ("--seq-len", "seq_len"), ("--sequences", "sequences"))
        if option in advised
    }
    memory = {
        field: int(advised[option].removesuffix("M")) << 20
        for option, field in (("--device-memory", "device_memory"), ("--host-memory", "host_memory"))
        if option in advised
    }
    if machine.device == "cpu" and memory:
        memory = dict.fromkeys(("device_memory", "host_memory"), memory["host_memory"])
    assert plan(shape, replace(settings, **numbers), replace(machine, **memory))


def test_a_model_that_no_device_holds_is_advised_to_spread_and_that_plan_fits():
    tiny = shape_of(tiny_model("llama"))
    leaders = {f"{number}.{name}": f"{number}.{lead}" for number in range(40) for name, lead in tiny.leaders.items()}
    linears = {name: tiny.linears[name.partition(".")[2]] for name in leaders}
    shape = replace(tiny, linears=linears, leaders=leaders, parameters=tiny.parameters + 39 * tiny.dense, blocks=80)
    cards = replace(GPU, device_memory=8 << 20, gpus=4)
    with pytest.raises(GfwsvdError, match="load needs .*: --device auto.* fits"):
        plan(shape, replace(SETTINGS, batch_size=1), cards)
    found = plan(shape, replace(SETTINGS, batch_size=1), replace(cards, spread=True))
    load = found.phases[0].device_bytes
    assert load == -(-4 * shape.parameters // 4) and load < cards.device_memory // 2
    alone = estimate(shape, SETTINGS, replace(cards, gpus=1, spread=True, link=1e9))
    assert alone.recomputed and alone.phases[0].device_bytes == (8 << 20) // 2
    waiting = 4 * shape.parameters - (8 << 20) // 2
    assert alone.phases[0].host_bytes >= waiting, "what the card has no room for waits on the host"
    slower = estimate(shape, SETTINGS, replace(cards, gpus=1, spread=True, link=1e6))
    moved = 2 * 15 / 4 * alone.groups * waiting  # forward and again, in every batch of a sweep
    assert slower.phases[1].seconds - alone.phases[1].seconds == pytest.approx(moved * (1e-6 - 1e-9))


def test_sequences_that_the_model_does_not_take_are_refused_as_calibrate_refuses_them():
    shape, settings = shape_of(tiny_model("llama")), Settings(sequences=2, seq_len=300, batch_size=1)
    with pytest.raises(GfwsvdError, match="have 300 tokens, the model takes 128") as refusal:
        plan(shape, settings, MACHINE)
    with pytest.raises(GfwsvdError) as expected:
        calibrate(tiny_model("llama"), batches(settings))
    assert str(refusal.value) == str(expected.value)
    assert plan(shape, replace(settings, method="svd"), MACHINE)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups_and_memory_of_a_calibration_on_a_cpu_are_as_planned(groups, tmp_path):
    model, settings = tiny_model("llama"), Settings(sequences=16, seq_len=16, batch_size=1, sweeps=2)
    shape, titles = shape_of(model), []
    weights = sum(value.nbytes for value in model.parameters())

    def planned(limit):
        return estimate(shape, settings, replace(MACHINE, device_memory=limit, host_memory=limit))

    # In the middle of the limits that give so many groups, since activations are estimated
    limits = [limit for limit in range(2_000_000, 8_000_000, 100_000) if planned(limit).groups == groups]
    limit = limits[len(limits) // 2]

    def track(items, title):
        titles.append(title)
        return items

    with open_work(tmp_path / "work", {}) as work, Live() as live:
        calibrate(model, batches(settings), sweeps=2, host_memory=limit, work=work, track=track)
    found = {title.partition(" of ")[2].rpartition("of ")[2] for title in titles if "layers" in title} or {"1"}
    assert found == {str(groups)}
    sweep = planned(limit).phases[1].host_bytes
    assert 0.6 * sweep < weights + live.peak <= sweep


@pytest.mark.parametrize("together", [1, 3, 14])
def test_the_memory_of_a_factorisation_is_planned_with_the_roots_that_are_found_together(together, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setitem(whiten.BATCH_NUMBERS, "cpu", together * 2 * 64**2)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128)).eval()
    statistics, row, linears = calibrate(model, batches(SETTINGS)), METHODS["gfwsvd"], find_linears(model)
    settings = {"keep": 0.8, "damping": 0.01, "guard": False, "work": None, "track": silent}
    settings["blanks"] = {name: Candidate(64, 64, torch.zeros(64)) for name in linears}
    there = [*model.parameters(), *(value for stats in statistics.layers.values() for value in vars(stats).values())]
    with Live() as live:
        live.known.update(value.untyped_storage()._cdata for value in there if isinstance(value, torch.Tensor))
        solve_layers(linears, statistics, row, **settings)
    shape = shape_of(model)
    planned = workspace_bytes(shape, SETTINGS, "cpu") + factor_bytes(shape, replace(SETTINGS, storage="factors"))
    assert 0.5 * planned < live.peak <= planned


def test_the_best_of_what_was_measured_stands_beside_the_plan():
    ceilings = MACHINE.ceilings
    assert ceilings["float64 TFLOP/s"] == pytest.approx(2 / 1e-9 / 1e12) and ceilings["memory GB/s"] == pytest.approx(2)
    assert "link GB/s" not in ceilings and replace(MACHINE, link=5e9).ceilings["link GB/s"] == 5
    assert plan(shape_of(tiny_model("llama")), SETTINGS, MACHINE).to_json()["ceilings"] == ceilings


def test_a_full_disk_is_refused_before_the_work():
    shape = shape_of(tiny_model("llama"))
    with pytest.raises(GfwsvdError, match=r"disk.*it takes (\d+)M of free disk") as refusal:
        plan(shape, SETTINGS, replace(MACHINE, disk=1 << 20))
    enough = int(str(refusal.value).partition("it takes ")[2].partition("M")[0]) << 20
    assert plan(shape, SETTINGS, replace(MACHINE, disk=enough))


def test_settings_that_compress_would_not_take_are_refused():
    shape = shape_of(tiny_model("llama"))
    for wrong in (
        {"keep": 1.5},
        {"method": "magic"},
        {"storage": "zip"},
        {"bits": 3},
        {"rounds": -1},
        {"gains": -1},
        {"unit": "word"},
        {"sweeps": 0},
    ):
        with pytest.raises(GfwsvdError, match=next(iter(wrong))):
            plan(shape, replace(SETTINGS, **wrong), MACHINE)
    with pytest.raises(GfwsvdError, match="of method svd are not: leave out the rounds"):
        plan(shape, replace(SETTINGS, method="svd", rounds=1), MACHINE)


def test_what_is_no_dense_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    model = tiny_model("llama")
    report = compress(model, method="svd", keep=0.6, rank_multiple=1)
    save_pretrained(model, tmp_path / "small", report=report)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for spec, reason in (
        ("empty", "no config.json"),
        ("small", "compressed or quantised already"),
        ("broken", "cannot tell the shape"),
        ("missing.gguf", "there is no file"),
    ):
        with pytest.raises(GfwsvdError, match=reason):
            model_shape(str(tmp_path / spec))


def test_a_curve_goes_through_its_points_and_grows_by_its_power_beyond():
    curve = Curve(((10.0, 1.0), (20.0, 4.0), (40.0, 8.0)), 3.0)
    assert [curve.seconds(size) for size, _ in curve.points] == pytest.approx([1.0, 4.0, 8.0])
    assert curve.seconds(1) == 1.0 and curve.seconds(80) == pytest.approx(64.0)
    assert curve.seconds(15) == pytest.approx(15**2 / 100)  # between the first two the time goes with the square


def test_a_machine_is_measured_by_every_operation_that_a_plan_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware_module, "_SIZES", [8, 16])
    monkeypatch.setattr(hardware_module, "_BYTES", [1 << 10])
    monkeypatch.setattr(hardware_module, "_FILE", 1 << 12)
    found = measure("cpu", torch.bfloat16, tmp_path)
    assert set(found.curves) == {*NAMES, "matmul bfloat16", "thin bfloat16"} and not list(tmp_path.iterdir())
    assert all(seconds > 0 for curve in found.curves.values() for _, seconds in curve.points)
    assert found.device_memory == found.host_memory > 0 and found.disk > 0 and not found.spread
    if not torch.cuda.is_available():
        spread = measure("auto", torch.bfloat16, tmp_path)
        assert (spread.device, spread.gpus, spread.spread) == ("cpu", 1, True)
    assert estimate(shape_of(tiny_model("llama").bfloat16()), SETTINGS, found).seconds > 0


def test_a_device_that_is_not_here_and_a_folder_that_cannot_be_written_are_errors(monkeypatch, tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(GfwsvdError, match="no device cuda here"):
            measure("cuda", torch.float32)
    monkeypatch.setattr(hardware_module, "_SIZES", [8])
    monkeypatch.setattr(hardware_module, "_BYTES", [1 << 10])
    with pytest.raises(GfwsvdError, match="no file can be written"):
        measure("cpu", torch.float32, tmp_path / "missing")


def test_a_time_is_told_in_the_unit_that_people_would_take():
    assert [duration(seconds) for seconds in (0.5, 115, 600, 7300)] == ["0.5 s", "115 s", "10 min", "2.03 h"]


def run(*arguments, status=0):
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def test_the_command_prints_a_table_or_json_and_refuses_early(skeletons, monkeypatch):
    monkeypatch.setattr("gfwsvd.cli_plan.measure", lambda device, dtype: MACHINE)
    sizes = ("--sequences", 16, "--seq-len", 16)
    found = json.loads(run(skeletons / "llama", *sizes, "--json").stdout.splitlines()[-1])
    expected = plan(model_shape(str(skeletons / "llama"))[0], SETTINGS, MACHINE)
    assert found == {"model": "llama", **expected.to_json()} and found["seconds"] == pytest.approx(expected.seconds)
    shown = " ".join(run(skeletons / "llama", *sizes).stdout.split())
    assert all(phase.name in shown for phase in expected.phases)
    assert "an upper bound" in shown and "2 memory GB/s" in shown and "float64 TFLOP/s" in shown
    asked = ("--bits", 8, "--rounds", 2, "--gains", 3)
    more = json.loads(run(skeletons / "llama", *sizes, *asked, "--json").stdout.splitlines()[-1])
    asked = replace(SETTINGS, bits=8, rounds=2, gains=3)
    assert more == {"model": "llama", **plan(model_shape(str(skeletons / "llama"))[0], asked, MACHINE).to_json()}
    asked = ("--unit", "sequence", "--exclude", "mlp", "--exclude", "k_proj")
    more = json.loads(run(skeletons / "llama", *sizes, *asked, "--json").stdout.splitlines()[-1])
    shape = model_shape(str(skeletons / "llama"), exclude=["mlp", "k_proj"])[0]
    assert more == {"model": "llama", **plan(shape, replace(SETTINGS, unit="sequence"), MACHINE).to_json()}
    refused = run(skeletons / "llama", *sizes, "--host-memory", "1M", status=1)
    assert "calibration sweep 1 needs" in refused.stderr
    spread = json.loads(run(skeletons / "llama", *sizes, "--device", "auto", "--json").stdout.splitlines()[-1])
    assert spread["groups"] == found["groups"]
    assert "expected an amount" in run(skeletons / "llama", "--host-memory", "much", status=1).stderr
