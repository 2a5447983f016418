"""Tiny random checkpoints in Hugging Face's format, written without torch or transformers.

Decides names, shapes and values of the weights; knows nothing of how they are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file


def write_tiny_llama(
    folder: str | Path,
    *,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 64,
    vocab: int = 64,
    context: int = 128,
    tied: bool = False,
    seed: int = 0,
    head: str = "lm",
) -> Path:
    """Writes `config.json` and `model.safetensors` of a random float32 Llama; returns the folder.

    `head` is `lm`, or `scalar` for a one-label sequence classifier (a critic or a reward model).
    Weights are normal with deviation 0.1, norms lie near 1, so that no two parameters are alike.
    Token 1 begins a text, token 2 ends it.
    """
    if head not in ("lm", "scalar"):
        raise ValueError(f"head {head!r} is neither 'lm' nor 'scalar'")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM" if head == "lm" else "LlamaForSequenceClassification"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    if head == "scalar":
        # transformers counts labels by these names, and needs a pad token to find the last token
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shapes = llama_tensors(config, tied=tied, head=head)
    generator = np.random.default_rng(seed)
    weights: dict[str, NDArray[Any]] = {}
    for name, shape in shapes.items():
        noise = 0.1 * generator.standard_normal(shape, dtype=np.float32)
        weights[name] = 1 + noise if name.endswith("norm.weight") else noise
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def llama_tensors(config: Mapping[str, Any], *, tied: bool, head: str) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the checkpoint. Linear weights are [out, in]."""
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (query, hidden),
            f"{prefix}.self_attn.k_proj.weight": (key, hidden),
            f"{prefix}.self_attn.v_proj.weight": (key, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, query),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (ffn, hidden),
            f"{prefix}.mlp.up_proj.weight": (ffn, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, ffn),
        }
    shapes["model.norm.weight"] = (hidden,)
    if head == "scalar":
        shapes["score.weight"] = (1, hidden)
    elif not tied:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes
