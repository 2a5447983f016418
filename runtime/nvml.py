"""What the NVIDIA driver says of this machine, where there is one and its Python binding is installed.

Facts only: names, memory, versions, links. Whether they suit a plan or a profile is decided by
whoever asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_MAX_LINKS = 18
"""NVLinks that a GPU of any generation so far has."""


@dataclass(frozen=True)
class Gpus:
    """The GPUs of one machine. `nvlinks[i]`: active NVLinks of GPU i, by the GPU at the other end.

    Links that end in a switch, through which a GPU reaches all others, are counted under -1.
    """

    driver: str
    names: tuple[str, ...]
    memory_bytes: tuple[int, ...]
    nvlinks: tuple[Mapping[int, int], ...]
    free_bytes: tuple[int, ...] = ()

    @property
    def topology(self) -> str:
        """One line for people, such as `NVLink: 18 links of each GPU to a switch`."""
        totals = {sum(links.values()) for links in self.nvlinks}
        if totals <= {0}:
            return "NVLink: none; GPUs talk over PCIe"
        most = max(totals)
        switched = all(set(links) <= {-1} for links in self.nvlinks)
        where = "to a switch" if switched else "to other GPUs"
        return f"NVLink: {most} links of each GPU {where}" + ("" if len(totals) == 1 else " at most")


def find_gpus() -> Gpus | None:
    """The machine's GPUs; None without a driver or without the binding (nvidia-ml-py)."""
    try:
        nvml: Any = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        return _read(nvml)
    finally:
        nvml.nvmlShutdown()


def _read(nvml: Any) -> Gpus:
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    places = {_text(nvml.nvmlDeviceGetPciInfo(handle).busId): i for i, handle in enumerate(handles)}
    return Gpus(
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
        names=tuple(_text(nvml.nvmlDeviceGetName(handle)) for handle in handles),
        memory_bytes=tuple(int(nvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles),
        nvlinks=tuple(_links(nvml, handle, places) for handle in handles),
        free_bytes=tuple(int(nvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles),
    )


def _links(nvml: Any, handle: Any, places: Mapping[str, int]) -> Mapping[int, int]:
    found: dict[int, int] = {}
    for link in range(_MAX_LINKS):
        try:
            if not nvml.nvmlDeviceGetNvLinkState(handle, link):
                continue
            remote = _text(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId)
        except nvml.NVMLError:
            continue  # there is no such link, or it does not say where it ends
        other = places.get(remote, -1)
        found[other] = found.get(other, 0) + 1
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
