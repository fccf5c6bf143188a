"""Compressed models for vLLM, and what transformers says of them."""

import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gfwsvd import calibrate, compress, load_model, save_pretrained, token_batches
from test_hf import compress_by_hand

SIZES = {  # vLLM on a CPU wants heads of 32 at least
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TINY: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),  # q, k and v have biases
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),  # q, k and v are one layer of the checkpoint too
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=128, n_layer=1, n_head=4, n_positions=128)),
}


def random_model(build: Callable[[], nn.Module]) -> nn.Module:
    """A float32 model with random biases too, the same at every call."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.eval()


def save_compressed(kind: str, folder: Path, smollm2: Path) -> None:
    """Write a tiny model, whose layers are low-rank, pivoted and dense by turns, or SmolLM2 at keep 0.9."""
    if kind in TINY:
        model = random_model(TINY[kind])
        save_pretrained(model, folder, report=compress_by_hand(model))
        return
    model, tokenizer, _ = load_model(str(smollm2))
    text = "\n".join(pydoc_data.topics.topics.values())
    statistics = calibrate(model, token_batches(text, tokenizer, sequences=2, seq_len=256))
    report = compress(model, statistics=statistics, method="kfac", keep=0.9)
    save_pretrained(model, folder, report=report, tokenizer=tokenizer)


@torch.no_grad()
def greedy(folder: Path, prompt: list[int], tokens: int) -> list[int]:
    """The tokens with which transformers goes on, always the likeliest."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "min_new_tokens": tokens, "max_new_tokens": tokens}
    return model.generate(ids, do_sample=False, **options)[0, len(prompt) :].tolist()
