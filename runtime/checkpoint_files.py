"""Checkpoints as files: names, the manifest, which of them are there, and whether they are whole.

    OUT/checkpoints/iteration-N/     the state after N iterations
        manifest.json                what it is of, and size and CRC-32 of every other file
        rank-R.safetensors           the pieces that rank R wrote
        rank-R.json                  which box of which tensor each piece is

A checkpoint is written under a hidden name and renamed when it is whole, so a folder that has the
name is one. Knows nothing of ranks, layouts or tensors beyond their boxes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from realloc.errors import InputError
from realloc.files import Reader
from realloc.layout import Box
from runtime.tensor_file import FileRecord, measure_file

VERSION = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"iteration-(0|[1-9][0-9]{0,17})")
_FILE = re.compile(r"rank-[0-9]{1,9}\.(safetensors|json)")


@dataclass(frozen=True)
class Piece:
    """A box of one tensor of a role; `state` is `weight`, or a state of its optimizer."""

    role: str
    state: str
    param: str
    box: Box

    @property
    def key(self) -> str:
        """Its name in the rank's file."""
        return f"{self.role}/{self.state}/{self.param}@{','.join(map(str, self.box.start))}"


@dataclass(frozen=True)
class RoleRecord:
    """One trained role: its Hugging Face config, its head, how many optimizer steps it has taken."""

    config: Mapping[str, Any]
    head: str
    optimizer_steps: int


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is of.

    `iteration` iterations are done: the next one has this index, reads the data from sequence
    `iteration * sequences` on, and draws its samples from (seed, iteration, ...), so this number and
    the experiment are the data's position and the random state. `experiment` is its content as in a
    plan, `placements` call -> mesh and strategy as text, `states` call -> what its `prepare` keeps.
    """

    iteration: int
    experiment: Mapping[str, Any]
    placements: Mapping[str, str]
    world_size: int
    roles: Mapping[str, RoleRecord]
    files: Mapping[str, FileRecord]
    states: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def checkpoints_folder(out: Path) -> Path:
    return out / "checkpoints"


def name_of(iteration: int) -> str:
    return f"iteration-{iteration}"


def partial_name(iteration: int) -> str:
    """Where a checkpoint is until it is whole."""
    return f".{name_of(iteration)}.partial"


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in the folder, oldest first."""
    found = {int(m[1]): path for path in folder.glob("iteration-*") if (m := _NAME.fullmatch(path.name))}
    return [found[iteration] for iteration in sorted(found)]


def iteration_of(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise AssertionError(f"{checkpoint} is no checkpoint's name")
    return int(match[1])


def remove_partial(folder: Path) -> None:
    """Removes what interrupted writes and removals have left. Nobody may be writing there."""
    for path in folder.glob(".iteration-*"):
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint so that a kill in between leaves no half of it under its name."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    if hidden.exists():
        shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def manifest_text(manifest: Manifest) -> str:
    content: dict[str, Any] = {
        "realloc": f"checkpoint/{VERSION}",
        "iteration": manifest.iteration,
        "world_size": manifest.world_size,
        "roles": {name: asdict(role) for name, role in manifest.roles.items()},
        "placements": dict(manifest.placements),
        "experiment": manifest.experiment,
        "files": {name: asdict(record) for name, record in manifest.files.items()},
        "states": {call: dict(state) for call, state in manifest.states.items()},
    }
    content["crc32"] = _content_crc(content)
    return json.dumps(content, indent=1) + "\n"


def _content_crc(content: Mapping[str, Any]) -> int:
    rest = {key: value for key, value in content.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint. Raises InputError when it is missing, newer or damaged."""
    path = checkpoint / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, so {checkpoint} is no whole checkpoint.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is damaged: {error}.") from None
    reader = Reader(content, str(path))
    kind, _, version = reader.get("realloc", str).partition("/")
    if kind != "checkpoint" or not version.isdecimal():
        raise InputError(f"{path}: is no manifest of a checkpoint.")
    if int(version) != VERSION:
        raise InputError(
            f"{path}: checkpoint version {version}; this realloc reads version {VERSION}. "
            f"Continue with the version of realloc that wrote it, or a newer one."
        )
    if reader.integer("crc32") != _content_crc(content):
        raise InputError(f"{path}: is damaged: its content does not match its own checksum.")
    manifest = Manifest(
        iteration=reader.integer("iteration"),
        experiment=reader.get("experiment", dict),
        placements=reader.get("placements", dict),
        world_size=reader.integer("world_size", minimum=1),
        roles={name: _parse_role(role) for name, role in _children(reader, "roles")},
        files={name: _parse_file(name, file) for name, file in _children(reader, "files")},
        states={call: _parse_state(state) for call, state in _state_readers(reader)},
    )
    reader.done()
    return manifest


def _children(reader: Reader, key: str) -> list[tuple[str, Reader]]:
    child = reader.child(key)
    return [(name, child.child(name)) for name in child.keys()]


def _state_readers(reader: Reader) -> list[tuple[str, Reader]]:
    child = reader.optional_child("states")  # checkpoints of earlier versions have none
    return [] if child is None else [(name, child.child(name)) for name in child.keys()]


def _parse_state(reader: Reader) -> Mapping[str, float]:
    return {name: reader.number(name) for name in reader.keys()}


def _parse_role(reader: Reader) -> RoleRecord:
    role = RoleRecord(
        reader.get("config", dict),
        reader.choice("head", ("lm", "scalar")),
        reader.integer("optimizer_steps"),
    )
    reader.done()
    return role


def _parse_file(name: str, reader: Reader) -> FileRecord:
    if not _FILE.fullmatch(name):  # a manifest must not lead out of its folder
        raise InputError(f"{reader.where}: is not the name of a checkpoint's file.")
    record = FileRecord(reader.integer("num_bytes"), reader.integer("crc32"))
    reader.done()
    return record


def index_text(file: str, pieces: Sequence[Piece]) -> str:
    """The index of one rank's file."""
    rows = [
        {"role": p.role, "state": p.state, "param": p.param, "start": p.box.start, "stop": p.box.stop}
        for p in pieces
    ]
    return json.dumps({"realloc": f"checkpoint-index/{VERSION}", "file": file, "pieces": rows}) + "\n"


def read_index(path: Path) -> tuple[str, list[Piece]]:
    """(file, its pieces). Raises InputError; the manifest's checksum has mostly spoken before."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pieces = [
            Piece(row["role"], row["state"], row["param"], Box(tuple(row["start"]), tuple(row["stop"])))
            for row in content["pieces"]
        ]
        return str(content["file"]), pieces
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: is no index of a checkpoint: {error!r}.") from None


def verify(checkpoint: Path) -> Manifest:
    """Reads all of a checkpoint and returns its manifest.

    Raises InputError that names the first file that is missing, truncated or corrupted.
    """
    manifest = read_manifest(checkpoint)
    problems: list[str | None] = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        files = sorted(manifest.files.items())
        problems = list(pool.map(lambda entry: _problem(checkpoint / entry[0], entry[1]), files))
    first = next((problem for problem in problems if problem is not None), None)
    if first is not None:
        raise InputError(first)
    return manifest


def _problem(path: Path, expected: FileRecord) -> str | None:
    try:
        found = measure_file(path)
    except FileNotFoundError:
        return f"{path}: no such file, but the checkpoint's manifest lists it."
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}."
    if found.num_bytes != expected.num_bytes:
        what = "truncated" if found.num_bytes < expected.num_bytes else "too long"
        return f"{path}: is {what}: {found.num_bytes} bytes, expected {expected.num_bytes}."
    if found.crc32 != expected.crc32:
        return (
            f"{path}: is corrupted: its checksum is {found.crc32:08x}, expected {expected.crc32:08x} "
            f"({found.num_bytes} bytes)."
        )
    return None


def choose(out: Path, name: str | None) -> tuple[Path, Manifest]:
    """The checkpoint `name` of the run in `out` (None: its newest), verified, and its manifest.

    Raises InputError when there is none, or when it is damaged: it then names the newest earlier one
    that is whole, since silently going back would hide that something eats files.
    """
    folder = checkpoints_folder(out)
    found = list_checkpoints(folder)
    if not out.is_dir():
        raise InputError(f"{out}: no such folder; give the --out of the run to continue.")
    if not found:
        raise InputError(
            f"{out}: has no checkpoint in {folder.name}/; the run stopped before its first one "
            f"(--save-every), so start it anew."
        )
    chosen = found[-1] if name is None else next((path for path in found if path.name == name), None)
    if chosen is None:
        names = ", ".join(path.name for path in found)
        raise InputError(f"{folder}: has no checkpoint '{name}'; there are: {names}.")
    try:
        return chosen, verify(chosen)
    except InputError as error:
        raise InputError(f"{error} {_advice(found, chosen)}") from None


def _advice(found: Sequence[Path], damaged: Path) -> str:
    for candidate in reversed(found):
        if candidate == damaged:
            continue
        try:
            verify(candidate)
        except InputError:
            continue
        return f"{candidate.name} is intact: continue from it with --from {candidate.name}."
    return "No other checkpoint of this run is intact."
