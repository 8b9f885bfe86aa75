"""Small Llama-like models with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama, biases": LlamaConfig(**SHAPE, attention_bias=True),
    "llama, tied, positions scaled": LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=SCALED),
    "mistral, wide heads": MistralConfig(**SHAPE, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
}


def build_model(config: Any) -> Any:
    """A model of this configuration with random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases and norms start as if they were not there
            if p.dim() == 1:
                p += 0.3 * torch.randn_like(p)
    return model
