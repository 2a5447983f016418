"""Hardware profiles: what one device type and its links cost, and where each number came from.

A profile is a `profile/1` file: a built-in one of this package, or one that `realloc profile`
measured. This module reads, checks and interpolates; it knows no models and no plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from cost_models.calibration import Calibration, calibration_content, read_calibration
from cost_models.curve import Curve, curve_content, read_curve
from cost_models.fabrics import fabric
from cost_models.link import Link, link_content, read_link
from cost_models.tables import Table, read_tables, tables_content
from realloc.errors import InputError
from realloc.files import Reader, dump_yaml, nearest, read_file, write_text
from realloc.model_shape import DTYPE_BYTES
from realloc.pace import Pace, pace_content, read_pace

_CROWDED = 1.02
"""Ranks that slow each other down by less do so evenly, whatever was measured between one and all."""


@dataclass(frozen=True)
class Provenance:
    """Where the numbers of a profile came from.

    `source` is `measured` or `analytic`; `samples` is how many repetitions stand behind each
    measured number (0 when analytic); `notes` name the sources of analytic numbers.
    """

    source: str
    device: str
    date: str
    samples: int = 0
    versions: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attention:
    """Fused attention: `efficiency` is its flops/s over the best matmul flops/s of the dtype.

    `launch_s` is the overhead of one kernel. With `per_sequence`, packed sequences take one kernel
    each (CPU); otherwise one kernel serves them all.
    """

    efficiency: float
    launch_s: float
    per_sequence: bool


@dataclass(frozen=True)
class Transfer:
    """What a transfer of data takes beside its messages: in any case, for every sequence of the batch (who
    gets it is worked out), for every key of every sequence that moves (put together, taken apart).
    `lane_s`: what a decode step takes on a pipeline stage beside its model, its message included.
    """

    node_s: float = 0.0
    sequence_s: float = 0.0
    value_s: float = 0.0
    lane_s: float = 0.0


@dataclass(frozen=True)
class Copies:
    """Bytes/s that a copy reads and writes, over the bytes that it touches: of one rank of a host, and of
    every rank while all are copying.
    """

    alone: Curve
    together: Curve


@dataclass(frozen=True)
class HardwareProfile:
    """Costs of one device and of its links.

    `reserved_bytes`: of its memory, what tensors cannot have (the driver's, NCCL's, fragments).
    `matmul`: dtype -> curve of achieved flops/s over the flops of one product, launch excluded.
    `memory`: bytes/s over the bytes that a loop touches again and again: one point for a GPU, more
    where caches matter. `launch_s`: overhead of one operator or kernel. `optimizer_bytes_per_s`:
    what a fused optimizer step reaches. `call_s`: fixed overhead of one call. `sequence_s`: a
    Python reward function on one sequence. `concurrency`: slowdown over the number of ranks of
    one node that compute at once (hosts with fewer cores than ranks); 1 when absent.
    `overlaps_host_copies`: the device computes while it copies from host memory. `tables`: what the
    runtime's own code took, of the models that were measured. `calibration`: factors on all that follows
    from the rest, found by `realloc calibrate`. `pace`: how fast the machine was meanwhile (hosts).
    `transfer`: nothing where it was not measured. `copies`: of ranks of one host.
    """

    name: str
    provenance: Provenance
    memory_bytes: int
    matmul: tuple[tuple[str, Curve], ...]
    memory: Curve
    launch_s: float
    attention: Attention
    optimizer_bytes_per_s: float
    host_bytes_per_s: float
    call_s: float
    sequence_s: float
    intra_node: Link
    inter_node: Link
    concurrency: Curve | None = None
    overlaps_host_copies: bool = False
    tables: tuple[Table, ...] = ()
    calibration: Calibration | None = None
    pace: Pace | None = None
    transfer: Transfer = Transfer()
    reserved_bytes: int = 0
    copies: Copies | None = None

    def tables_of(self, dtype: str) -> Mapping[tuple[str, str, float], Table]:
        """The tables of a dtype by what they are of, their quantity, and how ragged lengths were."""
        return self._tables.get(dtype, {})

    @cached_property
    def _tables(self) -> Mapping[str, Mapping[tuple[str, str, float], Table]]:
        found: dict[str, dict[tuple[str, str, float], Table]] = {}
        for table in self.tables:
            found.setdefault(table.dtype, {})[table.of, table.quantity, table.ragged] = table
        return found

    def matmul_curve(self, dtype: str) -> Curve:
        """Raises InputError when the profile has no products of that dtype."""
        for name, curve in self.matmul:
            if name == dtype:
                return curve
        known = ", ".join(name for name, _ in self.matmul)
        raise InputError(
            f"profile {self.name}: has no matmul throughput for {dtype} (it has: {known}); change the "
            f"experiment's dtype or measure it with `realloc profile`."
        )

    def slowdown(self, ranks: float) -> float:
        """How many times longer a rank computes when `ranks` ranks of its node compute at once."""
        if self.concurrency is None or ranks <= 1:
            return 1.0
        last_x, last_y = self.concurrency.points[-1]
        if ranks > last_x:  # the cores are shared out already: time grows with the ranks
            return max(1.0, last_y * ranks / last_x) if last_y > 1.05 else last_y
        return self.concurrency.at(ranks)

    def copy_s(self, moved: float, ranks: int) -> float:
        """Seconds to read and write so many bytes while `ranks` ranks of the node do."""
        if self.copies is None:
            return moved / self.memory.at(moved) * self.slowdown(ranks)
        alone_s = moved / self.copies.alone.at(moved)
        more_s = moved / self.copies.together.at(moved) - alone_s
        return (alone_s + self.crowding(ranks) * more_s) * self.beyond(ranks)

    def beyond(self, ranks: float) -> float:
        """How many times longer than the most ranks that were measured together."""
        most = ranks if self.concurrency is None else self.concurrency.points[-1][0]
        return self.slowdown(ranks) / self.slowdown(min(ranks, most))

    def crowding(self, ranks: float) -> float:
        """Where `ranks` at once lie between one (0) and as many as were measured together (1)."""
        if self.concurrency is None or ranks <= 1:
            return 0.0
        most, slowest = self.concurrency.points[-1]
        if slowest < _CROWDED:
            return min(1.0, (ranks - 1) / max(1.0, most - 1))
        return min(1.0, (self.slowdown(ranks) - 1) / (slowest - 1))

    def __str__(self) -> str:
        name = Path(self.name).name
        calibrated = ", calibrated" if self.calibration is not None else ""
        if self.provenance.source == "measured":
            return f"measured ({name}, {self.provenance.date}{calibrated})"
        return f"analytic ({name}{calibrated})"


def built_in_profiles() -> tuple[str, ...]:
    """Names of the profiles that come with the package."""
    folder = resources.files("cost_models").joinpath("profiles")
    return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml")))


def load_profile(device: str) -> HardwareProfile:
    """The profile of a cluster's `device`: a built-in name or the path of a profile file.

    `NAME@FABRIC` is a built-in one with another network between nodes (`cost_models/fabrics.yaml`).
    Raises InputError.
    """
    if device.endswith((".yaml", ".yml")) or "/" in device:
        return read_profile(device)
    name, mark, network = device.partition("@")
    if mark:
        link, profile = fabric(network, device), load_profile(name)
        return replace(profile, name=device, inter_node=link)
    known = built_in_profiles()
    if device not in known:
        raise InputError(
            f"device '{device}': no such hardware profile.{nearest(device, known)} "
            f"A path to a file that `realloc profile` wrote works too."
        )
    with resources.as_file(resources.files("cost_models").joinpath("profiles", f"{device}.yaml")) as path:
        return read_profile(path)


def read_profile(path: str | Path) -> HardwareProfile:
    """Reads and checks a `profile/1` file. Raises InputError naming the key."""
    reader = read_file(path, "profile")
    concurrency = reader.raw("concurrency", None)
    profile = HardwareProfile(
        name=reader.get("name", str),
        provenance=_read_provenance(reader.child("provenance")),
        memory_bytes=reader.integer("memory_bytes", minimum=1),
        matmul=_read_matmul(reader.child("matmul")),
        memory=read_curve(reader, "memory"),
        launch_s=reader.number("launch_s", minimum=0.0, maximum=1.0),
        attention=_read_attention(reader.child("attention")),
        optimizer_bytes_per_s=reader.number("optimizer_bytes_per_s", minimum=1.0),
        host_bytes_per_s=reader.number("host_bytes_per_s", minimum=1.0),
        call_s=reader.number("call_s", minimum=0.0, maximum=60.0),
        sequence_s=reader.number("sequence_s", minimum=0.0, maximum=60.0),
        intra_node=read_link(reader.child("intra_node")),
        inter_node=read_link(reader.child("inter_node")),
        concurrency=None if concurrency is None else read_curve(reader, "concurrency"),
        overlaps_host_copies=reader.get("overlaps_host_copies", bool, False),
        tables=read_tables(reader.raw("tables", []), reader.at("tables")),
        calibration=read_calibration(reader.optional_child("calibration")),
        pace=read_pace(reader.optional_child("pace")),
        transfer=_read_transfer(reader.optional_child("transfer")),
        reserved_bytes=reader.integer("reserved_bytes", 0, minimum=0),
        copies=_read_copies(reader.optional_child("copies")),
    )
    reader.done()
    if profile.reserved_bytes >= profile.memory_bytes:
        raise InputError(
            f"{path}: reserved_bytes is {profile.reserved_bytes}, which leaves nothing of the "
            f"{profile.memory_bytes} bytes of memory."
        )
    return profile


def write_profile(profile: HardwareProfile, path: str | Path) -> None:
    """Writes a profile so that `read_profile` gives an equal value."""
    write_text(path, dump_yaml("profile", profile_content(profile)))


def profile_content(profile: HardwareProfile) -> Mapping[str, Any]:
    """The profile as the mapping that a `profile/1` file holds."""
    p = profile.provenance
    content: dict[str, Any] = {
        "name": profile.name,
        "provenance": {
            "source": p.source,
            "device": p.device,
            "date": p.date,
            "samples": p.samples,
            "versions": dict(p.versions),
            "notes": list(p.notes),
        },
        "memory_bytes": profile.memory_bytes,
        "matmul": {dtype: curve_content(curve) for dtype, curve in profile.matmul},
        "memory": curve_content(profile.memory),
        "launch_s": profile.launch_s,
        "attention": dict(vars(profile.attention)),
        "optimizer_bytes_per_s": profile.optimizer_bytes_per_s,
        "host_bytes_per_s": profile.host_bytes_per_s,
        "overlaps_host_copies": profile.overlaps_host_copies,
        "call_s": profile.call_s,
        "sequence_s": profile.sequence_s,
        "intra_node": link_content(profile.intra_node),
        "inter_node": link_content(profile.inter_node),
    }
    if profile.reserved_bytes:
        content["reserved_bytes"] = profile.reserved_bytes
    if profile.concurrency is not None:
        content["concurrency"] = curve_content(profile.concurrency)
    if profile.tables:
        content["tables"] = tables_content(profile.tables)
    if profile.calibration is not None:
        content["calibration"] = calibration_content(profile.calibration)
    if profile.pace is not None:
        content["pace"] = pace_content(profile.pace)
    if profile.transfer != Transfer():
        content["transfer"] = dict(vars(profile.transfer))
    if profile.copies is not None:
        content["copies"] = {name: curve_content(curve) for name, curve in vars(profile.copies).items()}
    return content


def _read_transfer(reader: Reader | None) -> Transfer:
    if reader is None:
        return Transfer()
    keys = ("node_s", "sequence_s", "value_s")
    seconds = {key: reader.number(key, minimum=0.0, maximum=60.0) for key in keys}
    transfer = Transfer(**seconds, lane_s=reader.number("lane_s", 0.0, minimum=0.0, maximum=60.0))
    reader.done()
    return transfer


def _read_copies(reader: Reader | None) -> Copies | None:
    if reader is None:
        return None
    copies = Copies(read_curve(reader, "alone"), read_curve(reader, "together"))
    reader.done()
    return copies


def _read_provenance(reader: Reader) -> Provenance:
    versions = reader.get("versions", dict, {})
    notes = reader.get("notes", list, [])
    provenance = Provenance(
        source=reader.choice("source", ("measured", "analytic")),
        device=reader.get("device", str),
        date=str(reader.raw("date")),
        samples=reader.integer("samples", 0),
        versions=tuple((str(k), str(v)) for k, v in versions.items()),
        notes=tuple(str(note) for note in notes),
    )
    reader.done()
    return provenance


def _read_matmul(reader: Reader) -> tuple[tuple[str, Curve], ...]:
    for key in reader.keys():
        if key not in DTYPE_BYTES:
            raise InputError(f"{reader.at(key)}: not a dtype.{nearest(key, DTYPE_BYTES)}")
    if not reader.keys():
        raise InputError(f"{reader.where}: needs the throughput of at least one dtype.")
    return tuple((key, read_curve(reader, key)) for key in reader.keys())


def _read_attention(reader: Reader) -> Attention:
    attention = Attention(
        efficiency=reader.number("efficiency", minimum=1e-6, maximum=10.0),
        launch_s=reader.number("launch_s", minimum=0.0, maximum=1.0),
        per_sequence=reader.get("per_sequence", bool),
    )
    reader.done()
    return attention
