"""How long planning takes and what it proves, as clusters and graphs grow; and the paper's MCMC beside it.

`python benchmarks/search_scale.py [--quick] [--json]`. Every measurement is a process of its own, from
import to result, with everything priced. Clusters: six-call PPO with Llama-70B and -7B (7B alone up to
two nodes) on 1 to 128 nodes of eight H100. Calls: graphs of 3 to 20 calls on two nodes, several roles
that generate and train. MCMC: the same problem and the same seconds, the cost reached over time for both.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
CALLS = (3, 6, 9, 12, 16, 20)
LIMITS_S = {1: 2.0, 2: 2.0, 16: 10.0, 128: 60.0}
QUICK = ((1, 2), (3, 6))
SMALL = "ppo_llama7b_16xh100"
LARGE = "ppo_llama70b_128xh100"


def limit_s(nodes: int) -> float:
    """Seconds for the whole process: the goals', and between them the next larger one's."""
    return next(limit for known, limit in LIMITS_S.items() if nodes <= known)


def measure(nodes: int, calls: int, method: str, seconds: float, seed: int) -> Mapping[str, Any]:
    """In this process: one search, which must end `seconds` after the start of the process's imports."""
    began = time.perf_counter()
    from planner.api import make_problem
    from planner.search import methods
    from realloc.cluster import Cluster
    from realloc.experiment import read_experiment

    name = SMALL if nodes <= 2 else LARGE
    experiment = read_experiment(ROOT / "experiments" / "recipes" / f"{name}.yaml")
    cluster = Cluster(nodes, 8, "h100-sxm")
    if calls:
        from benchmarks.search_graphs import chains, problem_of

        problem = problem_of(experiment, chains(calls), cluster)
    else:
        problem = make_problem(experiment, cluster)
    built = time.perf_counter() - began
    result = methods()[method](problem, max(0.1, seconds - built), seed)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "nodes": nodes,
        "calls": len(problem.graph.calls),
        "method": method,
        "candidates": sum(map(len, problem.rows)),
        "iteration_s": result.iteration_s,
        "bound_s": result.lower_bound_s,
        "gap": result.gap,
        "proven": result.proven,
        "build_seconds": round(built, 3),
        "seconds": round(time.perf_counter() - began, 3),
        "cpu_seconds": round(sum(u.ru_utime + u.ru_stime for u in used), 3),
        "memory_bytes": max(u.ru_maxrss for u in used) * 1024,
        "history": [(round(built + p.elapsed_s, 3), p.iteration_s) for p in result.history],
    }


def apart(nodes: int, calls: int, method: str, seconds: float, seed: int = 0) -> Mapping[str, Any]:
    """`measure` in a fresh process. `wall_seconds` counts its start too."""
    command = [sys.executable, __file__, "--one", json.dumps([nodes, calls, method, seconds, seed])]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "wall_seconds": round(time.perf_counter() - began, 3)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few nodes and calls")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--nodes", type=int, nargs="+", help="only these numbers of nodes")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(measure(*json.loads(given.one))))
        return 0
    from benchmarks.provenance import provenance

    nodes = given.nodes or (QUICK[0] if given.quick else NODES)
    by_nodes = []
    for count in nodes:
        limit = limit_s(count)
        row = {"auto": apart(count, 0, "auto", limit - 0.2), "mcmc": apart(count, 0, "mcmc", limit - 0.2)}
        by_nodes.append({"nodes": count, "limit_seconds": limit, **row})
        show(row["auto"])
        show(row["mcmc"])
    by_calls = []
    for count in QUICK[1] if given.quick else () if given.nodes else CALLS:
        by_calls.append(apart(2, count, "auto", 10.0))
        show(by_calls[-1])
    if given.json:
        print(json.dumps({"nodes": by_nodes, "calls": by_calls, "provenance": provenance(("numpy",))}))
    return 0


def show(row: Mapping[str, Any]) -> None:
    gap = "proven" if row["proven"] else f"gap {row['gap']:.2%}"
    what = f"{row['nodes']:4} nodes {row['calls']:3} calls {row['method']:5}"
    spent = f"{row['cpu_seconds']:.2f} s CPU, building {row['build_seconds']:.2f} s"
    memory = f"{row['memory_bytes'] / 2**20:.0f} MiB"
    found = f"{row['iteration_s']:8.4f} s, {gap:11}"
    print(f"{what}: {found} in {row['wall_seconds']:6.2f} s ({spent}, {memory})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
