"""Collectives of one mesh: which link, which algorithm."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cost_models.communication import Communication, GroupShape, group_shape
from cost_models.link import Link
from cost_models.profile import Transfer, load_profile
from realloc.mesh import DeviceMesh
from tests.unit.cost_models.cases import profile

H100 = load_profile("h100-sxm")
NODE, NODES = DeviceMesh(0, 8, 8), DeviceMesh(0, 32, 8)


@pytest.mark.parametrize("size_bytes", [8.0, 1e6, 1e9])
@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "reduce_scatter"])
def test_in_a_node_the_links_fastest_way_is_taken(collective: str, size_bytes: float):
    expected = H100.intra_node.collective_s(collective, 8, size_bytes)
    found = Communication(H100, NODE).collective_s(collective, GroupShape(1, 8), size_bytes)
    assert found == pytest.approx(expected)


def test_across_nodes_the_network_carries_each_ranks_part():
    """4 nodes of 8: within a node all but 1/8 of the tensor each way, across nodes 1/8 of it."""
    group = group_shape(NODES, 1, 32)
    assert group == GroupShape(4, 8)
    size = 1e12
    within = 2 * size * 7 / 8 / 370e9
    across = 2 * size / 8 * 3 / 4 / 40e9
    found = Communication(H100, NODES).all_reduce_s(group, size)
    assert found == pytest.approx(within + across, rel=1e-3)


def test_replicas_of_tensor_parallel_groups_talk_across_nodes_alone():
    group = group_shape(NODES, 8, 4)
    assert group == GroupShape(4, 1)
    found = Communication(H100, NODES).all_reduce_s(group, 1e12)
    assert found == pytest.approx(2 * 1e12 * 3 / 4 / 40e9, rel=1e-3)


def test_a_decode_round_of_stages_by_hand():
    """Two lanes on two stages: a message for each, or what steps were measured to take beside the model."""
    plain = profile(intra_node=Link(1e-3, 1e6), inter_node=Link(3e-3, 1e6))
    timed = replace(plain, transfer=Transfer(lane_s=5e-3))
    one, two = DeviceMesh(0, 2, 2), DeviceMesh(0, 4, 2)
    assert Communication(plain, one).decode_round_s(1000, 2, 2) == pytest.approx(2 * (1e-3 + 1e-3))
    assert Communication(timed, one).decode_round_s(1000, 2, 2) == pytest.approx(2 * 5e-3 + 2 * 1e-3)
    # between nodes a message takes longer than the one that was measured
    assert Communication(timed, two).decode_round_s(1000, 4, 2) == pytest.approx(2 * 5e-3 + 4 * (2e-3 + 1e-3))
