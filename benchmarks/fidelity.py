"""How well predictions hold: seconds per iteration predicted and measured, over plans that differ.

Two ranks on a core each run PPO and GRPO with two models under hand-written plans that between them use every
axis and saver: data, tensor and pipeline parallelism, micro-batches, schedules, ZeRO, recomputation, sequence
parallelism, reallocation between layouts, disjoint meshes, offload.

There are several rounds. In each a profile is taken first, from the experiments themselves (never from their
runs), predictions are made from it, and then every plan runs, one after the other: shared machines drift, and
profile and run should meet the same one. Predicted is the median over rounds; measured the median over rounds
of the median distance between the ends of successive iterations, without the first half of them.

`error` is |predicted - measured| / measured. A prediction is of the machine that was profiled, and a shared
machine is another one for tenths of a second or for minutes, while others are at its physical cores. So
ranks take its pace after every iteration, by a fixed piece of work that knows nothing of plans
(`realloc.pace`), and iterations count that began and ended at the pace of the round's profile, whatever was
predicted. Plans with fewer than two rounds that have such iterations, or whose rounds are more than 5%
apart, run again as long as time allows. Where no round of a plan has any, all iterations of the one nearest
to the profile's pace count (`disturbed` says of how many plans). `..._all` are the same numbers with all
iterations of all rounds; `..._at_pace` those with measured seconds divided by how much slower the machine
was than while it was profiled. `repeat` is how far two rounds of one plan are apart, 2 |a - b| / (a + b),
all iterations counted. `spearman` is the rank correlation of predicted and measured seconds among the plans
of one experiment, `regret` how much slower the plan predicted best ran than the fastest that ran; both are
those of the worst experiment. Between experiments ranking is easy and says nothing. `core_share` says
whether other work of this host took the ranks' cores; below about 0.95 no time is to be trusted.

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
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.fidelity_numbers import (  # noqa: E402
    MEANS,
    RANKING,
    WORST,
    Result,
    Round,
    summary,
    to_repeat,
)
from benchmarks.provenance import provenance  # noqa: E402
from experiments import toy  # noqa: E402
from planner.predict import predict  # noqa: E402
from realloc.augmented import Placement  # noqa: E402
from realloc.cli import main as realloc_main  # noqa: E402
from realloc.comparison import compare, core_share  # noqa: E402
from realloc.comparison_text import comparison_text  # noqa: E402
from realloc.dataflow import CallKind  # noqa: E402
from realloc.experiment import Experiment, read_experiment  # noqa: E402
from realloc.files import dump_yaml  # noqa: E402
from realloc.mesh import parse_mesh  # noqa: E402
from realloc.pace import iterations_at_pace  # noqa: E402
from realloc.plan import ExecutionPlan, write_plan  # noqa: E402
from realloc.strategy import parse_strategy  # noqa: E402
from realloc.trace import Trace, read_trace  # noqa: E402
from runtime.host_memory import keep_freed_memory  # noqa: E402
from tests.tiny import write_tiny_llama  # noqa: E402

RANKS = 2
QUICK_S, FULL_S = 4.0, 8.0
"""For how long each plan runs in a round."""
QUICK_ROUNDS, FULL_ROUNDS = 2, 3
FEWEST = 12
"""Iterations of a round, however long they take."""
FEWEST_CALM = 3
"""Iterations at the profile's pace, for a round to count."""
APART, QUICK_LIMIT_S, FULL_LIMIT_S = 0.05, 560.0, 5400.0
"""Plans whose rounds are further apart run again, if that begins within so many seconds."""
WARMING = 1 / 2
"""Of a round's iterations, which do not count: under ZeRO 3 it takes eight until memory comes from the system
no more, and what comes is slow at first."""
QUICK_CASES = ("ppo-260K", "grpo-15M")
BOTH, ONE, OTHER = "node[0]", "node0:gpu[0]", "node0:gpu[1]"
MAX_PROMPT = 16
Placed = tuple[str, str]

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


def run_round(folder: Path, profile: Path, seconds: float, labels: Iterable[str]) -> Mapping[str, Round]:
    """Predicts plans of one experiment, then runs each for about so many seconds."""
    experiment = read_experiment(folder / "experiment.yaml")
    plans = {label: predict(place(experiment, PLANS[label]), str(profile)) for label in labels}
    return {label: round_of(plan, run_once(plan, folder, seconds)) for label, plan in plans.items()}


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


def round_of(plan: ExecutionPlan, trace: Trace) -> Round:
    """What a run of a plan gives."""
    assert plan.predictions is not None
    comparison = compare(plan, trace)
    iterations = len({record.iteration for record in trace.records})
    skipped = ceil(WARMING * iterations)
    profiled, calm = plan.predictions.pace, []
    if profiled is not None:
        at_pace = iterations_at_pace(trace, profiled, plan.cluster.gpus_per_node)
        each = trace.each_iteration_s(skip_iterations=skipped)
        calm = [seconds for iteration, seconds in each.items() if iteration in at_pace]
    return Round(
        predicted_s=plan.predictions.iteration_s,
        measured_s=trace.iteration_seconds(skip_iterations=skipped),
        calm_s=median(calm) if len(calm) >= FEWEST_CALM else None,
        pace=1.0 if comparison.pace is None else comparison.pace.work,
        core_share=core_share(trace),
        comparison=comparison,
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller batches and fewer iterations")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    parser.add_argument("--experiments", nargs="+", choices=[c.name for c in CASES], help="only these")
    parser.add_argument("--profile", type=Path, help="predict with this profile instead of new ones")
    parser.add_argument("--verbose", action="store_true", help="every plan's comparison, term by term")
    options = parser.parse_args(argv)
    if len(os.sched_getaffinity(0)) < RANKS:
        raise SystemExit(f"needs {RANKS} cores, one for each rank")
    keep_freed_memory()  # ranks are forked from this process
    with tempfile.TemporaryDirectory(prefix="realloc-fidelity-") as name:
        results = run(Path(name), options)
    report = {"benchmark": "fidelity", **summary(results), "provenance": provenance(("torch", "realloc"))}
    if not options.json:
        for result in results:
            print(
                f"{result.case:10} {result.plan:30} predicted {result.predicted_s:7.3f} s, measured "
                f"{result.measured_s:7.3f} s, ratio {result.measured_s / result.predicted_s:5.2f}, at pace "
                f"{result.at_pace_s / result.predicted_s:5.2f}"
            )
            if options.verbose:
                print(comparison_text(result.typical.comparison))
        for key in (*MEANS, *WORST, *RANKING):
            print(f"{key}: {report[key]:.3f}")
    print(json.dumps(report))


def run(folder: Path, options: argparse.Namespace) -> Sequence[Result]:
    """All rounds of all plans of the experiments that were asked for."""
    names = options.experiments or (QUICK_CASES if options.quick else [case.name for case in CASES])
    cases = [case for case in CASES if case.name in names]
    experiments = [prepare(case, folder / case.name, options.quick) for case in cases]
    seconds, rounds = (QUICK_S, QUICK_ROUNDS) if options.quick else (FULL_S, FULL_ROUNDS)
    limit_s = QUICK_LIMIT_S if options.quick else FULL_LIMIT_S
    found: dict[tuple[str, str], list[Round]] = {}
    begun, profile = time.monotonic(), Path()
    for number in range(rounds):
        profile = options.profile or folder / f"profile-{number}.yaml"
        if options.profile is None:
            _profile(profile, experiments, options.quick)
        for case in cases:
            ran = run_round(folder / case.name, profile.resolve(), seconds, PLANS)
            for label, each in ran.items():
                found.setdefault((case.name, label), []).append(each)
        if not options.json:
            print(f"round {number + 1} of {rounds} done", flush=True)
    for name, label in to_repeat(found, APART):
        if time.monotonic() - begun > limit_s:
            break
        again = run_round(folder / name, profile.resolve(), seconds, [label])[label]
        found[name, label].append(again)
    return [Result(case, label, tuple(rounds)) for (case, label), rounds in found.items()]


def _profile(profile: Path, experiments: Sequence[Path], quick: bool) -> None:
    """Measures the machine for these experiments."""
    arguments = ["profile", "--ranks", str(RANKS), "-o", str(profile)]
    for experiment in experiments:
        arguments += ["--experiment", str(experiment)]
    _command(*arguments, *(["--quick"] if quick else []))


if __name__ == "__main__":
    main()
