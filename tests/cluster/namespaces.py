"""Hosts of a small cluster on one machine: a network namespace each, joined by links with a set bandwidth.

Decides how namespaces, links and host names are made and taken down again. Knows nothing of what runs in
them. Needs root and iproute2; `why_not()` says what is missing. A process in a host sees that host's network
and host name, and this machine's processes and files. Latency cannot be set (`netem` is often missing).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

_NETWORK = "10.77.0"
_NUMBERS = count()


@dataclass(frozen=True)
class Host:
    """One host. `address` is its own on the link, `device` the link's name in it."""

    name: str
    address: str
    device: str
    hosts_file: Path

    def command(self, command: Sequence[str | Path]) -> list[str]:
        """The command, to be started in this host. It becomes the process itself, so signals reach it."""
        enter = f'hostname {self.name}; mount --bind {self.hosts_file} /etc/hosts; exec "$@"'
        return [
            *("nsenter", f"--net=/run/netns/{self.name}", "unshare", "--uts", "--mount"),
            *("bash", "-c", enter, "bash", *map(str, command)),
        ]

    def shape(self, rate: str | None) -> None:
        """Limits what the host sends: `rate` as tc writes it (`100mbit`), None takes the limit away."""
        if rate is None:
            _run("tc", "-n", self.name, "qdisc", "del", "dev", self.device, "root", check=False)
        else:
            limit = ("tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
            _run("tc", "-n", self.name, "qdisc", "replace", "dev", self.device, "root", *limit)

    def cut(self) -> None:
        """Takes the host off the network without a word to the others, as when a cable is pulled."""
        _run("ip", "-n", self.name, "link", "set", self.device, "down")

    def restore(self) -> None:
        """Puts the host back."""
        _run("ip", "-n", self.name, "link", "set", self.device, "up")


def why_not() -> str | None:
    """Why there can be no such hosts here; None when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc", "nsenter", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    name = f"probe{os.getpid()}"
    if _run("ip", "netns", "add", name, check=False):
        return "this machine allows no network namespaces"
    _run("ip", "netns", "del", name)
    return None


@contextmanager
def hosts(number: int = 2, rate: str | None = None) -> Iterator[tuple[Host, ...]]:
    """So many hosts that reach each other, each sending at most `rate`. They are gone afterwards.

    Names are this process's own, addresses are seen by these hosts alone: several tests may have hosts at
    the same time. Processes in them must end before.
    """
    mark = f"{os.getpid()}x{next(_NUMBERS)}"
    switch = f"s{mark}"
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        table = Path(folder) / "hosts"
        made = tuple(Host(f"h{i}n{mark}", f"{_NETWORK}.{i + 1}", f"v{i}", table) for i in range(number))
        names = "".join(f"{host.address} {host.name}\n" for host in made)
        table.write_text(f"127.0.0.1 localhost\n{names}")
        try:
            _connect(made, switch)
            for host in made:
                host.shape(rate)
            yield made
        finally:
            for name in (*(host.name for host in made), switch):
                _run("ip", "netns", "del", name, check=False)


def _connect(made: Sequence[Host], switch: str) -> None:
    """Joins namespaces by a bridge in a namespace of its own: the machine's network is not touched."""
    _run("ip", "netns", "add", switch)
    _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", switch, "link", "set", "bridge", "up")
    for i, host in enumerate(made):
        _run("ip", "netns", "add", host.name)
        _run("ip", "-n", host.name, "link", "set", "lo", "up")
        peer = ("type", "veth", "peer", "name", f"p{i}", "netns", switch)
        _run("ip", "-n", host.name, "link", "add", host.device, *peer)
        _run("ip", "-n", switch, "link", "set", f"p{i}", "master", "bridge", "up")
        _run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", host.device)
        _run("ip", "-n", host.name, "link", "set", host.device, "up")


def _run(*command: str, check: bool = True) -> int:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.returncode
