"""The share of an iteration in which a rank waits and the plan does not say so.

A plan makes ranks wait: a rank whose next node needs another rank is idle until that one comes. That idle
time the plan explains. What it does not explain is what the runtime adds between nodes: interpreting
instructions, fetching data, recording, reporting; and the waiting of other ranks that follows from it.

Definition. From the trace take each rank's own seconds in each node: from the moment the last of the node's
ranks arrived (or the rank's own start, where it left before that) until the rank was done. Replay exactly
these seconds in the plan's order: a node starts when all its ranks are free, a rank is free again as soon as
its own seconds are over, and nothing else takes time. Over the steady iterations (all but the first),

    unexplained(rank) = (measured end - replayed end) / (measured end - measured start)

The rank's busy seconds are the same in both, so this is the idle time that neither the plan's order nor the
durations of its nodes account for. `unexplained_share` is that of the worst rank of the worst plan. Time that
a rank spends inside a call waiting for its peers (a pipeline's bubble, uneven shares) belongs to the call's
seconds, which the planner prices; it is not counted here.

Two plans run, each as a user runs it, checkpoints included: the searched one, and a hand-written one that
trains actor and critic on disjoint meshes. For the latter `overlap_share` says how much of the shorter of the
two training calls runs while the other does. A short run first says how many sequences make iterations of
ITERATION_S seconds.

    python benchmarks/overhead.py [--quick] [--json]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.ppo_runs import SHAPES, Ours, prepare_models, realloc_command  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from realloc.trace import Trace, TraceRecord, read_trace  # noqa: E402

QUICK_SEQUENCES = 16
ITERATION_S = 14.0
"""What iterations shall take in full: above ten seconds with some room, as the split plan is another."""
SPLIT = {
    "actor_gen": ("node[0]", "d2t1p1"),
    "rew_inf": ("node0:gpu[0]", "d1t1p1"),
    "ref_inf": ("node[0]", "d2t1p1"),
    "critic_inf": ("node0:gpu[1]", "d1t1p1"),
    "actor_train": ("node0:gpu[0]", "d1t1p1"),
    "critic_train": ("node0:gpu[1]", "d1t1p1"),
}


def unexplained(trace: Trace, order: Sequence[str]) -> Mapping[str, Any]:
    """Per-rank shares of the steady iterations, and the worst; `order` holds the nodes' names."""
    first = min(record.iteration for record in trace.records)
    steady = [r for r in trace.records if r.iteration > first]
    place = {name: i for i, name in enumerate(order)}
    # records of no node (a checkpoint's copy) are the runtime's own time: they do not enter the replay
    nodes: dict[tuple[int, int], list[TraceRecord]] = defaultdict(list)
    for record in steady:
        if record.node in place:
            nodes[record.iteration, place[record.node]].append(record)
    # each rank begins where its first iteration ended, so that what comes between iterations counts
    start = {
        rank: max(r.end_s for r in trace.records if r.rank == rank and r.iteration == first)
        for rank in range(trace.world_size)
    }
    end = {rank: max(r.end_s for r in steady if r.rank == rank) for rank in range(trace.world_size)}
    free, busy = replay([nodes[key] for key in sorted(nodes)], start)
    ranks = []
    for rank in range(trace.world_size):
        span = end[rank] - start[rank]
        lost = (end[rank] - free[rank]) / span
        ranks.append(
            {
                "rank": rank,
                "span_s": span,
                "busy_share": busy[rank] / span,
                "planned_wait_share": 1.0 - busy[rank] / span - lost,
                "unexplained_share": lost,
                "between_nodes_share": _gaps([r for r in steady if r.rank == rank], start[rank]) / span,
            }
        )
    return {"unexplained_share": max(r["unexplained_share"] for r in ranks), "ranks": ranks}


def replay(
    nodes: Sequence[Sequence[TraceRecord]], start: Mapping[int, float]
) -> tuple[Mapping[int, float], Mapping[int, float]]:
    """(when each rank is free, its busy seconds) after nodes that take their measured seconds.

    `nodes`: the records of each node, one a rank, in the plan's order; `start`: when each rank begins.
    """
    free, busy = dict(start), dict.fromkeys(start, 0.0)
    for records in nodes:
        arrived = max(record.start_s for record in records)
        meet = max(free[record.rank] for record in records)
        for record in records:
            if record.end_s <= arrived and len(records) > 1:  # it left before the last rank came
                begin, seconds = free[record.rank], record.end_s - record.start_s
            else:
                begin, seconds = meet, record.end_s - arrived
            free[record.rank] = begin + seconds
            busy[record.rank] += seconds
    return free, busy


def _gaps(records: Sequence[TraceRecord], start_s: float) -> float:
    """Seconds of one rank, from `start_s` on, between the end of a node and the start of its next."""
    ordered = sorted(records, key=lambda r: r.start_s)
    ends = [start_s, *(r.end_s for r in ordered)]
    return sum(max(0.0, r.start_s - end) for end, r in zip(ends, ordered, strict=False))


def overlap(trace: Trace, one: str, other: str) -> float:
    """Median over iterations of the time both calls run, over the seconds of the shorter."""
    spans: dict[tuple[int, str], tuple[float, float]] = {}
    for r in trace.records:
        if r.node in (one, other):
            low, high = spans.get((r.iteration, r.node), (r.start_s, r.end_s))
            spans[r.iteration, r.node] = (min(low, r.start_s), max(high, r.end_s))
    shares = []
    for iteration in {key[0] for key in spans}:
        (a, b), (c, d) = spans[iteration, one], spans[iteration, other]
        shares.append(max(0.0, min(b, d) - max(a, c)) / min(b - a, d - c))
    return median(shares)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="iterations of about a second")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args(argv)
    shape = replace(next(s for s in SHAPES if s.name == "llama-4M"), sequences=QUICK_SEQUENCES)
    plans: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="realloc-overhead-") as name:
        folder = Path(name)
        profile = folder / "profile.yaml"
        realloc_command(folder, "profile", "--quick", "--ranks", "2", "-o", str(profile))
        prepare_models(shape, folder)
        ours = Ours(shape, folder, profile, iterations=6 if options.quick else 3, ranks=2)
        if not options.quick:
            ours.run(seed=0)
            times = ITERATION_S / read_trace(ours.trace).iteration_seconds()
            shape = replace(shape, sequences=QUICK_SEQUENCES * math.ceil(times))
            ours = Ours(shape, folder, profile, iterations=4, ranks=2)
        for label, placements in (("searched", None), ("split", SPLIT)):
            if placements is not None:
                ours.place(placements)
            ours.run(seed=0, saves=True)
            trace = read_trace(ours.trace)
            row = dict(unexplained(trace, ours.order))
            row["iteration_s"] = trace.iteration_seconds()
            row["plan"] = ours.plan
            if label == "split":
                row["overlap_share"] = overlap(trace, "actor_train", "critic_train")
            plans[label] = row
            if not options.json:
                print(_line(label, row), flush=True)
    result = {
        "benchmark": "overhead",
        "unexplained_share": max(row["unexplained_share"] for row in plans.values()),
        "sequences": shape.sequences,
        "iteration_s": min(row["iteration_s"] for row in plans.values()),
        "overlap_share": plans["split"]["overlap_share"],
        "plans": plans,
        "provenance": provenance(("torch", "realloc")),
    }
    print(json.dumps(result))


def _line(label: str, row: Mapping[str, Any]) -> str:
    shares = ", ".join(
        f"rank {r['rank']}: busy {r['busy_share']:.1%}, waits by plan {r['planned_wait_share']:.1%}, "
        f"unexplained {r['unexplained_share']:.2%}"
        for r in row["ranks"]
    )
    return f"{label:9} {row['iteration_s']:.3f} s an iteration; {shares}"


if __name__ == "__main__":
    main()
