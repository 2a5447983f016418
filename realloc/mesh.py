"""Device meshes: the contiguous GPUs that one call runs on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from realloc.cluster import Cluster
from realloc.errors import PlanError


@dataclass(frozen=True, order=True)
class DeviceMesh:
    """GPUs `first` to `first + size - 1` of a cluster with nodes of `gpus_per_node`.

    Either whole consecutive nodes (`node[0-1]`) or a slice of one node whose size divides the
    node and which starts at a multiple of its size (`node0:gpu[0-3]`).
    """

    first: int
    size: int
    gpus_per_node: int

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.size)

    @property
    def num_nodes(self) -> int:
        """How many nodes the mesh touches."""
        last = (self.first + self.size - 1) // self.gpus_per_node
        return last - self.first // self.gpus_per_node + 1

    def overlaps(self, other: DeviceMesh) -> bool:
        return self.first < other.first + other.size and other.first < self.first + self.size

    def __contains__(self, rank: int) -> bool:
        return self.first <= rank < self.first + self.size

    def __str__(self) -> str:
        node, gpu = divmod(self.first, self.gpus_per_node)
        if self.size % self.gpus_per_node == 0 and gpu == 0:
            return f"node{_span(node, self.size // self.gpus_per_node)}"
        return f"node{node}:gpu{_span(gpu, self.size)}"

    def check(self, cluster: Cluster, where: str) -> None:
        """Raises PlanError when the mesh is not a legal part of the cluster."""
        if self.gpus_per_node != cluster.gpus_per_node:
            raise PlanError(
                f"{where}: mesh {self} is for nodes of {self.gpus_per_node} GPUs; "
                f"the cluster's have {cluster.gpus_per_node}."
            )
        if self.size < 1 or self.first < 0 or self.first + self.size > cluster.num_gpus:
            raise PlanError(
                f"{where}: mesh {self} lies outside the cluster, which has {cluster.num_nodes} "
                f"node(s) of {cluster.gpus_per_node} GPU(s): nodes 0-{cluster.num_nodes - 1}, "
                f"GPUs 0-{cluster.gpus_per_node - 1} in each."
            )
        per_node = cluster.gpus_per_node
        if self.size < per_node:
            if per_node % self.size or self.first % self.size:
                raise PlanError(
                    f"{where}: mesh {self} is not allowed: a slice of a node must have a size that "
                    f"divides its {per_node} GPUs and start at a multiple of that size."
                )
        elif self.size % per_node or self.first % per_node:
            raise PlanError(
                f"{where}: mesh {self} is not allowed: a mesh larger than a slice of one node "
                f"must be whole consecutive nodes of {per_node} GPUs."
            )


def _span(first: int, count: int) -> str:
    return f"[{first}]" if count == 1 else f"[{first}-{first + count - 1}]"


_NODES = re.compile(r"node\[?(\d{1,9})(?:-(\d{1,9}))?\]?")
_SLICE = re.compile(r"node\[?(\d{1,9})\]?:gpu\[?(\d{1,9})(?:-(\d{1,9}))?\]?")


def parse_mesh(text: str, cluster: Cluster, where: str) -> DeviceMesh:
    """Reads `node[0-1]` or `node0:gpu[0-3]` and checks it against the cluster.

    Raises PlanError.
    """
    per_node = cluster.gpus_per_node
    if match := _NODES.fullmatch(text):
        first, last = int(match[1]), int(match[2] or match[1])
        start, size = first * per_node, (last - first + 1) * per_node
    elif match := _SLICE.fullmatch(text):
        gpu, last = int(match[2]), int(match[3] or match[2])
        if last >= per_node:
            raise PlanError(
                f"{where}: mesh {text} lies outside the cluster: its nodes have GPUs 0-{per_node - 1}."
            )
        start, size = int(match[1]) * per_node + gpu, last - gpu + 1
    else:
        raise PlanError(
            f"{where}: cannot read the mesh '{text}'; write whole nodes as node[0-1] or a slice "
            f"of one node as node0:gpu[0-3]."
        )
    if size < 1:
        raise PlanError(f"{where}: mesh '{text}' is empty: its range runs backwards.")
    mesh = DeviceMesh(start, size, per_node)
    mesh.check(cluster, where)
    return mesh


def all_meshes(cluster: Cluster) -> tuple[DeviceMesh, ...]:
    """Every legal mesh of the cluster, smallest first."""
    per_node = cluster.gpus_per_node
    slices = [
        DeviceMesh(first, size, per_node)
        for size in range(1, per_node)
        if per_node % size == 0
        for first in range(0, cluster.num_gpus, size)
    ]
    nodes = [
        DeviceMesh(first * per_node, count * per_node, per_node)
        for count in range(1, cluster.num_nodes + 1)
        for first in range(cluster.num_nodes - count + 1)
    ]
    return tuple(slices + nodes)
