"""The process in which one Python reward runs: reads samples, calls the function, writes numbers.

Started as `python -m runtime.reward_process` by `runtime.reward_worker`, with which it speaks JSON, a line a
message, over pipes. What the function prints goes to the log, what it raises becomes a message; whatever
else it does to this process, the rank that started it lives on. Imports no torch.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

from realloc.functions import Sample
from realloc.named_code import LONGEST, described
from runtime.parent import die_with


def main() -> None:
    """Serves requests until the pipe is closed. Its first line says which function, and where to find it."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what the function prints must not look like a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the launcher
    start = json.loads(requests.readline() or b"null")
    if start is None:
        return
    die_with(start["parent"])
    with suppress(OSError):  # where memory runs out, this process is to end and no rank
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    sys.path[:] = start["path"]
    try:
        function = _load(start["function"])
    except BaseException as error:  # noqa: BLE001 (importing a user's module may do anything)
        _send(replies, {"error": f"cannot be loaded: {described(error, __file__)}"})
        return
    _send(replies, {"ready": True})
    for line in requests:
        request = json.loads(line)
        samples = [Sample(**sample) for sample in request["samples"]]
        _send(replies, answer(function, samples, start["options"]))


def answer(
    function: Callable[..., Any], samples: Sequence[Sample], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The reply to one request: `values`, None where one is no finite number, which `bad` then shows.

    `error` instead where the function raised or returned something else than one value for each sample.
    """
    try:
        result = function(samples, **options)
        if hasattr(result, "tolist"):  # an array or a tensor
            result = result.tolist()
    except BaseException as error:  # noqa: BLE001 (a user's function may raise anything, SystemExit too)
        return {"error": f"raised {described(error, __file__)}"}
    if not isinstance(result, Sequence) or isinstance(result, (str, bytes)):
        got = type(result).__name__
        return {"error": f"returned {got}; it must return a list with one number for each sample"}
    if len(result) != len(samples):
        return {
            "error": f"returned {len(result)} for {len(samples)} samples; it must return a list with one "
            f"number for each"
        }
    values = [_number(value) for value in result]
    bad = {i: _short(repr(v)) for i, v in enumerate(result) if values[i] is None}
    return {"values": values, "bad": bad}


def _load(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def _send(replies: BinaryIO, content: Mapping[str, Any]) -> None:
    data = json.dumps(content).encode() + b"\n"
    while data:
        data = data[replies.write(data) :]


def _number(value: Any) -> float | None:
    """A number of Python's, numpy's or torch's; None for anything else, and for one that is not finite."""
    try:
        number = value.item() if hasattr(value, "item") else value
        return float(number) if isinstance(number, Real) and math.isfinite(number) else None
    except (OverflowError, RuntimeError, ValueError):  # too large a number; an array of several
        return None


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


if __name__ == "__main__":
    main()
