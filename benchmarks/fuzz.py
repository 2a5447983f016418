"""Damages experiments, plans, profiles, traces and what else is read, and runs commands on them.

    python benchmarks/fuzz.py --count 10000 --seed 0 --json

No case may end in a traceback, take too long, or write outside its output folder. What does is printed
with the seed that makes it again (`--count 1 --seed N`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.fuzz.cases import Outcome, Watch, run_case, write_originals


def fuzz(
    count: int, seed: int, *, file: str | None = None, seconds: float = float("inf")
) -> list[tuple[int, Outcome]]:
    """Runs up to `count` cases, each of a seed of its own; (seed, outcome) of each."""
    watch = Watch()
    outcomes = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="realloc-fuzz-") as name:
        root = Path(name).resolve()
        write_originals(root / "originals")
        for number in range(seed, seed + count):
            if time.monotonic() - started > seconds:
                break
            outcome = run_case(root / "originals", root / "case", watch, Random(number), file)
            outcomes.append((number, outcome))
            if len(outcomes) % 500 == 0:
                print(
                    f"{len(outcomes)} cases, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True
                )
            if outcome.is_wrong:
                print(
                    f"seed {number}: {outcome.name}: {outcome.command}: {outcome.kind}\n{outcome.text}\n",
                    flush=True,
                )
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", help="damage this file only")
    parser.add_argument("--quick", action="store_true", help="200 cases")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sys.dont_write_bytecode = True
    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.monotonic()
    outcomes = fuzz(200 if arguments.quick else arguments.count, arguments.seed, file=arguments.file)
    kinds = Counter(outcome.kind for _, outcome in outcomes)
    result = {
        "cases": len(outcomes),
        "seconds": round(time.monotonic() - started, 1),
        **{kind: kinds[kind] for kind in ("accepted", "refused", "traceback", "hang", "write", "exit")},
        "files": dict(Counter(outcome.name for _, outcome in outcomes)),
    }
    print(json.dumps(result) if arguments.json else result)
    sys.exit(any(outcome.is_wrong for _, outcome in outcomes))


if __name__ == "__main__":
    main()
