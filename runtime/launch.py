"""A run from its plan to its results: the checks before it, a store, the ranks, a monitor, the merged trace.

Everything a user can get wrong is checked before the first rank starts. Ranks are forked from
this process, which has imported torch once, so four of them are up in about a second.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from realloc.backend import DEEPSPEED
from realloc.comparison import compare
from realloc.comparison_text import comparison_text
from realloc.errors import InputError, RunError
from realloc.files import write_text
from realloc.plan import ExecutionPlan, plan_text, read_plan
from realloc.trace import Trace
from realloc.trust import check_functions
from runtime.agent import Ended, run_agent
from runtime.checkpoint import SaveOptions
from runtime.checkpoint_files import checkpoints_folder, choose, iteration_of, remove_partial
from runtime.dataset import open_dataset
from runtime.deepspeed_backend import NO_RESUME
from runtime.engine import source_sequences
from runtime.functions import FunctionTable
from runtime.heartbeat import Board
from runtime.machine import check_pinnable, this_machine
from runtime.metrics import MetricsChannel
from runtime.monitor import Monitor, Watching
from runtime.nvml import find_gpus
from runtime.program import Program, compile_program
from runtime.restarts import Restarts
from runtime.restore import changes, check_resumable
from runtime.run_folder import prepare_folder, reserve_errors, rewind_folder, run_lock
from runtime.stores import listen
from runtime.supported import check_cluster, check_runs
from runtime.tracing import CHECKPOINT, merge_traces
from runtime.verdict import Failure, continuation, failure_of, read_errors
from runtime.watchdog import Limits, Watchdog
from runtime.worker import WorkerSpec, reporting_ranks

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class RunOptions:
    """`limits`: when a rank is lost. `max_restarts`: how often the run then goes on from its last checkpoint.

    `pin`: a core for each rank. `trust`: code that the plan names and that is not realloc's own may run.
    """

    iterations: int | None = None
    overwrite: bool = False
    limits: Limits = field(default_factory=Limits)
    max_restarts: int = 3
    saving: SaveOptions = field(default_factory=SaveOptions)
    pin: bool = False
    trust: bool = False
    watching: Watching = field(default_factory=Watching)


def run_plan(plan_path: Path, out: Path, options: RunOptions) -> Trace:
    """Runs a plan on this machine and writes everything under `out`.

    `out` gets plan.yaml, metrics.jsonl, trace.jsonl, TensorBoard events, logs, checkpoints, and the
    trained models as Hugging Face folders. Raises InputError before anything starts, RunError when a
    rank fails.
    """
    plan = _with_iterations(read_plan(plan_path, trust=options.trust), options.iterations)
    program = compile_program(plan)
    _check_runnable(plan, trust=options.trust)
    if options.pin:
        check_pinnable(plan.cluster.num_gpus)
    prepare_folder(out, overwrite=options.overwrite)
    with run_lock(out):
        return _execute(plan, program, out, options, None)


def resume_run(out: Path, plan_path: Path | None, checkpoint: str | None, options: RunOptions) -> Trace:
    """Continues the run in `out` from a checkpoint (None: its newest), under its own plan or another.

    Another plan may differ in everything but the algorithm, the models' shapes and the dtype; what
    else differs of the experiment is printed. Raises as `run_plan` does, and InputError for a
    checkpoint that is damaged or of other models.
    """
    chosen, manifest = choose(out, checkpoint)
    path = plan_path if plan_path is not None else out / "plan.yaml"
    plan = _with_iterations(read_plan(path, trust=options.trust), options.iterations)
    if plan.experiment.training_backend == DEEPSPEED:
        raise InputError(f"{path}: experiment: training_backend: {NO_RESUME}")
    check_resumable(chosen, manifest, plan)
    program = compile_program(plan)
    _check_runnable(plan, trust=options.trust)
    if options.pin:
        check_pinnable(plan.cluster.num_gpus)
    differing = changes(manifest, plan)
    if differing:
        print(f"note: differs from the experiment that {chosen.name} is of: {', '.join(differing)}")
    with run_lock(out):
        rewind_folder(out, manifest.iteration)
        print(f"continuing after {manifest.iteration} iterations, from {chosen}")
        return _execute(plan, program, out, options, chosen)


def _execute(
    plan: ExecutionPlan, program: Program, out: Path, options: RunOptions, checkpoint: Path | None
) -> Trace:
    write_text(out / "plan.yaml", plan_text(plan))
    store = listen(LOOPBACK, 0, timedelta(seconds=60))
    if not torch.cuda.is_available():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # DeepSpeed's engine keeps its own state, which no checkpoint of ours has
    can_resume = plan.experiment.training_backend != DEEPSPEED
    restarts = Restarts(out, options.max_restarts if can_resume else 0)
    while True:
        spec = WorkerSpec(
            plan=str(out / "plan.yaml"),
            out=str(out),
            store_host=LOOPBACK,
            store_port=store.port,
            timeout_s=_patience_s(plan, options.limits),
            launcher_pid=os.getpid(),
            saving=options.saving,
            checkpoint=None if checkpoint is None else str(checkpoint),
            node=0,
            num_nodes=1,
            ranks_per_node=plan.cluster.num_gpus,
            attempt=restarts.count,
            beat_s=options.limits.beat_s,
            pin=options.pin,
            samples=options.watching.samples,
        )
        monitor, failure = _attempt(plan, program, spec, options)
        if failure is None:
            break
        found = restarts.after(failure)
        checkpoint = None if found is None else found[0]
        rewind_folder(out, 0 if found is None else found[1].iteration)
    return _finish(plan, out, options, monitor)


def _attempt(
    plan: ExecutionPlan, program: Program, spec: WorkerSpec, options: RunOptions
) -> tuple[Monitor, Failure | None]:
    """Runs the ranks once. Raises KeyboardInterrupt, or RunError when a signal ends the launcher."""
    out = Path(spec.out)
    reserve_errors(out, plan.cluster.num_gpus)
    first = 0 if spec.checkpoint is None else iteration_of(Path(spec.checkpoint))
    collector = dist.TCPStore(
        spec.store_host, spec.store_port, is_master=False, timeout=timedelta(seconds=60)
    )
    store = dist.PrefixStore(f"attempt-{spec.attempt}", collector)
    channel = MetricsChannel(dist.PrefixStore("metrics", store), reporting_ranks(plan))
    watchdog = Watchdog(Board(spec.ranks_per_node), spec.node * spec.ranks_per_node, program, options.limits)
    try:
        with Monitor(plan, channel, out, first, options.watching) as monitor:
            ended = run_agent(spec, out / "logs", lambda: None, watchdog)
            failure = _failure(ended, out, program)
            if failure is None:
                monitor.finish()
    finally:
        remove_partial(checkpoints_folder(out))  # the ranks are gone by now
    return monitor, failure


def _patience_s(plan: ExecutionPlan, limits: Limits) -> float:
    """How long a rank waits for another in vain: longer than the watchdog takes to find what is wrong."""
    predicted_s = 0.0 if plan.predictions is None else plan.predictions.iteration_s
    return 2 * limits.hang_floor_s + limits.hang_factor * predicted_s


def _finish(plan: ExecutionPlan, out: Path, options: RunOptions, monitor: Monitor) -> Trace:
    """Joins the ranks' traces, and prints how it went."""
    traces = [out / "trace" / f"rank-{rank}.jsonl" for rank in range(plan.cluster.num_gpus)]
    trace = merge_traces(traces, out / "trace.jsonl", this_machine(options.pin))
    if trace.records:  # a run may have been ended after its last iteration
        print(comparison_text(compare(plan, trace)))
        print(monitor.change())
        if options.saving.every is None:
            print(_saved(trace))
    print(
        f"trained models: {out / 'models'}   metrics: {out / 'metrics.jsonl'}   trace: {out / 'trace.jsonl'}"
    )
    return trace


def _failure(ended: Ended, out: Path, program: Program) -> Failure | None:
    """Why the ranks have not ended well. Raises KeyboardInterrupt or RunError when the launcher was ended."""
    if ended.sent is signal.SIGINT:
        raise KeyboardInterrupt
    if ended.sent is not None:
        raise RunError(f"the run was ended by {ended.sent.name}; all ranks are stopped.{continuation(out)}")
    if ended.reason is not None:
        raise RunError(f"{ended.reason}{continuation(out)}")
    if ended.evidence is None:
        return None
    return failure_of(ended.evidence, read_errors(out, sorted(ended.evidence.beats)), program)


def _saved(trace: Trace) -> str:
    """After how many iterations a checkpoint was written, and why not after the others."""
    ended = {record.iteration for record in trace.records}
    saved = {record.iteration for record in trace.records if record.kind == CHECKPOINT}
    text = f"checkpoints: after {len(saved)} of {len(ended)} iterations"
    return text if saved == ended else f"{text}; the others ended while one was still being written"


def _with_iterations(plan: ExecutionPlan, iterations: int | None) -> ExecutionPlan:
    if iterations is None:
        return plan
    return replace(plan, experiment=replace(plan.experiment, iterations=iterations))


def _check_runnable(plan: ExecutionPlan, *, trust: bool) -> None:
    """What the ranks would stumble over, found before they start."""
    check_functions(plan.graph, "plan", trust=trust)
    experiment = plan.experiment
    check_cluster(plan.cluster, find_gpus() if torch.cuda.is_available() else None)
    for role, spec in experiment.models.items():
        check_runs(spec.shape, f"experiment: models.{role}")
        if not spec.has_weights:
            raise InputError(
                f"experiment: models.{role}: '{spec.model}' is a shape without weights, good for "
                f"planning; give the folder of a Hugging Face checkpoint to run it."
            )
    if plan.cluster.num_nodes > 1:
        raise InputError(
            f"plan: cluster: {plan.cluster.num_nodes} nodes; this version runs plans of one node."
        )
    if torch.cuda.is_available() and torch.cuda.device_count() < plan.cluster.num_gpus:
        raise InputError(
            f"plan: cluster: needs {plan.cluster.num_gpus} GPUs, this machine has "
            f"{torch.cuda.device_count()}."
        )
    if experiment.training_backend == DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            "experiment: training_backend: deepspeed is not installed; pip install deepspeed, or use "
            "training_backend: own."
        )
    FunctionTable(experiment.resolve_algorithm().functions).check(plan.graph)
    dataset = open_dataset(experiment)
    for key in plan.graph.source_keys:
        source_sequences(dataset.batch(0), plan.graph.key[key])
    print(dataset.summary())
