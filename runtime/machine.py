"""What this machine is called, in profiles and traces alike, and which cores its ranks may use."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import psutil
import torch

from realloc.errors import InputError
from realloc.trace import Machine


def device_name(device: torch.device) -> str:
    """The name by which a profile is recognized as that of this device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = psutil.cpu_count(logical=True) or 1
    return f"{platform.processor() or platform.machine()} host with {cores} cores"


def this_machine(pinned: bool) -> Machine:
    """What traces say of the machine a run is on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Machine(device_name(device), len(os.sched_getaffinity(0)), pinned)


class OthersUse:
    """How much of the machine's cores others use, from now on: not this process, nor its ended children."""

    def __init__(self) -> None:
        self._since, self._busy_s, self._own_s = time.monotonic(), _busy_s(), sum(os.times()[:4])

    def share(self) -> float:
        """Of all cores' time so far; may be asked again."""
        elapsed = (time.monotonic() - self._since) * (psutil.cpu_count(logical=True) or 1)
        others = _busy_s() - self._busy_s - (sum(os.times()[:4]) - self._own_s)
        return max(0.0, others / elapsed) if elapsed > 0 else 0.0


def _busy_s() -> float:
    """Seconds for which cores of this machine were not idle, since it was started."""
    times = psutil.cpu_times()
    # a guest's time is in the user's already
    return (
        sum(times) - times.idle - sum(getattr(times, name, 0.0) for name in ("iowait", "guest", "guest_nice"))
    )


def check_pinnable(ranks: int) -> None:
    """Raises InputError when there are fewer cores than ranks."""
    cores = len(os.sched_getaffinity(0))
    if ranks > cores:
        raise InputError(
            f"--pin: {ranks} ranks need {ranks} cores, this process may use {cores}; run without --pin."
        )


def cores_mark() -> str:
    """The same for all processes that share a kernel and the cores that they may use."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    kernel = boot.read_text(encoding="ascii").strip() if boot.exists() else platform.node()
    return f"{kernel} {sorted(os.sched_getaffinity(0))}"


def pin(place: int) -> None:
    """Keeps this process, and threads that it starts from now on, on one core: the `place`-th of its own.

    Raises InputError when it has not so many.
    """
    cores = sorted(os.sched_getaffinity(0))
    if place >= len(cores):
        raise InputError(
            f"--pin: {place + 1} or more ranks of this host share {len(cores)} cores; run without --pin."
        )
    os.sched_setaffinity(0, {cores[place]})
