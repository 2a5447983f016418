"""Torchrun's elastic agent: starts this machine's ranks, forwards signals, and tells of failures.

Decides how ranks are started and stopped. What a failure means, `runtime.verdict` says.
"""

from __future__ import annotations

import logging
import os
import signal
import warnings
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from realloc.errors import RunError
from realloc.plan import ExecutionPlan
from runtime.program import Program
from runtime.verdict import continuation, describe_failure
from runtime.worker import WorkerSpec, run_worker

LOOPBACK = "127.0.0.1"


def run_agent(plan: ExecutionPlan, program: Program, spec: WorkerSpec) -> None:
    """Runs the plan's ranks until all have ended. Raises RunError when one fails or a signal ends the run."""
    out = Path(spec.out)
    ranks = plan.cluster.num_gpus
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="run",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOOPBACK}:0",
        rdzv_configs={"is_host": True},
        local_addr=LOOPBACK,
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=str(out / "logs"), redirects=Std.ALL),
    )
    if not torch.cuda.is_available():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _log_to_file(out / "logs" / "agent.log")
    try:
        elastic_launch(config, run_worker)(spec)
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise RunError(
            f"the run was ended by {error.sigval.name}; all ranks are stopped.{continuation(out)}"
        ) from None
    except ChildFailedError as error:
        exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        raise RunError(describe_failure(out, program, exit_codes)) from None


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
