"""Reallocation on gloo ranks of one machine against what it could be compared with.

For every pair of layouts: our schedule, out of shared memory (what ranks of one host use) and by
messages; the same bytes between the same pairs of ranks as one contiguous message each (the line
rate); everything gathered everywhere, then sliced; every source shard broadcast to the ranks that
need a part of it. The five take turns within one run, so that other work on the machine hits all
alike; medians of the slowest rank's time.

    python benchmarks/reallocation.py [--quick] [--json]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from realloc.augmented import Placement  # noqa: E402
from realloc.layout import Box, Layout, layout, optimizer_layout  # noqa: E402
from realloc.mesh import DeviceMesh  # noqa: E402
from realloc.model_shape import ModelShape  # noqa: E402
from realloc.params import parameters  # noqa: E402
from realloc.reallocation import Schedule, lower_bound, schedule  # noqa: E402
from realloc.strategy import Strategy  # noqa: E402
from runtime.parameters import views_of  # noqa: E402
from runtime.reallocation import Holding, Reallocator, Staging  # noqa: E402
from runtime.shared_memory import SharedMemory  # noqa: E402
from tests.ranks.launch import run_ranks  # noqa: E402

WORLD = 4
WIDTH = 4
Method = Callable[[], None]


def _place(first: int, size: int, dp: int, tp: int, pp: int, *, zero: int = 0, virtual: int = 1) -> Placement:
    strategy = Strategy(dp, tp, pp, zero=zero, virtual_stages=virtual)
    return Placement(DeviceMesh(first, size, WORLD), strategy)


Layouts = Callable[[ModelShape, DeviceMesh, Strategy], Layout]
OPTIMIZER_PAIRS: Sequence[tuple[Placement, Placement]] = [
    (_place(0, 4, 4, 1, 1, zero=1), _place(0, 4, 2, 2, 1, zero=1)),
    (_place(0, 4, 2, 1, 2, zero=1), _place(0, 4, 4, 1, 1, zero=3)),
]
PARAMETER_PAIRS: Sequence[tuple[Placement, Placement]] = [
    (_place(0, 4, 1, 4, 1), _place(0, 4, 4, 1, 1)),
    (_place(0, 4, 1, 1, 4), _place(0, 4, 4, 1, 1)),
    (_place(0, 4, 1, 4, 1), _place(0, 4, 1, 1, 4)),
    (_place(0, 4, 1, 1, 4), _place(0, 4, 1, 4, 1)),
    (_place(0, 4, 2, 1, 2), _place(0, 4, 2, 2, 1)),
    (_place(0, 4, 1, 4, 1), _place(0, 4, 2, 2, 1)),
    (_place(0, 4, 1, 2, 2), _place(0, 4, 2, 2, 1)),
    (_place(0, 4, 1, 2, 2), _place(0, 4, 4, 1, 1)),
    (_place(0, 4, 2, 2, 1), _place(0, 4, 1, 4, 1)),
    (_place(0, 2, 1, 2, 1), _place(2, 2, 2, 1, 1)),
    (_place(0, 2, 1, 1, 2), _place(2, 2, 1, 2, 1)),
    (_place(0, 2, 2, 1, 1), _place(0, 4, 1, 1, 4)),
    (_place(0, 4, 1, 4, 1), _place(1, 1, 1, 1, 1)),
    (_place(0, 1, 1, 1, 1), _place(0, 4, 1, 2, 2)),
    (_place(0, 4, 4, 1, 1, zero=3), _place(0, 4, 1, 4, 1)),
    (_place(0, 4, 2, 2, 1, zero=3), _place(0, 4, 2, 1, 2)),
    (_place(0, 4, 1, 2, 2, virtual=3), _place(0, 4, 2, 2, 1)),
]
PAIRS: Sequence[tuple[Layouts, Placement, Placement]] = [
    *((layout, src, dst) for src, dst in PARAMETER_PAIRS),
    *((optimizer_layout, src, dst) for src, dst in OPTIMIZER_PAIRS),
]


def _layouts(shape: ModelShape, index: int) -> tuple[Layout, Layout]:
    of, src, dst = PAIRS[index]
    return of(shape, src.mesh, src.strategy), of(shape, dst.mesh, dst.strategy)


def _shape(quick: bool) -> ModelShape:
    """9.3M parameters, or 32M."""
    hidden, vocab = (256, 8192) if quick else (512, 16000)
    return ModelShape(
        family="llama",
        hidden=hidden,
        num_layers=6,
        num_heads=8,
        num_kv_heads=4,
        head_dim=hidden // 8,
        ffn_dim=hidden * 11 // 4,
        vocab=vocab,
        max_positions=512,
    )


@dataclass
class Case:
    """One pair of layouts on one rank. `groups` are process groups by their sorted ranks."""

    rank: int
    src: Layout
    dst: Layout
    plan: Schedule
    holds: Holding
    wants: Holding
    groups: Mapping[tuple[int, ...], Any]
    shared: SharedMemory

    def mover(self, shared: SharedMemory | None, staging: Staging) -> Reallocator:
        return Reallocator(
            self.plan.of(self.rank),
            self.rank,
            self.holds,
            self.wants,
            src_dtype=torch.float32,
            dst_dtype=torch.float32,
            staging=staging,
            shared=shared,
        )

    def point_to_point(self) -> Method:
        """The plan's bytes between the plan's pairs of ranks, one contiguous message each."""
        volume: dict[tuple[int, int], int] = {}
        for copy in self.plan.cross:
            pair = (copy.src, copy.dst)
            volume[pair] = volume.get(pair, 0) + copy.box.num_elements
        out = [(b, torch.ones(n)) for (a, b), n in volume.items() if a == self.rank]
        into = [(a, torch.ones(n)) for (a, b), n in volume.items() if b == self.rank]

        def run() -> None:
            ops = [dist.P2POp(dist.irecv, buffer, peer) for peer, buffer in into]
            ops += [dist.P2POp(dist.isend, buffer, peer) for peer, buffer in out]
            for work in dist.batch_isend_irecv(ops) if ops else ():
                work.wait()

        return run

    def _owners(self) -> dict[tuple[str, Box], int]:
        """Each distinct source box and the first rank that holds it."""
        owners: dict[tuple[str, Box], int] = {}
        for rank, boxes in self.src.boxes.items():
            for item in boxes.items():
                owners.setdefault(item, rank)
        return owners

    def gather(self) -> Method:
        """All distinct source boxes go to all ranks in one all-gather; each slices what it wants."""
        owned: dict[int, list[tuple[str, Box]]] = {rank: [] for rank in range(WORLD)}
        for item, owner in self._owners().items():
            owned[owner].append(item)
        size = max(sum(box.num_elements for _, box in items) for items in owned.values())
        mine, everything = torch.zeros(size), torch.zeros(WORLD, size)

        def run() -> None:
            start = 0
            for param, box in owned[self.rank]:
                part = mine[start : start + box.num_elements]
                part.view(box.shape).copy_(self.holds.tensors[param])
                start += box.num_elements
            dist.all_gather(list(everything), mine)
            for rank, items in owned.items():
                start = 0
                for param, box in items:
                    self._take(param, box, everything[rank, start : start + box.num_elements])
                    start += box.num_elements

        return run

    def broadcast(self) -> Method:
        """Each distinct source box is broadcast to the ranks that want a part of it."""
        buffers: dict[int, torch.Tensor] = {}
        steps = []
        for (param, box), owner in self._owners().items():
            wanting = [r for r, b in self.dst.boxes.items() if param in b and b[param].intersect(box)]
            ranks = tuple(sorted({owner, *wanting}))
            if self.rank in ranks:
                steps.append((param, box, owner, self.groups.get(ranks)))
                if owner != self.rank:
                    buffers.setdefault(box.num_elements, torch.zeros(box.num_elements))

        def run() -> None:
            for param, box, owner, group in steps:
                own = owner == self.rank
                buffer = self.holds.tensors[param].view(-1) if own else buffers[box.num_elements]
                if group is not None:
                    dist.broadcast(buffer, owner, group=group)
                self._take(param, box, buffer)

        return run

    def _take(self, param: str, box: Box, values: torch.Tensor) -> None:
        """Copies what this rank wants of a source box."""
        common = self.wants.boxes[param].intersect(box) if param in self.wants.boxes else None
        if common is not None:
            self.wants.view(param, common).copy_(values.view(box.shape)[common.within(box)])


def _case(rank: int, shape: ModelShape, index: int, groups: Mapping[tuple[int, ...], Any]) -> Case:
    src, dst = _layouts(shape, index)
    generator = torch.Generator().manual_seed(index)
    dense = {spec.name: torch.randn(spec.shape, generator=generator) for spec in parameters(shape)}
    shared = SharedMemory()
    holds, wants = (_holding(which.boxes.get(rank, {}), shared) for which in (src, dst))
    for param, tensor in holds.tensors.items():
        tensor.copy_(dense[param][holds.boxes[param].slices])
    return Case(rank, src, dst, schedule(src, dst, WORLD), holds, wants, groups, shared)


def _holding(boxes: Mapping[str, Box], shared: SharedMemory) -> Holding:
    total = sum(box.num_elements for box in boxes.values())
    return Holding(views_of(shared.empty(total, torch.float32, torch.device("cpu")), boxes), boxes)


def _measure(rank: int, world_size: int, shape: ModelShape, repeats: int) -> list[dict[str, Any]]:
    """For every pair: bytes sent by this rank, and its seconds by method and repetition."""
    timeout = timedelta(seconds=60)
    groups = {
        ranks: dist.new_group(list(ranks), timeout=timeout)
        for size in range(2, WORLD + 1)
        for ranks in combinations(range(WORLD), size)
    }
    staging = Staging()
    results = []
    for index in range(len(PAIRS)):
        case = _case(rank, shape, index, groups)
        movers = {"ours": case.mover(case.shared, staging), "messages": case.mover(None, staging)}
        methods: dict[str, Callable[[], object]] = {
            **{name: mover.run for name, mover in movers.items()},
            "p2p": case.point_to_point(),
            "gather": case.gather(),
            "broadcast": case.broadcast(),
        }
        _check(case, methods)
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(repeats):
            for name, method in methods.items():
                dist.barrier()
                start = time.perf_counter()
                method()
                seconds[name].append(time.perf_counter() - start)
        sent, staged = movers["ours"].sent_bytes, movers["messages"].staging_bytes
        results.append({"sent_bytes": sent, "staging_bytes": staged, "seconds": seconds})
    return results


def _check(case: Case, methods: Mapping[str, Callable[[], object]]) -> None:
    """Runs every method once (a warm-up), and compares the results of those that have one."""
    results = []
    for name, method in methods.items():
        for tensor in case.wants.tensors.values():
            tensor.zero_()
        method()
        if name != "p2p":
            results.append({p: tensor.clone() for p, tensor in case.wants.tensors.items()})
    for other in results[1:]:
        for param, tensor in other.items():
            if not torch.equal(tensor, results[0][param]):
                raise AssertionError(f"{param} differs between methods")


def _summary(shape: ModelShape, ranks: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One row for every pair, times of the slowest rank, medians over repetitions."""
    rows = []
    for i, (of, before, after) in enumerate(PAIRS):
        bound = WIDTH * lower_bound(*_layouts(shape, i))
        sent = [r[i]["sent_bytes"] for r in ranks]
        slowest = {
            name: [max(times) for times in zip(*(r[i]["seconds"][name] for r in ranks), strict=True)]
            for name in ranks[0][i]["seconds"]
        }
        time_s = {name: median(times) for name, times in slowest.items()}
        rows.append(
            {
                "src": str(before),
                "dst": str(after),
                "of": "parameters" if of is layout else "optimizer states",
                "bytes": sum(sent),
                "bytes_over_bound": sum(sent) / bound,
                "busiest_over_mean_sender": max(sent) / (sum(sent) / sum(n > 0 for n in sent)),
                "staging_bytes": max(r[i]["staging_bytes"] for r in ranks),
                "time_s": time_s,
                "time_over_p2p": _ratio(slowest["ours"], slowest["p2p"]),
                "messages_over_p2p": _ratio(slowest["messages"], slowest["p2p"]),
                "gather_over_ours": _ratio(slowest["gather"], slowest["ours"]),
                "broadcast_over_ours": _ratio(slowest["broadcast"], slowest["ours"]),
            }
        )
    return rows


def _ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of the ratios within each repetition."""
    return median(x / y for x, y in zip(a, b, strict=True))


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer repetitions")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args(argv)
    shape, repeats = _shape(options.quick), 5 if options.quick else 15
    rows = _summary(shape, run_ranks(_measure, WORLD, shape, repeats, timeout_s=600))
    if not options.json:
        for row in rows:
            times = "  ".join(f"{name} {1e3 * s:7.1f} ms" for name, s in row["time_s"].items())
            print(f"{row['src']:>26} -> {row['dst']:26} {row['bytes'] / 1e6:7.1f} MB  {times}")
    result = {
        "pairs": rows,
        "bytes_over_bound_worst": max(row["bytes_over_bound"] for row in rows),
        "time_over_p2p_median": median(row["time_over_p2p"] for row in rows),
        "messages_over_p2p_median": median(row["messages_over_p2p"] for row in rows),
        "gather_over_ours_median": median(row["gather_over_ours"] for row in rows),
        "broadcast_over_ours_median": median(row["broadcast_over_ours"] for row in rows),
        "provenance": {
            "commit": _commit(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "backend": "gloo",
            "ranks": WORLD,
            "params": shape.num_params,
            "repeats": repeats,
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
