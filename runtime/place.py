"""Which of a run's launchers this one is, and what to type on every node."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from realloc.errors import InputError

PORT = 29400
"""What messages propose."""
LOST_SHARE = 0.6
"""Of the time in which a fault is to be found: how long a launcher may be silent."""
_OPTIONS = ("--nnodes", "--node-rank", "--rdzv-endpoint")


@dataclass(frozen=True)
class Place:
    """Which launcher this is: number `node` of `nnodes`, that meet at `endpoint` (host, port) of node 0.

    `join_timeout_s`: how long they wait for each other. `lost_s`: how long a launcher may be silent.
    """

    nnodes: int = 1
    node: int = 0
    endpoint: tuple[str, int] | None = None
    join_timeout_s: float = 120.0
    lost_s: float = 6.0


def check_place(place: Place, num_nodes: int, arguments: Sequence[str] | None = None) -> None:
    """Raises InputError unless `place` fits a plan of so many nodes; says what to type on each.

    `arguments`: what was typed, None takes the process's own.
    """
    if place.nnodes != num_nodes:
        given = f"--nnodes is {place.nnodes}" if place.nnodes > 1 else "--nnodes is not given"
        raise InputError(f"plan: cluster: {_nodes(num_nodes)}, but {given}; {commands(num_nodes, arguments)}")
    if place.node >= place.nnodes:
        raise InputError(f"--node-rank {place.node}: nodes are numbered 0 to {place.nnodes - 1}.")
    if place.nnodes > 1 and place.endpoint is None:
        raise InputError(f"--rdzv-endpoint is not given; {commands(num_nodes, arguments)}")


def _nodes(number: int) -> str:
    return f"{number} node{'s' if number > 1 else ''}"


def commands(num_nodes: int, arguments: Sequence[str] | None) -> str:
    """What to type on every node."""
    given = _without_place(sys.argv[1:] if arguments is None else arguments)
    command = f"realloc {shlex.join(given)}"
    if num_nodes == 1:
        return f"run this on one machine:\n  {command}"
    lines = [
        f"  on node {node}:  {command} --nnodes {num_nodes} --node-rank {node} --rdzv-endpoint HOST:{PORT}"
        for node in range(num_nodes)
    ]
    if len(lines) > 4:
        lines[2:-1] = ["  ..."]
    told = "\n".join(lines)
    return (
        f"start the same run on every node, HOST being an address of node 0 that all of them reach, or use "
        f"--launcher slurm or ray:\n{told}"
    )


def _without_place(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in _OPTIONS:
            skip = True
        elif not argument.startswith(tuple(f"{option}=" for option in _OPTIONS)):
            kept.append(argument)
    return kept
