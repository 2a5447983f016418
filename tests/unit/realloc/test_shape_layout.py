"""Model shapes against published sizes; layouts against the whole parameters they cut up."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realloc.errors import InputError
from realloc.layout import Box, layout, on_stage, shard_boxes
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape, RopeScaling, read_config, resolve_shape, shape_from_config
from realloc.model_zoo import named_shapes
from realloc.params import parameters, split_range, stage_layers, tp_range
from realloc.strategy import Strategy, forbidden
from tests.tiny import write_tiny_llama

LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
QWEN2: Mapping[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
QWEN3: Mapping[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
}
NEOX: Mapping[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 50304,
    "hidden_act": "gelu",
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
}


@pytest.mark.parametrize(
    ("config", "name", "num_params"),
    [
        (LLAMA, "llama-7b", 6_738_415_616),
        (QWEN2, "qwen2.5-0.5b", 494_032_768),
        (QWEN3, "qwen3-0.6b", 596_049_920),
        (NEOX, "pythia-160m", 162_322_944),
    ],
)
def test_a_config_gives_the_named_shape(config: Mapping[str, Any], name: str, num_params: int) -> None:
    shape = shape_from_config(config, "config")
    assert shape == named_shapes()[name]
    assert shape.num_params == num_params


# parameter counts that the models' authors state, or that their published weights have
@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("llama-13b", 13_015_864_320),
        ("llama-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("pythia-70m", 70_426_624),
        ("pythia-1b", 1_011_781_632),
        ("pythia-12b", 11_846_072_320),
    ],
)
def test_named_shapes_have_the_published_size(name: str, num_params: int) -> None:
    assert named_shapes()[name].num_params == num_params


def test_a_checkpoint_has_the_parameters_of_its_shape(tmp_path: Path) -> None:
    for tied in (False, True):
        folder = write_tiny_llama(tmp_path / str(tied), tied=tied)
        shape = resolve_shape(str(folder), "here")
        header = (folder / "model.safetensors").read_bytes()
        tensors = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
        del tensors["__metadata__"]
        assert sum(math.prod(t["shape"]) for t in tensors.values()) == shape.num_params


def test_rope_settings() -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = shape_from_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": llama3}, "c")
    new = shape_from_config({**LLAMA, "rope_parameters": {"rope_theta": 5e5, **llama3}}, "c")
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    linear = shape_from_config({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}}, "c")
    assert linear.rope_scaling == RopeScaling(2.0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported: the decoder runs llama, qwen2, "),
        ({"model_type": None}, "model_type 'None' is not supported"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"hidden_size": "wide"}, "a value in the model's config is wrong"),
        ({"hidden_size": None}, "a value in the model's config is wrong"),
        ({"hidden_size": float("inf")}, "a value in the model's config is wrong"),
        ({"hidden_size": float("nan")}, "a value in the model's config is wrong"),
        ({"hidden_size": -4096}, "must be at least 1"),
        ({"num_attention_heads": 0}, "a value in the model's config is wrong"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is above the most"),
        ({"vocab_size": 10**40}, "vocab_size is above the most"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"num_key_value_heads": 5}, "not a multiple of 5 kv heads"),
        ({"head_dim": 7}, "7 of 7 dimensions of a head are rotated"),
        ({"rope_theta": 0}, "rope_theta 0.0 must be positive"),
        ({"rope_parameters": "default"}, "a value in the model's config is wrong"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "the key 'factor' is missing"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"use_sliding_window": True}, "sliding-window"),
    ],
)
def test_wrong_configs(change: Mapping[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match="^here: ") as caught:
        shape_from_config({**LLAMA, **change}, "here")
    assert expected in str(caught.value)


def test_missing_and_unreadable_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the key 'vocab_size' is missing"):
        shape_from_config({k: v for k, v in LLAMA.items() if k != "vocab_size"}, "here")
    with pytest.raises(InputError, match="here: 'lama-7b' is neither .* Did you mean 'llama-7b'"):
        resolve_shape("lama-7b", "here")
    with pytest.raises(InputError, match="has no config.json"):
        read_config(tmp_path)
    for text in ("{", "[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="not valid JSON"):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="expected a JSON object"):
        read_config(tmp_path)


def tiny(**changes: Any) -> ModelShape:
    shape = ModelShape(
        family="llama",
        hidden=24,
        num_layers=5,
        num_heads=12,
        num_kv_heads=2,
        head_dim=4,
        ffn_dim=36,
        vocab=37,
        max_positions=64,
        rotary_dim=4,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm=True,
    )
    return replace(shape, **changes)


SHAPES = {
    "untied": tiny(),
    "tied": tiny(tied_embeddings=True),
    "scalar": tiny(head="scalar", tied_embeddings=True),
    "layer norm": tiny(norm="layer", gated_mlp=False, num_kv_heads=12),
}
STRATEGIES = [
    Strategy(dp, tp, pp)
    for dp, tp, pp in [
        (1, 1, 1),
        (2, 1, 1),
        (1, 2, 1),
        (1, 4, 1),
        (1, 12, 1),
        (1, 1, 2),
        (1, 1, 5),
        (2, 2, 3),
        (2, 6, 2),
    ]
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_the_boxes_of_a_layout_tile_every_parameter(name: str, strategy: Strategy) -> None:
    """Each element lies on every data replica once, or once for each copy of its kv head."""
    shape = SHAPES[name]
    assert forbidden(strategy, shape) is None
    mesh = DeviceMesh(strategy.size, strategy.size, strategy.size)  # not at rank 0
    found = layout(shape, mesh, strategy)
    assert found.ranks == tuple(mesh.ranks)
    for spec in parameters(shape):
        count = np.zeros(spec.shape, dtype=np.int64)
        for rank in found.ranks:
            if spec.name in found.boxes[rank]:
                count[found.boxes[rank][spec.name].slices] += 1
        copies = strategy.dp
        if spec.tp_dim is None:
            copies *= strategy.tp
        elif ".attn.k." in spec.name or ".attn.v." in spec.name:
            copies *= max(1, strategy.tp // shape.num_kv_heads)
        if spec.on_first and spec.on_last and strategy.pp > 1:
            copies *= 2
        assert (count == copies).all(), spec.name


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_layout_counts_its_elements(strategy: Strategy) -> None:
    mesh = DeviceMesh(0, strategy.size, strategy.size)
    found = layout(SHAPES["untied"], mesh, strategy)
    for rank in mesh.ranks:
        boxes = found.boxes[rank].values()
        assert found.num_elements(rank) == sum(math.prod(box.shape) for box in boxes) > 0
    assert found.num_elements(10_000) == 0


def test_stages_own_layers_in_order() -> None:
    shape = tiny(tied_embeddings=True)
    layers = [stage_layers(shape, 3, stage) for stage in range(3)]
    assert [layer for stage in layers for layer in stage] == list(range(5))
    assert min(map(len, layers)) >= 1
    by_name = {spec.name: spec for spec in parameters(shape)}
    owners = {n: [s for s in range(3) if on_stage(spec, shape, 3, s)] for n, spec in by_name.items()}
    assert owners["embed.weight"] == [0, 2]  # tied: the last stage computes logits with it
    assert owners["final_norm.weight"] == [2]
    assert owners["layers.0.attn.q.weight"] == [0]
    assert owners["layers.4.mlp.down.weight"] == [2]
    assert all(len(stages) == 1 for name, stages in owners.items() if name != "embed.weight")
    untied = {spec.name: spec for spec in parameters(tiny())}
    assert not untied["embed.weight"].on_last
    assert untied["head.weight"].on_last


def test_heads_stay_whole_and_kv_heads_are_shared_by_neighbours() -> None:
    specs = {spec.name: spec for spec in parameters(tiny())}
    query, key = specs["layers.0.attn.q.weight"], specs["layers.0.attn.k.weight"]
    for tp in (1, 2, 3, 4, 6, 12):
        for rank in range(tp):
            cut = tp_range(query, tp, rank)
            assert cut is not None
            assert cut[0] % 4 == cut[1] % 4 == 0
    assert [tp_range(key, 4, rank) for rank in range(4)] == [(0, 4), (0, 4), (4, 8), (4, 8)]
    # a rank's query heads must use the kv head that it holds: 3 query heads a rank, 6 a kv head
    for rank in range(4):
        cut, kv = tp_range(query, 4, rank), tp_range(key, 4, rank)
        assert cut is not None
        assert kv is not None
        assert {head // 6 for head in range(cut[0] // 4, cut[1] // 4)} == {kv[0] // 4}
    assert tp_range(specs["layers.0.attn_norm.weight"], 4, 1) is None


def test_ranges_are_even_and_whole() -> None:
    for total in (1, 5, 37):
        for parts in (1, 2, 3, 5):
            ranges = [split_range(total, parts, part) for part in range(parts)]
            assert [i for a, b in ranges for i in range(a, b)] == list(range(total))
            sizes = [b - a for a, b in ranges]
            assert max(sizes) - min(sizes) <= 1


def test_boxes() -> None:
    box = Box((2, 0), (6, 4))
    assert box.shape == (4, 4)
    assert box.num_elements == 16
    assert box.intersect(Box((4, 2), (9, 3))) == Box((4, 2), (6, 3))
    assert box.intersect(Box((6, 0), (7, 4))) is None
    data = np.arange(80).reshape(10, 8)
    inner = Box((3, 1), (5, 2))
    np.testing.assert_array_equal(data[box.slices][inner.within(box)], data[inner.slices])


def test_layouts_do_not_depend_on_the_data_replica() -> None:
    shape = SHAPES["untied"]
    assert shard_boxes(shape, 2, 1, 0, 0) is shard_boxes(shape, 2, 1, 0, 0)
    found = layout(shape, DeviceMesh(0, 4, 4), Strategy(dp=2, tp=2))
    assert found.boxes[0] == found.boxes[2] != found.boxes[1]
