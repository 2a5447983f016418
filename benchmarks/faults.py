"""A campaign of faults: ranks killed and stopped, links cut, disks filled, each at a moment drawn at random.

A tiny PPO experiment runs undisturbed first. Then it runs again and again, and each time something is
done to it from outside: at a random moment of a random iteration, while its ranks start, or while a
checkpoint is being written. Each run has to notice, say which rank or node is to blame, go on from its
last checkpoint, and end with the weights, optimizer states, metrics and samples of the undisturbed run,
bit for bit.

    killed, stopped   a rank gets SIGKILL or SIGSTOP, of a run of one node or two; the run restarts by itself
    disk              the disk of the run's folder is full (a small tmpfs; without the right to mount one, a
                      limit on the size of files): the run ends with a message, `--resume` goes on
    link              two nodes in network namespaces, one's link goes down; both launchers end, and
                      `--resume` goes on when it is up again (needs root; else reported as not run)

    python benchmarks/faults.py [--quick] [--json] [--markdown]

The last line is one JSON object: `faults` is how many there were, `detected` those noticed within
`bound_s` with the right rank or node named, `resumed` those after which the run came to its end,
`identical` those that then left the undisturbed run's state; `detection_s_worst`; `kinds`, the same for each.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.fault_runs import ITERATIONS, Campaign, Outcome  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402

FULL = {"killed": 44, "stopped": 24, "disk": 20, "link": 16}
QUICK = {"killed": 2, "stopped": 2, "disk": 1, "link": 1}
BOUND_S = 10.0


def row(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The numbers of some faults."""
    times = [o.detection_s for o in outcomes if o.detection_s is not None]
    return {
        "faults": len(outcomes),
        "detected": sum(o.is_named and (o.detection_s or 0.0) <= BOUND_S for o in outcomes),
        "resumed": sum(o.has_resumed for o in outcomes),
        "identical": sum(o.is_identical for o in outcomes),
        "detection_s_median": median(times) if times else None,
        "detection_s_worst": max(times, default=None),
    }


def table(kinds: dict[str, dict[str, Any]]) -> str:
    """The kinds as a table in Markdown."""
    lines = [
        "| fault | runs | detected within 10 s and named | resumed | identical | detection, median (worst) |",
        "|---|---|---|---|---|---|",
    ]
    for kind, numbers in kinds.items():
        if numbers["detection_s_worst"] is None:
            times = "-"
        else:
            times = f"{numbers['detection_s_median']:.1f} s ({numbers['detection_s_worst']:.1f} s)"
        cells = [numbers[key] for key in ("faults", "detected", "resumed", "identical")]
        lines.append(f"| {kind} | {' | '.join(map(str, cells))} | {times} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="six faults")
    parser.add_argument("--json", action="store_true", help="only the JSON object on stdout")
    parser.add_argument("--markdown", action="store_true", help="a table for the documentation too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(FULL), help="faults of this kind alone")
    options = parser.parse_args(argv)
    counts = QUICK if options.quick else FULL
    if options.only:
        counts = {options.only: counts[options.only]}
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    random.Random(options.seed).shuffle(kinds)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        campaign = Campaign(Path(folder), BOUND_S, options.seed)
        not_run = {kind: reason for kind in counts if (reason := campaign.why_not(kind)) is not None}
        planned = [kind for kind in kinds if kind not in not_run]
        for number, kind in enumerate(planned):
            outcomes.append(campaign.run(kind, number))
            print(f"{number + 1}/{len(planned)} {outcomes[-1]}", file=sys.stderr, flush=True)
    by_kind = {kind: row([o for o in outcomes if o.kind == kind]) for kind in counts if kind not in not_run}
    result = {
        **row(outcomes),
        "bound_s": BOUND_S,
        "iterations": ITERATIONS,
        "kinds": by_kind,
        "not_run": {kind: {"faults": counts[kind], "reason": reason} for kind, reason in not_run.items()},
        "seed": options.seed,
        "bad": [asdict(o) for o in outcomes if not (o.is_named and o.is_identical)],
        "provenance": provenance(),
    }
    if options.markdown or not options.json:
        print(table({**by_kind, "all": row(outcomes)}))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
