"""Where metrics go besides the run's own file: TensorBoard, Weights & Biases, MLflow.

Each is a package of its own that is imported only when it is used. Knows names and numbers, not runs.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
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
    names: Sequence[str], out: Path, settings: Mapping[str, Any], first: int
) -> tuple[Writer, ...]:
    """TensorBoard where it is installed, and `names` of `LOGGERS`.

    `settings`: the experiment, which is kept beside the numbers. `first`: the iteration to begin with.
    """
    opened: list[Writer] = []
    events = _tensorboard(out / "tensorboard", first)
    if events is not None:
        opened.append(events)
    if "wandb" in names:
        opened.append(_Wandb(out, settings))
    if "mlflow" in names:
        opened.append(_MLflow(out, settings))
    return tuple(opened)


class _TensorBoard:
    def __init__(self, events: Any) -> None:
        self._events = events

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._events.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._events.close()


def _tensorboard(folder: Path, first: int) -> Writer | None:
    """None where the package is not installed; events from iteration `first` on go."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return _TensorBoard(SummaryWriter(log_dir=str(folder), purge_step=first))


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
