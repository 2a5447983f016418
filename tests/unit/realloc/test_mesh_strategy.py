"""Meshes and strategies: text forms round-trip, illegal ones are refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realloc.cluster import Cluster
from realloc.errors import InputError, PlanError
from realloc.mesh import DeviceMesh, all_meshes, parse_mesh
from realloc.model_zoo import named_shapes
from realloc.strategy import Coordinates, Strategy, forbidden, parse_strategy, strategy_content

CLUSTER = Cluster(num_nodes=3, gpus_per_node=8, device="h100")


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("gpus", [1, 6, 8])
def test_every_mesh_round_trips(nodes: int, gpus: int) -> None:
    cluster = Cluster(nodes, gpus, "any")
    meshes = all_meshes(cluster)
    assert len(set(meshes)) == len(meshes)
    assert len({str(mesh) for mesh in meshes}) == len(meshes)
    for mesh in meshes:
        assert parse_mesh(str(mesh), cluster, "here") == mesh


def test_all_meshes_are_the_legal_ones() -> None:
    found = set(all_meshes(CLUSTER))
    for first in range(CLUSTER.num_gpus + 1):
        for size in range(CLUSTER.num_gpus + 2):
            mesh = DeviceMesh(first, size, 8)
            try:
                mesh.check(CLUSTER, "here")
            except PlanError:
                assert mesh not in found
            else:
                assert mesh in found


@pytest.mark.parametrize(
    ("text", "first", "size", "formatted"),
    [
        ("node[0-1]", 0, 16, "node[0-1]"),
        ("node1", 8, 8, "node[1]"),
        ("node[2]", 16, 8, "node[2]"),
        ("node0:gpu[0-3]", 0, 4, "node0:gpu[0-3]"),
        ("node2:gpu5", 21, 1, "node2:gpu[5]"),
        ("node[1]:gpu[0-7]", 8, 8, "node[1]"),
    ],
)
def test_mesh_text(text: str, first: int, size: int, formatted: str) -> None:
    mesh = parse_mesh(text, CLUSTER, "here")
    assert (mesh.first, mesh.size) == (first, size)
    assert str(mesh) == formatted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "cannot read the mesh"),
        ("node", "cannot read the mesh"),
        ("gpu[0-3]", "cannot read the mesh"),
        ("node[0-1]:gpu[0-3]", "cannot read the mesh"),
        ("node[-1]", "cannot read the mesh"),
        ("node" + "9" * 30, "cannot read the mesh"),
        ("node[1-0]", "runs backwards"),
        ("node0:gpu[3-2]", "runs backwards"),
        ("node[0-3]", "lies outside the cluster"),
        ("node3:gpu0", "lies outside the cluster"),
        ("node0:gpu[6-9]", "lies outside the cluster"),
        ("node0:gpu[0-2]", "must have a size that divides its 8 GPUs"),
        ("node0:gpu[2-5]", "start at a multiple of that size"),
    ],
)
def test_illegal_meshes(text: str, expected: str) -> None:
    with pytest.raises(PlanError, match="^here: ") as caught:
        parse_mesh(text, CLUSTER, "here")
    assert expected in str(caught.value)


def test_a_mesh_for_other_nodes_or_across_a_border() -> None:
    with pytest.raises(PlanError, match="nodes of 4 GPUs"):
        DeviceMesh(0, 4, 4).check(CLUSTER, "here")
    with pytest.raises(PlanError, match="whole consecutive nodes"):
        DeviceMesh(4, 12, 8).check(CLUSTER, "here")


def test_mesh_geometry() -> None:
    mesh = DeviceMesh(8, 16, 8)
    assert list(mesh.ranks) == list(range(8, 24))
    assert mesh.num_nodes == 2
    assert DeviceMesh(4, 4, 8).num_nodes == 1
    assert 8 in mesh
    assert 7 not in mesh
    assert 24 not in mesh
    assert mesh.overlaps(DeviceMesh(16, 8, 8))
    assert not mesh.overlaps(DeviceMesh(0, 8, 8))


degrees = st.integers(1, 9)


@given(degrees, degrees, degrees, degrees)
def test_strategy_round_trips(dp: int, tp: int, pp: int, micro_batches: int) -> None:
    strategy = Strategy(dp, tp, pp, micro_batches)
    assert parse_strategy(str(strategy), "here") == strategy
    assert parse_strategy(dict(strategy_content(strategy)), "here") == strategy


@given(degrees, degrees, degrees)
def test_coordinates_and_index_are_inverse(dp: int, tp: int, pp: int) -> None:
    strategy = Strategy(dp, tp, pp)
    seen = [strategy.coordinates(index) for index in range(strategy.size)]
    assert len(set(seen)) == strategy.size
    assert [strategy.index(at) for at in seen] == list(range(strategy.size))
    assert seen == sorted(seen)  # pp slowest, tp fastest
    assert seen[-1] == Coordinates(pp - 1, dp - 1, tp - 1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("d4", "cannot read the strategy 'd4'"),
        ("t2d4p1", "cannot read"),
        ("d4t2p1m", "cannot read"),
        ("d4t2p" + "1" * 40, "cannot read"),
        ({"dp": 0}, "dp: 0 is below"),
        ({"tp": True}, "tp: expected a whole number"),
        ({"tp": 2.5}, "tp: expected a whole number"),
        ({"ddp": 2}, "unknown key 'ddp'. Did you mean 'dp'?"),
        ({"pp": 10**30}, "pp: the number is too large"),
        (None, "expected a mapping"),
        (7, "expected a mapping"),
        ([1], "expected a mapping"),
    ],
)
def test_unreadable_strategies(value: Any, expected: str) -> None:
    with pytest.raises(InputError, match="^here: ") as caught:
        parse_strategy(value, "here")
    assert expected in str(caught.value)


def test_degrees_must_make_up_the_mesh() -> None:
    mesh = DeviceMesh(0, 8, 8)
    Strategy(2, 2, 2).check(mesh, None, "here")
    with pytest.raises(PlanError, match="dp 2 x tp 2 x pp 1 = 4, but mesh node.0. has 8"):
        Strategy(2, 2, 1).check(mesh, None, "here")
    with pytest.raises(PlanError, match="must be at least 1"):
        parse_strategy("d0t8p1", "here").check(mesh, None, "here")
    with pytest.raises(PlanError, match="must be at least 1"):
        Strategy(8, 1, 1, 0).check(mesh, None, "here")


def test_what_a_shape_forbids() -> None:
    shape = named_shapes()["qwen2.5-0.5b"]  # 14 heads, 2 kv heads, width 4864, 24 layers
    assert forbidden(Strategy(tp=2, pp=24), shape) is None
    assert forbidden(Strategy(tp=14), shape) == "tp 14 does not divide the MLP width 4864"
    assert forbidden(Strategy(tp=4), shape) == "tp 4 does not divide the 14 attention heads"
    assert forbidden(Strategy(tp=7), shape) == "tp 7 neither divides nor is a multiple of the 2 kv heads"
    assert forbidden(Strategy(pp=25), shape) == "pp 25 exceeds the 24 layers"
    llama = named_shapes()["llama-3-8b"]  # 32 heads, 8 kv heads
    assert forbidden(Strategy(tp=16), llama) is None  # each kv head on two ranks
    with pytest.raises(PlanError, match="here: strategy d1t64p1 is not possible: tp 64 does not divide"):
        Strategy(tp=64).check(DeviceMesh(0, 64, 8), llama, "here")
