"""Examines a node, or all of them, before a run.

Every node examines itself (`doctor_host`, `doctor_files`); node 0 collects the reports, compares what
must be the same everywhere (`doctor_report`), and adds the links (`doctor_links`). Decides who waits for
whom and for how long; prints nothing.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from realloc.errors import InputError
from runtime.doctor_files import file_findings
from runtime.doctor_host import existing_parent, host_findings
from runtime.doctor_links import link_findings
from runtime.doctor_report import FAILURE, OK, DoctorRequest, Finding, NodeReport, gathered
from runtime.stores import connect, listen


def examine(request: DoctorRequest) -> list[Finding]:
    """Every finding, on node 0; those of its own node on the others.

    Raises InputError for an endpoint that is bad, or gone before all is done.
    """
    store = _store(request)
    token = None
    try:
        shared, token = _shared_folder(request, store)
        host, marks = host_findings(request)
        files, file_marks = file_findings(request)
        report = NodeReport(
            request.node, socket.gethostname(), (*host, *files, *shared), {**marks, **file_marks}
        )
        findings = [*report.findings]
        if request.nodes > 1:
            reports = _exchange(request, store, report)
            findings = gathered(reports, request.nodes) if request.node == 0 else findings
        if store is not None and request.ranks:
            here = replace(request, endpoint=(request.endpoint[0], store.port))
            findings += link_findings(here, store)
        if request.nodes > 1:
            _leave(request, store)
    except dist.DistError:
        where = ":".join(map(str, request.endpoint))
        raise InputError(
            f"{where}: node 0 does not answer any more: it has ended, or the network between is cut."
        ) from None
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    return findings


def _store(request: DoctorRequest) -> dist.TCPStore | None:
    """The store that nodes and ranks meet at; None where nobody has to."""
    if request.nodes == 1 and not request.ranks:
        return None
    wait = timedelta(seconds=request.timeout_s)
    return (connect if request.node else listen)(*request.endpoint, wait)


def _exchange(request: DoctorRequest, store: dist.Store | None, report: NodeReport) -> list[NodeReport]:
    """Hands this node's report in; on node 0 all that come in time, on the others their own."""
    assert store is not None
    store.set(f"doctor/report/{request.node}", json.dumps(asdict(report)))
    if request.node:
        return [report]
    reports = [report]
    deadline = time.monotonic() + request.timeout_s
    for node in range(1, request.nodes):
        key = f"doctor/report/{node}"
        while not store.check([key]) and time.monotonic() < deadline:
            time.sleep(0.05)
        if store.check([key]):
            reports.append(_report(json.loads(store.get(key).decode())))
    return reports


def _report(content: Mapping[str, object]) -> NodeReport:
    findings = content["findings"]
    marks = content["marks"]
    assert isinstance(findings, list)
    assert isinstance(marks, dict)
    return NodeReport(
        int(str(content["node"])),
        str(content["host"]),
        tuple(Finding(**finding) for finding in findings),
        {str(name): str(mark) for name, mark in marks.items()},
    )


def _leave(request: DoctorRequest, store: dist.Store | None) -> None:
    """Node 0 goes last: it holds the store."""
    assert store is not None
    store.set(f"doctor/left/{request.node}", "1")
    if request.node == 0:
        keys = [f"doctor/left/{node}" for node in range(request.nodes)]
        deadline = time.monotonic() + 5.0
        while not store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.05)


def _shared_folder(
    request: DoctorRequest, store: dist.Store | None
) -> tuple[tuple[Finding, ...], Path | None]:
    """Whether the other nodes see node 0's output folder; and the file by which they tell."""
    if request.nodes == 1 or store is None:
        return (), None
    folder = existing_parent(request.out)
    if request.node == 0:
        token = folder / f".realloc-doctor-{secrets.token_hex(8)}"
        try:
            token.touch()
        except OSError:
            store.set("doctor/token", "-")
            return (), None  # that it is not writable is a finding of its own
        store.set("doctor/token", str(token.absolute()))
        return (), token
    try:
        name = store.get("doctor/token").decode()
    except RuntimeError:
        return (), None
    deadline = time.monotonic() + 3.0  # a network file system may show it late
    while name != "-" and time.monotonic() < deadline:
        if (folder / Path(name).name).exists():
            return (Finding("shared folder", OK, f"{folder} is node 0's", node=request.node),), None
        time.sleep(0.1)
    found = f"{folder} is not the folder that node 0 sees as {Path(name).parent}"
    advice = "give every node the same --out, on a file system that all of them mount"
    return (Finding("shared folder", FAILURE, found, advice, request.node),), None
