"""What of that which can be planned this machine runs: model shapes, and a cluster's description."""

from __future__ import annotations

from realloc.cluster import GIB, Cluster
from realloc.errors import InputError
from realloc.model_shape import ModelShape
from runtime.nvml import Gpus

_BEYOND = 1.05
"""Predictions of memory are worth no more: so much beyond a GPU's own is an error."""


def check_runs(shape: ModelShape, where: str) -> None:
    """Raises InputError for a shape that is good for planning only."""
    if shape.is_moe:
        raise InputError(
            f"{where}: the model has {shape.num_experts} experts in each layer; mixtures of experts can be "
            f"planned, but this version does not run them. Give a dense model."
        )


def check_cluster(cluster: Cluster, gpus: Gpus | None) -> None:
    """Raises InputError where the cluster's description contradicts what the driver says of this node."""
    if gpus is None:
        return
    found = len(gpus.names)
    if found < cluster.gpus_per_node:
        raise InputError(
            f"cluster: gpus_per_node is {cluster.gpus_per_node}, but the driver finds {found} here "
            f"({', '.join(gpus.names) or 'none'}); correct the cluster and plan again."
        )
    least = min(gpus.memory_bytes[: cluster.gpus_per_node])
    if cluster.memory_bytes is not None and cluster.memory_bytes > least:
        raise InputError(
            f"cluster: memory_gib is {cluster.memory_bytes / GIB:.4g}, but a {gpus.names[0]} here has "
            f"{least / GIB:.4g} GiB; correct the cluster and plan again."
        )


def check_memory(peak_bytes: int, num_gpus: int, gpus: Gpus | None) -> None:
    """Raises InputError where a plan is predicted to need more than the driver says that a GPU has."""
    if gpus is None or not peak_bytes:
        return
    worst = min(range(min(num_gpus, len(gpus.names))), key=lambda i: gpus.memory_bytes[i])
    least = gpus.memory_bytes[worst]
    if peak_bytes > _BEYOND * least:
        raise InputError(
            f"plan: is predicted to need {peak_bytes / GIB:.4g} GiB on a GPU, but GPU {worst} here "
            f"({gpus.names[worst]}) has {least / GIB:.4g} GiB; plan again with cluster: memory_gib: "
            f"{int(least / GIB)}."
        )


def other_device(planned: str, found: str, *, how: str = "measured on") -> str | None:
    """A warning where costs are of another device than the one a run uses; `how` they are."""
    if planned == found:
        return None
    return (
        f"the plan's costs were {how} '{planned}', this is '{found}': predictions may be far off, and "
        f"another plan may be faster here; measure with realloc profile."
    )
