"""Reward functions that fail in every way that one can, on the samples whose response says so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from realloc.functions import Sample


def length(samples: Sequence[Sample], scale: float = 1.0) -> list[float]:
    print('{"values": [7.0], "bad": {}}', flush=True)  # looks like a reply, but is none
    return [scale * len(s.response) for s in samples]


def array(samples: Sequence[Sample]) -> Any:
    return np.array([len(s.response) for s in samples], dtype=np.float32)


def scalars(samples: Sequence[Sample]) -> list[Any]:
    return [np.bool_(True), np.array(2.0), np.float32(3)][: len(samples)]


def memory_rank(samples: Sequence[Sample]) -> list[float]:
    """What the kernel adds to this process's score when it looks for one to end."""
    return [float(Path("/proc/self/oom_score_adj").read_text()) for _ in samples]


def nan(samples: Sequence[Sample]) -> list[float]:
    return [float("nan") if s.response == "bad" else 1.0 for s in samples]


def infinite(samples: Sequence[Sample]) -> list[float]:
    return [float("-inf") if s.response == "bad" else 1.0 for s in samples]


def words(samples: Sequence[Sample]) -> list[Any]:
    return ["good" if s.response == "bad" else 1.0 for s in samples]


def too_large(samples: Sequence[Sample]) -> list[Any]:
    return [10**400 if s.response == "bad" else 1.0 for s in samples]


def closes(samples: Sequence[Sample]) -> list[float]:
    """Takes the pipes from its process, which then fails by itself."""
    return [_if_bad(s, lambda: os.closerange(0, 100)) for s in samples]


def raises(samples: Sequence[Sample]) -> list[float]:
    return [_if_bad(s, lambda: 1 / 0) for s in samples]


def exits(samples: Sequence[Sample]) -> list[float]:
    return [_if_bad(s, lambda: sys.exit(0)) for s in samples]


def dies(samples: Sequence[Sample]) -> list[float]:
    return [_if_bad(s, lambda: os._exit(3)) for s in samples]


def hangs(samples: Sequence[Sample]) -> list[float]:
    return [_if_bad(s, lambda: time.sleep(60)) for s in samples]


def too_few(samples: Sequence[Sample]) -> list[float]:
    return [1.0 for s in samples if s.response != "bad"]


def nothing(samples: Sequence[Sample]) -> None:
    return None


def only_together(samples: Sequence[Sample]) -> list[float]:
    """Fails on every batch of more than one."""
    return [1.0 for s in samples][:1]


def asks(samples: Sequence[Sample]) -> list[float]:
    return [float(len(input()))]


def starts_another(samples: Sequence[Sample]) -> list[float]:
    """Leaves a process behind, tells its id, and hangs."""
    child = subprocess.Popen(["sleep", "60"])
    Path(samples[0].response).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)
    return [0.0]


def _if_bad(sample: Sample, act: Callable[[], Any]) -> float:
    if sample.response == "bad":
        act()
    return 1.0
