"""How far the default search's plan is above the best known, over random experiments.

`python benchmarks/regret.py [--quick] [--json]`. For each experiment: the default method with a few
seconds, then every method with many; the best of all is the best known. Regret is the default's
seconds per iteration divided by the best known's, minus 1. Seconds of search are those of the process
itself, so that other work on the machine does not decide.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

EXPERIMENTS = 50
SHORT_S, LONG_S = 5.0, 20.0
METHODS = ("auto", "branch", "mcmc", "greedy")


def regret(seed: int, short_s: float, long_s: float) -> Mapping[str, Any]:
    """One experiment; `regret` is None where nothing fits."""
    from benchmarks.search_graphs import random_experiment
    from planner.api import make_problem
    from planner.search import methods
    from realloc.errors import InfeasibleError
    from realloc.experiment import read_experiment

    base = read_experiment(ROOT / "experiments" / "recipes" / "ppo_llama7b_16xh100.yaml")
    experiment, cluster = random_experiment(seed, base)
    row: dict[str, Any] = {"seed": seed, "cluster": str(cluster), "actor": experiment.models["actor"].model}
    try:
        short = methods()["auto"](make_problem(experiment, cluster), short_s, 0, clock=time.process_time)
    except InfeasibleError:
        return {**row, "regret": None}
    row |= {"short_s": short.iteration_s, "short_gap": short.gap, "proven": short.proven}
    known = {"short": short.iteration_s}
    if not short.proven:
        for method in METHODS:
            problem = make_problem(experiment, cluster)
            known[method] = methods()[method](problem, long_s, 1, clock=time.process_time).iteration_s
    best = min(known.values())
    return {**row, "known": known, "regret": short.iteration_s / best - 1}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="four experiments, less time each")
    parser.add_argument("--long", type=float, help="seconds of every method, to find the best known")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parser.parse_args(arguments)
    from benchmarks.provenance import provenance

    number, long_s = (4, 6.0) if given.quick else (EXPERIMENTS, LONG_S)
    long_s = given.long or long_s
    rows: list[Mapping[str, Any]] = []
    seed = 0
    while len(rows) < number:
        row = regret(seed, SHORT_S, long_s)
        seed += 1
        if row["regret"] is None:
            print(
                f"{row['seed']:3} {row['actor']} on {row['cluster']}: does not fit; drawn again", flush=True
            )
            continue
        rows.append(row)
        state = "proven" if row["proven"] else f"gap {row['short_gap']:.2%}"
        print(
            f"{row['seed']:3} {row['actor']} on {row['cluster']}: {row['short_s']:.4f} s, {state}, "
            f"regret {row['regret']:.3%}",
            flush=True,
        )
    regrets = [row["regret"] for row in rows]
    within = sum(value <= 0.01 for value in regrets)
    print(f"{within} of {len(rows)} within 1%; worst {max(regrets):.3%}, mean {statistics.mean(regrets):.3%}")
    if given.json:
        summary = {"within_1_percent": within, "worst": max(regrets), "mean": statistics.mean(regrets)}
        print(json.dumps({"experiments": rows, **summary, "provenance": provenance(("numpy",))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
