"""The package on a GPU: the same statistics, models and tokens as on the CPU, within what rounding does."""

import copy
import socket

import pytest
import torch
from oracles import symmetric

from benchmarks.random_models import random_model
from gfwsvd import decoding, host, passes, ranked
from gfwsvd.calibration import calibrate
from gfwsvd.cli_app import exactly_repeated
from gfwsvd.compress import compress
from gfwsvd.decoding import GraphDecoder
from gfwsvd.evaluate import evaluate
from gfwsvd.fuse import fuse
from gfwsvd.hf import save_pretrained
from gfwsvd.host import to_host
from gfwsvd.latency import measure_latency
from gfwsvd.ranked import joined
from gfwsvd.ranks import STORAGE
from gfwsvd.statistics import LABELS, UNITS
from gfwsvd.work import open_work
from tiny_models import CAUSAL_KINDS, VOCABULARY, random_tokens, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
IDS = random_tokens(3, 10)
BUDGET = 192 << 20  # for `wide_model`: 54 MiB besides statistics, 64 of cuBLAS, 45 of each block


def _batches():
    return [{"input_ids": random_tokens(4, 24, seed=seed)} for seed in range(4)]


def wide_model():
    """Layers whose statistics take more than the model and its activations: 45 MiB a block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()


def _agree(actual, expected, tolerance):
    difference = actual.cpu().double() - expected.double()
    assert difference.norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_statistics_are_those_of_the_cpu(kind, unit):
    model = tiny_model(kind)
    expected = calibrate(model, _batches(), unit=unit, sweeps=2)
    found = calibrate(copy.deepcopy(model).cuda(), _batches(), unit=unit, sweeps=2)
    assert found.data_sha256 == expected.data_sha256 and found.layers.keys() == expected.layers.keys()
    for name, stats in found.layers.items():
        other = expected.layers[name]
        for matrix in ("input_moment", "output_moment", "left", "right"):
            _agree(symmetric(getattr(stats, matrix)), symmetric(getattr(other, matrix)), 1e-4)
        assert stats.scale == pytest.approx(other.scale, rel=1e-3)
        assert stats.trace == pytest.approx(other.trace, rel=1e-3)
        assert stats.squared_parts == pytest.approx(other.squared_parts, rel=1e-3)


def test_a_memory_budget_of_the_gpu_is_kept_in_groups_of_the_same_statistics(tmp_path):
    model = wide_model().cuda()
    matrices = ("input_moment", "output_moment", "left", "right")
    expected = {
        (name, matrix): symmetric(getattr(stats, matrix))
        for name, stats in calibrate(model, _batches(), sweeps=2).layers.items()
        for matrix in matrices
    }  # and none of it on the GPU
    peaks = {}
    for budget in (None, BUDGET):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with open_work(tmp_path / str(budget), {}) as work:
            found = calibrate(model, _batches(), sweeps=2, device_memory=budget, work=work)
        peaks[budget] = torch.cuda.max_memory_allocated()
    assert peaks[BUDGET] <= BUDGET < peaks[None]
    for name, stats in found.layers.items():
        for matrix in matrices:
            _agree(symmetric(getattr(stats, matrix)), expected[name, matrix], 1e-5)


@pytest.mark.parametrize("budget", [None, 1 << 40])
def test_a_gpu_that_is_too_small_for_the_batches_halves_them_and_the_sums_stay(budget):
    model, ids = wide_model().cuda(), random_tokens(256, 256)
    expected = calibrate(model, [{"input_ids": part} for part in ids.split(8)], sweeps=2)
    torch.cuda.empty_cache()
    share = (torch.cuda.memory_allocated() + (3 << 30)) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        # 16 of the 256 are held out
        with pytest.warns(UserWarning, match="out of memory with batches of 240 sequences: going on with 120"):
            found = calibrate(model, [{"input_ids": ids}], sweeps=2, device_memory=budget)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 0 < found.batch_rows < 256
    for name, stats in found.layers.items():
        for matrix in ("input_moment", "output_moment", "left", "right"):
            _agree(symmetric(getattr(stats, matrix)), symmetric(getattr(expected.layers[name], matrix)), 1e-4)


def test_a_calibration_that_was_interrupted_goes_on_on_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "SNAPSHOT_SECONDS", -1.0)
    monkeypatch.setattr(passes, "SNAPSHOT_COST", 0)
    model = tiny_model("llama").cuda()
    whole = calibrate(model, _batches(), sweeps=2)

    def track(items, description):
        for number, item in enumerate(items):
            if number == 2 and "pass 2" in description:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt), open_work(tmp_path / "work", {}) as work:
        calibrate(model, _batches(), sweeps=2, work=work, track=track)
    with open_work(tmp_path / "work", {}) as work:
        found = calibrate(model, _batches(), sweeps=2, work=work)
        for name, stats in found.layers.items():
            for matrix in ("input_moment", "output_moment", "left", "right"):
                _agree(symmetric(getattr(stats, matrix)), symmetric(getattr(whole.layers[name], matrix)), 1e-5)


def test_a_job_of_one_process_with_nccl_has_the_statistics_of_no_job(monkeypatch):
    """Its sums and broadcasts run; two processes need two GPUs."""
    model = tiny_model("llama").cuda()
    expected = calibrate(model, _batches(), sweeps=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in about.items():
        monkeypatch.setenv(name, value)
    with joined("cuda"):
        total = torch.ones(3, device="cuda")
        torch.distributed.all_reduce(total)
        torch.distributed.broadcast(total, 0)
        assert torch.equal(total, torch.ones_like(total)) and ranked.gathered("here") == ["here"]
        found = calibrate(model, _batches(), sweeps=2)
    for name, stats in found.layers.items():
        for matrix in ("input_moment", "output_moment", "left", "right"):
            _agree(symmetric(getattr(stats, matrix)), symmetric(getattr(expected.layers[name], matrix)), 1e-5)


def test_tensors_come_to_the_host_with_the_same_bits_once_they_are_computed(monkeypatch):
    monkeypatch.setattr(host, "STAGE", 1 << 20)
    root = torch.randn(2048, 2048, device="cuda") / 2048**0.5
    tensors = {f"power {number}": torch.linalg.matrix_power(root, number) for number in (40, 41, 42)}
    tensors |= {"half": tensors["power 42"].T.bfloat16(), "number": root.double().sum(), "nothing": root[:0]}
    found = to_host(tensors)
    for name, value in tensors.items():
        assert found[name].is_cpu and torch.equal(found[name], value.cpu()), name


@pytest.mark.parametrize("labels", LABELS)
def test_deterministic_statistics_have_the_same_bits_at_every_run(labels):
    model = wide_model().bfloat16().cuda()
    with exactly_repeated(True):
        first, second = (calibrate(model, _batches(), sweeps=2, labels=labels) for _ in range(2))
    for name, stats in first.layers.items():
        for matrix in ("input_moment", "output_moment", "left", "right"):
            assert torch.equal(getattr(stats, matrix), getattr(second.layers[name], matrix)), (name, matrix)


@pytest.mark.parametrize("storage", STORAGE)
def test_deterministic_compression_writes_the_same_bytes_at_every_run(storage, tmp_path):
    original, written = wide_model().bfloat16(), []
    for run in ("first", "second"):
        model = copy.deepcopy(original).cuda()
        with exactly_repeated(True):
            report = compress(model, _batches(), keep=0.7, storage=storage, sweeps=2, rounds=1)
        save_pretrained(model, tmp_path / run, report=report)
        written.append({path.name: path.read_bytes() for path in (tmp_path / run).glob("*.safetensors")})
    assert written[0] and written[0] == written[1]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_a_compressed_model_is_that_of_the_cpu(kind, storage):
    model = tiny_model(kind)
    on_gpu = copy.deepcopy(model).cuda()
    expected = compress(model, _batches(), keep=0.7, storage=storage)
    found = compress(on_gpu, _batches(), keep=0.7, storage=storage)
    assert [layer.rank for layer in found.layers] == [layer.rank for layer in expected.layers]
    assert sum(layer.predicted_loss for layer in found.layers) == pytest.approx(
        sum(layer.predicted_loss for layer in expected.layers), rel=1e-3
    )
    with torch.no_grad():
        _agree(on_gpu(input_ids=IDS.cuda()).logits, model(input_ids=IDS).logits, 1e-3)
    windows = random_tokens(2, 20, seed=9)
    assert evaluate(on_gpu, windows).perplexity == pytest.approx(evaluate(model, windows).perplexity, rel=1e-3)


def test_a_bfloat16_model_is_calibrated_and_compressed():
    model = tiny_model("llama").bfloat16()
    on_gpu = copy.deepcopy(model).cuda()
    expected, found = compress(model, _batches(), keep=0.8), compress(on_gpu, _batches(), keep=0.8)
    assert found.kept == pytest.approx(expected.kept, abs=0.02)
    with torch.no_grad():
        _agree(on_gpu(input_ids=IDS.cuda()).logits.float(), model(input_ids=IDS).logits.float(), 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", STORAGE)
def test_a_fused_model_has_the_logits_of_the_model_as_it_was(storage, dtype):
    model = tiny_model("llama").cuda()
    compress(model, _batches(), keep=0.7, storage=storage)
    model.to(dtype)
    ids = IDS.cuda()
    with torch.no_grad():
        for part in (ids[:1, :1], ids[:1], ids, random_tokens(4, 40).cuda()):  # each of the three ways
            model_logits = model(input_ids=part).logits.float()
            _agree(fuse(copy.deepcopy(model))(input_ids=part).logits.float(), model_logits.cpu(), 3e-2)


@pytest.mark.parametrize("fused", [False, True])
def test_replayed_steps_say_the_tokens_of_generation(fused):
    model = tiny_model("llama").cuda()
    compress(model, _batches(), keep=0.7)
    prompts = [random_tokens(3, length, seed=length).cuda() for length in (10, 7, 19, 10)]  # two padded sizes
    expected = [
        model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids))
        for ids in prompts
    ]
    decoder = GraphDecoder(fuse(model) if fused else model, batch_size=3, max_length=40)
    for ids, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(decoder.generate(ids, max_new_tokens=20), tokens)


def test_prompts_too_long_for_a_graph_go_on_without_one(monkeypatch):
    model = tiny_model("llama").cuda()
    ids = IDS.cuda()
    short, long = (GraphDecoder(model, batch_size=len(ids), max_length=64) for _ in range(2))
    expected = short.generate(ids, max_new_tokens=12)
    monkeypatch.setattr(decoding, "GRAPH_TOKENS", 0)
    assert torch.equal(long.generate(ids, max_new_tokens=12), expected)


def test_latency_is_measured_on_the_gpu():
    table = measure_latency(tiny_model("llama").bfloat16().cuda(), tokens=1)
    assert table.device == torch.cuda.get_device_name() and table.dtype == "bfloat16"


def test_rounds_choose_ranks_on_a_gpu_and_lower_the_loss():
    model = tiny_model("llama").cuda()
    report = compress(model, _batches(), keep=0.5, rank_multiple=1, rounds=2)
    assert len(report.round_losses) == 3 and all(layer.loss_scale > 0 for layer in report.layers)
    expected = compress(tiny_model("llama"), _batches(), keep=0.5, rank_multiple=1, rounds=2)
    assert report.round_losses[0] == pytest.approx(expected.round_losses[0], rel=1e-3)


def test_a_model_of_the_size_of_smollm2_goes_from_statistics_to_a_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = random_model("smollm2-135m", dtype=torch.float32, device="cpu")
    batches = [{"input_ids": torch.randint(model.config.vocab_size, (2, 128))} for _ in range(4)]
    expected = calibrate(model, batches)
    model.cuda()
    found = calibrate(model, batches)
    for name, stats in found.layers.items():
        for matrix in ("input_moment", "output_moment", "left", "right"):
            _agree(symmetric(getattr(stats, matrix)), symmetric(getattr(expected.layers[name], matrix)), 1e-3)
    report = compress(model, statistics=found, keep=0.8)
    assert report.kept <= 0.8 and any(layer.kind == "pivoted" for layer in report.layers)
    save_pretrained(model, tmp_path / "smaller", report=report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", dtype="auto", device_map="cuda").eval()
    ids = batches[0]["input_ids"].cuda()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
