"""Where Hugging Face checkpoints keep our parameters: names and fusions, family by family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from realloc.params import EMBED, FINAL_NORM, HEAD, ParamSpec

SCORE = "score.weight"


@dataclass(frozen=True)
class Source:
    """The tensor of a checkpoint that holds a parameter.

    `names` are tried in order (writers differ); the first is the one we write. With `part`,
    the tensor holds q, k and v, head by head: head h has the rows (3 h + part) * head_dim on.
    """

    names: tuple[str, ...]
    part: int | None = None


@dataclass(frozen=True)
class Family:
    """How one family names things. `modules` maps the part of our name after the layer number."""

    trunk: str
    embed: str
    final_norm: str
    head: tuple[str, ...]
    modules: Mapping[str, str]
    fused_qkv: str | None = None
    causal_lm: str = ""
    classifier: str = ""


_LLAMA_MODULES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def _llama_like(name: str) -> Family:
    return Family(
        trunk="model",
        embed="embed_tokens",
        final_norm="norm",
        head=("lm_head.weight",),
        modules=_LLAMA_MODULES,
        causal_lm=f"{name}ForCausalLM",
        classifier=f"{name}ForSequenceClassification",
    )


FAMILIES: Mapping[str, Family] = {
    "llama": _llama_like("Llama"),
    "qwen2": _llama_like("Qwen2"),
    "qwen3": _llama_like("Qwen3"),
    "gpt_neox": Family(
        trunk="gpt_neox",
        embed="embed_in",
        final_norm="final_layer_norm",
        head=("embed_out.weight", "lm_head.weight"),
        modules={
            "attn_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "attn.o": "attention.dense",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        },
        fused_qkv="attention.query_key_value",
        causal_lm="GPTNeoXForCausalLM",
        classifier="GPTNeoXForSequenceClassification",
    ),
}


def source(family: Family, spec: ParamSpec) -> Source:
    """Where a checkpoint of this family keeps the parameter."""
    if spec.name == EMBED:
        return Source((f"{family.trunk}.{family.embed}.weight",))
    if spec.name == HEAD:
        return Source((SCORE,) if spec.shape[0] == 1 and spec.tp_dim is None else family.head)
    module, _, kind = spec.name.rpartition(".")
    if module == FINAL_NORM:
        return Source((f"{family.trunk}.{family.final_norm}.{kind}",))
    inner = module.removeprefix(f"layers.{spec.layer}.")
    prefix = f"{family.trunk}.layers.{spec.layer}"
    if family.fused_qkv is not None and inner in ("attn.q", "attn.k", "attn.v"):
        part = ("attn.q", "attn.k", "attn.v").index(inner)
        return Source((f"{prefix}.{family.fused_qkv}.{kind}",), part)
    return Source((f"{prefix}.{family.modules[inner]}.{kind}",))
