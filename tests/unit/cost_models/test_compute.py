"""Compute: roofline limits and hand-computed seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.compute import ComputeCosts, Pack
from cost_models.curve import Curve
from cost_models.profile import Attention
from realloc.model_shape import ModelShape
from realloc.model_zoo import named_shapes
from tests.unit.cost_models.cases import profile

SHAPE = ModelShape(
    family="llama", hidden=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=128,
    vocab=1000, max_positions=512, rotary_dim=16,
)  # fmt: skip


def costs(tp: int = 1, shape: ModelShape = SHAPE, **changes: object) -> ComputeCosts:
    return ComputeCosts(profile(**changes), shape, "float32", tp)


def test_a_large_product_is_bound_by_arithmetic():
    # 2 * 4096^3 flops at 1 Tflops/s
    assert costs().matmul_s(4096, 4096, 4096) == pytest.approx(2 * 4096**3 / 1e12)


def test_a_matrix_vector_product_is_bound_by_memory():
    # 4 bytes of each weight, and of the two vectors, at 100 GB/s; arithmetic would take half of it
    fast = costs(matmul=(("float32", Curve(((1.0, 1e15),))),))
    assert fast.matmul_s(1, 4096, 4096) == pytest.approx(4 * (4096**2 + 2 * 4096) / 1e11)


def test_every_product_pays_its_launch():
    assert costs(launch_s=1.0).matmul_s(1, 1, 1) == pytest.approx(1.0, rel=1e-6)


def test_attention_takes_half_of_the_square_by_hand():
    only_attention = costs(
        matmul=(("float32", Curve(((1.0, 1e12),))),),
        memory=Curve(((1.0, 1e30),)),
        attention=Attention(0.5, 0, False),
    )
    with_attention = only_attention.forward_layer_s(Pack(100, 100**2, 1, 0))
    without = only_attention.forward_layer_s(Pack(100, 0, 1, 0))
    # causal: 4 * 100^2 / 2 * (4 heads of 16) flops at half of 1 Tflops/s
    assert with_attention - without == pytest.approx(2 * 100**2 * 64 / 0.5e12)


def test_ragged_sequences_take_a_kernel_each_where_kernels_are_per_sequence():
    seconds = {}
    for per_sequence in (False, True):
        c = costs(attention=Attention(1.0, 1.0, per_sequence))
        seconds[per_sequence] = c.forward_layer_s(Pack(100, 1000, 10, 0))
    assert seconds[True] - seconds[False] == pytest.approx(9.0)


def test_gradients_of_slices_grow_with_their_number():
    c = costs(attention=Attention(1.0, 0.0, True))
    one, ten = (c.backward_layer_s(Pack(100, 1000, runs, 0)) for runs in (1, 10))
    # ten times 100 tokens of q, k and v (128 fp32 numbers), written and added
    assert ten - one == pytest.approx(2 * 10 * 100 * 128 * 4 / 1e11)


def test_layer_flops_follow_the_parameters():
    c = costs(memory=Curve(((1.0, 1e30),)))
    weights = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    assert c.forward_layer_s(Pack(50, 0, 1, 0)) == pytest.approx(2 * 50 * weights / 1e12)
    assert c.backward_layer_s(Pack(50, 0, 1, 0)) == pytest.approx(4 * 50 * weights / 1e12)


def test_elements_of_stages_add_up_to_the_model():
    whole = costs()
    assert whole.stage_elements(1, 0) == SHAPE.num_params
    assert whole.stage_elements(2, 0) + whole.stage_elements(2, 1) == SHAPE.num_params
    tied = costs(shape=replace(SHAPE, tied_embeddings=True))
    table = 1000 * 64
    assert tied.stage_elements(2, 0) + tied.stage_elements(2, 1) == SHAPE.num_params  # held twice
    assert tied.stage_elements(1, 0) == SHAPE.num_params - table


def test_shards_hold_replicated_norms_and_kv_heads():
    sharded = costs(tp=4)  # 2 kv heads on 4 ranks: each rank has one
    layer = 64 * (16 + 16 + 16 + 16) + 3 * 64 * 32 + 2 * 64
    assert sharded.layer_elements == layer
    assert sharded.partial_elements(False) == 2 * 32 * 64  # both kv heads' gradients are summed
    assert costs(tp=2).partial_elements(False) == 0
    # two norms of 64 more when every rank has its own rows
    assert costs(tp=2).partial_elements(True) == 2 * 64


def test_the_optimizer_is_bound_by_memory():
    # 28 bytes for AdamW, 16 to clear, measure and scale the gradient, at 100 GB/s
    assert costs().optimizer_s(10**9, 0) == pytest.approx(44e9 / 1e11)


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([1, 2, 4]))
def test_more_tokens_never_take_less_time(a: int, b: int, tp: int):
    c = ComputeCosts(profile(), named_shapes()["qwen2.5-0.5b"], "bfloat16", 1 if tp == 4 else tp)
    few, many = sorted((a, b))
    for price in (c.forward_layer_s, c.backward_layer_s):
        assert price(Pack(few, few**2, 1, few)) <= price(Pack(many, many**2, 1, many))
    assert c.decode_layer_s(few, 100, 1e9) <= c.decode_layer_s(many, 100, 1e9)
    assert c.head_s(few) <= c.head_s(many)
    assert c.sample_s(few) <= c.sample_s(many)
