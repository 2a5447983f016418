"""Calls: terms by hand, monotonicity, and published speeds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cost_models.calls import TERMS, CallPricer, distinct_stages
from cost_models.communication import GroupShape, group_shape
from cost_models.compute import ComputeCosts
from cost_models.curve import Curve
from cost_models.link import Link
from cost_models.profile import load_profile
from realloc.dataflow import Call, CallKind, Output
from realloc.experiment import Workload
from realloc.lengths import Lengths
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape
from tests.unit.cost_models.cases import FREE, cost_model, experiment, place, profile

STRATEGIES = ("d1t1p1", "d8t1p1", "d1t8p1", "d1t1p8m8", "d2t2p2m4", "d4t2p1m2")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_terms_sum_to_the_call_and_none_is_negative(strategy: str):
    model = cost_model(experiment(), load_profile("a100-80gb"))
    for call in model.graph.calls:
        terms = model.call_terms(call, place(strategy))
        assert tuple(terms) == TERMS
        assert min(terms.values()) >= 0.0
        assert sum(terms.values()) == pytest.approx(model.call_s(call, place(strategy)))
        assert terms["compute"] > 0


def test_terms_appear_only_with_their_parallelism():
    model = cost_model(experiment(), load_profile("a100-80gb"))
    train = model.graph.by_name["actor_train"]
    alone = model.call_terms(train, place("d1t1p1"))
    assert alone["tp_communication"] == alone["pp_communication"] == alone["bubble"] == 0.0
    assert alone["dp_communication"] == 0.0
    assert alone["optimizer"] > 0
    assert model.call_terms(train, place("d1t2p1"))["tp_communication"] > 0
    assert model.call_terms(train, place("d2t1p1"))["dp_communication"] > 0
    staged = model.call_terms(train, place("d1t1p2m4"))
    assert staged["bubble"] > 0
    assert staged["pp_communication"] > 0
    assert model.call_terms(model.graph.by_name["ref_inf"], place("d2t1p1"))["dp_communication"] == 0


def test_data_parallelism_divides_compute_exactly_without_overheads():
    model = cost_model(experiment(sequences=64), profile(memory=Curve(((1.0, 1e30),))))
    call = model.graph.by_name["ref_inf"]
    one = model.call_terms(call, place("d1t1p1"))["compute"]
    assert model.call_terms(call, place("d8t1p1"))["compute"] == pytest.approx(one / 8)


def test_all_reduce_of_training_gradients_by_hand():
    model = cost_model(experiment(sequences=8), profile())
    train = model.graph.by_name["actor_train"]
    assert train.epochs == 1
    # fp32 gradients of every parameter over a group of 2 at 10 GB/s and 1 ms, once a mini-batch
    elements = model.shape("actor").num_params
    expected = train.mini_batches * (1e-3 + 4 * elements / 1e10)
    assert model.call_terms(train, place("d2t1p1"))["dp_communication"] == pytest.approx(expected)


def test_tp_all_reduces_of_inference_by_hand():
    model = cost_model(experiment(sequences=8, prompt=64, response=64), profile())
    call = model.graph.by_name["critic_inf"]
    # embedding and two of each layer, of 8 * 128 tokens x 4096 x 2 bytes; a scalar head adds none
    each = 1e-3 + 8 * 128 * 4096 * 2 / 1e10
    assert model.call_terms(call, place("d1t2p1"))["tp_communication"] == pytest.approx(65 * each)


def test_the_bubble_shrinks_with_micro_batches():
    model = cost_model(experiment(), profile(intra_node=FREE, launch_s=0.0))
    call = model.graph.by_name["critic_inf"]
    shares = []
    for micro_batches in (1, 2, 8):
        terms = model.call_terms(call, place(f"d1t1p4m{micro_batches}"))
        shares.append(terms["bubble"] / terms["compute"])
    # equal stages: (pp - 1) / micro-batches
    assert shares == pytest.approx([3.0, 1.5, 0.375], rel=0.02)


def test_generation_with_fewer_groups_than_stages_waits():
    model = cost_model(experiment(), profile())
    call = model.graph.by_name["actor_gen"]
    assert model.call_terms(call, place("d1t1p4m4"))["bubble"] == 0.0
    one_group = model.call_terms(call, place("d1t1p4m1"))
    assert one_group["bubble"] == pytest.approx(3 * one_group["compute"])


def test_decoding_runs_to_the_longest_response():
    half = experiment(sequences=8, response=256, mean_response=128)
    short, ragged, full = (
        cost_model(made, load_profile("h100-sxm"))
        for made in (experiment(sequences=8, response=128), half, experiment(sequences=8, response=256))
    )
    times = [m.call_s(m.graph.by_name["actor_gen"], place("d1t1p1")) for m in (short, ragged, full)]
    # weights are read for every step, so half the tokens save little
    assert 1.8 * times[0] < times[1] < times[2]


def test_free_slots_are_taken_at_once():
    """Four groups on one rank: with ragged responses nobody waits for the longest of each group."""
    hardware = load_profile("h100-sxm")

    def seconds(mean: float, strategy: str) -> float:
        model = cost_model(experiment(sequences=64, prompt=16, response=1024, mean_response=mean), hardware)
        return model.call_s(model.graph.by_name["actor_gen"], place(strategy))

    # full lengths: four times the steps; else three waves of mean responses and one to the longest
    assert seconds(1024, "d1t1p1m4") > 2 * seconds(1024, "d1t1p1")
    assert seconds(256, "d1t1p1m4") < 0.5 * seconds(1024, "d1t1p1m4")


def test_a_prompt_is_priced_once_for_all_its_samples():
    made = experiment(sequences=64, prompt=4096, response=2)
    shared = replace(made, workload=replace(made.workload, samples_per_prompt=16))
    one, many = (cost_model(x, load_profile("h100-sxm")) for x in (shared, made))
    call = one.graph.by_name["actor_gen"]
    times = [model.call_s(call, place("d1t1p1")) for model in (one, many)]
    assert times[0] < times[1] / 8


def test_ranks_that_share_cores_slow_each_other_down():
    crowded = profile(concurrency=Curve(((1.0, 1.0), (4.0, 2.0))), intra_node=FREE)
    model = cost_model(experiment(), crowded, per_node=4)
    call = model.graph.by_name["critic_inf"]
    alone = model.call_s(call, place("d1t1p1", per_node=4))
    assert model.call_s(call, place("d4t1p1", per_node=4)) == pytest.approx(alone / 4 * 2.0, rel=1e-3)


def test_compute_calls_cost_a_constant_per_sequence():
    made = replace(experiment(), reward="experiments.rewards:length")
    made = replace(made, models={r: m for r, m in made.models.items() if r != "reward"})
    model = cost_model(made, profile())
    call = model.graph.by_name["rew_inf"]
    assert call.kind is CallKind.COMPUTE
    assert model.call_s(call, place("d4t1p1")) == pytest.approx(128 * 1e-3)
    assert model.call_memory(call, place("d4t1p1")).total == 0


def test_stages_of_equal_content_are_priced_once():
    stages = distinct_stages((8, 8, 8, 8))
    assert [(s.index, s.count, s.first, s.last) for s in stages] == [
        (0, 1, True, False), (1, 2, False, False), (3, 1, False, True),
    ]  # fmt: skip


def test_groups_know_how_many_nodes_they_cross():
    two_nodes = DeviceMesh(0, 16, 8)
    assert group_shape(two_nodes, 1, 8) == GroupShape(1, 8)
    assert group_shape(two_nodes, 8, 2) == GroupShape(2, 1)
    assert group_shape(two_nodes, 4, 4) == GroupShape(2, 2)
    assert group_shape(DeviceMesh(4, 4, 8), 2, 2) == GroupShape(1, 2)


def test_crossing_nodes_costs_more():
    model = cost_model(experiment(), load_profile("h100-sxm"), nodes=2)
    call = model.graph.by_name["critic_inf"]
    within = model.call_terms(call, place("d1t8p1"))["tp_communication"]
    across = model.call_terms(call, place("d1t16p1"))["tp_communication"]
    assert across > 1.5 * within


def test_llama_7b_decodes_at_the_published_speed():
    """102 output tokens/s at batch 1, 3024 at batch 64 (LMDeploy benchmark, A100-80, fp16, 128 + 128)."""
    for batch, published in ((1, 102.0), (64, 3024.0)):
        model = cost_model(experiment(sequences=batch), load_profile("a100-80gb"))
        seconds = model.call_s(model.graph.by_name["actor_gen"], place("d1t1p1"))
        assert batch * 128 / seconds == pytest.approx(published, rel=0.25)


@pytest.mark.parametrize(
    "hidden, layers, tp, published", [(2048, 24, 1, 408.8), (4096, 30, 2, 465.9), (6144, 32, 4, 489.1)]
)
def test_training_reaches_published_megatron_throughput(hidden: int, layers: int, tp: int, published: float):
    """Tflops/s per GPU of the Megatron-LM README: bf16, sequences of 4096, H100 SXM."""
    shape = ModelShape(
        family="gpt_neox", hidden=hidden, num_layers=layers, num_heads=hidden // 128,
        num_kv_heads=hidden // 128, head_dim=128, ffn_dim=4 * hidden, vocab=51200, max_positions=4096,
        norm="layer", gated_mlp=False, activation="gelu", rotary_dim=128,
    )  # fmt: skip
    hardware = replace(load_profile("h100-sxm"), inter_node=Link(0.0, 1e30))
    costs = ComputeCosts(hardware, shape, "bfloat16", tp)
    placed = place(f"d1t{tp}p1m8")
    workload = Workload(8 * 4, Lengths(1.0, 1), Lengths(4095.0, 4095))
    call = Call(
        "train", CallKind.TRAIN_STEP, ("tokens",), (), role="actor", sequence="tokens",
        output=Output.LOGPROBS, loss="loss",
    )  # fmt: skip
    seconds = sum(CallPricer(hardware, costs, placed.mesh, placed.strategy, workload).terms(call).values())
    tokens = workload.sequences * 4096
    # model flops as Megatron counts them: Narayanan et al. 2021, section 5.1, without recomputation
    flops = 72 * tokens * layers * hidden**2 * (1 + 4096 / (6 * hidden) + 51200 / (12 * layers * hidden))
    assert flops / seconds / tp / 1e12 == pytest.approx(published, rel=0.25)
