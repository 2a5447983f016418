"""`realloc doctor`: looks at this machine, or at every node, before a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from realloc.cli.nodes import add_nodes, check_nodes
from realloc.cli.values import Commands, add_trust, positive, seconds
from realloc.errors import InputError

if TYPE_CHECKING:
    from realloc.plan import ExecutionPlan
    from runtime.doctor_report import DoctorRequest, Finding

MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "failure": ("FAILURE", "bold red")}


def add(commands: Commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check machine, links, disk and files before a run",
        description="Checks versions, GPUs and memory against the plan, the links against its profile, the "
        "output folder, and that models are whole and the same on every node. Exit code 2 when something "
        "fails. On several nodes, start the same command on each, with its --node-rank.",
        allow_abbrev=False,
    )
    doctor.add_argument("plan", metavar="PLAN", type=Path, nargs="?", help="the plan that is to be run")
    doctor.add_argument(
        "--out", metavar="DIR", type=Path, help="where the run would write (default: as realloc run)"
    )
    doctor.add_argument(
        "--keep", type=positive, default=2, metavar="K", help="checkpoints that will be kept (default: 2)"
    )
    doctor.add_argument(
        "--thorough", action="store_true", help="compare every byte of the models, not headers and sizes"
    )
    doctor.add_argument("--no-links", action="store_true", help="start no ranks: a few seconds instead")
    doctor.add_argument(
        "--ranks", type=positive, metavar="N", help="without a plan: ranks that try the links"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    add_nodes(doctor).add_argument(
        "--timeout",
        type=seconds,
        default=30.0,
        metavar="S",
        help="how long to wait for others (default: 30 s)",
    )
    add_trust(doctor)
    doctor.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    request = _request(arguments)
    from runtime.doctor import examine

    findings = examine(request)
    if arguments.json:
        print(json.dumps({"ok": not _failures(findings), "findings": [asdict(f) for f in findings]}))
    else:
        _print(findings, request.nodes)
    return 2 if _failures(findings) else 0


def _failures(findings: Sequence[Finding]) -> int:
    return sum(finding.status == "failure" for finding in findings)


def _request(arguments: argparse.Namespace) -> DoctorRequest:
    """Raises InputError for options that contradict each other or the plan."""
    from realloc.plan import read_plan

    plan = None if arguments.plan is None else read_plan(arguments.plan, trust=arguments.trust)
    check_nodes(arguments)
    if plan is not None and arguments.ranks is not None:
        raise InputError("--ranks: the plan says how many ranks a node has; leave it out.")
    if plan is not None and plan.cluster.num_nodes != arguments.nnodes:
        raise InputError(
            f"{arguments.plan}: is for {plan.cluster.num_nodes} nodes, --nnodes is {arguments.nnodes}; start "
            f"realloc doctor on {plan.cluster.num_nodes} nodes with --nnodes {plan.cluster.num_nodes}."
        )
    from runtime.doctor_report import DoctorRequest

    ranks = _ranks(arguments, plan)
    out = arguments.out or Path("out") / (arguments.plan.stem if arguments.plan is not None else "")
    request = DoctorRequest(
        plan=plan,
        out=out,
        keep=arguments.keep,
        nodes=arguments.nnodes,
        node=arguments.node_rank,
        endpoint=arguments.rdzv_endpoint or ("127.0.0.1", 0),
        ranks=0 if arguments.no_links else ranks,
        thorough=arguments.thorough,
        trust=arguments.trust,
        timeout_s=arguments.timeout,
    )
    return request if plan is None else _with_profile(request, plan)


def _ranks(arguments: argparse.Namespace, plan: ExecutionPlan | None) -> int:
    if plan is not None:
        return plan.cluster.gpus_per_node
    from runtime.doctor_links import usual_ranks

    return arguments.ranks or usual_ranks()


def _with_profile(request: DoctorRequest, plan: ExecutionPlan) -> DoctorRequest:
    """With what the plan's profile promises, where there still is one."""
    from dataclasses import replace

    from cost_models.profile import load_profile
    from runtime.doctor_report import LinkExpectation

    try:
        profile = load_profile(plan.cluster.device)
    except InputError:
        return request
    links = {"intra_node": profile.intra_node, "inter_node": profile.inter_node}
    promised = {kind: LinkExpectation(link.latency_s, link.bytes_per_s) for kind, link in links.items()}
    if profile.provenance.source != "measured":
        return replace(request, links=promised)
    versions: Mapping[str, str] = dict(profile.provenance.versions)
    return replace(request, links=promised, device=profile.provenance.device, versions=versions)


def _print(findings: Sequence[Finding], nodes: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (*(("node",) if nodes > 1 else ()), "check", "", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        word, style = MARKS[finding.status]
        cells: tuple[str | Text, ...] = (finding.check, Text(word, style), Text(finding.found))
        table.add_row(*((str(finding.node),) if nodes > 1 else ()), *cells)
    console = Console(highlight=False, soft_wrap=False)
    console.print(table)
    for finding in findings:
        if finding.status != "ok":
            where = f" (node {finding.node})" if nodes > 1 else ""
            console.print(Text(f"{finding.check}{where}: {finding.advice}."), soft_wrap=True)
    failures = _failures(findings)
    print(
        f"{failures} failure{'s' if failures > 1 else ''}"
        if failures
        else "nothing stands in the way of a run"
    )
