"""The cluster that planning commands take: a file, the experiment's own, or single options."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from realloc.errors import InputError

if TYPE_CHECKING:
    from realloc.cluster import Cluster
    from realloc.experiment import Experiment


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """The options that describe a cluster."""
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--cluster", metavar="FILE", type=Path, help="a cluster's YAML file")
    cluster.add_argument("--nodes", type=int, metavar="N", help="number of nodes")
    cluster.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs in each node")
    cluster.add_argument("--device", metavar="NAME", help="a hardware profile: a name, or a YAML file")


def chosen_cluster(arguments: argparse.Namespace, experiment: Experiment) -> Cluster:
    """The cluster of `--cluster`, else the experiment's; single options replace parts of it."""
    from realloc.cluster import cluster_content, parse_cluster, read_cluster
    from realloc.files import Reader

    given = {"nodes": arguments.nodes, "gpus_per_node": arguments.gpus_per_node, "device": arguments.device}
    given = {key: value for key, value in given.items() if value is not None}
    if arguments.cluster is not None:
        if given:
            option = next(iter(given)).replace("_", "-")
            raise InputError(f"--cluster and --{option} both describe the cluster; give one of them.")
        return read_cluster(arguments.cluster)
    cluster = experiment.cluster
    if cluster is None and not given:
        raise InputError(
            f"{arguments.experiment}: names no cluster. Give --cluster FILE, or --nodes N --gpus-per-node G "
            "--device NAME, or write into the experiment, for example: "
            "cluster: {nodes: 2, gpus_per_node: 8, device: h100-sxm}"
        )
    if cluster is not None and "device" in given:
        cluster = replace(cluster, memory_bytes=None)  # it was the other device's
    content = given if cluster is None else {**cluster_content(cluster), **given}
    missing = [key for key in ("gpus_per_node", "device") if key not in content]
    if missing:
        raise InputError(
            f"{arguments.experiment}: names no cluster, so --{missing[0].replace('_', '-')} is needed beside "
            f"--{next(iter(given)).replace('_', '-')}."
        )
    return parse_cluster(Reader(content, "command line: cluster"), Path.cwd())
