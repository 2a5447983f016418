"""Measures the machine and writes a hardware profile: the measuring side of `realloc profile`.

Starts one process per rank on this machine, runs the micro-benchmarks, and writes a `profile/1`
file. Decides what of the profile is measured; what cannot be measured on one node is said in the
file's notes. Knows nothing of how the numbers are used.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from realloc import __version__
from realloc.errors import InputError, RunError
from realloc.files import dump_yaml, write_text
from runtime import microbenchmarks as bench
from runtime.machine import device_name

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What no micro-benchmark shows: Python around one call, and a reward function on one sequence.
_CALL_S = {"cpu": 2e-3, "cuda": 5e-3}
_SEQUENCE_S = 1e-4
# A node's network cannot be seen from one node: 200 Gb/s at the share of line rate that nccl-tests
# issue 160 reports (20 GB/s).
_GPU_INTER_NODE: Mapping[str, Any] = {"latency_s": 2e-5, "bytes_per_s": 2e10}


def run_profile(output: Path, ranks: int, quick: bool, timeout_s: float = 600.0) -> None:
    """Measures this machine with `ranks` processes and writes the profile to `output`.

    Raises InputError when there are fewer GPUs than ranks, RunError when a process fails.
    """
    if ranks < 1:
        raise InputError(f"realloc profile: --ranks is {ranks}, must be at least 1.")
    gpus = torch.cuda.device_count()
    if gpus and ranks > gpus:
        raise InputError(f"realloc profile: --ranks is {ranks}, but there are {gpus} GPUs.")
    with tempfile.TemporaryDirectory(prefix="realloc-profile-") as folder:
        _run_ranks(Path(folder), ranks, quick, timeout_s)
        measured = json.loads((Path(folder) / "measured.json").read_text(encoding="utf-8"))
    write_text(output, dump_yaml("profile", profile_content(measured, output.stem, ranks)))


def profile_content(measured: Mapping[str, Any], name: str, ranks: int) -> Mapping[str, Any]:
    """The `profile/1` mapping for what rank 0 measured."""
    is_cpu = measured["device_type"] == "cpu"
    intra = measured.get("link", {"latency_s": 1e-4, "bytes_per_s": 1e9})
    notes = [f"call_s and sequence_s are estimates; measured with {ranks} ranks on one node"]
    if "link" not in measured:
        notes.append("links: one rank has none; the numbers are placeholders")
    if is_cpu:
        inter = intra
        notes.append("inter_node: taken as intra_node, both are this machine's loopback")
    else:
        inter = _GPU_INTER_NODE
        notes.append("inter_node: an estimate for one 200 Gb/s NIC per GPU; one node cannot measure it")
    best = {dtype: max(y for _, y in points) for dtype, points in measured["matmul"].items()}
    attention = measured["attention"]
    content: dict[str, Any] = {
        "name": name,
        "provenance": {
            "source": "measured",
            "device": measured["device"],
            "date": datetime.now(UTC).date().isoformat(),
            "samples": measured["samples"],
            "versions": measured["versions"],
            "notes": notes,
        },
        "memory_bytes": measured["memory_bytes"],
        "matmul": measured["matmul"],
        "memory": measured["memory"],
        "launch_s": measured["launch_s"],
        "attention": {
            "efficiency": attention["flops_per_s"] / best[attention["dtype"]],
            "launch_s": attention["launch_s"],
            "per_sequence": is_cpu,
        },
        "optimizer_bytes_per_s": measured["optimizer_bytes_per_s"],
        "host_bytes_per_s": measured["host_bytes_per_s"],
        "overlaps_host_copies": not is_cpu,
        "call_s": _CALL_S[measured["device_type"]],
        "sequence_s": _SEQUENCE_S,
        "intra_node": intra,
        "inter_node": inter,
    }
    if is_cpu and ranks > 1:
        content["concurrency"] = measured["concurrency"]
    return _rounded(content)  # type: ignore[no-any-return]


def _rounded(value: Any) -> Any:
    """Four significant digits: what a measurement is worth."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


def _run_ranks(folder: Path, ranks: int, quick: bool, timeout_s: float) -> None:
    """Starts a process per rank and waits for all; the first to fail ends the others."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": _loopback()}
    processes: list[subprocess.Popen[bytes]] = []
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    try:
        for rank in range(ranks):
            command = [sys.executable, "-m", "runtime.profiler", "--rank", str(rank)]
            command += ["--ranks", str(ranks), "--folder", str(folder)] + (["--quick"] if quick else [])
            with logs[rank].open("wb") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in processes):
            for rank, process in enumerate(processes):
                if process.poll() not in (None, 0):
                    raise RunError(f"realloc profile: rank {rank} failed: {_last_line(logs[rank])}")
            if time.monotonic() > deadline:
                raise RunError(f"realloc profile: not done after {timeout_s:.0f} s; try --quick.")
            time.sleep(0.05)
        for rank, process in enumerate(processes):
            if process.returncode:
                raise RunError(f"realloc profile: rank {rank} failed: {_last_line(logs[rank])}")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def _loopback() -> str:
    """The name of the loopback device, which alone the ranks talk over."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    return "lo"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def measure(rank: int, ranks: int, quick: bool, device: torch.device) -> Mapping[str, Any]:
    """Runs every micro-benchmark; all ranks call it, rank 0's result counts."""
    budget = bench.effort(device, quick)
    clock = bench.Clock(device, budget)
    result: dict[str, Any] = {}
    if ranks > 1:
        dist.barrier()
    if rank == 0:
        result = _alone(clock, budget, device, ranks)
    if ranks > 1:
        dist.barrier()
        result["concurrency"] = bench.concurrency_points(clock, device, rank, ranks)
        large, repeats = budget.message_bytes, budget.repeats
        link: dict[str, Any] = dict(bench.message_costs(clock, device, rank, large, repeats))
        link["collectives"] = bench.collective_rows(clock, device, rank, ranks, large, repeats)
        result["link"] = link
    return result


def _alone(clock: bench.Clock, budget: bench.Effort, device: torch.device, ranks: int) -> dict[str, Any]:
    """What one rank measures while the others wait."""
    overhead = bench.launch_s(clock, device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    flops_per_s, tiny = bench.attention_costs(clock, device, dtype)
    return {
        "device": device_name(device),
        "device_type": device.type,
        "memory_bytes": _memory_bytes(device, ranks),
        "samples": budget.repeats,
        "versions": {
            "realloc": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
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


def main(arguments: Sequence[str] | None = None) -> None:
    """One rank of the measurement."""
    parser = argparse.ArgumentParser(prog="runtime.profiler")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", options.rank)
        torch.cuda.set_device(device)
    if options.ranks > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{options.folder}/store",
            rank=options.rank,
            world_size=options.ranks,
            timeout=timedelta(seconds=600),
        )
    result = measure(options.rank, options.ranks, options.quick, device)
    if options.rank == 0:
        (options.folder / "measured.json").write_text(json.dumps(result), encoding="utf-8")
    if options.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
