"""What one node says of itself before a run: versions, devices, memory, disk, shared memory.

Starts no process and touches no GPU: the driver is asked through its library. Refuses to know other nodes.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from realloc import __version__
from realloc.cluster import GIB
from realloc.errors import InputError
from realloc.plan import ExecutionPlan
from runtime.checkpoint_shares import STATE_BYTES, states_of, trained_roles
from runtime.doctor_report import FAILURE, OK, WARNING, DoctorRequest, Finding, guarded
from runtime.machine import device_name
from runtime.nvml import Gpus, find_gpus
from runtime.supported import check_cluster, other_device

RECORD_BYTES = 300
"""One line of a trace, roughly."""
SHM_BYTES_PER_RANK = 64 << 20
"""What NCCL takes of /dev/shm for each rank at most, with its usual channels and buffers."""
TIGHT = 0.9
"""A share of what is free above which a prediction is no promise."""


def host_findings(request: DoctorRequest) -> tuple[list[Finding], Mapping[str, str]]:
    """Findings of this node, and what must be the same on the others."""
    gpus = find_gpus()
    versions = _versions(gpus)
    findings = [Finding("versions", OK, _listed(versions), node=request.node)]
    findings += _other_versions(request, versions)
    findings += _devices(request, gpus)
    findings += _memory(request, gpus)
    findings += disk_findings(request)
    findings += _shared_memory(request, gpus)
    return findings, versions


def _versions(gpus: Gpus | None) -> Mapping[str, str]:
    found = {"realloc": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    if gpus is not None:
        found["driver"] = gpus.driver
        if torch.version.cuda is not None:
            found["cuda"] = torch.version.cuda
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _other_versions(request: DoctorRequest, versions: Mapping[str, str]) -> list[Finding]:
    """Where the profile was measured with others, its numbers may no longer hold."""
    other = {
        name: version
        for name, version in request.versions.items()
        if name in ("torch", "cuda", "driver") and versions.get(name, version) != version
    }
    if not other:
        return []
    found = f"the plan's costs were measured with {_listed(other)}"
    return [Finding("versions", WARNING, found, "measure again: realloc profile", request.node)]


def _devices(request: DoctorRequest, gpus: Gpus | None) -> list[Finding]:
    node = request.node
    if gpus is None:
        cores = len(os.sched_getaffinity(0))
        if torch.version.cuda is not None and not _is_for_cpu(request.plan):
            advice = (
                "install the NVIDIA driver and nvidia-ml-py (pip install 'realloc[gpu]'), or plan for cpu"
            )
            return [Finding("devices", FAILURE, "the driver does not answer", advice, node)]
        findings = [Finding("devices", OK, f"no GPU; {cores} cores", node=node)]
        if request.plan is not None and not _is_for_cpu(request.plan):
            found = f"the plan is for {request.plan.cluster.device}, this node has no GPU"
            advice = "run it where such GPUs are, or plan with a profile of this machine"
            findings.append(Finding("devices", WARNING, found, advice, node))
        here = device_name(torch.device("cpu"))
    else:
        names = ", ".join(dict.fromkeys(gpus.names)) or "none"
        findings = [Finding("devices", OK, f"{len(gpus.names)} GPUs ({names}); {gpus.topology}", node=node)]
        here = gpus.names[0] if gpus.names else ""
    if request.plan is not None:
        try:
            check_cluster(request.plan.cluster, gpus)
        except InputError as error:
            findings.append(guarded("devices", node, error))
    warning = None if request.device is None else other_device(request.device, here)
    if warning is not None:
        findings.append(Finding("devices", WARNING, warning, "measure with realloc profile", node))
    return findings


def _is_for_cpu(plan: ExecutionPlan | None) -> bool:
    """Whether the plan's costs are those of a CPU, as far as the device's name tells."""
    return plan is None or Path(plan.cluster.device).stem == "cpu" or "/" in plan.cluster.device


def _memory(request: DoctorRequest, gpus: Gpus | None) -> list[Finding]:
    """The predicted peak of a GPU against what is free on each; of a host's ranks against its memory."""
    plan = request.plan
    if plan is None:
        return []
    if plan.predictions is None or not plan.predictions.peak_bytes:
        found = "the plan predicts no memory"
        return [Finding("memory", WARNING, found, "realloc explain PLAN says what it needs", request.node)]
    peak = sum(plan.predictions.peak_bytes.values())
    ranks = plan.cluster.gpus_per_node
    if gpus is None:
        need, free, of = peak * ranks, psutil.virtual_memory().available, f"{ranks} ranks on this host"
    else:
        free_bytes = gpus.free_bytes[:ranks]
        if not free_bytes:
            return []
        worst = min(range(len(free_bytes)), key=free_bytes.__getitem__)
        need, free, of = peak, free_bytes[worst], f"GPU {worst}"
    found = f"{need / GIB:.2f} GiB predicted, {free / GIB:.2f} GiB free ({of})"
    if need > free:
        advice = (
            "end what else uses the memory, or plan with less: cluster: memory_gib, or constraints that "
            "allow ZeRO, recomputation or offload"
        )
        return [Finding("memory", FAILURE, found, advice, request.node)]
    if need > TIGHT * free:
        advice = "little is left for what no prediction knows: fragments, other processes"
        return [Finding("memory", WARNING, found, advice, request.node)]
    return [Finding("memory", OK, found, node=request.node)]


def existing_parent(out: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    path = out.absolute()
    while not path.exists():
        path = path.parent
    return path


def disk_findings(request: DoctorRequest) -> list[Finding]:
    """Whether OUT can be written, and has room for checkpoints, models and traces."""
    folder = existing_parent(request.out)
    where = (
        f"{request.out}" if folder == request.out.absolute() else f"{request.out} (to be made in {folder})"
    )
    node = request.node
    if not folder.is_dir():
        return [Finding("disk", FAILURE, f"{folder} is a file", "give another --out", node)]
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".realloc-doctor-") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        advice = "give another --out, or make the folder writable for this user"
        return [Finding("disk", FAILURE, f"{where}: cannot be written: {error.strerror}", advice, node)]
    free = shutil.disk_usage(folder).free
    if request.plan is None:
        return [Finding("disk", OK, f"{where}: {free / GIB:.2f} GiB free", node=node)]
    need = output_bytes(request.plan, request.keep)
    found = f"{where}: {need / GIB:.2f} GiB for {request.keep} checkpoints, models and traces, "
    found += f"{free / GIB:.2f} GiB free"
    if need > free:
        advice = "free some space, keep fewer checkpoints (--keep), or give another --out"
        return [Finding("disk", FAILURE, found, advice, node)]
    return [Finding("disk", OK, found, node=node)]


def output_bytes(plan: ExecutionPlan, keep: int) -> int:
    """Bytes that a run leaves at most: `keep` checkpoints and the one being written, models, traces."""
    element = plan.experiment.dtype_bytes
    state = STATE_BYTES * len(states_of(plan.experiment.dtype))
    params = sum(plan.experiment.role_shape(plan.graph, role).num_params for role in trained_roles(plan))
    checkpoints = (keep + 1) * params * (element + state)
    records = plan.experiment.iterations * sum(len(node.ranks) for node in plan.augmented.nodes)
    return checkpoints + params * element + 2 * records * RECORD_BYTES


def _shared_memory(request: DoctorRequest, gpus: Gpus | None) -> list[Finding]:
    """Room in /dev/shm, through which NCCL talks within a host; CPU ranks share anonymous files."""
    node, shm = request.node, Path("/dev/shm")  # noqa: S108 (the kernel's own, not a temporary file)
    ranks = request.ranks if request.plan is None else request.plan.cluster.gpus_per_node
    if gpus is None:
        try:
            os.close(os.memfd_create("realloc-doctor", os.MFD_CLOEXEC))
        except (AttributeError, OSError) as error:
            found, advice = (
                f"no anonymous files ({error})",
                "reallocation will use messages, which are slower",
            )
            return [Finding("shared memory", WARNING, found, advice, node)]
        return [Finding("shared memory", OK, "ranks of this host can share memory", node=node)]
    free = shutil.disk_usage(shm).free if shm.is_dir() else 0
    need = ranks * SHM_BYTES_PER_RANK
    found = f"{free / GIB:.2f} GiB free in {shm}, NCCL may take {need / GIB:.2f} GiB"
    if free < need:
        advice = "in a container: --shm-size=8g (docker) or an emptyDir with medium Memory (Kubernetes)"
        return [Finding("shared memory", FAILURE, found, advice, node)]
    return [Finding("shared memory", OK, found, node=node)]
