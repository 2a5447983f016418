"""Launchers started as a user starts them, one a node, and waited for together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.demo import environment

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Said:
    """How a process ended, and what it said."""

    code: int
    out: str
    err: str


def free_endpoint() -> str:
    """HOST:PORT on loopback where nobody listens."""
    with socket.create_server((LOOPBACK, 0)) as free:
        return f"{LOOPBACK}:{free.getsockname()[1]}"


def run_command(*arguments: str | Path) -> list[str]:
    """The command line of `realloc run`."""
    return [sys.executable, "-m", "realloc", "run", *map(str, arguments)]


def node_command(node: int, endpoint: str, *arguments: str | Path, nnodes: int = 2) -> list[str]:
    """The command line of one node's launcher."""
    place = ("--nnodes", nnodes, "--node-rank", node, "--rdzv-endpoint", endpoint, "--join-timeout", 60)
    return run_command(*map(str, place), *arguments)


def start(command: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """The command, in a session of its own."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait(processes: Sequence[subprocess.Popen[str]], timeout_s: float = 240.0) -> list[Said]:
    """Waits for all; whatever happens, none is left."""
    try:
        said = []
        for process in processes:
            out, err = process.communicate(timeout=timeout_s)
            said.append(Said(process.returncode, out, err))
        return said
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
