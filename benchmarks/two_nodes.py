"""A cluster of two nodes with a slow link: is it seen, does the plan follow, does the prediction hold?

The nodes are network namespaces of this machine, each with a core's worth of ranks (one), joined by a link
that is shaped to about a tenth of loopback; `realloc profile --nnodes 2` measures both, `realloc search`
plans GRPO with that profile and with one of loopback for the same two nodes, and the first plan is run on
both nodes, in rounds. Needs root and iproute2 (`tests/cluster/namespaces.py`).

`link_bytes_per_s` is what the profile found of the slow link, `loopback_bytes_per_s` of loopback;
`predicted_s` and `measured_s` are seconds per iteration of the plan for the slow link, `error` is their
difference over the measured, `error_at_pace` the same had the machine been as fast as when it was profiled;
`plan_changed`: whether the two plans differ.

    python benchmarks/two_nodes.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.fidelity import CASES, prepare  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from cost_models.profile import read_profile  # noqa: E402
from realloc.comparison import compare  # noqa: E402
from realloc.files import dump_yaml, read_yaml  # noqa: E402
from realloc.plan import ExecutionPlan, read_plan  # noqa: E402
from realloc.trace import Trace, read_trace  # noqa: E402
from tests.cluster.namespaces import Host, hosts, why_not  # noqa: E402

CASE = "grpo-15M"
NODES = 2
PORT = 29400
CHANGED = "plan_changed"
QUICK_S, FULL_S = 8.0, 60.0
ROUNDS = 3


def realloc(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "realloc", *arguments]


def run_on(made: Sequence[Host], arguments: Sequence[str], port: int) -> None:
    """The same command on every node. Exits when one fails."""
    meeting = ["--nnodes", str(len(made)), "--rdzv-endpoint", f"{made[0].address}:{port}"]
    with ExitStack() as files:
        logs = [files.enter_context(tempfile.TemporaryFile()) for _ in made]
        started = [
            subprocess.Popen(
                host.command(realloc(*arguments, *meeting, "--node-rank", str(node))),
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for node, (host, log) in enumerate(zip(made, logs, strict=True))
        ]
        for node, (process, log) in enumerate(zip(started, logs, strict=True)):
            if process.wait():
                log.seek(0)
                said = log.read().decode(errors="replace")[-3000:]
                raise SystemExit(
                    f"node {node}: realloc {arguments[0]} ended with {process.returncode}:\n{said}"
                )


def local(*arguments: str) -> None:
    done = subprocess.run(realloc(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"realloc {arguments[0]} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def two_nodes(experiment: Path) -> Path:
    """The experiment for two nodes of one rank each."""
    content = dict(read_yaml(experiment))
    content["cluster"] = {"nodes": NODES, "gpus_per_node": 1, "device": "cpu"}
    content.pop("realloc")
    path = experiment.with_name("two-nodes.yaml")
    path.write_text(dump_yaml("experiment", content), encoding="utf-8")
    return path


def searched(experiment: Path, profile: Path, output: Path) -> ExecutionPlan:
    local("search", str(experiment), "--device", str(profile), "-o", str(output))
    return read_plan(output)


def report(plan: ExecutionPlan, other: ExecutionPlan, traces: Sequence[Trace]) -> dict[str, Any]:
    """What the rounds say of the plan for the slow link; `other` is that for loopback."""
    assert plan.predictions is not None
    comparisons = [compare(plan, trace) for trace in traces]
    rounds = [trace.iteration_seconds() for trace in traces]
    paces = [1.0 if c.pace is None else c.pace.ratio for c in comparisons]
    at_pace = median(s / pace for s, pace in zip(rounds, paces, strict=True))
    predicted, measured = plan.predictions.iteration_s, median(rounds)
    return {
        "predicted_s": predicted,
        "measured_s": measured,
        "error": abs(predicted - measured) / measured,
        "error_at_pace": abs(predicted - at_pace) / at_pace,
        CHANGED: dict(plan.placements) != dict(other.placements),
        "rounds_s": rounds,
        "paces": paces,
        "plan": {name: str(placement) for name, placement in plan.placements.items()},
        "plan_for_loopback": {name: str(placement) for name, placement in other.placements.items()},
    }


def measure(folder: Path, *, quick: bool) -> dict[str, Any]:
    case = next(case for case in CASES if case.name == CASE)
    experiment = two_nodes(prepare(case, folder / "experiment", quick))
    effort = ["--quick"] if quick else []
    loopback, slow = folder / "loopback.yaml", folder / "slow.yaml"
    base = ["profile", "--experiment", str(experiment), *effort]
    local(*base, "--ranks", str(NODES), "-o", str(loopback))
    fast = read_profile(loopback)
    rate = max(1, round(0.1 * fast.intra_node.bytes_per_s * 8 / 1e6))
    with hosts(NODES, f"{rate}mbit") as made:
        run_on(made, [*base, "--ranks", "1", "-o", str(slow)], PORT)
        plan = searched(experiment, slow, folder / "slow-plan.yaml")
        other = searched(experiment, loopback, folder / "loopback-plan.yaml")
        assert plan.predictions is not None
        iterations = max(4, round((QUICK_S if quick else FULL_S) / ROUNDS / plan.predictions.iteration_s))
        traces = []
        for number in range(ROUNDS):
            out = folder / f"out{number}"
            arguments = ["run", str(folder / "slow-plan.yaml"), "--out", str(out), "--save-every", "0"]
            run_on(made, [*arguments, "--iterations", str(iterations)], PORT + 1 + number)
            traces.append(read_trace(out / "trace.jsonl"))
    found = read_profile(slow).inter_node
    return {
        "link_bytes_per_s": found.bytes_per_s,
        "loopback_bytes_per_s": fast.intra_node.bytes_per_s,
        "shaped_bytes_per_s": rate * 1e6 / 8,
        **report(plan, other, traces),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller batches and fewer iterations")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args(argv)
    missing = why_not()
    if missing is not None:
        raise SystemExit(f"two nodes on one machine: {missing}")
    with tempfile.TemporaryDirectory(prefix="realloc-two-nodes-") as name:
        found = measure(Path(name), quick=options.quick)
    found = {"benchmark": "two_nodes", **found, "provenance": provenance(("torch", "realloc"))}
    if not options.json:
        for key in ("link_bytes_per_s", "predicted_s", "measured_s", "error", "error_at_pace", CHANGED):
            print(f"{key}: {found[key]}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
