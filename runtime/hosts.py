"""The machines behind a plan's node numbers: what each is called, where it is reached, what is in it.

Knows nothing of how launchers find each other; `runtime.team` does.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from realloc.files import write_text
from runtime.machine import device_name
from runtime.stores import address_towards

HOSTS = "hosts.json"


@dataclass(frozen=True)
class Host:
    """A node's machine. `address`: the one that leads to node 0; `device`: what it computes on."""

    node: int
    name: str
    address: str
    device: str

    def __str__(self) -> str:
        return f"node {self.node} ({self.name}, {self.address})"


def this_host(node: int, endpoint: str) -> Host:
    """This machine, as the one that is `node` in a run that meets at the host `endpoint`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Host(node, socket.gethostname(), address_towards(endpoint), device_name(device))


def write_hosts(out: Path, hosts: Sequence[Host], ranks_per_node: int) -> str:
    """Keeps which machine is which node in `out`/hosts.json; returns the same as a table."""
    rows = [
        asdict(host) | {"first_rank": host.node * ranks_per_node, "ranks": ranks_per_node} for host in hosts
    ]
    write_text(out / HOSTS, json.dumps({"realloc": "hosts/1", "hosts": rows}, indent=1) + "\n")
    head = ("node", "host", "address", "ranks", "device")
    table = [head] + [
        (
            str(host.node),
            host.name,
            host.address,
            f"{host.node * ranks_per_node}-{(host.node + 1) * ranks_per_node - 1}",
            host.device,
        )
        for host in hosts
    ]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )
