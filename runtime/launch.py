"""A run from its plan to its results: the checks before it, its folder, its attempts, the merged trace.

Everything a user can get wrong is checked before the first rank starts. Ranks are forked from
this process, which has imported torch once, so four of them are up in about a second.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from realloc.backend import DEEPSPEED
from realloc.comparison import compare
from realloc.comparison_text import comparison_text
from realloc.errors import InputError, RunError
from realloc.plan import ExecutionPlan, plan_text, read_plan
from realloc.trace import Trace
from runtime.attempts import Run, RunOptions, follow, lead
from runtime.checkpoint_files import Manifest, choose
from runtime.checks import check_runnable
from runtime.deepspeed_backend import NO_RESUME
from runtime.machine import this_machine
from runtime.monitor import Monitor
from runtime.place import check_place
from runtime.program import compile_program
from runtime.restore import changes, check_resumable
from runtime.run_folder import prepare_folder, rewind_folder, run_lock
from runtime.team import Team
from runtime.tracing import CHECKPOINT, merge_traces


def run_plan(plan_path: Path, out: Path, options: RunOptions) -> Trace | None:
    """Runs a plan, or this node's part of it, and writes everything under `out`.

    `out` gets plan.yaml, metrics.jsonl, trace.jsonl, TensorBoard events, logs, checkpoints, and the
    trained models as Hugging Face folders. Raises InputError before anything starts, RunError when a
    rank fails. Returns the trace, on node 0.
    """
    plan = _with_iterations(read_plan(plan_path, trust=options.trust), options.iterations)
    check_place(options.place, plan.cluster.num_nodes)
    with Team(options.place) as team:
        run = _meet(plan, out, options, team)
        if not team.is_first:
            _follow(run)
            return None
        prepare_folder(out, overwrite=options.overwrite)
        with run_lock(out):
            return _finish(run, lead(run, None))


def resume_run(
    out: Path, plan_path: Path | None, checkpoint: str | None, options: RunOptions
) -> Trace | None:
    """Continues the run in `out` from a checkpoint (None: its newest), under its own plan or another.

    Another plan may differ in everything but the algorithm, the models' shapes and the dtype; what
    else differs of the experiment is printed. Which checkpoint it is, node 0 decides. Raises and returns
    as `run_plan` does, and InputError for a checkpoint that is damaged or of other models.
    """
    path = plan_path if plan_path is not None else out / "plan.yaml"
    if options.place.node == 0:
        chosen, manifest = choose(out, checkpoint)
    plan = _with_iterations(read_plan(path, trust=options.trust), options.iterations)
    if plan.experiment.training_backend == DEEPSPEED:
        raise InputError(f"{path}: experiment: training_backend: {NO_RESUME}")
    check_place(options.place, plan.cluster.num_nodes)
    with Team(options.place) as team:
        if not team.is_first:
            _follow(_meet(plan, out, options, team))
            return None
        check_resumable(chosen, manifest, plan)
        run = _meet(plan, out, options, team)
        _say_changes(chosen, manifest, plan)
        with run_lock(out):
            rewind_folder(out, manifest.iteration)
            print(f"continuing after {manifest.iteration} iterations, from {chosen}")
            return _finish(run, lead(run, chosen))


def _meet(plan: ExecutionPlan, out: Path, options: RunOptions, team: Team) -> Run:
    """Checks that this machine can run its part, and that all launchers mean the same run."""
    program = compile_program(plan)
    summary = check_runnable(plan, pin=options.pin, trust=options.trust)
    if team.is_first:
        print(summary)
    team.meet(sha256(plan_text(plan).encode()).hexdigest())
    return Run(plan, program, out, options, team)


def _follow(run: Run) -> None:
    follow(run)
    print(f"{run.team.me}: done. Logs of its ranks: {run.logs}   everything else: {run.out}")


def _finish(run: Run, monitor: Monitor) -> Trace:
    """Joins the ranks' traces, and prints how it went."""
    out, plan = run.out, run.plan
    traces = [out / "trace" / f"rank-{rank}.jsonl" for rank in range(plan.cluster.num_gpus)]
    try:
        trace = merge_traces(traces, out / "trace.jsonl", this_machine(run.options.pin))
    except OSError as error:
        raise RunError(
            f"{out / 'trace.jsonl'}: cannot be written: {error.strerror}; make room.{run.continuation}"
        ) from None
    if trace.records:  # a run may have been ended after its last iteration
        print(comparison_text(compare(plan, trace)))
        print(monitor.change())
        if run.options.saving.every is None:
            print(_saved(trace))
    print(
        f"trained models: {out / 'models'}   metrics: {out / 'metrics.jsonl'}   trace: {out / 'trace.jsonl'}"
    )
    return trace


def _saved(trace: Trace) -> str:
    """After how many iterations a checkpoint was written, and why not after the others."""
    ended = {record.iteration for record in trace.records}
    saved = {record.iteration for record in trace.records if record.kind == CHECKPOINT}
    text = f"checkpoints: after {len(saved)} of {len(ended)} iterations"
    return text if saved == ended else f"{text}; the others ended while one was still being written"


def _say_changes(checkpoint: Path, manifest: Manifest, plan: ExecutionPlan) -> None:
    differing = changes(manifest, plan)
    if differing:
        print(f"note: differs from the experiment that {checkpoint.name} is of: {', '.join(differing)}")


def _with_iterations(plan: ExecutionPlan, iterations: int | None) -> ExecutionPlan:
    if iterations is None:
        return plan
    return replace(plan, experiment=replace(plan.experiment, iterations=iterations))
