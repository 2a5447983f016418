"""Memory that processes of one host can read from each other.

Decides how segments are made, found again and opened by others; knows nothing of what lies in them.
A segment is an anonymous file (`memfd_create`) that others open through the owner's `/proc` entry:
it has no name, so nothing is left behind however a process ends.
"""

from __future__ import annotations

import logging
import mmap
import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a tensor's first element lies: the owner's file, which file that is, its size, the offset."""

    fd: int
    inode: int
    num_bytes: int
    offset: int


@dataclass(frozen=True)
class _Segment:
    fd: int
    memory: torch.Tensor


class SharedMemory:
    """The segments of this process, and those of others that it has opened.

    Where the system gives no such memory, tensors come from ordinary memory and are not found.
    """

    def __init__(self) -> None:
        self._segments: list[_Segment] = []
        self._opened: dict[tuple[int, int, int], torch.Tensor] = {}
        self._enabled = hasattr(os, "memfd_create") and Path("/proc/self/fd").exists()

    def empty(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised flat tensor; in a segment of its own on the CPU."""
        num_bytes = num_elements * dtype.itemsize
        if device.type != "cpu" or not num_bytes or not self._enabled:
            return torch.empty(num_elements, dtype=dtype, device=device)
        try:
            fd = os.memfd_create("parameters", os.MFD_CLOEXEC)
            os.posix_fallocate(fd, 0, num_bytes)  # fails here, not at the first touch of a page
            memory = _mapped(fd, num_bytes)
        except OSError as error:
            logger.warning("no shared memory for %d bytes (%s): messages instead", num_bytes, error)
            self._enabled = False
            return torch.empty(num_elements, dtype=dtype)
        self._segments.append(_Segment(fd, memory))
        return memory.view(dtype)

    def find(self, tensor: torch.Tensor) -> Place | None:
        """Where the tensor lies, None when it is in none of this process's segments."""
        for segment in self._segments:
            offset = tensor.data_ptr() - segment.memory.data_ptr()
            if 0 <= offset < segment.memory.numel():
                return Place(segment.fd, os.fstat(segment.fd).st_ino, segment.memory.numel(), offset)
        return None

    def open(self, pid: int, place: Place) -> torch.Tensor | None:
        """The bytes of another process's segment, None when this process may not or cannot open it."""
        key = (pid, place.fd, place.inode)
        if key not in self._opened:
            try:
                fd = os.open(f"/proc/{pid}/fd/{place.fd}", os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                logger.warning("cannot open shared memory of process %d (%s): messages instead", pid, error)
                return None
            try:
                status = os.fstat(fd)
                if (status.st_ino, status.st_size) != (place.inode, place.num_bytes):
                    return None
                self._opened[key] = _mapped(fd, place.num_bytes)
            finally:
                os.close(fd)
        return self._opened[key]


def _mapped(fd: int, num_bytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)


def host_token() -> int:
    """A number that processes have in common when they see the same kernel, process ids and network.

    With another network a process is on another host of the plan, whoever's memory it could read: what the
    plan sends between hosts has to take the way that was measured.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return 0
    spaces = [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("pid", "net")]
    text = "".join([boot.read_text(), *spaces])
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")
