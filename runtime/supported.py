"""What of that which can be planned this machine runs: model shapes, and a cluster's description."""

from __future__ import annotations

from realloc.cluster import GIB, Cluster
from realloc.errors import InputError
from realloc.model_shape import ModelShape
from runtime.nvml import Gpus


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


def other_device(planned: str, found: str) -> str | None:
    """A warning where costs were measured on another device than the one a run uses."""
    if planned == found:
        return None
    return (
        f"the plan's costs were measured on '{planned}', this is '{found}': predictions may be far off, and "
        f"another plan may be faster here; measure with realloc profile."
    )
