"""The proven optimum of candidate tables for six-call PPO, and how long it takes.

`python benchmarks/plan_tables.py FOLDER [--quick] --json` solves every `*.json` table of a folder. A table
maps each call to its candidates: `{mesh: [first GPU, number of GPUs], pp, dp, tp, time_ms, mem_bytes,
static_mem_bytes}`. `planner.phases` states the objective. Seconds are of the search alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.phases import Candidate, PhasedSearch

PHASES = (("actor_gen",), ("rew_inf", "ref_inf", "critic_inf"), ("actor_train", "critic_train"))
CAPACITY_BYTES = 80 << 30


def read_table(path: Path) -> list[Candidate]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return [
        Candidate(
            call=call,
            name=f"d{row['dp']}t{row['tp']}p{row['pp']}",
            first=row["mesh"][0],
            size=row["mesh"][1],
            cost=row["time_ms"],
            static_bytes=row["static_mem_bytes"],
            active_bytes=row["mem_bytes"] - row["static_mem_bytes"],
        )
        for call, rows in content.items()
        for row in rows
    ]


def solve(path: Path) -> Mapping[str, Any]:
    candidates = read_table(path)
    started = time.perf_counter()
    result = PhasedSearch(PHASES, candidates, CAPACITY_BYTES).solve()
    seconds = time.perf_counter() - started
    return {
        "cost_ms": result.cost,
        "bound_ms": result.bound,
        "seconds": round(seconds, 4),
        "plan": {
            call: {"mesh": [c.first, c.size], "strategy": c.name, "time_ms": c.cost}
            for call, c in result.chosen.items()
        },
        "visited": result.visited,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of tables")
    parser.add_argument("--quick", action="store_true", help="no difference: it is quick")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parser.parse_args(arguments)
    results = {path.stem: solve(path) for path in sorted(given.folder.glob("*.json"))}
    for name, result in results.items():
        print(f"{name}: {result['cost_ms']} ms, proven, in {result['seconds']} s")
    if given.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
