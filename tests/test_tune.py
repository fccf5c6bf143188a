"""Recovery training: it recovers, touches nothing but the factors, goes on where it was, and fails without a loss."""

import errno
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer
from typer.testing import CliRunner

from gfwsvd.checkpoint import inspect
from gfwsvd.cli import app
from gfwsvd.compress import compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.hf import save_pretrained
from gfwsvd.layers import LowRankLinear
from gfwsvd.outcome import CompressionReport
from gfwsvd.sources import load_model
from gfwsvd.tune import _Student, training_tokens, tune
from tiny_models import VOCABULARY, random_tokens, tiny_model, word_tokenizer

TRAIN, HELDOUT = random_tokens(64, 32, seed=1), random_tokens(8, 32, seed=2)
SHORT = {"learning_rate": 3e-3, "batch_size": 8}


def compressed(kind: str = "llama", **options: object) -> tuple[nn.Module, CompressionReport]:
    model = tiny_model(kind)
    options = {"method": "svd", "keep": 0.5, "ranks": "uniform", "rank_multiple": 4} | options
    return model, compress(model, **options)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def factors(model: nn.Module) -> set[str]:
    """Names of the tensors that training may change."""
    layers = (name for name, module in model.named_modules() if isinstance(module, LowRankLinear))
    names = {f"{name}.{leaf}" for name in layers for leaf in ("weight", "up", "bias")}
    return names & state(model).keys()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if torch.equal(one[name], other[name])]


def interrupted(after: int):
    """A `track` that is Ctrl-C after so many steps of the training."""

    def track(items, description):
        for number, item in enumerate(items):
            if description.startswith("training") and number == after:
                raise KeyboardInterrupt
            yield item

    return track


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_training_brings_the_model_back_towards_the_dense_one_and_changes_factors_alone(tmp_path, kind):
    model, _ = compressed(kind)
    old = state(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    found = tune(model, TRAIN, HELDOUT, tmp_path / "w", reference=tiny_model(kind), epochs=4, **SHORT)
    assert found.improved and found.steps == 32
    assert found.after.kl < 0.8 * found.before.kl
    assert set(old) - set(same(old, state(model))) == factors(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training


def test_without_a_reference_the_loss_of_the_next_tokens_falls(tmp_path):
    model, _ = compressed()
    pattern = torch.arange(3, 35).repeat(8, 1)  # learnable, unlike random tokens
    found = tune(model, pattern.repeat(8, 1), pattern, tmp_path / "w", **SHORT)
    assert found.improved and found.after.kl is None
    assert found.after.perplexity < 0.5 * found.before.perplexity


@pytest.mark.parametrize("objective", ["kl", "tokens"])
@pytest.mark.parametrize("chunk", [1 << 23, 7 * VOCABULARY])
def test_loss_and_gradients_are_those_of_all_logits_at_once(monkeypatch, objective, chunk):
    monkeypatch.setattr("gfwsvd.tune.CHUNK_LOGITS", chunk)
    model, _ = compressed()
    dense = tiny_model("llama") if objective == "kl" else None
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    model.double(), dense and dense.double()
    ids = TRAIN[:3]
    logs = model(ids).logits[:, :-1].log_softmax(-1).flatten(0, 1)
    if dense is None:
        expected = F.cross_entropy(logs, ids[:, 1:].flatten())
    else:
        aim = dense(ids).logits[:, :-1].log_softmax(-1).flatten(0, 1).detach()
        expected = (aim.exp() * (aim - logs)).sum(-1).mean()
    expected.backward()
    oracle = [layer.up.grad.clone() for layer in layers.values()]
    model.zero_grad()
    loss = _Student(model, dense, layers, TRAIN, False)(ids)["loss"]
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for layer, gradient in zip(layers.values(), oracle, strict=True):
        assert (layer.up.grad - gradient).norm() < 1e-5 * gradient.norm()


def test_a_bfloat16_model_is_trained_in_float32_and_stays_bfloat16(tmp_path):
    model, _ = compressed()
    model.bfloat16()
    old = state(model)
    dense = tiny_model("llama").bfloat16()
    found = tune(model, TRAIN, HELDOUT, tmp_path / "w", reference=dense, epochs=2, **SHORT)
    assert found.after.kl < 0.9 * found.before.kl
    assert {tensor.dtype for tensor in state(model).values()} == {tensor.dtype for tensor in old.values()}
    assert set(old) - set(same(old, state(model))) == factors(model)
    saved = load_file(max((tmp_path / "w").glob("checkpoint-*")) / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32, torch.int32}


def test_products_in_bfloat16_train_too(tmp_path):
    model, _ = compressed()
    found = tune(model, TRAIN, HELDOUT, tmp_path / "w", reference=tiny_model("llama"), dtype="bfloat16", **SHORT)
    assert found.after.kl < 0.9 * found.before.kl and found.settings["dtype"] == "bfloat16"


def test_a_training_that_makes_it_worse_gives_the_old_factors_back(tmp_path):
    model, _ = compressed(keep=0.9)
    old = state(model)
    found = tune(model, TRAIN, HELDOUT, tmp_path / "w", reference=tiny_model("llama"), learning_rate=5)
    assert not found.improved and found.after.kl > found.before.kl
    assert len(same(old, state(model))) == len(old)


# -------------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("after", [2, 5, 7])
def test_an_interrupted_training_ends_in_the_same_bits(tmp_path, after):
    arguments = {"reference": tiny_model("llama"), "epochs": 2, "batch_size": 16, "learning_rate": 3e-3}
    whole, _ = compressed()
    tune(whole, TRAIN[:56], HELDOUT, tmp_path / "whole", **arguments)
    model, _ = compressed()
    old = state(model)
    with pytest.raises(KeyboardInterrupt):
        tune(model, TRAIN[:56], HELDOUT, tmp_path / "w", track=interrupted(after), **arguments)
    assert len(same(old, state(model))) == len(old)
    newest = max((tmp_path / "w").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    torch.manual_seed(5)  # the random state of another process
    seen = []
    tune(
        model, TRAIN[:56], HELDOUT, tmp_path / "w", track=lambda i, text: seen.append((text, len(i))) or i, **arguments
    )
    left = 8 - int(newest.name.split("-")[1])
    assert (f"training: {left} steps", left) in seen and left < 8
    assert len(same(state(whole), state(model))) == len(old)


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    arguments = {"reference": tiny_model("llama"), **SHORT}
    whole, _ = compressed()
    tune(whole, TRAIN, HELDOUT, tmp_path / "whole", **arguments)
    model, _ = compressed()
    with pytest.raises(KeyboardInterrupt):
        tune(model, TRAIN, HELDOUT, tmp_path / "w", track=interrupted(4), **arguments)
    newest = max((tmp_path / "w").glob("checkpoint-*"))
    (newest / "trainer_state.json").write_text('{"global_')
    (newest / "model.safetensors").write_bytes(b"")
    tune(model, TRAIN, HELDOUT, tmp_path / "w", **arguments)
    assert len(same(state(whole), state(model))) == len(state(model))


def test_other_arguments_are_refused_by_name(tmp_path):
    model, _ = compressed()
    dense = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt):
        tune(model, TRAIN, HELDOUT, tmp_path / "w", reference=dense, track=interrupted(5))
    kept = sorted(tmp_path.rglob("*"))
    with pytest.raises(GfwsvdError, match=r"learning_rate was 0.0001 and is 0.001\): run it as before") as error:
        tune(model, TRAIN, HELDOUT, tmp_path / "w", reference=dense, learning_rate=1e-3)
    assert "batch_size" not in str(error.value)
    with pytest.raises(GfwsvdError, match="data_sha256"):
        tune(model, TRAIN.flip(0), HELDOUT, tmp_path / "w", reference=dense)
    with pytest.raises(GfwsvdError, match="reference_sha256"):
        tune(model, TRAIN, HELDOUT, tmp_path / "w", reference=tiny_model("llama", seed=1))
    with torch.no_grad():
        next(module for module in model.modules() if isinstance(module, LowRankLinear)).weight.mul_(1.1)
    with pytest.raises(GfwsvdError, match="model_sha256"):
        tune(model, TRAIN, HELDOUT, tmp_path / "w", reference=dense)
    assert sorted(tmp_path.rglob("*")) == kept


# --------------------------------------------------------------------------------------------------------------- errors


def test_a_loss_that_is_nan_stops_and_leaves_the_model_as_it_was(tmp_path):
    model, _ = compressed()
    old = state(model)
    with pytest.raises(GfwsvdError, match=r"NaN.*lower learning rate"):
        tune(model, TRAIN, HELDOUT, tmp_path / "w", reference=tiny_model("llama"), learning_rate=1e30)
    assert len(same(old, state(model))) == len(old)


def test_a_full_disk_stops_and_the_training_goes_on_from_the_last_checkpoint(tmp_path, monkeypatch):
    model, _ = compressed()
    old, arguments = state(model), {"reference": tiny_model("llama"), **SHORT}
    write = Trainer._save_optimizer_and_scheduler

    def full(trainer: Trainer, folder: str) -> None:
        if trainer.state.global_step == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(trainer, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(GfwsvdError, match="could not keep the training in .* No space left"):
            tune(model, TRAIN, HELDOUT, tmp_path / "w", **arguments)
    assert len(same(old, state(model))) == len(old)
    seen = []
    tune(model, TRAIN, HELDOUT, tmp_path / "w", track=lambda i, text: seen.append(text) or i, **arguments)
    assert "training: 6 steps" in seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"reference": "bert"}, "cannot be compared with the reference|predicts no next tokens"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_is_written(tmp_path, options, message):
    if "reference" in options:
        options = {"reference": tiny_model(options["reference"])}
    with pytest.raises(GfwsvdError, match=message):
        tune(compressed()[0], TRAIN, HELDOUT, tmp_path / "w", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_has_nothing_to_train(tmp_path):
    with pytest.raises(GfwsvdError, match="no low-rank layer to train"):
        tune(tiny_model("llama"), TRAIN, HELDOUT, tmp_path / "w")


def test_the_held_out_tokens_are_the_end_of_the_text_and_none_is_trained_on():
    text = "".join(f"w{number % 3}\n" for number in range(950)) + "".join(
        f"w{3 + number % 3}\n" for number in range(50)
    )
    train, heldout = training_tokens(text, word_tokenizer(), sequences=58, seq_len=16)
    assert train.shape == (58, 16) and train.max() == 2
    assert heldout.shape == (3, 16) and heldout.min() == 3
    with pytest.raises(GfwsvdError, match="held out from training, and there the text is too short"):
        training_tokens(text, word_tokenizer(), sequences=2, seq_len=64)


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a tiny model, a compressed one, one that is hardly compressed, and a text."""
    folder = tmp_path_factory.mktemp("tune")
    tiny_model("llama").save_pretrained(folder / "dense")
    word_tokenizer().save_pretrained(folder / "dense")
    for name, keep in (("small", 0.5), ("good", 0.9)):
        model, report = compressed(keep=keep)
        save_pretrained(model, folder / name, report=report, tokenizer=word_tokenizer())
    numbers = random_tokens(1, 8000).flatten().tolist()
    (folder / "text.txt").write_text("\n".join(f"w{number}" for number in numbers))
    return folder


def command(workspace: Path, *arguments: object, status: int = 0, source: str = "small"):
    words = ["tune", workspace / source, "--text", workspace / "text.txt", "--seq-len", "32", *arguments]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def test_the_command_writes_a_checkpoint_like_its_source_but_closer_to_the_dense_model(workspace, tmp_path):
    out = tmp_path / "out"
    options = ("--reference", workspace / "dense", "--sequences", "128", "--learning-rate", "3e-3", "--epochs", "2")
    said = json.loads(command(workspace, *options, "--out", out, "--json").stdout.splitlines()[-1])
    assert said["improved"] and said["after"]["kl"] < 0.8 * said["before"]["kl"] and said["steps"] == 64
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the work folder is gone

    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in (workspace / "small").iterdir()}
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (out, workspace / "small")]
    assert sizes[0] == sizes[1]
    found, source = inspect(out), inspect(workspace / "small")
    (tuned,) = found["provenance"].pop("tuned")
    assert found == source
    assert tuned["reference"] == "dense" and tuned["text"] == "text.txt" and tuned["after"] == said["after"]

    old, new = (load_file(folder / "model.safetensors") for folder in (workspace / "small", out))
    model = load_model(str(out))[0]
    assert set(old) - set(same(old, new)) == factors(model)

    again = json.loads(
        command(workspace, "--sequences", "8", "--out", tmp_path / "2", "--json", source=str(out)).stdout.splitlines()[
            -1
        ]
    )
    assert len(inspect(tmp_path / "2")["provenance"]["tuned"]) == 2 and again["reference"] is None


def test_the_command_goes_on_after_ctrl_c(workspace, tmp_path, monkeypatch):
    options = ("--reference", workspace / "dense", "--sequences", "40")
    command(workspace, *options, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("gfwsvd.cli_change.bar", interrupted(4))
        patch.setattr("sys.argv", ["gfwsvd", "tune"])
        result = command(workspace, *options, "--out", tmp_path / "out", status=130)
    assert f"what is done is kept in {tmp_path / 'out.tune'}; to go on from it:\ngfwsvd tune\n" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.tune", "whole"]
    other = command(workspace, *options, "--out", tmp_path / "out", "--learning-rate", "1e-3", status=1)
    assert "learning_rate was 0.0001 and is 0.001" in other.stderr
    command(workspace, *options, "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    tensors = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert tensors[0] == tensors[1]


def test_the_command_says_that_a_training_made_it_worse_and_keeps_the_source(workspace, tmp_path):
    options = ("--reference", workspace / "dense", "--sequences", "40", "--learning-rate", "5")
    result = command(workspace, *options, "--out", tmp_path / "out", source="good")
    assert "did not lower the held-out loss" in result.stderr
    tensors = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", workspace / "good")]
    assert tensors[0] == tensors[1]
    assert inspect(tmp_path / "out")["provenance"]["tuned"][0]["improved"] is False


def test_the_command_refuses_folders_that_gfwsvd_did_not_write(workspace, tmp_path):
    result = command(workspace, "--out", tmp_path / "out", source="dense", status=1)
    assert "is no gfwsvd checkpoint" in result.stderr
    load_model(str(workspace / "small"))[0].save_pretrained(tmp_path / "again")
    result = command(workspace, "--out", tmp_path / "out", source=str(tmp_path / "again"), status=1)
    assert "has no gfwsvd.json" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
