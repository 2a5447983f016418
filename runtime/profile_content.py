"""From what was measured to the mapping that a `profile/1` file holds, and what is said about it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

# What no micro-benchmark shows: Python around one call, and a reward function on one sequence.
_CALL_S = {"cpu": 5e-4, "cuda": 5e-3}
_SEQUENCE_S = 3e-5
# A node's network cannot be seen from one node: 200 Gb/s at the share of line rate that nccl-tests
# issue 160 reports (20 GB/s).
_GPU_INTER_NODE: Mapping[str, Any] = {
    "latency_s": 2e-5,
    "bytes_per_s": 2e10,
    "estimate": "a 200 Gb/s NIC for each GPU",
}
_NO_LINK: Mapping[str, Any] = {"latency_s": 1e-4, "bytes_per_s": 1e9, "estimate": "a placeholder"}

Links = Mapping[str, Mapping[str, Any]]
"""`intra_node` and `inter_node` as a profile holds them."""


def profile_content(
    measured: Mapping[str, Any],
    name: str,
    tables: Mapping[str, Any] | None = None,
    known: Links | None = None,
) -> Mapping[str, Any]:
    """The `profile/1` mapping for what rank 0 measured and for the tables of the models.

    `known`: links of such a device from elsewhere, for those that this measurement has not seen.
    """
    is_cpu = measured["device_type"] == "cpu"
    intra = measured.get("link", (known or {}).get("intra_node", _NO_LINK))
    inter, notes = _inter_node(measured, intra, known, is_cpu=is_cpu)
    notes += measured.get("notes", [])
    best = {dtype: max(y for _, y in points) for dtype, points in measured["matmul"].items()}
    attention = measured["attention"]
    content: dict[str, Any] = {
        "name": name,
        "provenance": {
            "source": "measured",
            "device": measured["device"],
            "date": datetime.now(UTC).date().isoformat(),
            "samples": measured["samples"],
            "versions": measured["versions"],
            "notes": notes,
        },
        "memory_bytes": measured["memory_bytes"],
        "matmul": measured["matmul"],
        "memory": measured["memory"],
        "launch_s": measured["launch_s"],
        "attention": {
            "efficiency": attention["flops_per_s"] / best[attention["dtype"]],
            "launch_s": attention["launch_s"],
            "per_sequence": is_cpu,
        },
        "optimizer_bytes_per_s": measured["optimizer_bytes_per_s"],
        "host_bytes_per_s": measured["host_bytes_per_s"],
        "overlaps_host_copies": not is_cpu,
        "call_s": _CALL_S[measured["device_type"]],
        "sequence_s": _SEQUENCE_S,
        "intra_node": intra,
        "inter_node": inter,
    }
    if reserved := measured.get("reserved_bytes"):
        content["reserved_bytes"] = reserved
        notes.append("reserved_bytes: what driver and libraries had, and 3% for fragments, an estimate")
    if is_cpu and "concurrency" in measured:
        content["concurrency"] = measured["concurrency"]
    if tables is not None:
        content["tables"] = tables["tables"]
        if tables["concurrency"]:
            content["concurrency"] = tables["concurrency"]
    content |= {key: measured[key] for key in ("copies", "transfer") if key in measured}
    if pace := _pace(measured.get("pace"), (tables or {}).get("pace")):
        content["pace"] = pace
    return _rounded(content)  # type: ignore[no-any-return]


def _pace(device: Mapping[str, Any] | None, tables: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """That of the tables, from which most is predicted; what others do to it from where it was measured."""
    if not tables or (tables["ranks"] > 1) or not device:
        return tables or device
    together_s = tables["alone_s"] * device["together_s"] / device["alone_s"]
    return {**tables, "together_s": together_s, "ranks": device["ranks"]}


def _inter_node(
    measured: Mapping[str, Any], intra: Mapping[str, Any], known: Links | None, *, is_cpu: bool
) -> tuple[Mapping[str, Any], list[str]]:
    """The link between nodes, and what has to be said about the links."""
    ranks, nodes = measured["ranks"], measured["nodes"]
    where = "one node" if nodes == 1 else f"{nodes} nodes"
    notes = [f"call_s and sequence_s are estimates; measured with {ranks} ranks on {where}"]
    if "link" not in measured:
        source = "the numbers are placeholders" if known is None else f"taken from {intra['estimate']}"
        notes.append(f"links: one rank on a node has none; {source}")
    if "inter_link" in measured:
        return measured["inter_link"], notes
    if is_cpu:
        notes.append("inter_node: taken as intra_node, both are this machine's loopback")
        return {"estimate": "taken as within one node", **intra}, notes
    inter = _GPU_INTER_NODE if known is None else known["inter_node"]
    notes.append(f"inter_node: an estimate ({inter['estimate']}); one node cannot measure it")
    return inter, notes


def _rounded(value: Any) -> Any:
    """Four significant digits: what a measurement is worth."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
