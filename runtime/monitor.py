"""Watching a run: collects metrics, writes them down, shows progress."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from realloc.dataflow import CallKind, DataflowGraph
from realloc.errors import RunError
from realloc.evaluation import PREFIX, REPORT, RIVAL
from realloc.experiment import experiment_content
from realloc.plan import ExecutionPlan
from runtime.display import AUTO, Display, Moment, most_memory, open_display, time_left
from runtime.metrics import MetricsChannel
from runtime.reward_hacking import signs
from runtime.samples import put_together
from runtime.writers import open_writers

POLL_S = 0.05
TELL_S = 3.0
"""How long ranks that cannot write either may take to say so themselves: they can say more of it."""


SHOWN_SAMPLES, SHOWN_CHARACTERS = 2, 300


@dataclass(frozen=True)
class Watching:
    """What a user wants to see of a run.

    `loggers`: where metrics go besides the folder (`runtime.writers.LOGGERS`). `samples`: how many generated
    ones of each iteration are kept. `form`: how progress is shown (`runtime.display.FORMATS`).
    """

    loggers: tuple[str, ...] = ()
    samples: int = 2
    form: str = AUTO


class Monitor:
    """Collects each iteration's metrics in a thread, in the launcher's process, from `begin` on."""

    def __init__(
        self,
        plan: ExecutionPlan,
        channel: MetricsChannel,
        out: Path,
        first: int = 0,
        watching: Watching | None = None,
    ) -> None:
        """`first`: the iteration that the run begins with; earlier ones stay in the metrics' file."""
        self._plan, self._channel, self._first = plan, channel, first
        self._iterations = iterations = plan.experiment.iterations
        self._headlines: list[str] = []
        self._last_headline = ""
        self._path = out / "metrics.jsonl"
        self._failure: OSError | None = None
        self._is_complete = False
        self._failed_s = 0.0
        self._last_samples: list[Mapping[str, Any]] = []
        self._history, self._told = _earlier(self._path) if first else [], set[str]()
        settings = experiment_content(plan.experiment)
        watching = watching or Watching()
        mode = "a" if first else "w"
        try:
            self._file = self._path.open(mode, encoding="utf-8")
            self._samples = (out / "samples.jsonl").open(mode, encoding="utf-8")
            self._writers = open_writers(watching.loggers, out, settings, first, self._warn)
        except OSError as error:
            raise RunError(f"{out}: the metrics cannot be written: {error.strerror}.") from None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
        self._display: Display | None = open_display(watching.form, first, iterations)
        self._seconds: list[float] = []

    def __enter__(self) -> Monitor:
        return self

    def begin(self) -> None:
        """Begins to watch. Not before the ranks are forked: a lock that a thread of the launcher holds at
        that moment, inside torch's store or for the terminal, would be held for ever in the rank."""
        self._tell(lambda display: display.begin())
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=10)
        for close in (self._file.close, self._samples.close, *(writer.close for writer in self._writers)):
            with suppress(OSError):  # each line was flushed: it was told when that failed
                close()
        self._tell(lambda display: display.end())

    def finish(self) -> None:
        """Waits until the last iteration's metrics are written. Raises RunError when they cannot be."""
        self._thread.join(timeout=60)
        if self._failure is not None:
            raise RunError(
                f"{self._path}: the metrics cannot be written: {self._failure.strerror}; the trained "
                f"models and checkpoints are complete."
            )
        if not self._thread.is_alive() and not self._is_complete:
            raise RunError(
                f"{self._path}: lacks the metrics of some iterations: the thread that writes them has failed "
                f"(see above); the trained models and checkpoints are complete."
            )

    @property
    def trouble(self) -> str | None:
        """Why the run must not go on: its metrics have not been writable for a while."""
        if self._failure is None or time.monotonic() < self._failed_s + TELL_S:
            return None
        return f"{self._path}: the metrics cannot be written: {self._failure.strerror}; the run is ended."

    def change(self) -> str:
        """The first iteration's headline beside the last one's."""
        if not self._headlines:
            return "no metrics were reported"
        text = f"first iteration: {self._headlines[0]}\nlast iteration:  {self._headlines[-1]}"
        if self._last_headline:
            text += f"\nafter training:  {self._last_headline}"
        return "\n".join([text, *map(_shown, self._last_samples[:SHOWN_SAMPLES])])

    def _watch(self) -> None:
        started = time.monotonic()
        evaluates = self._plan.experiment.evaluation is not None  # once more, after the last iteration
        for iteration in range(self._first, self._iterations + evaluates):
            while (found := self._channel.collect(iteration, wait=False)) is None:
                if self._stop.wait(POLL_S):
                    return
            seconds = time.monotonic() - started
            started += seconds
            try:
                if iteration == self._iterations:
                    self._show_last(found.metrics)
                    break
                self._show(iteration, found.metrics, seconds)
                self._keep(put_together(iteration, found.samples))
                self._channel.confirm(iteration)
            except OSError as error:  # a full disk must not end a thread without a word
                self._failed_s = time.monotonic()
                self._failure = error
                return
        self._is_complete = True

    def _show_last(self, metrics: Mapping[str, float]) -> None:
        """What evaluation says of the trained models: a line without the numbers of an iteration."""
        self._file.write(json.dumps({"iteration": self._iterations, **metrics}) + "\n")
        self._file.flush()
        for writer in self._writers:
            writer.write(self._iterations, metrics)
        self._last_headline = headline(self._plan.graph, metrics)

    def _show(self, iteration: int, metrics: Mapping[str, float], seconds: float) -> None:
        tokens = tokens_of(metrics)
        record = {
            "iteration": iteration,
            "seconds": round(seconds, 4),
            "tokens_per_s": round(tokens / seconds, 1),
            **metrics,
        }
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for writer in self._writers:
            writer.write(iteration, {**metrics, "tokens_per_s": tokens / seconds})
        line = headline(self._plan.graph, metrics)
        self._headlines.append(line)
        self._seconds.append(seconds)
        predictions = self._plan.predictions
        moment = Moment(
            iteration=iteration,
            iterations=self._iterations,
            seconds=seconds,
            tokens_per_s=tokens / seconds,
            headline=line,
            metrics=metrics,
            predicted_s=None if predictions is None else predictions.iteration_s,
            left_s=time_left(self._seconds, self._iterations - iteration - 1),
            memory_bytes=most_memory(),
        )
        self._tell(lambda display: display.show(moment))
        self._history.append(metrics)
        for sign in signs(self._history):
            if sign.kind not in self._told:
                self._told.add(sign.kind)
                self._warn(f"iteration {iteration + 1}: {sign.message}")

    def _warn(self, message: str) -> None:
        self._tell(lambda display: display.warn(message))

    def _tell(self, show: Callable[[Display], None]) -> None:
        """Shows something, as long as somebody looks: `realloc run | head` must not end a run."""
        if self._display is None:
            return
        try:
            show(self._display)
        except (OSError, SystemExit):  # rich ends the program where a pipe is broken
            self._display = None

    def _keep(self, samples: list[Mapping[str, Any]]) -> None:
        self._samples.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        self._samples.flush()
        self._last_samples = samples or self._last_samples


def tokens_of(metrics: Mapping[str, float]) -> float:
    """Tokens of one iteration, prompts and responses; of the longest call where they differ.

    What evaluation passes through models counts for nothing.
    """
    counts = {name: value for name, value in metrics.items() if name.endswith("/tokens")}
    trained = [value for name, value in counts.items() if not name.startswith((PREFIX, RIVAL, REPORT))]
    return max(trained or counts.values())


def headline(graph: DataflowGraph, metrics: Mapping[str, float]) -> str:
    """The few numbers that a person watches: scores, KL, losses."""
    parts = []
    for call in graph.calls:
        if call.every:
            parts += [
                f"held-out {name.rpartition('/')[2]} {value:.3f}"
                for name, value in metrics.items()
                if call.report is not None
                and name.startswith(f"{call.name}/")
                and not name.endswith("/tokens")
            ]
            continue
        if call.kind is CallKind.COMPUTE or (call.output is not None and call.output == "scores"):
            parts += [
                f"reward {metrics[name]:.3f}"
                for key in call.writes
                if (name := f"{call.name}/{key}") in metrics
            ]
        if call.kind is CallKind.TRAIN_STEP:
            if (name := f"{call.name}/approx_kl") in metrics:
                parts.append(f"kl {metrics[name]:.4f}")
            if (name := f"{call.name}/loss") in metrics:
                parts.append(f"{call.role} loss {metrics[name]:.4f}")
    return "  ".join(parts)


def _earlier(path: Path) -> list[Mapping[str, float]]:
    """The metrics of the iterations before a run goes on, where the file is still there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _shown(sample: Mapping[str, Any]) -> str:
    """A sample in a few lines."""
    scores = [f"{key} {value:.3f}" for key, value in sample.items() if isinstance(value, float)]
    text = f"{sample['prompt']} →{sample['response']}".replace("\n", " ")
    cut = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
    return f"sample {sample['id']}{''.join(f', {score}' for score in scores)}: {cut}"
