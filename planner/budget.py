"""Where all GPUs' time goes: an iteration's seconds as a sum of causes, and what makes one plan slower.

A cause's share is its GPU-seconds over the number of GPUs of the cluster, so that the causes of a plan
add up to its seconds per iteration exactly, idle GPUs included, however calls overlap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.assess import KINDS, Assessment, kind_of
from realloc.augmented import NodeKind

IDLE = "GPUs idle"
TRANSFERS = "data transfers"
_MOVES: Mapping[NodeKind, str] = {
    NodeKind.REALLOCATE: "reallocation of",
    NodeKind.LOAD: "copies to and from the host of",
    NodeKind.OFFLOAD: "copies to and from the host of",
}
NOT_WORTH_TELLING = 0.08
"""Causes below this share of a difference are left out of its reasons."""


@dataclass(frozen=True)
class Cause:
    """One cause, such as `tp communication in actor_gen`. `kind` as in KINDS, `moves` or `idle`."""

    name: str
    kind: str


def budget(assessment: Assessment) -> Mapping[Cause, float]:
    """Cause -> seconds of an iteration, averaged over all GPUs; they sum to `iteration_s`."""
    plan = assessment.plan
    gpus = plan.cluster.num_gpus
    found: dict[Cause, float] = {}
    for node in plan.augmented.nodes:
        if not assessment.occupies(node.name):
            continue
        share = len(node.ranks) / gpus
        if node.kind is NodeKind.CALL:
            for term, seconds in assessment.call_terms(node.name).items():
                cause = Cause(f"{term.replace('_', ' ')} in {node.name}", kind_of(term))
                found[cause] = found.get(cause, 0.0) + seconds * share
            continue
        name = TRANSFERS if node.kind is NodeKind.TRANSFER else f"{_MOVES[node.kind]} {node.role}"
        cause = Cause(name, "moves")
        found[cause] = found.get(cause, 0.0) + assessment.node_s[node.name] * share
    found[Cause(IDLE, "idle")] = assessment.iteration_s - sum(found.values())
    return found


def kinds_of(causes: Mapping[Cause, float]) -> Mapping[str, float]:
    """Seconds by kind: those of KINDS, `moves` and `idle`."""
    totals = dict.fromkeys((*KINDS, "moves", "idle"), 0.0)
    for cause, seconds in causes.items():
        totals[cause.kind] += seconds
    return totals


def reasons(best: Assessment, other: Assessment, most: int = 4) -> tuple[str, ...]:
    """What grew from `best` to `other`, most first; what all GPUs spend on it in seconds.

    Plans of the same experiment on clusters of any size; causes that shrank are left out.
    """
    before, after = budget(best), budget(other)
    growth = {cause: seconds - before.get(cause, 0.0) for cause, seconds in after.items()}
    worth = NOT_WORTH_TELLING * sum(grown for grown in growth.values() if grown > 0)
    found = []
    for cause, grown in sorted(growth.items(), key=lambda item: -item[1])[:most]:
        if grown <= max(worth, 1e-9):
            break
        if cause.kind == "idle":
            digits = 0 if abs(other.idle_share - best.idle_share) >= 0.01 else 1
            share = f"{other.idle_share:.{digits}%} of the time instead of {best.idle_share:.{digits}%}"
            found.append(f"GPUs idle {share}: {grown:+.3g} s")
        else:
            found.append(f"{cause.name} {grown:+.3g} s")
    return tuple(found)
