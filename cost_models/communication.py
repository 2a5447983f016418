"""Seconds of messages and collectives inside a placement, by which links its groups cross."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cost_models.link import CollectiveCost
from cost_models.profile import HardwareProfile
from realloc.mesh import DeviceMesh


@dataclass(frozen=True)
class GroupShape:
    """How the ranks of a group lie: on how many nodes, at most how many on one."""

    nodes: int
    per_node: int

    @property
    def size(self) -> int:
        return self.nodes * self.per_node


def group_shape(mesh: DeviceMesh, stride: int, count: int) -> GroupShape:
    """The shape of the group of `count` ranks that starts at the mesh's first rank, `stride` apart."""
    per_node = mesh.gpus_per_node
    if count == 1 or mesh.num_nodes == 1:
        return GroupShape(1, count)
    offset = mesh.first % per_node
    nodes = len({(offset + i * stride) // per_node for i in range(count)})
    return GroupShape(nodes, -(-count // nodes))


class Communication:
    """Prices what the ranks of one mesh say to each other. All groups of the mesh talk at once."""

    def __init__(self, profile: HardwareProfile, mesh: DeviceMesh) -> None:
        self._intra = profile.intra_node
        self._inter = profile.inter_node
        self._profile = profile
        self._per_node = min(mesh.size, mesh.gpus_per_node)
        self._across = mesh.num_nodes > 1
        self._known: dict[tuple[str, GroupShape], tuple[float, tuple[CollectiveCost, ...]]] = {}

    @property
    def asked(self) -> Collection[tuple[str, GroupShape]]:
        """The collectives, and of which groups, that were priced so far."""
        return self._known.keys()

    def _contention(self, group: GroupShape) -> float:
        """A measured collective had the cores to itself; on CPU hosts other groups take their share."""
        return self._profile.slowdown(self._per_node) / self._profile.slowdown(group.per_node)

    def collective_s(self, collective: str, group: GroupShape, size_bytes: float) -> float:
        """Seconds of a collective on a tensor of `size_bytes` (see `cost_models.link`).

        Groups of several ranks on several nodes work in two levels: within the node, and across
        nodes on each rank's part.
        """
        if group.size < 2:
            return 0.0
        key = (collective, group)
        if key not in self._known:
            self._known[key] = self._ways(collective, group)
        shared, ways = self._known[key]
        return shared * min(way.seconds(size_bytes) for way in ways)

    def _ways(self, collective: str, group: GroupShape) -> tuple[float, tuple[CollectiveCost, ...]]:
        """How many times longer than measured, and every algorithm."""
        if group.nodes == 1:
            return self._contention(group), self._intra.ways(collective, group.per_node)
        latency = self._across_s(collective, group, 0.0)
        sizes = {
            at * group.per_node for way in self._inter.ways(collective, group.nodes) for at, _ in way.knees
        }
        knees = tuple((at, self._across_s(collective, group, at)) for at in sorted(sizes or {1.0}))
        at, knee_s = knees[-1]
        per_byte = (self._across_s(collective, group, 1e12) - knee_s) / (1e12 - at)
        return 1.0, (CollectiveCost(group.size, latency, 1 / per_byte, knees),)

    def _across_s(self, collective: str, group: GroupShape, size_bytes: float) -> float:
        part = size_bytes / group.per_node
        seconds = self._inter.collective_s(collective, group.nodes, part)
        if collective in ("all_reduce", "reduce_scatter"):
            seconds += self._intra.collective_s("reduce_scatter", group.per_node, size_bytes)
        if collective in ("all_reduce", "all_gather"):
            seconds += self._intra.collective_s("all_gather", group.per_node, size_bytes)
        return seconds

    def all_reduce_s(self, group: GroupShape, size_bytes: float) -> float:
        return self.collective_s("all_reduce", group, size_bytes)

    def copy_s(self, moved: float) -> float:
        """Bytes read and written on every rank of the mesh."""
        return self._profile.copy_s(moved, self._per_node)

    def stage_message_s(self, size_bytes: float) -> float:
        """A message to the next pipeline stage, over the slowest boundary of the mesh."""
        link = self._inter if self._across else self._intra
        return link.message_s(size_bytes)

    def decode_round_s(self, size_bytes: float, stages: int, lanes: int) -> float:
        """Messages of this size in a decode step of every lane, with what else stages do for it.

        Where that was measured, between ranks of a host, it holds what a message takes there at least.
        """
        message_s, lane_s = self.stage_message_s(size_bytes), self._profile.transfer.lane_s
        if not lane_s:
            return stages * message_s
        return lanes * lane_s + stages * max(0.0, message_s - self._intra.latency_s)
