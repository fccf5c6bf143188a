"""vLLM's engine says what transformers says of the same checkpoint, and refuses one that is not whole."""

import shutil
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers.quantization import get_quantization_config

from gfwsvd import GfwsvdError, checkpoint, serving_vllm
from gfwsvd.checkpoint import Entry
from gfwsvd.shards import MergedLayer
from served_models import greedy

TOKENS = 24
PROMPTS = [[5, 9, 33, 7], [77, 3, 64, 101, 12, 8, 90], [44]]


@pytest.fixture
def engine():
    """Makes vLLM's engine of a folder, without tokenizer."""

    def make(folder, **options):
        settings = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 4, "skip_tokenizer_init": True}
        return LLM(str(folder), **settings, **options)

    yield make
    cleanup_dist_env_and_memory()


def answers(llm, prompts):
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"enforce_eager": True}),
        ("qwen2", {"enforce_eager": True}),
        ("qwen2", {}),  # torch.compile
        ("qwen2", {"enforce_eager": True, "tensor_parallel_size": 2}),
        ("phi3", {"enforce_eager": True, "tensor_parallel_size": 2}),
        ("smollm2", {"enforce_eager": True}),
        ("llama-8", {"enforce_eager": True}),
        ("qwen2-8", {}),
        ("qwen2-8", {"enforce_eager": True, "tensor_parallel_size": 2}),
        ("phi3-8", {"enforce_eager": True, "tensor_parallel_size": 2}),
        ("smollm2-8", {"enforce_eager": True}),
    ],
    ids=lambda value: "-".join(map(str, value)) or "compiled" if isinstance(value, dict) else value,
)
def test_vllm_goes_on_as_transformers_does(served, engine, kind, options):
    folder = served(kind)
    expected = [greedy(folder, prompt, TOKENS) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert answers(engine(folder, **options), PROMPTS) == expected


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"enforce_eager": True}),
        ("qwen2", {}),
        ("phi3", {"enforce_eager": True}),
        ("smollm2", {}),
        ("qwen2-8", {}),
    ],
    ids=lambda value: "-".join(map(str, value)) or "compiled" if isinstance(value, dict) else value,
)
def test_the_groups_that_a_gpu_runs_go_on_as_transformers_does(served, engine, monkeypatch, kind, options):
    groups = []

    def grouped(merged, tensors, make=MergedLayer.grouped):
        groups.append(make(merged, tensors))
        return groups[-1]

    monkeypatch.setattr(serving_vllm, "_kernels_run", lambda device: True)
    monkeypatch.setattr(MergedLayer, "grouped", grouped)
    folder = served(kind)
    assert answers(engine(folder, **options), PROMPTS) == [greedy(folder, prompt, TOKENS) for prompt in PROMPTS]
    assert any(groups)  # where a shard is dense there is none


def without(folder, tensor, into):
    """A copy of the checkpoint that lacks one tensor."""
    shutil.copytree(folder, into)
    tensors = load_file(into / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


ATTENTION = "model.layers.0.self_attn"


# A ValueError, since vLLM checks its settings with pydantic, which makes one of its own of every ValueError.
def test_a_missing_factor_is_named_before_anything_is_loaded(served, engine, tmp_path):
    folder = without(served("qwen2"), f"{ATTENTION}.k_proj.up", tmp_path / "broken")
    with pytest.raises(ValueError, match=rf"tensor {ATTENTION}\.k_proj\.up is missing from .*model\.safetensors"):
        engine(folder, enforce_eager=True)


@pytest.fixture
def of_the_hub(monkeypatch):
    """Folders are as names on the hub, of which nothing can be said before their files are here."""
    monkeypatch.setattr(serving_vllm.GfwsvdVllmConfig, "maybe_update_config", lambda *_, **__: None)


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        *(("qwen2", name) for name in ("q_proj.weight", "k_proj.order", "v_proj.weight", "q_proj.bias", "o_proj.up")),
        *(("qwen2-8", name) for name in ("q_proj.scales", "k_proj.up")),
    ],
)
@pytest.mark.usefixtures("of_the_hub")
def test_a_tensor_that_does_not_come_is_named(served, engine, tmp_path, kind, tensor):
    folder = without(served(kind), f"{ATTENTION}.{tensor}", tmp_path / "broken")
    with pytest.raises(GfwsvdError, match=rf"missing from the checkpoint: {ATTENTION}\.{tensor};"):
        engine(folder, enforce_eager=True)


@pytest.mark.usefixtures("of_the_hub")
def test_factors_that_should_be_whole_numbers_are_named_before_they_are_rounded(served, engine, tmp_path):
    shutil.copytree(served("qwen2-8"), tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors[f"{ATTENTION}.q_proj.up"] = tensors[f"{ATTENTION}.q_proj.up"].float()
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GfwsvdError, match=rf"{ATTENTION}\.q_proj\.up should be torch.int8 by .*, got torch.float32"):
        engine(tmp_path / "broken", enforce_eager=True)


def test_factors_in_other_bits_are_refused(monkeypatch):
    monkeypatch.setattr(checkpoint, "parse_section", lambda _: {"a": Entry("lowrank", 4, 8), "b": Entry("dense", None)})
    assert serving_vllm.GfwsvdVllmConfig({}).entries
    monkeypatch.setattr(checkpoint, "parse_section", lambda _: {"a": Entry("lowrank", 4, 4)})
    with pytest.raises(GfwsvdError, match="in 8 bits or in floats, got bits 4: "):
        serving_vllm.GfwsvdVllmConfig({})


def test_gpt2_which_vllm_would_transpose_is_refused(served, engine):
    with pytest.raises(GfwsvdError, match=r"attn\.c_attn\.weight should be \(8, 128\) by config\.json, got \(128, 8\)"):
        engine(served("gpt2"), enforce_eager=True)


def test_the_plugin_is_an_entry_point_and_registering_again_is_harmless():
    (found,) = entry_points(group="vllm.general_plugins", name="gfwsvd")
    for _ in range(2):
        found.load()()
        assert get_quantization_config("gfwsvd") is serving_vllm.GfwsvdVllmConfig


def test_copied_key_and_value_heads_are_the_same_outputs_in_both_processes():
    # Four processes, eight query heads of 32 and two key and value heads, of which each is in two processes.
    layer = SimpleNamespace(output_sizes=[256, 128, 128], num_kv_head_replicas=2)
    firsts = []
    for layer.tp_rank in range(4):
        outputs = serving_vllm._outputs(layer, [64, 32, 32], 512)
        assert [d_out for d_out, _ in outputs] == [256, 64, 64]
        assert all(torch.equal(own, own[0] + torch.arange(len(own))) for _, own in outputs)
        firsts.append([int(own[0]) for _, own in outputs])
    assert firsts == [[0, 0, 0], [64, 0, 0], [128, 32, 32], [192, 32, 32]]
