"""Findings: what was looked at on a node before a run, how it is, and what to do about it.

Knows what the nodes' reports must agree on; does not know how anything is found out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from realloc.errors import ReallocError
from realloc.plan import ExecutionPlan

OK, WARNING, FAILURE = "ok", "warning", "failure"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at on one node. `advice` says what to do where it is not right."""

    check: str
    status: str
    found: str
    advice: str = ""
    node: int = 0


@dataclass(frozen=True)
class NodeReport:
    """What a node says of itself. `marks`: what must be the same on every node, by name."""

    node: int
    host: str
    findings: tuple[Finding, ...]
    marks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LinkExpectation:
    """What the profile says of one kind of link: one message's latency and one device's bytes/s."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class DoctorRequest:
    """`nodes`, `node`: how many take part, and which this is. `endpoint`: where node 0 listens.

    `ranks`: processes of one node that try the links (0: none do). `links`: kind (`intra_node`,
    `inter_node`) -> what the profile promises. `device`: whose costs the plan was made with, where they
    were measured. `thorough`: whole model files are compared, not their headers. `trust`: the plan's own
    code may be imported. `timeout_s`: how long others are waited for.
    """

    plan: ExecutionPlan | None
    out: Path
    keep: int = 2
    nodes: int = 1
    node: int = 0
    endpoint: tuple[str, int] = ("127.0.0.1", 0)
    ranks: int = 0
    links: Mapping[str, LinkExpectation] = field(default_factory=dict)
    device: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    thorough: bool = False
    trust: bool = False
    timeout_s: float = 30.0


def guarded(check: str, node: int, error: ReallocError, advice: str = "") -> Finding:
    """A finding of what the runtime itself would refuse; its message says what to change."""
    return Finding(check, FAILURE, str(error), advice or "as the message says", node)


def gathered(reports: Sequence[NodeReport], nodes: int) -> list[Finding]:
    """All findings, and one for each mark that differs and each node that has said nothing."""
    findings = [finding for report in reports for finding in report.findings]
    present = {report.node: report for report in reports}
    for node in range(nodes):
        if node not in present:
            findings.append(
                Finding(
                    "reachability",
                    FAILURE,
                    f"node {node} has not reported",
                    "start the same command there with its --node-rank; check that it reaches the endpoint",
                    node,
                )
            )
    if 0 not in present:
        return findings
    for name, mark in present[0].marks.items():
        others = [report.node for report in reports if report.marks.get(name) != mark]
        if others:
            differing = "; ".join(f"node {n}: {present[n].marks.get(name, 'nothing')}" for n in others[:4])
            findings.append(
                Finding(
                    "same everywhere",
                    FAILURE,
                    f"{name} differs: node 0: {mark}; {differing}",
                    "install the same versions, and copy the same files, on every node",
                    others[0],
                )
            )
        elif len(reports) > 1:
            findings.append(Finding("same everywhere", OK, f"{name}: {mark}"))
    return findings
