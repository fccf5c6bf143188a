"""What a plan says beforehand: what fits, what is refused, and with which advice."""

import json
from dataclasses import replace

import pytest
import torch
from machines import GPU, MACHINE, NAMES, SETTINGS, batches
from test_sources import write_gguf
from typer.testing import CliRunner

from gfwsvd import GfwsvdError, calibrate, compress, load_model, save_pretrained, save_statistics, whiten
from gfwsvd import hardware as hardware_module
from gfwsvd.cli import app
from gfwsvd.cli_plan import duration
from gfwsvd.effort import flops, model_pass
from gfwsvd.footprint import (
    Settings,
    activation_bytes,
    round_bytes,
)
from gfwsvd.hardware import Curve, measure
from gfwsvd.hooks import frozen
from gfwsvd.layers import find_linears, weight_shape
from gfwsvd.losses import next_token_loss
from gfwsvd.memory import bytes_in_use
from gfwsvd.plan import estimate, plan
from gfwsvd.skeleton import model_shape, shape_of
from tiny_models import CAUSAL_KINDS, tiny_model


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
