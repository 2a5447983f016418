"""The machines a plan is for: nodes x GPUs per node, and which hardware profile describes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realloc.files import Reader, read_file, resolve_path

GIB = 1 << 30


@dataclass(frozen=True)
class Cluster:
    """`num_nodes` nodes of `gpus_per_node` GPUs each.

    GPUs are numbered 0 to num_gpus - 1, node by node; a GPU's number is its rank in a run.
    `device` names a hardware profile: a built-in one, or the path of a profile file.
    `memory_bytes` is the memory of one GPU that may be used; None takes the profile's.
    """

    num_nodes: int
    gpus_per_node: int
    device: str
    memory_bytes: int | None = None

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    def __str__(self) -> str:
        nodes = f"{self.num_nodes} node{'s' if self.num_nodes > 1 else ''}"
        device = Path(self.device).stem if self.device.endswith((".yaml", ".yml")) else self.device
        return f"{nodes} x {self.gpus_per_node} {device}"


def read_cluster(path: str | Path) -> Cluster:
    """Reads a `cluster/1` file. Raises InputError."""
    return parse_cluster(read_file(path, "cluster"), Path(path).parent)


def parse_cluster(reader: Reader, folder: Path) -> Cluster:
    """Reads a cluster from a mapping; a profile path is taken relative to `folder`."""
    memory_gib = reader.number("memory_gib", None, minimum=0.001, maximum=1e6)
    device = reader.get("device", str)
    if device.endswith((".yaml", ".yml")):
        device = str(resolve_path(device, folder, reader.at("device")))
    cluster = Cluster(
        num_nodes=reader.integer("nodes", 1, minimum=1, maximum=100_000),
        gpus_per_node=reader.integer("gpus_per_node", minimum=1, maximum=1024),
        device=device,
        memory_bytes=None if memory_gib is None else int(memory_gib * GIB),
    )
    reader.done()
    return cluster


def cluster_content(cluster: Cluster) -> Mapping[str, Any]:
    content: dict[str, Any] = {
        "nodes": cluster.num_nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "device": cluster.device,
    }
    if cluster.memory_bytes is not None:
        content["memory_gib"] = cluster.memory_bytes / GIB
    return content
