"""The links between ranks, tried for a few seconds before a run: who reaches whom, and how fast.

Forks a process per rank of this node; ranks of all nodes meet at the doctor's store. Measures a message
there and back at two sizes and an all_reduce, with the code of `realloc profile`, and compares with what
the plan's profile promises. Decides when a link is too slow; knows no plan.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing.process import BaseProcess
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from runtime import microbenchmarks as bench
from runtime.doctor_report import FAILURE, OK, WARNING, DoctorRequest, Finding, LinkExpectation
from runtime.gloo_threads import let_ranks_go_first
from runtime.link_benchmarks import LinkClock, message_costs
from runtime.stores import interface_towards

SLOW, BROKEN = 0.5, 0.1
"""Shares of the promised bytes/s below which a link is suspicious, and surely the wrong one."""
_REPEATS = 3


def link_findings(request: DoctorRequest, store: dist.Store) -> list[Finding]:
    """What the ranks have found; on nodes other than 0 nothing, node 0 tells."""
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface_towards(request.endpoint[0]))
    context = multiprocessing.get_context("fork")  # torch is imported already
    processes = [
        context.Process(
            target=_rank, args=(request, request.node * request.ranks + local, local), daemon=True
        )
        for local in range(request.ranks)
    ]
    for process in processes:
        process.start()
    try:
        told = _told(request, store, processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    if request.node:
        return []
    return told


def usual_ranks() -> int:
    """How many ranks try the links where no plan says it: one for each GPU, or two."""
    return torch.cuda.device_count() or 2


def _told(request: DoctorRequest, store: dist.Store, processes: Sequence[BaseProcess]) -> list[Finding]:
    """Waits for the ranks' numbers, or says who is missing."""
    ranks = request.nodes * request.ranks
    done = "doctor/links/done"
    deadline = time.monotonic() + 2 * request.timeout_s
    while not store.check([done]) and time.monotonic() < deadline:
        failed = [r for r in range(ranks) if store.check([f"doctor/links/error/{r}"])]
        if failed or any(process.exitcode not in (None, 0) for process in processes):
            break
        time.sleep(0.05)
    if store.check([done]):
        return _judged(request, store)
    arrived = [r for r in range(ranks) if store.check([f"doctor/links/arrived/{r}"])]
    missing = sorted(set(range(ranks)) - set(arrived))
    if missing:
        nodes = sorted({rank // request.ranks for rank in missing})
        found = f"ranks {_some(missing)} (nodes {_some(nodes)}) have not come"
        advice = "look at those nodes: is the command running there, does its host reach the endpoint?"
        return [Finding("reachability", FAILURE, found, advice)]
    errors = [
        store.get(f"doctor/links/error/{r}").decode()
        for r in range(ranks)
        if store.check([f"doctor/links/error/{r}"])
    ]
    found = f"all ranks came, but do not hear each other: {errors[0] if errors else 'time is up'}"
    advice = (
        "set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME on GPUs) to the interface that connects the nodes, and "
        "open the firewall between them for all ports; NCCL_DEBUG=INFO says more"
    )
    return [Finding("reachability", FAILURE, found, advice)]


def _some(numbers: Sequence[int]) -> str:
    text = ", ".join(map(str, numbers[:8]))
    return f"{text}, ..." if len(numbers) > 8 else text


def _judged(request: DoctorRequest, store: dist.Store) -> list[Finding]:
    ranks = request.nodes * request.ranks
    backend = "nccl" if torch.cuda.device_count() else "gloo"
    findings = [Finding("reachability", OK, f"{backend}: {ranks} ranks on {request.nodes} nodes")]
    for node in range(request.nodes):
        measured: Mapping[str, Mapping[str, float]] = json.loads(store.get(f"doctor/links/{node}").decode())
        for kind, numbers in measured.items():
            findings.append(replace(judged(kind, numbers, request.links.get(kind)), node=node))
    return findings


def judged(kind: str, numbers: Mapping[str, float], promised: LinkExpectation | None) -> Finding:
    """One link's numbers beside the profile's. `numbers`: latency_s and bytes_per_s of a message."""
    rate = numbers["bytes_per_s"]
    found = f"{rate / 1e9:.3g} GB/s, {numbers['latency_s'] * 1e6:.0f} us"
    if "all_reduce_s" in numbers:
        found += (
            f"; all_reduce of {numbers['all_reduce_bytes'] / 2**20:.0f} MiB {numbers['all_reduce_s']:.3g} s"
        )
    name = f"link {kind.replace('_', ' ')}"
    if promised is None:
        return Finding(name, OK, found)
    share = rate / promised.bytes_per_s
    found += f" ({share:.0%} of the profile's {promised.bytes_per_s / 1e9:.3g} GB/s)"
    if share >= SLOW:
        return Finding(name, OK, found)
    advice = (
        "predictions will be too good: is the link busy, is this the right network interface "
        "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_IB_HCA)? If it is, measure with realloc profile and "
        "plan again"
    )
    return Finding(name, FAILURE if share < BROKEN else WARNING, found, advice)


def _rank(request: DoctorRequest, rank: int, local: int) -> None:
    """One rank: joins the others, measures, and tells."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the one that waits for us
    host, port = request.endpoint
    wait = timedelta(seconds=request.timeout_s)
    store = dist.TCPStore(host, port, is_master=False, timeout=wait)
    store.set(f"doctor/links/arrived/{rank}", "1")
    gpu = torch.cuda.device_count() > 0
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=dist.PrefixStore("doctor/group", store),
            rank=rank,
            world_size=request.nodes * request.ranks,
            timeout=wait,
        )
        let_ranks_go_first()
        measured = _measure(request, rank, device)
        if local == 0:
            store.set(f"doctor/links/{request.node}", json.dumps(measured))
        dist.barrier()
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        with suppress(dist.DistError):  # node 0 may be what is gone
            store.set(f"doctor/links/error/{rank}", lines[0] if lines else type(error).__name__)
        sys.exit(1)  # it has been told: no traceback
    if rank == 0:
        store.set("doctor/links/done", "1")


def _measure(request: DoctorRequest, rank: int, device: torch.device) -> Mapping[str, Any]:
    """Numbers of this node's links, as this rank sees them. All ranks call it."""
    budget = bench.effort(device, quick=True)
    clock = bench.Clock(device, budget)
    size, per_node = budget.message_bytes, request.ranks
    links = LinkClock(clock, device, size)
    hosts = [[node * per_node + i for i in range(per_node)] for node in range(request.nodes)]
    dist.all_reduce(torch.zeros(1, device=device))  # NCCL wants a collective before the first message
    result: dict[str, Any] = {}
    if per_node > 1:
        pairs = [(members[0], members[1]) for members in hosts]
        result["intra_node"] = message_costs(links, rank, pairs)
    for first in (0, 1):  # neighbours in turns: every node is at work once or twice, whatever their number
        pairs = [
            (a, b)
            for node in range(first, request.nodes - 1, 2)
            for a, b in zip(hosts[node], hosts[node + 1], strict=True)
        ]
        if not pairs:
            continue
        found = message_costs(links, rank, pairs)
        if any(rank in pair for pair in pairs):
            best = result.get("inter_node")
            if best is None or found["bytes_per_s"] > best["bytes_per_s"]:
                result["inter_node"] = found
    if request.nodes * per_node > 1:
        tensor = torch.zeros(size // 4, device=device)
        clock.run(lambda: dist.all_reduce(tensor), 1)
        spent = median(clock.run(lambda: dist.all_reduce(tensor), 1) for _ in range(_REPEATS))
        widest = "inter_node" if request.nodes > 1 else "intra_node"
        result[widest] = {**result[widest], "all_reduce_s": spent, "all_reduce_bytes": float(size)}
    return result
