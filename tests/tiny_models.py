"""Tiny random models of each kind that the tests cover, built from configurations alone: nothing to download."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gfwsvd.layers import LowRankLinear, dense_weight, find_linears

VOCABULARY = 128
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
_COMMON = {**_TOKENS, **_SIZES, "intermediate_size": 160, "initializer_range": 0.1}


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_COMMON, num_key_value_heads=2))


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_COMMON, num_key_value_heads=2, head_dim=24))


def _mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_COMMON, num_key_value_heads=2))


def _gemma() -> nn.Module:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**_COMMON, num_key_value_heads=1, head_dim=16))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(**_TOKENS, n_embd=64, n_layer=2, n_head=4, n_inner=160, n_positions=128, initializer_range=0.1)
    )


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(OPTConfig(**_TOKENS, **_SIZES, ffn_dim=160, word_embed_proj_dim=64, init_std=0.1))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_COMMON))


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma": _gemma,
    "gpt2": _gpt2,
    "opt": _opt,
    "bert": _bert,
}
KINDS = tuple(_BUILDERS)
CAUSAL_KINDS = tuple(kind for kind in KINDS if kind != "bert")


def tiny_model(kind: str, *, seed: int = 0) -> nn.Module:
    """A random float32 model in eval mode, the same at every call, with about 100,000 parameters.

    llama, qwen3 and mistral share each key and value head among two query heads, gemma one among four; gemma, gpt2, opt
    and bert tie their embeddings; gpt2 has Conv1D layers; bert is a masked language model, the others causal ones.
    Biases are random too, where transformers would start them at zero: a test must notice a lost one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[kind]()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model.eval()


def cut(model: nn.Module, rank: int) -> dict[str, LowRankLinear]:
    """Low-rank layers, as two factors, of all linear ones of a model."""
    layers = {}
    for name, module in find_linears(model).items():
        left, values, right = torch.linalg.svd(dense_weight(module).detach(), full_matrices=False)
        bias = None if module.bias is None else module.bias.detach()
        layers[name] = LowRankLinear.from_factors(left[:, :rank] * values[:rank], right[:rank], bias)
    return layers


def random_tokens(sequences: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Token numbers (sequences, length) int64 without special ones."""
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def word_tokenizer() -> Any:
    """A tokenizer of the words w0, w1, ... with their own numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")


def tiny_workspace(folder: Path, *, words: int, blocks: int = 2) -> Path:
    """Writes a tiny Llama of so many `blocks`, one or two, with its tokenizer to `folder / "model"` and a text of
    random words to `folder / "text.txt"`; returns `folder`."""
    model: Any = tiny_model("llama")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:blocks], blocks
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    numbers = torch.randint(VOCABULARY, (words,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{number}" for number in numbers))
    return folder
