"""The strategies that search sees: fronts, what they leave out, and what an infeasible call is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cost_models.model import CostModel
from cost_models.profile import load_profile
from planner.candidates import build_candidates
from planner.infeasible import infeasible_call
from planner.keeping import Limits
from planner.options import Front, Option, Options, thinned
from realloc.augmented import Placement
from realloc.cluster import GIB, Cluster
from realloc.dataflow import CallKind
from realloc.errors import InfeasibleError
from realloc.mesh import DeviceMesh
from realloc.strategy import Recompute, Schedule, Strategy, inconsistent
from tests.unit.cost_models.cases import experiment
from tests.unit.planner.problems import TableMemory

CLUSTER = Cluster(1, 8, "h100-sxm")


def costs_of(made, cluster=CLUSTER):
    return CostModel(made, made.graph(), cluster, load_profile("h100-sxm"))


def option(seconds: float, size: int) -> Option:
    return Option(Strategy(), seconds, TableMemory(size))


def test_a_front_keeps_what_is_faster_or_smaller():
    front = Front()
    beaten = []
    for seconds, size in ((3.0, 30), (1.0, 90), (2.0, 60), (2.0, 50), (0.5, 95), (1.5, 40)):
        new = option(seconds, size)
        assert front.better(seconds, size) is None
        beaten += front.add(new)
    assert [(o.seconds, o.total_bytes) for o in front.options] == [(0.5, 95), (1.0, 90), (1.5, 40), (3.0, 30)]
    assert [(o.seconds, o.total_bytes) for o in beaten] == [(2.0, 60), (2.0, 50)]
    assert front.better(1.5, 40) is front.options[2]
    assert front.better(0.4, 1000) is None
    assert [o.seconds for o in thinned(front.options, 2)] == [0.5, 3.0]


@pytest.mark.parametrize("sequences", [512, 16])
def test_options_are_the_front_of_all_strategies(sequences: int):
    """Against pricing every strategy of the layout: none of them beats an option that was kept."""
    made = experiment("llama-7b", sequences=sequences, prompt=512, response=512)
    costs, mesh = costs_of(made), DeviceMesh(0, 8, 8)
    call = made.graph().by_name["actor_train"]
    for dp, tp, pp in ((8, 1, 1), (2, 4, 1), (2, 2, 2)):
        numbers = [1, 2]
        options = Options(call, mesh, costs, 10**15, 100, lambda reason, example: None)
        kept = options.of([(Strategy(dp, tp, pp), numbers)], costs.shape("actor"))
        assert len({o.strategy for o in kept}) == len(kept) > 2
        every = [
            Strategy(dp, tp, pp, m, zero, split, schedule, 1, recompute)
            for m in numbers
            for zero in (0, 1, 2)
            for split in (False, True)
            for schedule in (Schedule.ONE_F_ONE_B, Schedule.GPIPE, Schedule.ZERO_BUBBLE)
            for recompute in Recompute
        ]
        base = [o for o in kept if o.strategy.zero < 3 and o.strategy.virtual_stages == 1]
        for strategy in every:
            again = strategy.recompute is not Recompute.NONE
            if inconsistent(strategy) or (strategy.schedule is Schedule.ZERO_BUBBLE and again):
                continue  # weight gradients put off would hold what recomputation dropped
            placed = Placement(mesh, strategy)
            seconds, size = costs.call_s(call, placed), costs.call_memory(call, placed).total
            assert any(o.seconds <= seconds * (1 + 1e-9) and o.total_bytes <= size for o in base), strategy


def test_every_kind_gets_the_fields_it_has_a_use_for():
    made = experiment("llama-7b", sequences=512)
    graph = made.graph()
    found = build_candidates(made, graph, CLUSTER, costs_of(made), 80 * GIB)
    for call in graph.calls:
        strategies = {c.placement.strategy for c in found.candidates[call.name]}
        for strategy in strategies:
            strategy.check_kind(call.kind, call.name)
            assert inconsistent(strategy) is None
        if call.kind is CallKind.TRAIN_STEP:
            assert any(s.zero for s in strategies)
            assert any(s.schedule is Schedule.ZERO_BUBBLE for s in strategies)
            assert any(s.virtual_stages > 1 for s in strategies)
        assert any(s.sequence_parallel for s in strategies) == (call.kind is not CallKind.GENERATE)
        assert all(s.schedule is not Schedule.GPIPE for s in strategies)
    plain = build_candidates(made, graph, CLUSTER, costs_of(made), 80 * GIB, Limits(degrees_only=True))
    best, before = (min(c.option.seconds for c in f.candidates["actor_train"]) for f in (found, plain))
    assert best < before


def test_memory_savers_make_a_tight_call_fit():
    """13B in training on 8 GPUs of 32 GiB: what stays is 27 GiB, activations 9 GiB unless dropped."""
    made = experiment("llama-13b", sequences=64, prompt=2048, response=2048)
    graph, cluster = made.graph(), replace(CLUSTER, memory_bytes=32 * GIB)
    found = build_candidates(made, graph, cluster, costs_of(made, cluster), 32 * GIB)
    strategies = {c.placement.strategy for c in found.candidates["actor_train"]}
    assert any(s.recompute is not Recompute.NONE for s in strategies)
    plain = Limits(degrees_only=True)
    with pytest.raises(InfeasibleError):
        build_candidates(made, graph, cluster, costs_of(made, cluster), 32 * GIB, plain)


def test_an_infeasible_call_is_told_what_was_tried_and_what_helps():
    made = experiment("llama-70b", sequences=64)
    with pytest.raises(InfeasibleError) as caught:
        build_candidates(made, made.graph(), CLUSTER, costs_of(made), 80 * GIB)
    message = str(caught.value)
    assert message.startswith("actor_train fits nowhere: even node[0] d")
    assert "+full needs" in message
    assert "and still" in message
    assert "use 2 times the GPUs (with d" in message
    # and it is true
    twice = Cluster(2, 8, "h100-sxm")
    assert build_candidates(made, made.graph(), twice, costs_of(made, twice), 80 * GIB).candidates


def test_more_mini_batches_are_proposed_where_they_help():
    made = experiment("llama-7b", sequences=64, prompt=100_000, response=1000)
    call = replace(made.graph().by_name["critic_train"], mini_batches=1)
    costs = costs_of(made, Cluster(1, 1, "h100-sxm"))
    mesh = DeviceMesh(0, 8, 8)
    capacity = 60 * GIB
    degrees = {mesh: [(Strategy(8, 1, 1), [1])]}
    message = str(infeasible_call(made, call, costs.shape("critic"), degrees, costs, capacity))
    assert "mini-batches (with d" in message
