"""One rank of a profile's micro-benchmarks: the device by itself, then the links to other ranks.

Ranks of one host, or of several hosts under a launcher: which is which is found out by their names.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from realloc import __version__
from realloc.errors import InputError
from runtime import microbenchmarks as bench
from runtime.collectives import all_gather
from runtime.gloo_threads import let_ranks_go_first
from runtime.host_memory import keep_freed_memory
from runtime.lane_benchmarks import lane_s
from runtime.link_benchmarks import SMALL_BYTES, LinkClock, collective_rows, message_costs
from runtime.machine import device_name
from runtime.nvml import find_gpus
from runtime.stores import connect
from runtime.transfer_benchmarks import transfer_costs

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FRAGMENTS = 0.03
"""Of a GPU's memory, an estimate: what lies in gaps between tensors."""
_QUICK_S, _LONG_S = 0.7, 2.0
"""For about how long a message of one size is sent."""
_COPY_S = 0.02
"""As many of these as there are repeats are copies of each size measured for."""
_PACES = 50
"""How often ranks take their pace with nobody beside, to know calm moments of links by."""
_WAIT = timedelta(hours=4)
"""How long ranks wait for the first one, which measures alone."""


_WAY = 3
"""Of measuring. Goes up when the same point means another number, so that no profile is of two kinds."""


def fingerprint(quick: bool) -> str:
    """What makes two measurements comparable: machine, versions, effort, the way of measuring."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    return f"{device_name(device)}, {versions}{', quick' if quick else ''}, way {_WAY}"


def _versions() -> Mapping[str, str]:
    versions = {
        "realloc": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    if torch.cuda.is_available() and dist.is_nccl_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    gpus = find_gpus() if torch.cuda.is_available() else None
    return versions if gpus is None else {**versions, "driver": gpus.driver}


def measure(rank: int, hosts: Sequence[Sequence[int]], quick: bool, device: torch.device) -> dict[str, Any]:
    """Runs every micro-benchmark; all ranks call it, rank 0's result counts.

    `hosts`: the ranks of each host, rank 0 the first of the first.
    """
    budget = bench.effort(device, quick)
    clock = bench.Clock(device, budget)
    result: dict[str, Any] = {}
    ranks, local = sum(map(len, hosts)), hosts[0]
    if ranks > 1:
        dist.barrier()
    if rank == 0:
        result = _alone(bench.Clock(device, budget, alone=True), budget, device, len(local))
        result |= {"ranks": ranks, "nodes": len(hosts)}
    if ranks > 1:
        dist.barrier()
    links = LinkClock(clock, device, budget.message_bytes, _QUICK_S if quick else _LONG_S)
    if device.type == "cpu" and ranks > 1:
        for turn in range(ranks):  # what the pace is with nobody beside
            if turn == rank:
                links.moments.learn(_PACES)
            dist.barrier()
    if len(local) > 1:
        if device.type == "cpu":
            shared = bench.concurrency(clock, device, rank, len(local))
            result |= {"concurrency": shared.points, "pace": shared.pace}
            result["copies"] = _copies(budget, rank, local)
        link: dict[str, Any] = dict(message_costs(links, rank, [(local[0], local[1])]))
        in_memory = device.type == "cpu"
        link["collectives"] = collective_rows(links, rank, [local], in_memory=in_memory)
        result["link"] = link
    if len(hosts) > 1:
        result["inter_link"] = _between(links, rank, hosts)
    if device.type == "cpu" and ranks > 1:
        first = result["link" if len(local) > 1 else "inter_link"]  # between ranks 0 and 1
        timed = partial(links.seconds, num_bytes=SMALL_BYTES)
        result["transfer"] = transfer_costs(timed, first["latency_s"], rank)
        result["transfer"] |= {"lane_s": lane_s(timed, rank)}
    return result


def _copies(budget: bench.Effort, rank: int, local: Sequence[int]) -> Mapping[str, Any]:
    """Copies of one rank, then of all ranks at once."""
    copied = partial(bench.copy_points, budget.working_sets, _COPY_S * budget.repeats)
    alone = copied(lambda: None) if rank == local[0] else []
    dist.barrier()
    together = copied(dist.barrier)
    dist.barrier()
    shared = bench.turns(len(local))
    return {"alone": alone, "together": [[size, rate / shared] for size, rate in together]}


def _between(clock: LinkClock, rank: int, hosts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The link between hosts, with all ranks of each at it: what each one's share of it is."""
    share = min(map(len, hosts))
    pairs = list(zip(hosts[0][:share], hosts[1][:share], strict=True))
    link: dict[str, Any] = dict(message_costs(clock, rank, pairs))
    link["collectives"] = collective_rows(
        clock, rank, [[members[i] for members in hosts] for i in range(share)]
    )
    return link


def _alone(clock: bench.Clock, budget: bench.Effort, device: torch.device, ranks: int) -> dict[str, Any]:
    """What one rank measures while the others wait."""
    overhead = bench.launch_s(clock, device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    flops_per_s, tiny = bench.attention_costs(clock, device, dtype)
    gpus = find_gpus() if device.type == "cuda" else None
    return {
        "device": device_name(device),
        "device_type": device.type,
        "memory_bytes": _memory_bytes(device, ranks),
        "reserved_bytes": _reserved_bytes(device),
        "samples": budget.repeats,
        "versions": _versions(),
        "notes": [] if gpus is None else [gpus.topology],
        "launch_s": overhead,
        "matmul": {
            name: bench.matmul_points(clock, device, kind, budget.sides, overhead)
            for name, kind in DTYPES.items()
        },
        "memory": bench.memory_points(clock, device, budget.working_sets, overhead),
        "attention": {
            "dtype": str(dtype).removeprefix("torch."),
            "flops_per_s": flops_per_s,
            "launch_s": tiny,
        },
        "optimizer_bytes_per_s": bench.optimizer_bytes_per_s(clock, device, budget.optimizer_elements),
        "host_bytes_per_s": bench.host_bytes_per_s(clock, device),
    }


def _memory_bytes(device: torch.device, ranks: int) -> int:
    """Memory of one rank: the GPU's, or an equal part of the host's."""
    if device.type == "cuda":
        total: int = torch.cuda.get_device_properties(device).total_memory
        return total
    return psutil.virtual_memory().total // ranks


def _reserved_bytes(device: torch.device) -> int:
    """Of a GPU's memory, what its driver and libraries have, and what fragments of the allocator may cost."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device) + _FRAGMENTS * total)


def hosts_of(marks: Sequence[int]) -> Sequence[Sequence[int]]:
    """The ranks of each host, from the mark of every rank's host. Raises InputError for uneven ones."""
    hosts: dict[int, list[int]] = {}
    for rank, mark in enumerate(marks):
        hosts.setdefault(mark, []).append(rank)
    if len({len(ranks) for ranks in hosts.values()}) > 1:
        counts = ", ".join(str(len(ranks)) for ranks in hosts.values())
        raise InputError(f"realloc profile: hosts have different numbers of ranks: {counts}.")
    return list(hosts.values())


def _host_mark() -> int:
    """A number that ranks of one host share: of its name, and of the launcher's number for it."""
    number = os.environ.get("GROUP_RANK", os.environ.get("SLURM_NODEID", ""))
    name = f"{socket.gethostname()} {number}"
    return int.from_bytes(sha256(name.encode()).digest()[:7], "big")


def _found_hosts(ranks: int, device: torch.device) -> Sequence[Sequence[int]]:
    """The ranks of each host; every rank calls it."""
    mine = torch.tensor([_host_mark()], dtype=torch.int64, device=device)
    marks = torch.empty(ranks, dtype=torch.int64, device=device)
    world = dist.group.WORLD
    assert world is not None
    all_gather(marks, mine, world)
    return hosts_of(marks.tolist())


def _meeting(store: str, wait: timedelta) -> dict[str, Any]:
    """How the process group is told where its ranks meet: a file, or a store that node 0 keeps."""
    if not store.startswith("tcp://"):
        return {"init_method": store}
    host, _, port = store.removeprefix("tcp://").rpartition(":")
    return {"store": dist.PrefixStore("profile", connect(host, int(port), wait))}


def _device(local_rank: int) -> torch.device:
    torch.set_num_threads(1)
    keep_freed_memory()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def measure_joined(quick: bool, then: Callable[[Mapping[str, Any]], None]) -> None:
    """Takes part as the rank that a launcher has made this process; rank 0 goes on with `then`."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_WAIT)
    let_ranks_go_first()
    try:
        result = measure(rank, _found_hosts(ranks, device), quick, device)
        if rank == 0:
            then(result)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """One rank of the measurement, on one node or several."""
    parser = argparse.ArgumentParser(prog="runtime.profile_rank")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--local-rank", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    device = _device(options.local_rank)
    wait = timedelta(seconds=options.timeout)
    hosts: Sequence[Sequence[int]] = [[0]]
    if options.ranks > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=options.rank,
            world_size=options.ranks,
            timeout=wait,
            **_meeting(options.store, wait),
        )
        let_ranks_go_first()
        hosts = _found_hosts(options.ranks, device)
    result = measure(options.rank, hosts, options.quick, device)
    if options.rank == 0:
        (options.folder / "measured.json").write_text(json.dumps(result), encoding="utf-8")
    if options.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
