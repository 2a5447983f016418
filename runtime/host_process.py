"""What the kernel knows of another process of this machine, and of its memory running out.

Facts alone; what they mean for a run is judged in `runtime.watchdog`.
"""

from __future__ import annotations

from pathlib import Path

import psutil

_VMSTAT = Path("/proc/vmstat")


class HostProcess:
    """A process by its id. What is asked of one that has ended gets the answer of an idle one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._process: psutil.Process | None = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._process = None

    @property
    def is_stopped(self) -> bool:
        """By SIGSTOP or by a debugger."""
        try:
            return self._process is not None and self._process.status() in (
                psutil.STATUS_STOPPED,
                psutil.STATUS_TRACING_STOP,
            )
        except psutil.NoSuchProcess:
            return False

    @property
    def cpu_s(self) -> float:
        """Seconds that all its threads have computed."""
        try:
            return 0.0 if self._process is None else sum(self._process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            return 0.0

    @property
    def resident_bytes(self) -> int:
        try:
            return 0 if self._process is None else int(self._process.memory_info().rss)
        except psutil.NoSuchProcess:
            return 0

    @property
    def has_runnable_thread(self) -> bool:
        """Whether a thread computes or only lacks a core (Linux; elsewhere false)."""
        return any(_state(task / "stat") == "R" for task in Path(f"/proc/{self.pid}/task").glob("*"))


def _state(stat: Path) -> str:
    try:
        # the second field is a name in parentheses, which may hold anything
        return stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except OSError:  # the thread has ended
        return ""


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since it started (Linux; elsewhere 0)."""
    try:
        lines = _VMSTAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
