"""The cost model as the planner uses it: moves, nodes, caching."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from cost_models.curve import Curve
from cost_models.link import Link
from cost_models.moves import held_elements
from cost_models.profile import Attention, Transfer, load_profile
from realloc.augmented import NodeKind, Placement, augment
from realloc.errors import InputError
from realloc.layout import layout
from realloc.mesh import DeviceMesh
from realloc.model_zoo import named_shapes
from realloc.params import parameters
from realloc.strategy import Strategy
from tests.unit.cost_models.cases import cost_model, experiment, place, profile

BYTES = 2 * 6_738_415_616


def test_reallocation_to_the_same_layout_is_free():
    model = cost_model(experiment(), profile())
    assert model.reallocate_s("actor", place("d2t4p1"), place("d2t4p1m4")) == 0.0


def test_reallocation_by_hand():
    """From one GPU to another one: every byte over one link."""
    model = cost_model(experiment(), profile(intra_node=Link(0.0, 1e10)))
    assert model.reallocate_s("actor", place("d1t1p1"), place("d1t1p1", 1)) == pytest.approx(BYTES / 1e10)
    # one GPU gives a second one a copy of what it keeps
    assert model.reallocate_s("actor", place("d1t1p1"), place("d2t1p1")) == pytest.approx(BYTES / 1e10)


def test_reallocation_pays_latency_for_its_messages():
    quick = cost_model(experiment(), profile(intra_node=Link(0.0, 1e10)))
    slow = cost_model(experiment(), profile(intra_node=Link(1e-3, 1e10)))
    pair = place("d1t1p1"), place("d1t1p1", 1)
    extra = slow.reallocate_s("actor", *pair) - quick.reallocate_s("actor", *pair)
    assert extra == pytest.approx(1e-3 * (32 * 9 + 3 + 1))  # one for each parameter, norms too few to matter


def test_ranks_of_a_cpu_host_read_each_others_memory():
    """Memory of 100 GB/s, where messages would take 10: what is received is read and written once."""
    cpu = profile(attention=Attention(1.0, 0.0, True))
    model = cost_model(experiment(), cpu, nodes=2)
    words = 2 * 1e-3  # ready, done
    assert model.reallocate_s("actor", place("d1t1p1"), place("d1t1p1", 1)) == pytest.approx(
        2 * BYTES / 1e11 + words
    )
    # nothing is received, but the other layout has memory of its own
    assert model.reallocate_s("actor", place("d2t1p1"), place("d1t1p1")) == pytest.approx(2 * BYTES / 1e11)
    # another host's memory cannot be read
    assert model.reallocate_s("actor", place("d1t1p1"), place("d1t1p1", 8)) > BYTES / 1e9


@pytest.mark.parametrize("strategy", ["d1t1p1", "d2t2p1", "d1t2p2", "d2t1p4", "d4t1p1z3", "d2t1p2z3"])
def test_held_elements_are_those_of_the_layout(strategy: str):
    shape = named_shapes()["llama-7b"]
    placed = place(strategy)
    held = layout(shape, placed.mesh, placed.strategy)
    most = max(held.num_elements(rank) for rank in held.ranks)
    apart = 4096 * len(parameters(shape))  # ZeRO splits each by its rows
    assert 0 <= most - held_elements(shape, placed.strategy) <= apart


def test_reallocation_between_nodes_uses_the_slow_link():
    model = cost_model(experiment(), profile(), nodes=2)
    near = model.reallocate_s("actor", place("d1t4p1"), place("d1t4p1", 4))
    far = model.reallocate_s("actor", place("d1t4p1"), place("d1t4p1", 8))
    assert far > 5 * near


def test_reallocation_costs_the_same_on_every_node():
    model = cost_model(experiment(), load_profile("h100-sxm"), nodes=4)
    here = model.reallocate_s("actor", place("d1t8p1"), place("d2t2p2"))
    assert model.reallocate_s("actor", place("d1t8p1", 16), place("d2t2p2", 16)) == here


def test_transfer_by_hand():
    model = cost_model(
        experiment(sequences=1000, prompt=100, response=100), profile(intra_node=Link(1e-3, 1e6))
    )
    # int64 tokens of 1000 sequences of 200, one reader, one writer; the lengths go before
    expected = 1e-3 * 2 + (1000 * 200 * 8 + 1000 * 8) / 1e6
    assert model.transfer_s(("tokens",), place("d1t1p1"), place("d1t1p1", 1)) == pytest.approx(expected)


def test_what_a_rank_has_written_stays_with_it():
    model = cost_model(
        experiment(sequences=1000, prompt=100, response=100), profile(intra_node=Link(1e-3, 1e6))
    )
    # two replicas on the same ranks: half of a replica's 500 sequences come from the other, as many go
    # there; nobody has to be told the lengths
    expected = 2 * (1e-3 + 250 * 200 * 8 / 1e6)
    assert model.transfer_s(("tokens",), place("d2t1p1"), place("d2t1p1")) == pytest.approx(expected)
    # every rank of one replica has everything
    assert model.transfer_s(("tokens",), place("d1t4p1"), place("d4t1p1")) == 0.0


def test_what_a_transfer_takes_beside_its_messages():
    plain = profile(intra_node=Link(1e-3, 1e6))
    work = experiment(sequences=1000, prompt=100, response=100)
    costs = cost_model(work, plain), cost_model(work, replace(plain, transfer=Transfer(0.5, 1e-4, 1e-3)))
    ends = place("d2t1p1"), place("d2t1p1")
    without, with_it = (model.transfer_s(("tokens", "logprobs"), *ends) for model in costs)
    # all 1000 sequences are looked at; two keys of the half of a replica's 500 that it lacks are moved
    assert with_it - without == pytest.approx(0.5 + 1000 * 1e-4 + 250 * 2 * 1e-3)


def test_transfers_grow_with_keys_and_readers():
    model = cost_model(experiment(), profile(intra_node=Link(0.0, 1e6)))
    one = model.transfer_s(("tokens",), place("d1t1p1"), place("d1t1p1", 1))
    assert model.transfer_s(("tokens", "logprobs"), place("d1t1p1"), place("d1t1p1", 1)) > one
    assert model.transfer_s(("tokens",), place("d1t1p1"), place("d1t4p1", 4)) > one


def test_every_node_of_a_plan_has_a_price():
    model = cost_model(experiment(), load_profile("h100-sxm"))
    placements = {call.name: place("d1t8p1") for call in model.graph.calls}
    placements["actor_gen"] = place("d4t1p2")
    placements["critic_train"] = place("d2t2p1", 4)
    augmented = augment(model.graph, placements)
    kinds = {node.kind: model.node_s(node, placements) for node in augmented.nodes}
    assert set(kinds) == {NodeKind.CALL, NodeKind.TRANSFER, NodeKind.REALLOCATE}
    free = {node.name for node in augmented.nodes if not model.node_s(node, placements)}
    # each of the ranks of d1t8 holds all that it has written
    assert free == {f"transfer:{src}:critic_train" for src in ("rew_inf", "ref_inf", "critic_inf")}
    call = next(node for node in augmented.nodes if node.name == "actor_gen")
    assert model.node_s(call, placements) == model.call_s(
        model.graph.by_name["actor_gen"], placements["actor_gen"]
    )


def test_host_copies_by_hand():
    """Bytes over the host's bandwidth; gradients are never copied, nor parameters that have not changed."""
    model = cost_model(experiment(), profile())
    placements = {call.name: place("d1t8p1") for call in model.graph.calls}
    placements["ref_inf"] = place("d4t2p1+offload")
    placements["actor_train"] = place("d1t4p2+offload")
    node = augment(model.graph, placements).by_name
    frozen = model.call_memory(model.graph.by_name["ref_inf"], placements["ref_inf"]).parameters
    assert model.node_s(node["load:ref:ref_inf"], placements) == pytest.approx(frozen / 1e10)
    assert model.node_s(node["offload:ref:ref_inf"], placements) == 0.0
    train = model.call_memory(model.graph.by_name["actor_train"], placements["actor_train"])
    both = (train.parameters + train.optimizer) / 1e10
    assert model.node_s(node["load:actor:actor_train"], placements) == pytest.approx(both)
    assert model.node_s(node["offload:actor:actor_train"], placements) == pytest.approx(
        train.optimizer / 1e10
    )
    parameters = node["offload:actor:actor_train:parameters"]
    assert model.node_s(parameters, placements) == pytest.approx(train.parameters / 1e10)


def test_ranks_that_share_cores_copy_more_slowly():
    shared = cost_model(experiment(), profile(concurrency=Curve(((1.0, 1.0), (4.0, 4.0)))))
    alone = cost_model(experiment(), profile())
    call, where = alone.graph.by_name["ref_inf"], place("d1t4p1+offload")
    once = alone.host_copy_s(call, where, ("parameters",))
    assert shared.host_copy_s(call, where, ("parameters",)) == pytest.approx(4 * once)


def test_a_dtype_that_the_profile_lacks_is_refused():
    lacking = profile(matmul=profile().matmul[:1])
    with pytest.raises(InputError, match="no matmul throughput for float32"):
        cost_model(experiment(dtype="float32"), lacking)


def test_provenance_and_memory_come_from_the_profile():
    model = cost_model(experiment(), load_profile("h100-sxm"))
    assert model.provenance == "analytic (h100-sxm)"
    # the driver, NCCL and fragments have their part, unless the user says what may be used
    assert 0.94 * 81559 * 2**20 < model.memory_bytes < 0.97 * 81559 * 2**20


def test_prices_are_quick():
    """A search asks 10^5 times: new strategies well under a millisecond, known ones in microseconds."""
    model = cost_model(experiment(), load_profile("h100-sxm"), nodes=16)
    call = model.graph.by_name["actor_train"]
    model.call_s(call, place("d1t8p1"))
    strategies = [
        Strategy(128 // tp // pp, tp, pp, m)
        for tp in (1, 2, 4, 8)
        for pp in (1, 2, 4, 8)
        for m in (1, 2, 4, 8)
    ]
    placements = [Placement(DeviceMesh(0, 128, 8), s) for s in strategies]
    fresh = [_timed(lambda p=p: model.call_s(call, p)) for p in placements]
    known = [_timed(lambda p=p: model.call_s(call, p)) for p in placements]
    assert sorted(fresh)[len(fresh) // 2] < 1e-3
    assert sorted(known)[len(known) // 2] < 1e-4


def _timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
