"""Predictions of a given plan, searched or written by hand: what a search would have written into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cost_models.model import CostModel
from planner.assess import Assessment
from planner.contention import call_terms
from realloc.plan import ExecutionPlan, Predictions


def assess(plan: ExecutionPlan, device: str | None = None) -> Assessment:
    """The plan in the order in which a run executes it, priced for its device (or `device`).

    Raises InputError for an unknown device.
    """
    if device is not None:
        plan = replace(plan, cluster=replace(plan.cluster, device=device))
    return Assessment(replace(plan, order=plan.node_order))


def predict(plan: ExecutionPlan, device: str | None = None) -> ExecutionPlan:
    """The plan with new predictions. Raises InputError for an unknown device."""
    assessment = assess(plan, device)
    return replace(plan, cluster=assessment.plan.cluster, predictions=predictions_of(plan, assessment))


def predictions_of(plan: ExecutionPlan, assessment: Assessment) -> Predictions:
    """An assessment of the plan as what a plan's file keeps of it."""
    return Predictions(
        iteration_s=assessment.iteration_s,
        tokens_per_s=assessment.tokens_per_s,
        node_s=assessment.node_s,
        peak_bytes={cause: size for cause, size in assessment.memory.by_cause.items() if size},
        costs=assessment.costs.provenance,
        terms=terms_of(assessment),
        sources=call_sources(assessment.plan, assessment.costs),
        pace=assessment.costs.profile.pace,
    )


def terms_of(assessment: Assessment) -> Mapping[str, Mapping[str, float]]:
    """Call -> term -> seconds; terms that are nothing are left out."""
    plan, costs = assessment.plan, assessment.costs
    return {
        call.name: {
            term: seconds
            for term, seconds in call_terms(plan, costs, call.name, assessment.node_s[call.name]).items()
            if seconds > 0
        }
        for call in plan.graph.calls
    }


def call_sources(plan: ExecutionPlan, costs: CostModel) -> Mapping[str, str]:
    """Call, and kind of node between calls -> what stands behind their seconds."""
    calls = {call.name: costs.call_sources(call, plan.placements[call.name]) for call in plan.graph.calls}
    return {**calls, **costs.move_sources(plan.augmented.nodes)}


def beyond_measured(sources: Mapping[str, str]) -> str:
    """What has seconds that do not all lie within what was measured, for people; empty if all do."""
    lines: dict[str, list[str]] = {}
    for name, text in sources.items():
        parts = [part for part in text.split("; ") if not part.startswith("measured: ")]
        if parts:
            lines.setdefault("; ".join(parts), []).append(name)
    return "\n".join(f"  {', '.join(names)}: {text}" for text, names in lines.items())
