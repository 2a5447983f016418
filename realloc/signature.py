"""Names for what is measured once and shared by models: a shard of a layer, and a shard of the ends.

Two models whose layers have the same widths take the same time in a layer, however many layers they
have. The names are keys of the tables in hardware profiles: whoever measures and whoever plans make
them from a model's shape with the same functions. Nothing here knows seconds.
"""

from __future__ import annotations

from functools import lru_cache

from realloc.model_shape import ModelShape


@lru_cache(maxsize=256)
def layer_signature(shape: ModelShape, tp: int) -> str:
    """Everything that decides the kernels of one tensor-parallel shard of a layer.

    Such as `layer h4096 q8 kv2 d128 f3584 gated silu rms rot128`.
    """
    words = [
        "layer",
        f"h{shape.hidden}",
        f"q{shape.num_heads // tp}",
        f"kv{max(1, shape.num_kv_heads // tp)}",
        f"d{shape.head_dim}",
        f"f{shape.ffn_dim // tp}",
        *([f"e{shape.num_experts}x{shape.experts_per_token}"] if shape.is_moe else []),
        "gated" if shape.gated_mlp else "plain",
        shape.activation,
        shape.norm,
        f"rot{shape.rotary_dim}",
    ]
    flags = {
        "qkv-bias": shape.qkv_bias,
        "out-bias": shape.out_bias,
        "mlp-bias": shape.mlp_bias,
        "qk-norm": shape.qk_norm,
        "parallel": shape.parallel_residual,
        # with one shard there is no group, and the code around it is not run
        "shard": tp > 1,
    }
    return " ".join(words + [name for name, is_on in flags.items() if is_on])


@lru_cache(maxsize=256)
def ends_signature(shape: ModelShape, tp: int) -> str:
    """Everything that decides embedding, final norm, head and sampling of one shard.

    Such as `ends h4096 v32000 lm rms`.
    """
    head = shape.head + ("-tied" if shape.tied_embeddings and shape.head == "lm" else "")
    words = ["ends", f"h{shape.hidden}", f"v{-(-shape.vocab // tp)}", head, shape.norm]
    return " ".join(words + (["shard"] if tp > 1 else []))


def call_signature(name: str, computes: str, shape: ModelShape | None = None) -> str:
    """What a call does around a model: its name, and its loss or output, such as `call actor_train ppo`.

    With a shape, around that one: ` of ` its layer follows. What passes lose by following each other is
    counted with the call.
    """
    return f"call {name} {computes}" + (f" of {layer_signature(shape, 1)}" if shape else "")
