"""One Python reward in a process of its own: a time limit for each batch, and blame for single samples.

Decides what counts as a failure and which samples it is of; the process is `runtime.reward_process`. What
happens to a sample without a number, the caller decides.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realloc.errors import RunError
from realloc.functions import Sample
from realloc.rewards import ERROR, RewardSource

START_LIMIT_S = 300.0
"""For Python to start and to import the reward's module, which may be a large one."""
_EXIT_S = 5.0
"""For a process that has closed its end of the pipe to exit by itself, which tells why."""
_CHUNK = 1 << 16
_ADVICE = "Mend it, or give it 'on_failure: skip' to leave such samples out (rewards)."
_ROOT = str(Path(__file__).resolve().parents[1])
"""Where Python finds this package; the rest of this process's path is set once Python has started."""


@dataclass(frozen=True)
class Failure:
    """Why there is no number: of a sample, or of the samples of one request."""

    text: str


class RewardWorker:
    """A reward and its process, which is started at once and again after it had to be ended."""

    def __init__(self, source: RewardSource) -> None:
        self.source = source
        self._process: _Process | None = _Process(source)
        self._deadline_s = 0.0

    def wait_ready(self) -> None:
        """Waits until the function is loaded, which is not of its time. Raises RunError if it cannot be."""
        self._ready()

    def post(self, samples: Sequence[Sample]) -> None:
        """Sends a batch; `take` waits for its numbers. Raises RunError as `wait_ready` does."""
        process = self._ready()
        self._deadline_s = time.monotonic() + self.source.time_limit_s
        process.send(samples, self._deadline_s)

    def take(self, samples: Sequence[Sample], where: str) -> list[float | Failure]:
        """The numbers of the posted samples, a Failure for each that has none.

        `where` begins messages. Raises RunError for the first failure with `on_failure: error`.
        """
        reply = self._reply(self._deadline_s, self.source.time_limit_s)
        if isinstance(reply, Failure):
            found = self._one_by_one(samples, reply, where)
        else:
            found = reply
        failed = [
            (sample, value.text)
            for sample, value in zip(samples, found, strict=True)
            if isinstance(value, Failure)
        ]
        if failed:
            sample, text = failed[0]
            if self.source.on_failure == ERROR:
                raise RunError(f"{self._message(where, text, sample)}. {_ADVICE}")
            count = f"{len(failed)} of {len(samples)} samples are left out; the first"
            print(f"{self._message(where, text, sample)}. {count} is this one.", file=sys.stderr, flush=True)
        return found

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def _one_by_one(self, samples: Sequence[Sample], whole: Failure, where: str) -> list[float | Failure]:
        """Asks for each sample alone. Raises RunError when a batch fails that has no failing sample."""
        limit_s = self.source.alone_limit_s(len(samples))
        found: list[float | Failure] = []
        for sample in samples:
            process = self._ready()
            deadline_s = time.monotonic() + limit_s
            process.send([sample], deadline_s)
            reply = self._reply(deadline_s, limit_s)
            found.append(reply if isinstance(reply, Failure) else reply[0])
            if self.source.on_failure == ERROR and isinstance(found[-1], Failure):
                raise RunError(f"{self._message(where, found[-1].text, sample)}. {_ADVICE}")
        if self.source.on_failure == ERROR:
            text = self._message(where, f"{whole.text}, though none of its samples does alone")
            raise RunError(f"{text}. {_ADVICE}")
        return found

    def _ready(self) -> _Process:
        if self._process is None:
            self._process = _Process(self.source)
        failure = self._process.wait_ready()
        if failure is not None:
            raise RunError(f"reward {self.source.title}: {failure.text}.")
        return self._process

    def _reply(self, deadline_s: float, limit_s: float) -> list[float | Failure] | Failure:
        """What came by the deadline. A process that did not answer is ended."""
        if self._process is None:
            raise AssertionError("nothing was posted")
        reply = self._process.receive(deadline_s)
        if reply is None:
            late = time.monotonic() >= deadline_s
            code = self._process.end(0.0 if late else _EXIT_S)
            self._process = None
            took = f"took longer than {limit_s:g} s"
            return Failure(took if late else f"ended its process ({_ending(code)})")
        if "error" in reply:
            return Failure(str(reply["error"]))
        bad = reply["bad"]
        return [
            Failure(f"returned {bad[str(i)]}, expected a finite number") if value is None else float(value)
            for i, value in enumerate(reply["values"])
        ]

    def _message(self, where: str, text: str, sample: Sample | None = None) -> str:
        message = f"{where}: reward {self.source.title} {text}"
        if sample is not None:
            row = f" ({sample.where})" if sample.where else ""
            message += f" for sample {sample.id}{row}, whose response is {sample.response[:80]!r}"
        return message


class _Process:
    """The pipes to one process. Times are those of `time.monotonic`."""

    def __init__(self, source: RewardSource) -> None:
        # a session of its own, so that what the function starts can be ended with it
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "runtime.reward_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([_ROOT, *_given_paths()])},
        )
        self._buffer = b""
        self._is_ready = False
        stdin, stdout = self._popen.stdin, self._popen.stdout
        if stdin is None or stdout is None:
            raise AssertionError("a process without pipes")
        self._in, self._out = stdin.fileno(), stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        start = {
            "function": source.function,
            "options": dict(source.options),
            "path": sys.path,
            "parent": os.getpid(),
        }
        self._write(start, time.monotonic() + START_LIMIT_S)

    def wait_ready(self) -> Failure | None:
        """None once the function is loaded, else why it cannot be."""
        if self._is_ready:
            return None
        reply = self.receive(time.monotonic() + START_LIMIT_S)
        self._is_ready = reply is not None and "ready" in reply
        if reply is None:
            return Failure("its process ended, or did not start in time")
        return None if self._is_ready else Failure(str(reply["error"]))

    def send(self, samples: Sequence[Sample], deadline_s: float) -> None:
        """Sends samples; values that JSON lacks go as text. Who does not read them will not answer either."""
        content = [vars(sample) | {"row": dict(sample.row)} for sample in samples]
        self._write({"samples": content}, deadline_s)

    def receive(self, deadline_s: float) -> dict[str, Any] | None:
        """The next reply; None if none came by the deadline, or the process ended."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._out, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    return None
                chunk = os.read(self._out, _CHUNK)
                if not chunk:
                    return None
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def end(self, grace_s: float = 0.0) -> int:
        """Ends the process, if it does not by itself within `grace_s`, and what it started.

        Returns its exit code.
        """
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(grace_s)
        code = self._popen.poll()
        try:
            os.killpg(self._popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for stream in (self._popen.stdin, self._popen.stdout):
            if stream is not None:
                stream.close()
        killed = self._popen.wait()
        return killed if code is None else code

    def _write(self, content: Any, deadline_s: float) -> None:
        data = memoryview(json.dumps(content, default=str).encode() + b"\n")
        with selectors.DefaultSelector() as selector:
            selector.register(self._in, selectors.EVENT_WRITE)
            while data:
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    return
                try:
                    data = data[os.write(self._in, data[:_CHUNK]) :]
                except BrokenPipeError:
                    return


def _given_paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return f"signal {-code}, as where memory runs out"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
