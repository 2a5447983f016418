"""Starts the ranks of a profile's micro-benchmarks on this node and waits for them.

One node's ranks meet at a file; those of several at a store that node 0 keeps on its endpoint, over the
network interface by which it is reached. Decides that; what ranks measure is `runtime.profile_rank`'s.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from realloc.errors import RunError
from runtime.host_memory import arena_environment
from runtime.stores import LOOPBACK, interface_towards, listen, wait_for


class RankOptions(Protocol):
    """What is asked of `runtime.profiler.ProfileOptions`."""

    @property
    def quick(self) -> bool: ...
    @property
    def timeout_s(self) -> float: ...
    @property
    def node(self) -> int: ...
    @property
    def nodes(self) -> int: ...
    @property
    def endpoint(self) -> tuple[str, int]: ...


def run_ranks(folder: Path, options: RankOptions, ranks: int) -> None:
    """Starts so many processes, a rank each, and waits for all; the first to fail ends the others.

    Rank 0 leaves `measured.json` in the folder. Raises RunError, and InputError for an endpoint that is not
    reached.
    """
    with _meeting(folder, options) as arguments:
        _run(folder, options, ranks, arguments)


@contextmanager
def _meeting(folder: Path, options: RankOptions) -> Iterator[Sequence[str]]:
    """Where the ranks meet, as arguments of theirs."""
    if options.nodes == 1:
        yield ["--store", f"file://{folder}/store"]
        return
    host, port = options.endpoint
    wait = timedelta(seconds=options.timeout_s)
    store = listen(host, port, wait) if options.node == 0 else None
    wait_for(host, port, options.timeout_s)
    yield ["--store", f"tcp://{host}:{port}"]
    del store  # it lives as long as its ranks


def _run(folder: Path, options: RankOptions, ranks: int, meeting: Sequence[str]) -> None:
    processes: list[subprocess.Popen[bytes]] = []
    first = options.node * ranks
    logs = [folder / f"rank-{first + i}.log" for i in range(ranks)]
    try:
        for local, path in enumerate(logs):
            command = [sys.executable, "-m", "runtime.profile_rank", "--rank", str(first + local)]
            command += ["--ranks", str(ranks * options.nodes), "--folder", str(folder), *meeting]
            command += ["--local-rank", str(local), "--timeout", str(options.timeout_s)]
            command += ["--quick"] if options.quick else []
            with path.open("wb") as log:
                environment = _environment(options)
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        deadline = time.monotonic() + options.timeout_s
        while any(process.poll() is None for process in processes):
            _check(processes, logs, first)
            if time.monotonic() > deadline:
                raise RunError(f"realloc profile: not done after {options.timeout_s:.0f} s; try --quick.")
            time.sleep(0.05)
        _check(processes, logs, first)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def _check(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], first: int) -> None:
    for i, (process, log) in enumerate(zip(processes, logs, strict=True)):
        if process.poll() not in (None, 0):
            raise RunError(f"realloc profile: rank {first + i} failed: {last_line(log)}")


def _environment(options: RankOptions) -> Mapping[str, str]:
    """One thread and arena each; gloo talks over the interface that leads to node 0 unless told otherwise."""
    environment = {**os.environ, **arena_environment(), "OMP_NUM_THREADS": "1"}
    if options.nodes > 1:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface_towards(options.endpoint[0]))
        environment["GROUP_RANK"] = str(options.node)
    else:
        environment["GLOO_SOCKET_IFNAME"] = interface_towards(LOOPBACK)
    return environment


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
