"""Tiny random models of every family in Hugging Face's format, made by `transformers` (the oracle)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf

_SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 61,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE: Mapping[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=False),
    "llama-tied": lambda: hf.LlamaConfig(**_SIZES, num_key_value_heads=1, tie_word_embeddings=True),
    "llama3-rope": lambda: hf.LlamaConfig(
        **_SIZES, num_key_value_heads=4, rope_parameters=dict(_LLAMA3_ROPE)
    ),
    "llama-linear-rope": lambda: hf.LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    ),
    "llama-biases": lambda: hf.LlamaConfig(
        **_SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True, hidden_act="gelu_new"
    ),
    "qwen2": lambda: hf.Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=16),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SIZES),
    "gpt_neox-serial": lambda: hf.GPTNeoXConfig(**_SIZES, use_parallel_residual=False),
}


def write_model(folder: str | Path, name: str, *, seed: int = 0, head: str = "lm") -> Path:
    """Writes the model `name` of CONFIGS with random weights, none of which are alike or zero.

    `head` is `lm` or `scalar` (one-label sequence classifier). Returns the folder.
    """
    config = CONFIGS[name]()
    torch.manual_seed(seed)
    if head == "scalar":
        config.num_labels = 1
        model = hf.AutoModelForSequenceClassification.from_config(config)
    else:
        model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, param in model.named_parameters():
            base = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            param.copy_(base + 0.15 * torch.randn_like(param))
    model.save_pretrained(folder)
    return Path(folder)


def load_oracle(folder: str | Path, *, head: str = "lm") -> Any:
    """The `transformers` model of a folder, in float32 and evaluation mode."""
    kind = hf.AutoModelForSequenceClassification if head == "scalar" else hf.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def edit_config(folder: str | Path, **changes: Any) -> None:
    """Changes keys of the folder's config.json."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
