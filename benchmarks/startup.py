"""Seconds from `realloc run` to the first instruction, and what they go into.

Runs the demo's plan with four ranks, one iteration, as a user does, with the functions of each phase wrapped:
ranks are forked, so they inherit the wrapping. A phase's seconds are those of the slowest rank; `cpu_s` is
what all processes together computed until then. The first says how long a user waits, the second holds on a
busy machine too: nothing starts in less than half of it on two cores.

    python benchmarks/startup.py [--quick] [--json] [--ranks 4] [--repeats 3]

The last line is one JSON object: `seconds` (median), `phases`, `cpu_s`, `goal_s`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GOAL_S = 15.0
LAUNCHER = (
    ("runtime.launch", "read_plan"),
    ("runtime.launch", "compile_program"),
    ("runtime.launch", "check_runnable"),
    ("runtime.launch", "prepare_folder"),
)
RANK = (
    ("torch.distributed", "init_process_group"),
    ("runtime.worker", "read_plan"),
    ("runtime.worker", "compile_program"),
    ("runtime.worker", "open_dataset"),
    ("runtime.worker", "make_plan_groups"),
    ("runtime.worker", "load_roles"),
    ("runtime.worker", "Engine"),
)


class Phases:
    """Notes how long wrapped functions take, one line a call, in a file that all processes append to."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, name: str, seconds: float) -> None:
        """`cpu_s`: what this process has computed since it was forked or started."""
        rank = os.environ.get("RANK")
        line = {"name": name, "rank": rank, "s": seconds, "at_s": time.time(), "cpu_s": time.process_time()}
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def wrap(self, module: str, attribute: str, label: str) -> None:
        owner: Any = sys.modules[module]
        original: Callable[..., Any] = getattr(owner, attribute)

        def timed(*arguments: Any, **named: Any) -> Any:
            started, cpu = time.monotonic(), time.process_time()
            try:
                return original(*arguments, **named)
            finally:
                self.note(label, time.monotonic() - started)
                self.note(f"{label} (cpu)", time.process_time() - cpu)

        setattr(owner, attribute, timed)


def child(notes: Path, started_s: float, plan: str, out: str) -> int:
    """The run, in a process of its own."""
    phases = Phases(notes)
    from realloc.cli import main

    phases.note("import realloc.cli", time.time() - started_s)
    before = time.monotonic()
    import runtime.engine
    import runtime.launch
    import runtime.worker

    phases.note("import runtime (torch)", time.monotonic() - before)
    for module, attribute in LAUNCHER:
        phases.wrap(module, attribute, f"launcher: {attribute}")
    for module, attribute in RANK:
        phases.wrap(module, attribute, f"rank: {attribute}")
    execute = runtime.engine.Engine._execute
    first: list[bool] = []

    def executing(self: Any, *arguments: Any) -> None:
        if not first:
            first.append(True)
            phases.note("first instruction", time.time() - started_s)
        execute(self, *arguments)

    runtime.engine.Engine._execute = executing  # type: ignore[method-assign, assignment]
    return main(["run", plan, "--out", out, "--iterations", "1"])


def one_start(plan: Path, folder: Path) -> dict[str, Any]:
    """Phases of one start."""
    notes, out = folder / "notes.jsonl", folder / "out"
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(notes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += [repr(time.time()), str(plan), str(out)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise SystemExit(f"the run failed: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in notes.read_text().splitlines()]
    first = [line for line in lines if line["name"] == "first instruction"]
    longest: dict[str, float] = {}
    for line in lines:
        longest[line["name"]] = max(longest.get(line["name"], 0.0), line["s"])
    seconds = longest.pop("first instruction")
    launcher = max(line["cpu_s"] for line in lines if line["rank"] is None)
    return {
        "seconds": seconds,
        "phases": {
            **longest,
            "everything else": seconds - sum(longest.values()),
        },
        # a forked process counts its own from 0
        "cpu_s": launcher + sum(line["cpu_s"] for line in first),
        "rank_cpu_s": max(line["cpu_s"] for line in first),
    }


def measure(ranks: int, repeats: int) -> dict[str, Any]:
    """Medians over starts of the demo's experiment."""
    from benchmarks.provenance import provenance

    with tempfile.TemporaryDirectory(prefix="realloc-startup-") as name:
        folder = Path(name)
        plan = folder / "plan.yaml"
        command = [sys.executable, "-m", "realloc", "search", str(ROOT / "experiments/demo/experiment.yaml")]
        command += ["--gpus-per-node", str(ranks), "-o", str(plan), "--time-limit", "2"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        starts = []
        for number in range(repeats):
            (folder / str(number)).mkdir()
            starts.append(one_start(plan, folder / str(number)))
    typical: dict[str, Any] = {
        key: round(median(start[key] for start in starts), 2) for key in ("seconds", "cpu_s", "rank_cpu_s")
    }
    names = starts[0]["phases"]
    phases = {name: round(median(start["phases"][name] for start in starts), 3) for name in names}
    return {
        **typical,
        "goal_s": GOAL_S,
        "ranks": ranks,
        "starts": repeats,
        "phases": phases,
        "provenance": provenance(),
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one start")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.ranks, 1 if arguments.quick else arguments.repeats)
    for name, seconds in result["phases"].items():
        print(f"{name:32} {seconds:8.3f} s")
    print(json.dumps(result) if arguments.json else f"first instruction after {result['seconds']} s")


if __name__ == "__main__":
    main()
