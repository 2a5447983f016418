"""How well predictions hold: seconds per iteration predicted and measured, over plans that differ.

Two ranks on a core each run PPO and GRPO with two models under hand-written plans that between them use every
axis and saver: data, tensor and pipeline parallelism, micro-batches, schedules, ZeRO, recomputation, sequence
parallelism, reallocation between layouts, disjoint meshes, offload. A profile is taken first, from the
experiments themselves (never from their runs); predictions are made from it before a plan runs.

Every plan runs in several rounds, one plan after the other in each, so that phases in which the machine is
slow meet all alike. Measured is the median over rounds of the median distance between the ends of successive
iterations, the first left out. `error` is |predicted - measured| / measured. Ranks also take the pace of the
machine (`realloc.pace`): `..._at_pace` are the same numbers with measured seconds divided by how much slower
the machine was than while it was profiled, which is the error of the model alone. `spearman` is the rank
correlation of predicted and measured seconds among the plans of one experiment, `regret` how much slower the
plan predicted best ran than the fastest that ran; both are those of the worst experiment. Between
experiments ranking is easy and says nothing. `core_share` says whether the machine was quiet: below about
0.95 other work took the ranks' cores, and no time is to be trusted.

    python benchmarks/fidelity.py [--quick] [--json] [--experiments NAME ...] [--profile FILE] [--verbose]

`--quick` runs two of the four experiments, shorter, of smaller batches. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.provenance import provenance  # noqa: E402
from experiments import toy  # noqa: E402
from planner.predict import predict  # noqa: E402
from realloc.augmented import Placement  # noqa: E402
from realloc.cli import main as realloc_main  # noqa: E402
from realloc.comparison import Comparison, compare, core_share  # noqa: E402
from realloc.comparison_text import comparison_text  # noqa: E402
from realloc.dataflow import CallKind  # noqa: E402
from realloc.experiment import Experiment, read_experiment  # noqa: E402
from realloc.files import dump_yaml  # noqa: E402
from realloc.mesh import parse_mesh  # noqa: E402
from realloc.plan import ExecutionPlan, write_plan  # noqa: E402
from realloc.strategy import parse_strategy  # noqa: E402
from realloc.trace import Trace, read_trace  # noqa: E402
from runtime.host_memory import keep_freed_memory  # noqa: E402
from tests.tiny import write_tiny_llama  # noqa: E402

RANKS = 2
QUICK_S, FULL_S = 7.0, 25.0
"""For how long each plan runs, all rounds together."""
ROUNDS = 3
FEWEST = 4
"""Iterations of a round, however long they take."""
QUICK_CASES = ("ppo-260K", "grpo-15M")
BOTH, ONE, OTHER = "node[0]", "node0:gpu[0]", "node0:gpu[1]"
MAX_PROMPT = 16
Placed = tuple[str, str]
RANKING = ("spearman", "spearman_at_pace", "regret")

# For each call, or for each kind of call: generate, inference, train_step; `*` is everything else.
PLANS: Mapping[str, Mapping[str, Placed]] = {
    "data": {"*": (BOTH, "d2t1p1")},
    "data, 4 micro-batches": {"*": (BOTH, "d2t1p1m4")},
    "tensor": {"*": (BOTH, "d1t2p1")},
    "pipeline": {"*": (BOTH, "d1t1p2m4")},
    "one rank": {"*": (ONE, "d1t1p1")},
    "disjoint training": {
        "*": (BOTH, "d2t1p1"),
        "actor_train": (ONE, "d1t1p1"),
        "critic_train": (OTHER, "d1t1p1"),
        "rew_inf": (ONE, "d1t1p1"),
        "critic_inf": (OTHER, "d1t1p1"),
    },
    "data, ZeRO 1": {"*": (BOTH, "d2t1p1"), "train_step": (BOTH, "d2t1p1m2z1")},
    "data, ZeRO 3, recomputation": {"*": (BOTH, "d2t1p1"), "train_step": (BOTH, "d2t1p1m2z3+full")},
    "generate data, train pipeline": {"*": (BOTH, "d2t1p1"), "train_step": (BOTH, "d1t1p2m4")},
    "generate data, train tensor": {"*": (BOTH, "d2t1p1m2"), "train_step": (BOTH, "d1t2p1+sp")},
    "generate on one rank": {"*": (BOTH, "d2t1p1"), "generate": (ONE, "d1t1p1m2")},
    "zero bubble, offload": {
        "*": (BOTH, "d2t1p1m2"),
        "train_step": (BOTH, "d1t1p2m4+zb"),
        "ref_inf": (BOTH, "d2t1p1+offload"),
    },
}


@dataclass(frozen=True)
class Case:
    """One experiment. `sequences` and `response` are (quick, full)."""

    name: str
    algorithm: str
    model: Mapping[str, int]
    sequences: tuple[int, int]
    response: tuple[int, int]
    mini_batches: int


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> Mapping[str, int]:
    names = ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab", "context")
    return dict(zip(names, (hidden, layers, heads, kv_heads, ffn, vocab, 128), strict=True))


STORIES_260K = _llama(64, 5, 8, 4, 172, 512)
STORIES_15M = _llama(288, 6, 6, 6, 768, 32000)

CASES = (
    Case("ppo-260K", "ppo", STORIES_260K, (32, 64), (24, 48), 2),
    Case("ppo-15M", "ppo", STORIES_15M, (8, 16), (16, 32), 2),
    Case("grpo-260K", "grpo", STORIES_260K, (32, 64), (24, 48), 2),
    Case("grpo-15M", "grpo", STORIES_15M, (8, 16), (16, 32), 1),
)


@dataclass(frozen=True)
class Result:
    """One plan of one experiment: seconds per iteration predicted, and measured in each round.

    `paces`: of each round, 1 where it is not known. `core_share`: for how much of their computing time
    ranks had their core; below 0.95 the machine was not quiet. `comparison` is of a typical round.
    """

    case: str
    plan: str
    predicted_s: float
    rounds_s: tuple[float, ...]
    paces: tuple[float, ...]
    comparison: Comparison
    core_share: float | None

    @property
    def measured_s(self) -> float:
        return median(self.rounds_s)

    @property
    def at_pace_s(self) -> float:
        """Measured seconds had the machine been as fast as when it was profiled."""
        return median(s / pace for s, pace in zip(self.rounds_s, self.paces, strict=True))

    @property
    def error(self) -> float:
        return abs(self.predicted_s - self.measured_s) / self.measured_s

    @property
    def error_at_pace(self) -> float:
        return abs(self.predicted_s - self.at_pace_s) / self.at_pace_s


def prepare(case: Case, folder: Path, quick: bool) -> Path:
    """Writes models, data and the experiment; returns the experiment's file."""
    folder.mkdir()
    models = {"ppo": ("actor", "ref", "critic", "reward"), "grpo": ("actor", "ref")}[case.algorithm]
    for seed, role in enumerate(models):
        head = "scalar" if role in ("critic", "reward") else "lm"
        tied = case.model["vocab"] > 1000 and head == "lm"
        write_tiny_llama(folder / role, seed=seed, head=head, tied=tied, **case.model)
        toy.write_tokenizer(folder / role)
    toy.write_data(folder, seed=5, num_train=256, num_test=2)
    content: dict[str, Any] = {
        "algorithm": case.algorithm,
        "models": {role: str(folder / role) for role in models},
        "data": {"path": str(folder / "train.jsonl"), "prompt": "prompt"},
        "workload": {
            "sequences": case.sequences[0 if quick else 1],
            "prompt_tokens": {"measured": True, "max": MAX_PROMPT},
            "response_tokens": case.response[0 if quick else 1],
        },
        "hyperparameters": {"mini_batches": case.mini_batches},
        "sampling": {"ignore_eos": True},
        "cluster": {"gpus_per_node": RANKS, "device": "cpu"},
    }
    if case.algorithm == "grpo":
        content["reward"] = "experiments.rewards:sentiment"
        content["workload"]["samples_per_prompt"] = 4
    path = folder / "experiment.yaml"
    path.write_text(dump_yaml("experiment", content), encoding="utf-8")
    return path


def place(experiment: Experiment, placed: Mapping[str, Placed]) -> ExecutionPlan:
    """The checked plan with these placements."""
    assert experiment.cluster is not None
    chosen = {}
    for call in experiment.graph().calls:
        mesh, strategy = placed.get(call.name) or placed.get(str(call.kind)) or placed["*"]
        if call.kind is CallKind.COMPUTE:  # Python on each rank's sequences
            strategy = f"d{1 if mesh != BOTH else RANKS}t1p1"
        elif call.kind is not CallKind.TRAIN_STEP:
            strategy = strategy.removesuffix("+zb")
        chosen[call.name] = Placement(
            parse_mesh(mesh, experiment.cluster, call.name), parse_strategy(strategy, call.name)
        )
    plan = ExecutionPlan(experiment, experiment.cluster, chosen)
    plan.check()
    return plan


def run_case(case: Case, folder: Path, profile: Path, seconds: float, *, quiet: bool) -> Sequence[Result]:
    """Predicts every plan of one experiment, and runs it for about so many seconds, in rounds."""
    experiment = read_experiment(folder / "experiment.yaml")
    plans = {label: predict(place(experiment, placed), str(profile)) for label, placed in PLANS.items()}
    traces: dict[str, list[Trace]] = {label: [] for label in plans}
    for _ in range(ROUNDS):
        for label, plan in plans.items():
            traces[label].append(run_once(plan, folder, seconds / ROUNDS))
    results = [result_of(case.name, label, plan, traces[label]) for label, plan in plans.items()]
    for result in () if quiet else results:
        print(
            f"{case.name:10} {result.plan:30} predicted {result.predicted_s:7.3f} s, measured "
            f"{result.measured_s:7.3f} s, ratio {result.measured_s / result.predicted_s:5.2f}, at pace "
            f"{result.at_pace_s / result.predicted_s:5.2f}",
            flush=True,
        )
    return results


def run_once(plan: ExecutionPlan, folder: Path, seconds: float) -> Trace:
    """Runs a plan for about so many seconds."""
    path, out = folder / "plan.yaml", folder / "out"
    write_plan(plan, path)
    assert plan.predictions is not None
    iterations = max(FEWEST, round(seconds / plan.predictions.iteration_s))
    _command(
        "run", str(path), "--out", str(out), "--overwrite", "--pin", "--save-every", "0",
        "--iterations", str(iterations),
    )  # fmt: skip
    return read_trace(out / "trace.jsonl")


def result_of(case: str, label: str, plan: ExecutionPlan, traces: Sequence[Trace]) -> Result:
    """What the rounds of one plan give."""
    assert plan.predictions is not None
    found = sorted(traces, key=lambda trace: trace.iteration_seconds())
    comparisons = [compare(plan, trace) for trace in traces]
    shares = [share for share in map(core_share, traces) if share is not None]
    return Result(
        case=case,
        plan=label,
        predicted_s=plan.predictions.iteration_s,
        rounds_s=tuple(trace.iteration_seconds() for trace in traces),
        paces=tuple(1.0 if c.pace is None else c.pace.ratio for c in comparisons),
        comparison=compare(plan, found[(len(found) - 1) // 2]),
        core_share=median(shares) if shares else None,
    )


def _command(*arguments: str) -> None:
    """A command of realloc in this process, which has imported torch once. Exits when it fails."""
    # a file, because the ranks that it forks need one that has a descriptor
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = realloc_main(arguments)
        if code:
            output.seek(0)
            raise SystemExit(f"realloc {' '.join(arguments)} ended with {code}:\n{output.read()[-3000:]}")


def spearman(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    if len(predicted) < 2:
        return 1.0
    one, other = _ranks(predicted), _ranks(measured)
    a, b = mean(one), mean(other)
    covariance = sum((x - a) * (y - b) for x, y in zip(one, other, strict=True))
    spread = sum((x - a) ** 2 for x in one) * sum((y - b) ** 2 for y in other)
    return covariance / spread**0.5 if spread else 1.0


def _ranks(values: Sequence[float]) -> Sequence[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def regret(results: Sequence[Result]) -> float:
    """How much slower the plan predicted best is than the fastest, as a share."""
    chosen = min(results, key=lambda result: result.predicted_s)
    return chosen.measured_s / min(result.measured_s for result in results) - 1


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """The benchmark's numbers, and how far each kind of term is off over all plans."""
    by_case: dict[str, list[Result]] = {}
    for result in results:
        by_case.setdefault(result.case, []).append(result)
    cases = {
        name: {
            "error_mean": mean(r.error for r in found),
            "error_worst": max(r.error for r in found),
            "error_mean_at_pace": mean(r.error_at_pace for r in found),
            "error_worst_at_pace": max(r.error_at_pace for r in found),
            "spearman": spearman([r.predicted_s for r in found], [r.measured_s for r in found]),
            "spearman_at_pace": spearman([r.predicted_s for r in found], [r.at_pace_s for r in found]),
            "regret": regret(found),
        }
        for name, found in by_case.items()
    }
    return {
        "error_mean": mean(r.error for r in results),
        "error_worst": max(r.error for r in results),
        "error_mean_at_pace": mean(r.error_at_pace for r in results),
        "error_worst_at_pace": max(r.error_at_pace for r in results),
        "spearman": min(case["spearman"] for case in cases.values()),
        "spearman_at_pace": min(case["spearman_at_pace"] for case in cases.values()),
        "regret": max(case["regret"] for case in cases.values()),
        "plans": [
            {
                "experiment": r.case,
                "plan": r.plan,
                "predicted_s": r.predicted_s,
                "measured_s": r.measured_s,
                "error": r.error,
                "error_at_pace": r.error_at_pace,
                "rounds_s": list(r.rounds_s),
                "paces": list(r.paces),
                "core_share": r.core_share,
            }
            for r in results
        ],
        "experiments": cases,
        "core_share": min((r.core_share for r in results if r.core_share is not None), default=None),
        "terms": _term_ratios(results),
    }


def _term_ratios(results: Sequence[Result]) -> Mapping[str, Mapping[str, Any]]:
    """Call and term (or kind of node) -> seconds predicted and measured, over all plans of an experiment."""
    sums: dict[str, list[float]] = {}
    for result in results:
        for line in result.comparison.lines:
            if line.predicted_s is None or line.measured_s is None:
                continue
            node = line.node if line.term else line.node.partition(":")[0]
            entry = sums.setdefault(f"{result.case} {node} {line.term}".strip(), [0.0, 0.0])
            entry[0] += line.predicted_s
            entry[1] += line.measured_s
    return {
        name: {"predicted_s": a, "measured_s": b, "ratio": b / a if a else None}
        for name, (a, b) in sums.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller batches and fewer iterations")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    parser.add_argument("--experiments", nargs="+", choices=[c.name for c in CASES], help="only these")
    parser.add_argument("--profile", type=Path, help="predict with this profile instead of a new one")
    parser.add_argument("--verbose", action="store_true", help="every plan's comparison, term by term")
    options = parser.parse_args(argv)
    if len(os.sched_getaffinity(0)) < RANKS:
        raise SystemExit(f"needs {RANKS} cores, one for each rank")
    keep_freed_memory()  # ranks are forked from this process
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="realloc-fidelity-") as name:
        folder = Path(name)
        names = options.experiments or (QUICK_CASES if options.quick else [case.name for case in CASES])
        cases = [case for case in CASES if case.name in names]
        experiments = [prepare(case, folder / case.name, options.quick) for case in cases]
        profile = options.profile
        if profile is None:
            profile = folder / "profile.yaml"
            _profile(profile, experiments, options.quick)
        for case in cases:
            seconds = QUICK_S if options.quick else FULL_S
            found = run_case(case, folder / case.name, profile.resolve(), seconds, quiet=options.json)
            results += found
            if options.verbose:
                for result in found:
                    print(result.plan, comparison_text(result.comparison), sep="\n", flush=True)
    report = {"benchmark": "fidelity", **summary(results), "provenance": provenance(("torch", "realloc"))}
    if not options.json:
        for key in ("error_mean", "error_worst", "error_mean_at_pace", "error_worst_at_pace", *RANKING):
            print(f"{key}: {report[key]:.3f}")
    print(json.dumps(report))


def _profile(profile: Path, experiments: Sequence[Path], quick: bool) -> None:
    """Measures the machine for these experiments."""
    arguments = ["profile", "--ranks", str(RANKS), "-o", str(profile)]
    for experiment in experiments:
        arguments += ["--experiment", str(experiment)]
    _command(*arguments, *(["--quick"] if quick else []))


if __name__ == "__main__":
    main()
