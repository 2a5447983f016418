"""The options by which a command is told which of several nodes it runs on."""

from __future__ import annotations

import argparse

from realloc.cli.values import count, endpoint, positive
from realloc.errors import InputError


def add_nodes(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds them; returns their group, for what a command has besides."""
    nodes = parser.add_argument_group(
        "several nodes", "the same command on each of them, with its --node-rank"
    )
    nodes.add_argument("--nnodes", type=positive, default=1, metavar="N", help="how many nodes (default: 1)")
    nodes.add_argument("--node-rank", type=count, default=0, metavar="I", help="which one this is, from 0")
    nodes.add_argument(
        "--rdzv-endpoint",
        type=endpoint,
        metavar="HOST:PORT",
        help="an address of node 0 that all nodes reach, and a free port there; the same on every node",
    )
    return nodes


def check_nodes(arguments: argparse.Namespace) -> None:
    """Raises InputError for a number that is none of the nodes', or without a place to meet."""
    if arguments.node_rank >= arguments.nnodes:
        raise InputError(
            f"--node-rank {arguments.node_rank}: nodes are numbered 0 to {arguments.nnodes - 1} (--nnodes)."
        )
    if arguments.nnodes > 1 and arguments.rdzv_endpoint is None:
        raise InputError(
            "--nnodes: give --rdzv-endpoint HOST:PORT, a free port of node 0, the same everywhere."
        )
