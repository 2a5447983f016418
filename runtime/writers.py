"""Where metrics go besides the run's own file: TensorBoard, Weights & Biases, MLflow.

Each is a package of its own that is imported only when it is used. Knows names and numbers, not runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from realloc.errors import InputError

LOGGERS = ("wandb", "mlflow")
"""Those that a user has to ask for, by the names of their packages."""


class Writer(Protocol):
    """Takes the metrics of one iteration after the other."""

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_loggers(names: Sequence[str]) -> None:
    """Raises InputError for one whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--log {name}: the package is not installed; pip install {name}.")


def open_writers(
    names: Sequence[str],
    out: Path,
    settings: Mapping[str, Any],
    first: int,
    warn: Callable[[str], None] = warnings.warn,
) -> tuple[Writer, ...]:
    """TensorBoard where it is installed, and `names` of `LOGGERS`.

    `settings`: the experiment, which is kept beside the numbers. `first`: the iteration to begin with.
    `warn`: told of a logger that fails later; it gets no more, and the run goes on. Raises InputError for
    one that cannot be opened, OSError when TensorBoard's file cannot be written.
    """
    opened: list[Writer] = []
    with suppress(ImportError):  # it is not installed, or what it needs is not
        opened.append(_TensorBoard(out / "tensorboard", first))
    kinds: Mapping[str, Callable[[Path, Mapping[str, Any]], Writer]] = {"wandb": _Wandb, "mlflow": _MLflow}
    for name in dict.fromkeys(names):
        try:
            opened.append(_Remote(name, kinds[name](out, settings), warn))
        except Exception as error:  # noqa: BLE001 (a package of others, which talks to a server)
            raise InputError(f"--log {name}: cannot be opened: {_said(error)}") from None
    return tuple(opened)


def _said(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Remote:
    """A logger whose failures, which may be anything, must not end a run: its numbers are on disk too."""

    def __init__(self, name: str, writer: Writer, warn: Callable[[str], None]) -> None:
        self._name, self._writer, self._warn = name, writer, warn
        self._has_failed = False

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._try(partial(self._writer.write, iteration, metrics))

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, action: Callable[[], None]) -> None:
        if self._has_failed:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 (a package of others, which talks to a server)
            self._has_failed = True
            self._warn(f"{self._name} fails and gets no more metrics ({_said(error)}); metrics.jsonl has all")


class _TensorBoard:
    """One file of events. Written at once and not by a thread, as TensorBoard's own writer does it: what a
    disk refuses then fails here, and not in a thread that nobody asks."""

    def __init__(self, folder: Path, first: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events, self._summaries = event_pb2, summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter((folder / name).open("wb"))
        self._put(file_version="brain.Event:2")
        # what an earlier attempt has told of these iterations no longer counts
        self._put(step=first, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        values = [self._summaries.Summary.Value(tag=k, simple_value=v) for k, v in metrics.items()]
        self._put(step=iteration, summary=self._summaries.Summary(value=values))

    def close(self) -> None:
        self._file.close()

    def _put(self, **content: Any) -> None:
        self._file.write(self._events.Event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()


class _Wandb:
    """A run named after the folder; project, entity and mode as wandb's own environment variables say."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(name=out.name, dir=str(out), config=dict(settings))

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=iteration)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run named after the folder; server and experiment as MLflow's own environment variables say."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.start_run(run_name=out.name)
        self._mlflow.log_params(flat(settings))

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=iteration)

    def close(self) -> None:
        self._mlflow.end_run()


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted names: {"a": {"b": 1}} -> {"a.b": 1}."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result
