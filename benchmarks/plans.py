"""Every algorithm's plan for 64 H100s, with its predicted time, as the table of docs/plans.md.

All roles are Llama-7B, eight nodes of eight GPUs, costs of the built-in profile (analytic); 512 prompts of
512 tokens, responses of 512; algorithms that compare samples take eight of each of 64 prompts. Prompts and
responses have their full lengths, so that the table does not rest on an assumed distribution.

    python benchmarks/plans.py [--quick] [--json] [--time-limit S]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.provenance import provenance
from planner.api import search_plan
from realloc.algorithm import BUILT_IN
from realloc.experiment import Experiment, parse_experiment
from realloc.files import Reader
from realloc.plan import ExecutionPlan

MODEL = "llama-7b"
LENGTHS = {"prompt_tokens": 512, "response_tokens": 512}
ROLES: Mapping[str, tuple[str, ...]] = {
    "ppo": ("actor", "critic", "ref", "reward"),
    "raft": ("actor", "reward"),
    "dpo": ("actor", "ref"),
    "reward": ("reward",),
    "sft": ("actor",),
}
SAMPLES = {"grpo": 8, "rloo": 8, "raft": 8, "iterative_dpo": 8, "dpo": 2, "reward": 2}


def experiment_of(algorithm: str) -> Experiment:
    """The experiment of the table's row."""
    roles = ROLES.get(algorithm, ("actor", "ref", "reward"))
    content = {
        "algorithm": algorithm,
        "models": dict.fromkeys(roles, MODEL),
        "workload": {"sequences": 512, "samples_per_prompt": SAMPLES.get(algorithm, 1), **LENGTHS},
        "sampling": {"ignore_eos": True},
        "dtype": "bfloat16",
        "cluster": {"nodes": 8, "gpus_per_node": 8, "device": "h100-sxm"},
    }
    return parse_experiment(Reader(content, algorithm), Path())


def row(algorithm: str, time_limit_s: float) -> Mapping[str, Any]:
    """The plan that was found in this time, and what is predicted and proven of it."""
    experiment = experiment_of(algorithm)
    assert experiment.cluster is not None
    plan = search_plan(experiment, experiment.cluster, time_limit_s=time_limit_s).plan
    predictions = plan.predictions
    assert predictions is not None
    bound = predictions.lower_bound_s
    return {
        "iteration_s": predictions.iteration_s,
        "tokens_per_s": predictions.tokens_per_s,
        "gap": None if bound is None else 1.0 - bound / predictions.iteration_s,
        "peak_gb": sum(predictions.peak_bytes.values()) / 1e9,
        "plan": {name: str(placement) for name, placement in plan.placements.items()},
        "call_s": _call_seconds(plan),
    }


def _call_seconds(plan: ExecutionPlan) -> Mapping[str, float]:
    assert plan.predictions is not None
    return {call.name: plan.predictions.node_s[call.name] for call in plan.graph.calls}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a line for each algorithm, calls with the same placement together."""
    lines = [
        "| algorithm | s an iteration | tokens/s | proven gap | GB on the fullest GPU | plan |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        by_placement: dict[str, list[str]] = {}
        for call, placement in found["plan"].items():
            by_placement.setdefault(placement, []).append(f"{call} {found['call_s'][call]:.2f} s")
        plan = "<br>".join(f"{', '.join(calls)}: `{p}`" for p, calls in by_placement.items())
        gap = "" if found["gap"] is None else f"{100 * found['gap']:.1f}%"
        numbers = (
            f"{found['iteration_s']:.2f} | {found['tokens_per_s']:,.0f} | {gap} | {found['peak_gb']:.1f}"
        )
        lines.append(f"| `{name}` | {numbers} | {plan} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a second of search for each")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    parser.add_argument("--time-limit", type=float, default=20.0, help="seconds of search for each")
    options = parser.parse_args(argv)
    limit_s = 1.0 if options.quick else options.time_limit
    rows = {name: row(name, limit_s) for name in BUILT_IN}
    if not options.json:
        print(table(rows))
    print(json.dumps({"benchmark": "plans", "rows": rows, "provenance": provenance(("realloc",))}))


if __name__ == "__main__":
    main()
