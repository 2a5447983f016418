"""What a plan reads, before it is run: models, data, functions; whole, and the same on every node.

Reads headers and sizes, or with `thorough` every byte. Loads no weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from realloc.errors import InputError
from realloc.experiment import Experiment
from realloc.row_sources import local_files
from realloc.trust import check_functions
from runtime.doctor_report import FAILURE, OK, DoctorRequest, Finding, guarded
from runtime.functions import FunctionTable
from runtime.hf import Checkpoint
from runtime.supported import check_runs

_CONFIG = ("config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors format allows."""
_BLOCK = 1 << 22


def file_findings(request: DoctorRequest) -> tuple[list[Finding], Mapping[str, str]]:
    """Findings about models, data and functions, and their hashes by name."""
    if request.plan is None:
        return [], {}
    experiment = request.plan.experiment
    findings: list[Finding] = []
    marks: dict[str, str] = {}
    folders: dict[str, list[str]] = {}
    for role, spec in experiment.models.items():
        try:
            check_runs(spec.shape, f"models.{role}")
        except InputError as error:
            findings.append(guarded("models", request.node, error))
        if spec.has_weights:
            folders.setdefault(spec.model, []).append(role)
        else:
            found = f"{role}: '{spec.model}' is a shape without weights"
            advice = "give the folder of a Hugging Face checkpoint to run it"
            findings.append(Finding("models", FAILURE, found, advice, request.node))
    for folder, roles in folders.items():
        name = f"model of {', '.join(roles)}"
        try:
            marks[name] = model_hash(Path(folder), thorough=request.thorough)
        except InputError as error:
            advice = "copy or download the model again, to the same path on every node"
            findings.append(guarded("models", request.node, error, advice))
            continue
        kind = "every byte" if request.thorough else "headers and sizes"
        found = f"{', '.join(roles)}: {folder} ({kind}: {marks[name][:12]})"
        findings.append(Finding("models", OK, found, node=request.node))
    findings += _data(request.node, experiment, marks, request.thorough)
    findings += _functions(request)
    return findings, marks


def model_hash(folder: Path, *, thorough: bool) -> str:
    """A hash of configuration, tokenizer, index, and the weights' headers and sizes (or all of them).

    Raises InputError for weights that are missing, truncated or not safetensors.
    """
    with Checkpoint(folder):
        pass  # the index leads to files that are there, none of them a pickle
    digest = sha256()
    for name in _CONFIG:
        path = folder / name
        digest.update(name.encode() + (path.read_bytes() if path.is_file() else b""))
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        digest.update(_header(path, size))
        if thorough:
            with path.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
    return digest.hexdigest()


def _header(path: Path, size: int) -> bytes:
    """The header of a safetensors file. Raises InputError where it does not fit the file's size."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_HEADER_BYTES, size - 8):
            raise InputError(f"{path}: not a safetensors file ({size} bytes).")
        header = stream.read(length)
    try:
        entries = json.loads(header)
        end = max((e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise InputError(f"{path}: has a damaged safetensors header.") from None
    if 8 + length + end != size:
        raise InputError(
            f"{path}: has {size} bytes, its header promises {8 + length + end}: it is truncated."
        )
    return header


def _data(node: int, experiment: Experiment, marks: dict[str, str], thorough: bool) -> list[Finding]:
    specs = [experiment.data, None if experiment.pretrain is None else experiment.pretrain.data]
    advice = "copy the data to the same path on every node"
    findings: list[Finding] = []
    try:
        paths = [path for spec in specs if spec is not None for path in local_files(spec)]
    except InputError as error:
        return [guarded("data", node, error, advice)]
    for path in paths:
        if not path.exists():
            findings.append(Finding("data", FAILURE, f"{path}: no such file", advice, node))
        elif not path.is_file():
            findings.append(Finding("data", OK, f"{path}", node=node))
        else:
            findings.append(_data_file(node, path, marks, thorough))
    return findings


def _data_file(node: int, path: Path, marks: dict[str, str], thorough: bool) -> Finding:
    size = path.stat().st_size
    digest = sha256(f"{size}".encode())
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                if not thorough:
                    break
    except OSError as error:
        advice = "copy the data to the same path on every node"
        return Finding("data", FAILURE, f"{path}: cannot be read: {error.strerror}", advice, node)
    marks[f"data {path.name}"] = digest.hexdigest()
    return Finding("data", OK, f"{path} ({size:,} bytes)", node=node)


def _functions(request: DoctorRequest) -> list[Finding]:
    assert request.plan is not None
    names = sorted({call.function for call in request.plan.graph.calls if call.function is not None})
    try:
        check_functions(request.plan.graph, "plan", trust=request.trust)
        FunctionTable(request.plan.experiment.resolve_algorithm().functions).check(request.plan.graph)
    except InputError as error:
        advice = "run from the folder of the module, or install it on every node"
        return [guarded("functions", request.node, error, advice)]
    listed = ", ".join([f"of {request.plan.experiment.algorithm}", *names])
    return [Finding("functions", OK, listed, node=request.node)]
