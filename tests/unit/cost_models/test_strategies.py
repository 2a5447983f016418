"""What ZeRO, sequence parallelism, recomputation and schedules cost: by hand, and in which direction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cost_models.activations import activation_bytes
from cost_models.compute import ComputeCosts, Pack
from cost_models.pipeline import bubble_s, messages_on_path, most_in_flight
from cost_models.profile import load_profile
from realloc.model_zoo import named_shapes
from realloc.pipeline_schedule import Pipeline, makespan, max_in_flight
from realloc.strategy import Recompute, Schedule, Strategy
from tests.unit.cost_models.cases import FREE, cost_model, experiment, place, profile

H100 = load_profile("h100-sxm")


def train(strategy: str, hardware=H100, **workload: Any):
    """(memory, terms) of an actor's train_step."""
    model = cost_model(experiment(**workload), hardware)
    call = model.graph.by_name["actor_train"]
    placed = place(strategy)
    return model.call_memory(call, placed), model.call_terms(call, placed)


def test_zero_splits_what_stays_by_hand():
    """Bytes as the trainer keeps them: bf16 parameters, fp32 gradients, moments and masters."""
    elements = 6_738_415_616
    kept = {
        0: (2 * elements, 4 * elements, 12 * elements),
        1: (2 * elements, 4 * elements, 12 * elements // 8),
        2: (2 * elements, 4 * elements // 8, 12 * elements // 8),
        3: (2 * elements // 8, 4 * elements // 8, 12 * elements // 8),
    }
    for zero, expected in kept.items():
        memory, _ = train(f"d8t1p1m8z{zero}")
        assert (memory.parameters, memory.gradients, memory.optimizer) == expected


def test_zero_messages_by_hand():
    """10 GB/s and 1 ms a step of log2: reduce-scatter of fp32 gradients, all-gather of bf16 parameters."""
    free_copies = replace(profile(), memory=profile().memory.__class__(((1.0, 1e30),)), launch_s=1e-5)
    units, elements = 34, 6_738_415_616  # embedding, 32 layers, head
    share = 1 / 2  # of a tensor, in a group of two
    scatter = units * 1e-3 + share * 4 * elements / 1e10
    gather = units * 1e-3 + share * 2 * elements / 1e10
    operators = 5 * 291 * free_copies.launch_s  # of all parameters, in each exchange
    expected = {
        1: scatter + gather + 2 * operators,
        2: 4 * scatter + gather + 5 * operators,
        3: 4 * scatter + 8 * gather + 12 * operators,
    }
    for zero, seconds in expected.items():
        _, terms = train(f"d2t1p1m4z{zero}", free_copies, sequences=32)
        assert terms["dp_communication"] == pytest.approx(4 * seconds), zero


@pytest.mark.parametrize(
    ("strategy", "tied", "tables"),
    [("d2t1p1m4z1", False, 0), ("d2t1p1m4z2", False, 16), ("d2t1p1m4z3", False, 16), ("d2t1p1m4z3", True, 0)],
)
def test_zero_makes_a_table_for_rows_that_no_head_shares(
    monkeypatch: pytest.MonkeyPatch, strategy: str, tied: bool, tables: int
) -> None:
    """In every micro-batch of four mini-batches, where passes were measured without."""
    shape = replace(named_shapes()["llama-7b"], tied_embeddings=tied)
    without = train(strategy, shape=shape)[1]["compute"]
    monkeypatch.setattr(ComputeCosts, "zero_table_s", lambda _: 1.0)
    assert train(strategy, shape=shape)[1]["compute"] - without == pytest.approx(tables)


@pytest.mark.parametrize("degrees", ["d8t1p1m8", "d2t4p1m2", "d4t2p1m4", "d2t2p2m4"])
def test_each_stage_of_zero_needs_less_and_sends_no_less(degrees: str):
    stages = (0, 1) if "p2" in degrees else (0, 1, 2, 3)
    found = [train(f"{degrees}z{zero}" if zero else degrees) for zero in stages]
    sizes = [memory.total for memory, _ in found]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    sent = [terms["dp_communication"] for _, terms in found[1:]]
    assert sent == sorted(sent)
    # the optimizer steps on a part
    assert found[1][1]["optimizer"] < found[0][1]["optimizer"]


@pytest.mark.parametrize("degrees", ["d8t1p1m8", "d1t8p1m8", "d2t2p2m4", "d1t4p2m4+sp", "d4t1p2m4z1"])
def test_recomputation_takes_longer_and_keeps_less(degrees: str):
    found = [train(f"{degrees}{flag}") for flag in ("", "+selective", "+full")]
    seconds = [sum(terms.values()) for _, terms in found]
    sizes = [memory.working["activations"] for memory, _ in found]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[1] < seconds[2]
    assert sizes[0] > sizes[1] > sizes[2]
    # the forward pass is about a third of the work (Korthikanti et al., section 5)
    assert seconds[2] < 1.4 * seconds[0]


def test_recomputed_activations_by_hand():
    model = cost_model(experiment(), profile())
    costs = model._costs("actor", 4)
    layer_input = 4096 * 2
    assert activation_bytes(costs, 100, Recompute.FULL) == 100 * layer_input
    assert activation_bytes(costs, 100, Recompute.FULL, True) == 25 * layer_input
    assert activation_bytes(costs, 100, Recompute.SELECTIVE) == 4 * 100 * layer_input
    # residual inputs by rows, gathered norm outputs whole
    assert activation_bytes(costs, 100, Recompute.SELECTIVE, True) == (2 * 25 + 2 * 100) * layer_input
    inside = activation_bytes(costs, 100) - 4 * 100 * layer_input
    assert activation_bytes(costs, 100, Recompute.NONE, True) == inside + (2 * 25 + 2 * 100) * layer_input


def test_full_recomputation_costs_a_forward_pass_but_for_the_last_product():
    hardware = profile(memory=profile().memory.__class__(((1.0, 1e30),)))
    costs = cost_model(experiment(), hardware)._costs("actor", 1)
    pack = Pack(256.0, 2 * 128.0**2, 1.0, 128.0)
    forward = costs.forward_layer_s(pack)
    last = 2 * 256 * 4096 * 11008 / 1e12
    assert costs.recompute_layer_s(pack, Recompute.FULL) == pytest.approx(forward - last)
    o = 2 * 256 * 4096 * 4096 / 1e12
    assert costs.recompute_layer_s(pack, Recompute.SELECTIVE) == pytest.approx(forward - last - o)
    assert costs.recompute_layer_s(pack, Recompute.NONE) == 0.0


def test_sequence_parallelism_sends_the_same_bytes_in_halves():
    """Without latencies an all-reduce is a reduce-scatter and an all-gather; norms are split besides."""
    hardware = replace(H100, intra_node=replace(FREE, bytes_per_s=1e11))
    _, plain = train("d1t8p1m8", hardware)
    _, split = train("d1t8p1m8+sp", hardware)
    # besides: norms' gradients are summed, and the last stage joins all rows for the head
    assert plain["tp_communication"] < split["tp_communication"] < 1.03 * plain["tp_communication"]
    assert split["compute"] < plain["compute"]
    less, more = (train(s, hardware)[0].total for s in ("d1t8p1m8+sp", "d1t8p1m8"))
    assert less < more


def test_stages_pass_their_rows_alone():
    hardware = replace(H100, intra_node=replace(FREE, bytes_per_s=1e11))
    plain, split = (train(f"d1t4p2m8{flag}", hardware)[1]["pp_communication"] for flag in ("", "+sp"))
    assert split == pytest.approx(plain / 4)


SCHEDULES = [
    (Schedule.ONE_F_ONE_B, 1),
    (Schedule.GPIPE, 1),
    (Schedule.ZERO_BUBBLE, 1),
    (Schedule.INTERLEAVED, 2),
    (Schedule.INTERLEAVED, 4),
]


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_closed_forms_are_what_the_actions_take(schedule: Schedule, virtual: int):
    for pp in (2, 3, 4, 8):
        for m in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
            if virtual > 1 and m % pp:
                continue
            pipeline = Pipeline(schedule, pp, virtual, m)
            strategy = Strategy(pp=pp, micro_batches=m, schedule=schedule, virtual_stages=virtual)
            for stage in range(pp):
                held = most_in_flight(strategy, stage, m) * virtual
                assert max_in_flight(pipeline, stage) == pytest.approx(held)
            for forward, backward, weight, send in ((1, 1, 1, 0.0), (1, 1.2, 0.8, 0.05)):
                exact = makespan(pipeline, forward / virtual, backward / virtual, weight / virtual, send)
                each = forward + backward + weight
                closed = m * each + bubble_s(strategy, m, [(pp - 1, each, weight)])
                closed += send * messages_on_path(strategy, m)
                assert closed == pytest.approx(exact, rel=0.02), (pp, m)


def test_schedules_trade_the_bubble_for_memory():
    plain, zb, interleaved, gpipe = (
        train(f"d1t1p4m8{flag}", sequences=512) for flag in ("", "+zb", "+i2", "+gpipe")
    )
    assert interleaved[1]["bubble"] == pytest.approx(plain[1]["bubble"] / 2, rel=0.05)
    assert zb[1]["bubble"] < plain[1]["bubble"]
    assert gpipe[1]["bubble"] == pytest.approx(plain[1]["bubble"])
    for one in (zb, interleaved, gpipe):
        assert one[0].total >= plain[0].total
    assert gpipe[0].working["activations"] > 1.5 * plain[0].working["activations"]
