"""The parameters of a model shape: global names and shapes, and how each may be split.

One list drives everything that touches weights: slicing at load, layouts, reallocation, memory,
optimizer, checkpoints, Hugging Face export. Linear weights are [out, in] as in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from realloc.model_shape import ModelShape

EMBED = "embed.weight"
HEAD = "head.weight"
FINAL_NORM = "final_norm"


@dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    `tp_dim` is the dim split over tensor-parallel ranks (None: every rank holds all of it).
    `unit` is the number of rows along `tp_dim` that must stay together (a kv head); parameters
    with fewer units than tp ranks are replicated over groups of ranks. `layer` is the layer that
    owns it, None for embedding, final norm and head. `on_first` and `on_last` say whether the
    first and the last pipeline stage hold it (a tied embedding is on both).
    """

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None = None
    unit: int = 1
    layer: int | None = None
    on_first: bool = False
    on_last: bool = False

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def split_range(total: int, parts: int, part: int) -> tuple[int, int]:
    """The `part`-th of `parts` contiguous ranges of 0..total, as even as possible."""
    return part * total // parts, (part + 1) * total // parts


def stage_layers(shape: ModelShape, pp: int, stage: int, virtual: int = 1) -> Sequence[int]:
    """The layers that a pipeline stage holds, ascending; of all its chunks when `virtual` > 1."""
    return [layer for chunk in range(virtual) for layer in chunk_layers(shape, pp, stage, chunk, virtual)]


def chunk_layers(shape: ModelShape, pp: int, stage: int, chunk: int, virtual: int) -> range:
    """The layers of one of the `virtual` chunks of a stage: chunks go round the stages in turn."""
    return range(*split_range(shape.num_layers, pp * virtual, chunk * pp + stage))


def tp_range(spec: ParamSpec, tp: int, rank: int) -> tuple[int, int] | None:
    """Start and stop along `tp_dim` of the shard of tensor-parallel rank `rank` of `tp`.

    None when the parameter is not split. Parameters with fewer units than ranks (kv heads) are
    replicated: `tp / units` neighbouring ranks hold the same unit.
    """
    if spec.tp_dim is None:
        return None
    units = spec.shape[spec.tp_dim] // spec.unit
    if spec.unit > 1 and units < tp:
        unit = rank * units // tp
        return unit * spec.unit, (unit + 1) * spec.unit
    start, stop = split_range(units, tp, rank)
    return start * spec.unit, stop * spec.unit


@lru_cache(maxsize=64)
def parameters(shape: ModelShape) -> tuple[ParamSpec, ...]:
    """All parameters of the shape, in the order of the forward pass."""
    specs = [
        ParamSpec(
            EMBED,
            (shape.vocab, shape.hidden),
            tp_dim=0,
            on_first=True,
            on_last=shape.tied_embeddings and shape.head == "lm",
        )
    ]
    for layer in range(shape.num_layers):
        specs += _layer(shape, layer)
    specs += _norm(shape, FINAL_NORM, on_last=True)
    if shape.head == "scalar":
        specs.append(ParamSpec(HEAD, (1, shape.hidden), on_last=True))
    elif not shape.tied_embeddings:
        specs.append(ParamSpec(HEAD, (shape.vocab, shape.hidden), tp_dim=0, on_last=True))
    return tuple(specs)


def _layer(shape: ModelShape, layer: int) -> list[ParamSpec]:
    prefix = f"layers.{layer}"
    hidden, dim = shape.hidden, shape.head_dim
    specs = _norm(shape, f"{prefix}.attn_norm", layer=layer)
    for name, heads in (("q", shape.num_heads), ("k", shape.num_kv_heads), ("v", shape.num_kv_heads)):
        rows = heads * dim
        specs.append(ParamSpec(f"{prefix}.attn.{name}.weight", (rows, hidden), 0, dim, layer))
        if shape.qkv_bias:
            specs.append(ParamSpec(f"{prefix}.attn.{name}.bias", (rows,), 0, dim, layer))
    if shape.qk_norm:
        specs.append(ParamSpec(f"{prefix}.attn.q_norm.weight", (dim,), layer=layer))
        specs.append(ParamSpec(f"{prefix}.attn.k_norm.weight", (dim,), layer=layer))
    width = shape.num_heads * dim
    specs.append(ParamSpec(f"{prefix}.attn.o.weight", (hidden, width), 1, dim, layer))
    if shape.out_bias:
        specs.append(ParamSpec(f"{prefix}.attn.o.bias", (hidden,), layer=layer))
    specs += _norm(shape, f"{prefix}.mlp_norm", layer=layer)
    if shape.is_moe:
        return specs + _experts(shape, prefix, layer)
    for name in ("gate", "up") if shape.gated_mlp else ("up",):
        specs.append(ParamSpec(f"{prefix}.mlp.{name}.weight", (shape.ffn_dim, hidden), 0, 1, layer))
        if shape.mlp_bias:
            specs.append(ParamSpec(f"{prefix}.mlp.{name}.bias", (shape.ffn_dim,), 0, 1, layer))
    specs.append(ParamSpec(f"{prefix}.mlp.down.weight", (hidden, shape.ffn_dim), 1, 1, layer))
    if shape.mlp_bias:
        specs.append(ParamSpec(f"{prefix}.mlp.down.bias", (hidden,), layer=layer))
    return specs


def _experts(shape: ModelShape, prefix: str, layer: int) -> list[ParamSpec]:
    """The router, and all experts' matrices as one: each expert is split over tp like an MLP."""
    experts, width, hidden = shape.num_experts, shape.ffn_dim, shape.hidden
    specs = [ParamSpec(f"{prefix}.mlp.router.weight", (experts, hidden), layer=layer)]
    for name in ("gate", "up") if shape.gated_mlp else ("up",):
        specs.append(ParamSpec(f"{prefix}.mlp.experts.{name}.weight", (experts, width, hidden), 1, 1, layer))
    specs.append(ParamSpec(f"{prefix}.mlp.experts.down.weight", (experts, hidden, width), 2, 1, layer))
    return specs


def _norm(
    shape: ModelShape, name: str, *, layer: int | None = None, on_last: bool = False
) -> list[ParamSpec]:
    names = ("weight", "bias") if shape.norm == "layer" else ("weight",)
    return [ParamSpec(f"{name}.{part}", (shape.hidden,), layer=layer, on_last=on_last) for part in names]
