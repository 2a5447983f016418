"""Torchrun's elastic agent: starts this machine's ranks, watches them, and stops them together.

Decides how ranks are started and stopped. Which other machines take part, `runtime.team` knows; what a
failure means, `runtime.verdict` says.
"""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.api import WorkerSpec as AgentSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import MultiprocessContext, SignalException
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from runtime.watchdog import Evidence, Watchdog
from runtime.worker import WorkerSpec, run_worker

POLL_S = 0.1
STOP_S = 5.0
"""How long ranks that are told to end may take; then they are killed."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

Stop = Callable[[], str | None]
"""Why the ranks must stop, None as long as they may go on. Asked again and again while they run."""
Starting = Callable[[], AbstractContextManager[None]]
"""What is around the moment in which the ranks are forked."""


@dataclass(frozen=True)
class Ended:
    """How this machine's ranks have ended. All fields are empty when all is well.

    `evidence`: what the watchdog knew when they had to end. `reason`: what `Stop` said. `sent`: the signal
    that ended the launcher.
    """

    evidence: Evidence | None = None
    reason: str | None = None
    sent: signal.Signals | None = None


def run_agent(spec: WorkerSpec, logs: Path, starting: Starting, stop: Stop, watchdog: Watchdog) -> Ended:
    """Runs this machine's ranks until all have ended, one has failed, or `stop` gives a reason.

    In the main thread. When it returns, no rank is left. `logs` gets what the ranks print and the agent's
    own log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    _log_to_file(logs / "agent.log")
    agent = _Agent(spec, logs, starting, stop, watchdog)
    with _handlers_restored():
        try:
            agent.run()
        except SignalException as error:
            return Ended(sent=error.sigval)
    return Ended(agent.evidence, agent.reason)


class _Agent(LocalElasticAgent):
    """Torchrun's agent for the ranks of one machine, which may also be stopped for a reason from outside."""

    def __init__(
        self, spec: WorkerSpec, logs: Path, starting: Starting, stop: Stop, watchdog: Watchdog
    ) -> None:
        agent_spec = AgentSpec(
            role="ranks",
            local_world_size=spec.ranks_per_node,
            rdzv_handler=_Alone(),
            entrypoint=run_worker,
            args=(spec, watchdog.board),
            max_restarts=0,
            monitor_interval=POLL_S,
        )
        logs_specs = DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL)
        super().__init__(agent_spec, logs_specs, start_method="fork")
        self._starting, self._stop, self._watchdog = starting, stop, watchdog
        self.reason: str | None = None
        self.evidence: Evidence | None = None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with self._starting():
            started: dict[int, Any] = super()._start_workers(worker_group)
        context = self._pcontext
        assert isinstance(context, MultiprocessContext), "ranks are forked"
        assert context._pc is not None, "they have been started"
        # not what Python has as active children: it forgets those that end as soon as they begin
        self._watchdog.watch(context._pc.processes)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        finding = self._watchdog.step()
        self.reason = self._stop() if finding is None else None
        if finding is not None or self.reason is not None:
            self.evidence = self._watchdog.evidence(finding)
            self._watchdog.kill()  # at once: a stopped or waiting rank would not end by itself
            return RunResult(state=WorkerState.FAILED)
        if not self._watchdog.all_at_end:
            return RunResult(state=WorkerState.HEALTHY)
        # torchrun would wait for each to end by itself: for ever, where one was stopped after its work
        self._watchdog.kill()
        done = {worker.global_rank: None for worker in worker_group.workers}
        return RunResult(state=WorkerState.SUCCEEDED, return_values=done)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        super()._shutdown(death_sig, min(timeout, int(STOP_S)))  # a stopped rank never ends by itself


class _Alone(RendezvousHandler):
    """A rendezvous with nobody: the launchers have met before their agents start, and ranks are numbered
    by the plan."""

    def get_backend(self) -> str:
        return "realloc"

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(dist.HashStore(), 0, 1, RendezvousStoreInfo("", 0))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return "run"

    def shutdown(self) -> bool:
        return True


@contextmanager
def _handlers_restored() -> Iterator[None]:
    """Takes back the signal handlers that the agent installs."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: it was not installed from Python
                signal.signal(number, handler)


class _LogFile(logging.FileHandler):
    """A log that says nothing when it cannot be written: on a full disk our own message is enough."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def _log_to_file(path: Path) -> None:
    """Sends the agent's log lines to a file: what they say of a failure, our own message says."""
    handler = _LogFile(path)
    for name in ("torch.distributed.elastic", "torch.multiprocessing", "torch.distributed.launcher"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    warnings.filterwarnings("ignore", module="torch.distributed.elastic")
