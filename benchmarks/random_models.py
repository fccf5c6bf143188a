"""Models of published shapes with random weights, for what does not depend on the values: speed and memory."""

from typing import Any

import torch
from torch import nn

# From the published configurations
SHAPES: dict[str, dict[str, int]] = {
    "llama-3.1-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256},
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "num_hidden_layers": 32, "vocab_size": 32000},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "num_hidden_layers": 30, "vocab_size": 49152},
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 128},
}


def random_model(shape: str, *, dtype: torch.dtype, device: str, layers: int | None = None) -> nn.Module:
    """A Llama of that shape in eval mode, or of its first layers alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = dict(SHAPES[shape])
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    finally:
        torch.set_default_dtype(default)
