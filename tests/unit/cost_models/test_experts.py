"""Mixtures of experts: parameters, flops of the experts that are taken, bytes of those that are read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cost_models.compute import ComputeCosts, Pack
from cost_models.curve import Curve
from realloc.errors import InputError
from realloc.model_shape import shape_from_config
from realloc.model_zoo import named_shapes
from realloc.strategy import Strategy, forbidden
from runtime.supported import check_runs
from tests.unit.cost_models.cases import profile

MIXTRAL = named_shapes()["mixtral-8x7b"]
FREE_MEMORY = Curve(((1.0, 1e30),))


@pytest.mark.parametrize(
    ("name", "billions"),
    [("mixtral-8x7b", 46.7), ("mixtral-8x22b", 140.6), ("qwen3-30b-a3b", 30.5), ("qwen3-235b-a22b", 235.1)],
)
def test_parameters_are_those_published(name: str, billions: float):
    assert named_shapes()[name].num_params / 1e9 == pytest.approx(billions, abs=0.1)


def test_training_computes_with_the_experts_taken():
    costs = ComputeCosts(profile(memory=FREE_MEMORY), MIXTRAL, "bfloat16", 1)
    attention = 4096 * 128 * (32 + 8 + 8 + 32)
    active = attention + 8 * 4096 + 2 * 3 * 4096 * 14336
    assert costs.forward_layer_s(Pack(1000, 0, 1, 0)) == pytest.approx(2 * 1000 * active / 1e12, rel=1e-6)


def test_decoding_reads_few_experts_for_one_token_and_all_for_many():
    fast = (("bfloat16", Curve(((1.0, 1e18),))),)
    costs = ComputeCosts(profile(matmul=fast), MIXTRAL, "bfloat16", 1)
    expert, others = 3 * 4096 * 14336, 4096 * 128 * (32 + 8 + 8 + 32) + 8 * 4096

    def read(batch: int) -> float:
        """Elements, at 100 GB/s; a token's own vectors are few beside them."""
        return costs.decode_layer_s(batch, 1, 1e12) * 1e11 / 2

    assert read(1) == pytest.approx(others + 2 * expert, rel=0.01)
    assert read(100) == pytest.approx(others + 8 * expert, rel=0.05)
    dense = replace(MIXTRAL, num_experts=0, experts_per_token=0)
    assert (
        read(100)
        > 5 * ComputeCosts(profile(matmul=fast), dense, "bfloat16", 1).decode_layer_s(100, 1, 1e12) * 1e11 / 2
    )


def test_shards_split_every_expert():
    costs = ComputeCosts(profile(), MIXTRAL, "bfloat16", 4)
    whole = ComputeCosts(profile(), MIXTRAL, "bfloat16", 1)
    replicated = 2 * 4096 + 8 * 4096  # norms and router
    assert 4 * (costs.layer_elements - replicated) == whole.layer_elements - replicated
    assert forbidden(Strategy(tp=3), MIXTRAL) is not None


def test_a_config_says_how_many_experts():
    config = {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960, "rope_theta": 1e6, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    assert shape_from_config(config, "config.json") == named_shapes()["qwen3-30b-a3b"]
    with pytest.raises(InputError, match="takes 200 of 128 experts"):
        shape_from_config({**config, "num_experts_per_tok": 200}, "config.json")
    with pytest.raises(InputError, match="layers without experts"):
        shape_from_config({**config, "mlp_only_layers": [0]}, "config.json")


def test_the_runtime_refuses_them():
    check_runs(named_shapes()["llama-7b"], "here")
    with pytest.raises(InputError, match=r"here: the model has 8 experts in each layer.*does not run"):
        check_runs(MIXTRAL, "here")
