"""A run's attempts: every launcher starts its ranks, node 0 says what follows when some have failed.

Decides what the launchers tell each other of an attempt and who of several failing nodes is to blame.
How launchers find each other, `runtime.team` knows; what befell a node's ranks, `runtime.verdict`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist

from realloc.backend import DEEPSPEED
from realloc.errors import RunError
from realloc.files import write_text
from realloc.plan import ExecutionPlan, plan_text
from runtime.agent import Ended, Stop, run_agent
from runtime.checkpoint import SaveOptions
from runtime.checkpoint_files import checkpoints_folder, iteration_of, remove_partial
from runtime.heartbeat import Board
from runtime.hosts import write_hosts
from runtime.metrics import MetricsChannel
from runtime.monitor import Monitor, Watching
from runtime.place import Place
from runtime.program import Program
from runtime.restarts import Restarts
from runtime.run_folder import reserve_errors, rewind_folder
from runtime.stores import connect, interface_towards
from runtime.team import Order, Report, Team
from runtime.verdict import Failure, continuation, failure_of, read_errors
from runtime.watchdog import Evidence, Limits, Watchdog
from runtime.worker import WorkerSpec, reporting_ranks

_STORE_TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class RunOptions:
    """`limits`: when a rank is lost. `max_restarts`: how often the run then goes on from its last checkpoint.

    `trust`: code that the plan names and that is not realloc's own may run.
    `pin`: a core for each rank. `place`: which of the plan's nodes this launcher is. On nodes other than 0
    what node 0 was told counts, `pin` and `place` aside.
    """

    iterations: int | None = None
    overwrite: bool = False
    limits: Limits = field(default_factory=Limits)
    max_restarts: int = 3
    saving: SaveOptions = field(default_factory=SaveOptions)
    pin: bool = False
    trust: bool = False
    watching: Watching = field(default_factory=Watching)
    place: Place = field(default_factory=Place)


@dataclass(frozen=True)
class Run:
    """What one launcher knows of its run."""

    plan: ExecutionPlan
    program: Program
    out: Path
    options: RunOptions
    team: Team

    def with_options(self, told: Mapping[str, Any]) -> Run:
        """The run under what node 0 has told."""
        options = replace(
            self.options,
            limits=Limits(**told["limits"]),
            saving=SaveOptions(**told["saving"]),
            watching=Watching(samples=told["samples"]),
        )
        return replace(self, options=options)

    @property
    def told(self) -> Mapping[str, Any]:
        """The options that ranks of all nodes must share."""
        options = self.options
        return {
            "limits": asdict(options.limits),
            "saving": asdict(options.saving),
            "samples": options.watching.samples,
        }

    @property
    def continuation(self) -> str:
        """What a message about a failure ends with."""
        return continuation(self.out, trust=self.options.trust)

    @property
    def logs(self) -> Path:
        """Where what this node's ranks print goes."""
        folder = self.out / "logs"
        return folder / f"node-{self.team.node}" if self.team.nnodes > 1 else folder

    def spec(self, attempt: int, checkpoint: Path | None) -> WorkerSpec:
        """What this node's ranks are told."""
        host, port = self.team.address
        return WorkerSpec(
            plan=str(self.out / "plan.yaml"),
            out=str(self.out),
            store_host=host,
            store_port=port,
            timeout_s=_patience_s(self.plan, self.options.limits),
            launcher_pid=os.getpid(),
            saving=self.options.saving,
            checkpoint=None if checkpoint is None else str(checkpoint),
            node=self.team.node,
            num_nodes=self.plan.cluster.num_nodes,
            ranks_per_node=self.plan.cluster.gpus_per_node,
            attempt=attempt,
            beat_s=self.options.limits.beat_s,
            pin=self.options.pin,
            samples=self.options.watching.samples,
        )


def lead(run: Run, checkpoint: Path | None) -> Monitor:
    """Node 0's part: runs the plan, again from its last checkpoint when it fails; returns what it showed.

    Raises RunError when a run has failed for good, KeyboardInterrupt when the user ends it.
    """
    write_text(run.out / "plan.yaml", plan_text(run.plan))
    hosts = write_hosts(run.out, run.team.hosts, run.plan.cluster.gpus_per_node)
    if run.team.nnodes > 1:
        print(hosts)
    _choose_interface(run.team)
    # DeepSpeed's engine keeps its own state, which no checkpoint of ours has
    can_resume = run.plan.experiment.training_backend != DEEPSPEED
    restarts = Restarts(run.out, run.options.max_restarts if can_resume else 0, trust=run.options.trust)
    while True:
        monitor, failure = _lead_attempt(run, restarts.count, checkpoint)
        if failure is None:
            run.team.conclude("")
            return monitor
        found = restarts.after(failure)
        checkpoint = None if found is None else found[0]
        rewind_folder(run.out, 0 if found is None else found[1].iteration)


def follow(run: Run) -> None:
    """Another node's part: runs its ranks as node 0 says, until the run is over. Raises as `lead` does."""
    _choose_interface(run.team)
    for attempt in count():
        order = run.team.take(attempt, run.out)
        if order is None:
            return
        if not attempt:
            print(f"{run.team.me}: its ranks start; node 0 shows how the run goes", flush=True)
        run = run.with_options(order.options)
        name = order.checkpoint
        spec = run.spec(attempt, None if name is None else checkpoints_folder(run.out) / name)
        ended = _run_ranks(run, spec, lambda: None, lambda: None)
        failure = _failure(ended, run)
        run.team.end(_report(run.team.node, failure, ended))


def _lead_attempt(run: Run, attempt: int, checkpoint: Path | None) -> tuple[Monitor, Failure | None]:
    """Runs the ranks once, on all nodes."""
    reserve_errors(run.out, run.plan.cluster.num_gpus)
    first = 0 if checkpoint is None else iteration_of(checkpoint)
    spec = run.spec(attempt, checkpoint)
    own = connect(spec.store_host, spec.store_port, _STORE_TIMEOUT)
    store = dist.PrefixStore("metrics", dist.PrefixStore(f"attempt-{attempt}", own))
    channel = MetricsChannel(store, reporting_ranks(run.plan))
    run.team.give(attempt, Order(None if checkpoint is None else checkpoint.name, run.told), run.out)
    try:
        with Monitor(run.plan, channel, run.out, first, run.options.watching) as monitor:
            ended = _run_ranks(run, spec, monitor.begin, lambda: monitor.trouble)
            if monitor.trouble is not None and ended.reason == monitor.trouble:
                raise RunError(f"{monitor.trouble}{run.continuation}")
            failure = _first(_reports(run, ended))
            if failure is None:
                monitor.finish()
    finally:
        remove_partial(checkpoints_folder(run.out))  # the ranks are gone by now
    return monitor, failure


def _reports(run: Run, ended: Ended) -> Sequence[Report]:
    """How all nodes' ranks have ended. Raises RunError when a node is not there any more."""
    report = _report(0, _failure(ended, run), ended)
    try:
        return run.team.end(report)
    except RunError as error:
        raise RunError(f"{error}{run.continuation}") from None


def _run_ranks(run: Run, spec: WorkerSpec, begun: Callable[[], None], stop: Stop) -> Ended:
    """Runs this node's ranks until they end, or `stop` or another node gives a reason to end them.

    `begun` is called when they have been forked.
    """
    first = spec.node * spec.ranks_per_node
    watchdog = Watchdog(Board(spec.ranks_per_node), first, run.program, run.options.limits)

    @contextmanager
    def starting() -> Iterator[None]:
        with run.team.quiet():
            yield
        begun()

    return run_agent(spec, run.logs, starting, lambda: run.team.reason_to_stop() or stop(), watchdog)


def _choose_interface(team: Team) -> None:
    """Has ranks talk over the interface that leads to node 0, unless the user has chosen one."""
    interface = interface_towards(team.address[0])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if team.nnodes > 1:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def _patience_s(plan: ExecutionPlan, limits: Limits) -> float:
    """How long a rank waits for another in vain: longer than the watchdog takes to find what is wrong."""
    predicted_s = 0.0 if plan.predictions is None else plan.predictions.iteration_s
    return 2 * limits.hang_floor_s + limits.hang_factor * predicted_s


def _failure(ended: Ended, run: Run) -> Failure | None:
    """Why this node's ranks have not ended well, None when they have or were only stopped.

    Raises KeyboardInterrupt or RunError when this launcher was ended.
    """
    if ended.sent is signal.SIGINT:
        if run.team.is_first and run.continuation:
            print(f"realloc: {run.continuation.strip()}", file=sys.stderr)
        raise KeyboardInterrupt
    if ended.sent is not None:
        raise RunError(
            f"the run was ended by {ended.sent.name}{_where(run.team)}; all ranks are stopped."
            f"{run.continuation}"
        )
    if ended.evidence is None:
        return None
    errors = read_errors(run.out, sorted(ended.evidence.beats))
    if ended.reason is not None and not errors and not _has_failed(ended.evidence):
        return None
    return failure_of(ended.evidence, errors, run.program)


def _where(team: Team) -> str:
    return f" on {team.me}" if team.nnodes > 1 else ""


def _has_failed(evidence: Evidence) -> bool:
    return evidence.finding is not None or any(evidence.exit_codes.values())


def _report(node: int, failure: Failure | None, ended: Ended) -> Report:
    return Report(node, None if failure is None else asdict(failure), ended.reason)


def _first(reports: Sequence[Report]) -> Failure | None:
    """What the run has failed of: failures that follow from another node's go last.

    Raises RunError where ranks were stopped and none has failed: their launcher lost sight of the others.
    """
    failures = [Failure(**report.failure) for report in reports if report.failure is not None]
    if failures:
        return min(failures, key=lambda failure: failure.is_secondary)
    for report in reports:
        if report.reason is not None:
            raise RunError(f"node {report.node} has stopped its ranks: {report.reason}")
    return None
