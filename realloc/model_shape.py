"""Model shapes: every number about a decoder that planning, layout and execution need.

Read from a Hugging Face `config.json` (Llama, Qwen2, Qwen3, GPT-NeoX) or by name. A shape holds
no weights and no paths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realloc.errors import InputError
from realloc.files import nearest

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
FAMILIES = ("llama", "qwen2", "qwen3", "gpt_neox", "mixtral", "qwen3_moe")
_MAX_LAYERS = 10_000
_MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling (`rope_type: llama3`) or linear scaling (the other numbers 0)."""

    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_positions: int = 0


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer.

    `head` is `lm` (logits over the vocabulary) or `scalar` (one number per token: a critic or a
    reward model). `rotary_dim` is how many of the `head_dim` dimensions are rotated. With
    `parallel_residual`, attention and MLP read the same input and add to the same residual
    (GPT-NeoX). With `num_experts`, every layer's MLP is that many of width `ffn_dim`, of which each
    token takes `experts_per_token`; such models are planned, not run.
    """

    family: str
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab: int
    max_positions: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    gated_mlp: bool = True
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rotary_dim: int = 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = field(default=None)
    parallel_residual: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    tied_embeddings: bool = False
    head: str = "lm"

    @property
    def is_moe(self) -> bool:
        """Whether the MLPs are mixtures of experts."""
        return self.num_experts > 0

    @property
    def num_params(self) -> int:
        from realloc.params import parameters

        return sum(spec.num_elements for spec in parameters(self))


def shape_from_config(config: Mapping[str, Any], where: str) -> ModelShape:
    """The shape in a Hugging Face `config.json`.

    Raises InputError for a model family or a setting that the decoder does not run.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError(
            f"{where}: model_type '{family}' is not supported: the decoder runs {', '.join(FAMILIES)}."
        )
    try:
        shape = _gpt_neox(config) if family == "gpt_neox" else _llama_like(config, str(family))
        shape = _with_rope(shape, config, where)
    except KeyError as error:
        raise InputError(f"{where}: the key {error} is missing from the model's config.") from None
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        # text or a list for a number, an infinite number, no heads to divide by, no rope settings
        raise InputError(f"{where}: a value in the model's config is wrong: {error}.") from None
    _check(shape, config, where)
    return shape


def _llama_like(config: Mapping[str, Any], family: str) -> ModelShape:
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    bias = bool(config.get("attention_bias", False))
    experts = 0
    if family in ("mixtral", "qwen3_moe"):
        experts = int(config["num_local_experts" if family == "mixtral" else "num_experts"])
    width = config["moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"]
    return ModelShape(
        family=family,
        hidden=hidden,
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        ffn_dim=int(width),
        vocab=int(config["vocab_size"]),
        max_positions=int(config.get("max_position_embeddings", 2048)),
        num_experts=experts,
        experts_per_token=int(config["num_experts_per_tok"]) if experts else 0,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        activation=str(config.get("hidden_act", "silu")),
        qkv_bias=True if family == "qwen2" else bias,
        out_bias=False if family == "qwen2" else bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        rotary_dim=head_dim,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _gpt_neox(config: Mapping[str, Any]) -> ModelShape:
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    rope = config.get("rope_parameters") or {}
    fraction = float(rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25)))
    bias = bool(config.get("attention_bias", True))
    return ModelShape(
        family="gpt_neox",
        hidden=hidden,
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn_dim=int(config["intermediate_size"]),
        vocab=int(config["vocab_size"]),
        max_positions=int(config.get("max_position_embeddings", 2048)),
        norm="layer",
        norm_eps=float(config.get("layer_norm_eps", 1e-5)),
        gated_mlp=False,
        activation=str(config.get("hidden_act", "gelu")),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        rotary_dim=int(hidden // heads * fraction),
        parallel_residual=bool(config.get("use_parallel_residual", True)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _with_rope(shape: ModelShape, config: Mapping[str, Any], where: str) -> ModelShape:
    """Adds the rotary settings, from `rope_parameters` or from the older keys."""
    from dataclasses import replace

    rope: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling: RopeScaling | None = None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_positions=int(rope["original_max_position_embeddings"]),
        )
    elif kind == "linear":
        scaling = RopeScaling(factor=float(rope["factor"]))
    elif kind != "default":
        raise InputError(f"{where}: rope_type '{kind}' is not supported (default, linear, llama3).")
    return replace(shape, rope_theta=float(theta), rope_scaling=scaling)


def _check(shape: ModelShape, config: Mapping[str, Any], where: str) -> None:
    numbers = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
    }
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{where}: {name} is {value}, must be at least 1.")
        most = _MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE
        if value > most:
            raise InputError(f"{where}: {name} is above the most that is supported, {most}.")
    if not 0 <= shape.rotary_dim <= shape.head_dim or shape.rotary_dim % 2:
        raise InputError(
            f"{where}: {shape.rotary_dim} of {shape.head_dim} dimensions of a head are rotated; "
            f"the number must be even."
        )
    if not (math.isfinite(shape.rope_theta) and shape.rope_theta > 0 and 0 <= shape.norm_eps < 1):
        raise InputError(
            f"{where}: rope_theta {shape.rope_theta} must be positive, "
            f"and the norm's eps {shape.norm_eps} between 0 and 1."
        )
    if shape.num_heads % shape.num_kv_heads:
        raise InputError(
            f"{where}: {shape.num_heads} attention heads are not a multiple of {shape.num_kv_heads} kv heads."
        )
    if shape.num_experts < 0 or not shape.experts_per_token <= shape.num_experts:
        raise InputError(
            f"{where}: each token takes {shape.experts_per_token} of {shape.num_experts} experts; it cannot "
            f"take more than there are."
        )
    if shape.is_moe and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        raise InputError(f"{where}: layers without experts between those with them are not supported.")
    if shape.activation not in ("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        raise InputError(f"{where}: hidden_act '{shape.activation}' is not supported.")
    if config.get("use_sliding_window"):
        raise InputError(f"{where}: sliding-window attention is not supported yet.")


def read_config(folder: str | Path) -> Mapping[str, Any]:
    """The `config.json` of a Hugging Face folder. Raises InputError."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such model folder (nor a model shape known by name).")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: has no config.json, so it is no Hugging Face model.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object.")
    return config


def resolve_shape(model: str, where: str) -> ModelShape:
    """The shape of a model given as a name (`llama-7b`) or as a Hugging Face folder.

    Raises InputError when it is neither.
    """
    from realloc.model_zoo import named_shapes

    shapes = named_shapes()
    if model in shapes:
        return shapes[model]
    if not Path(model).is_dir():
        hint = " Put a Hugging Face model there." if "/" in model else nearest(model, shapes)
        raise InputError(f"{where}: '{model}' is neither a folder nor a named model shape.{hint}")
    return shape_from_config(read_config(model), f"{model}/config.json")
