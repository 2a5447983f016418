"""Calibration: factors on predicted seconds that a run has shown to be due, and where they came from.

A factor belongs to a quantity: a term of a kind of call (`generate.compute`,
`train_step.dp_communication`), or what lies between calls: `transfer`, `reallocate`, `host_copy`.
Terms are those that a run can tell apart (`realloc.comparison`). A factor is the seconds measured over
the seconds predicted, both summed over the run's nodes that have the quantity, where a node's measured
seconds are its median over the steady iterations: one slow iteration moves nothing, and long nodes
weigh more than short ones. Measured seconds are those at the pace of the profiled machine
(`realloc.pace`), where the run tells its own: how fast a machine was one day is no property of the
device, and the profile's `pace`, to which later runs are compared, stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from realloc.augmented import NodeKind
from realloc.comparison import COMPUTE, WAITING, measured_terms, timed_as, timed_terms
from realloc.dataflow import CallKind
from realloc.errors import InputError
from realloc.files import Reader, nearest
from realloc.plan import ExecutionPlan
from realloc.trace import Trace

_NODES = {
    NodeKind.TRANSFER: "transfer",
    NodeKind.REALLOCATE: "reallocate",
    NodeKind.LOAD: "host_copy",
    NodeKind.OFFLOAD: "host_copy",
}
LEAST_SHARE = 1e-3
"""Quantities below this share of an iteration keep their factor: their noise is larger."""
MOST = 50.0
"""A factor beyond this, or below its inverse, is no correction: something else is wrong."""


@dataclass(frozen=True)
class Calibration:
    """`base`: the profile that was corrected. `samples`: steady iterations of `run`.

    `pace`: how many times slower the machine was during `run` than when it was profiled, which the
    factors are without; None where that is not known and they have it in them.
    """

    base: str
    run: str
    date: str
    samples: int
    factors: tuple[tuple[str, float], ...]
    pace: float | None = None

    @cached_property
    def _by_quantity(self) -> Mapping[str, float]:
        return dict(self.factors)

    def of_node(self, kind: NodeKind) -> float:
        return self._by_quantity.get(_NODES[kind], 1.0)

    def terms(self, kind: CallKind, terms: Mapping[str, float]) -> Mapping[str, float]:
        """The terms of a call, corrected."""
        return {name: s * self._by_quantity.get(f"{kind}.{timed_as(name)}", 1.0) for name, s in terms.items()}


def factors_of(
    plan: ExecutionPlan, trace: Trace, known: Calibration | None, pace: float = 1.0
) -> Mapping[str, float]:
    """Quantity -> factor, from a run of the plan, which must have predictions made with `known`.

    `pace`: how many times slower the machine was than when it was profiled. What `known` says of
    quantities that the run does not have stays. Raises InputError for a factor beyond belief.
    """
    factors = dict(known.factors) if known is not None else {}
    least = LEAST_SHARE * trace.iteration_seconds() / pace
    for quantity, (predicted, took) in _sums(plan, trace).items():
        measured = took / pace
        if not predicted or not measured or max(predicted, measured) < least:
            continue
        ratio = measured / predicted
        if not 1 / MOST <= ratio <= MOST:
            raise InputError(
                f"calibrate: {quantity} took {measured:.4g} s, predicted were {predicted:.4g} s: {ratio:.3g} "
                f"times is no correction; was the machine busy, or is the profile another machine's?"
            )
        factors[quantity] = factors.get(quantity, 1.0) * ratio
    return factors


def _sums(plan: ExecutionPlan, trace: Trace) -> Mapping[str, tuple[float, float]]:
    """Quantity -> seconds predicted and measured."""
    assert plan.predictions is not None
    by_term, by_node = measured_terms(trace), trace.node_seconds()
    sums: dict[str, tuple[float, float]] = {}

    def add(quantity: str, predicted: float, measured: float) -> None:
        before = sums.get(quantity, (0.0, 0.0))
        sums[quantity] = before[0] + predicted, before[1] + measured

    for node in plan.augmented.nodes:
        if node.call is None:
            add(_NODES[node.kind], plan.predictions.node_s[node.name], by_node[node.name])
            continue
        kind = plan.graph.by_name[node.call].kind
        predicted = timed_terms(plan.predictions.terms[node.name])
        measured = dict(by_term.get(node.name, {COMPUTE: by_node[node.name]}))
        measured[COMPUTE] += measured.pop(WAITING, 0.0)  # of uneven work, which is compute somewhere
        if node.name not in by_term:  # a run on GPUs tells no terms apart: all of them share the factor
            whole = sum(predicted.values())
            measured = {term: by_node[node.name] * s / whole for term, s in predicted.items() if whole}
        for term in predicted:
            add(f"{kind}.{term}", predicted[term], measured.get(term, 0.0))
    return sums


def read_calibration(reader: Reader | None) -> Calibration | None:
    """The calibration of a profile file, where it has one. Raises InputError."""
    if reader is None:
        return None
    factors = reader.child("factors")
    for quantity in factors.keys():
        kind, _, term = quantity.partition(".")
        known: list[str] = [*CallKind] if term else [*_NODES.values()]
        if kind not in known:
            raise InputError(f"{factors.at(quantity)}: no such quantity.{nearest(kind, known)}")
    found = Calibration(
        base=reader.get("base", str),
        run=reader.get("run", str),
        date=str(reader.raw("date")),
        samples=reader.integer("samples", minimum=1),
        pace=reader.number("pace", minimum=1e-3, maximum=1e3) if reader.has("pace") else None,
        factors=tuple((q, factors.number(q, minimum=1e-6, maximum=1e6)) for q in factors.keys()),
    )
    factors.done()
    reader.done()
    return found


def calibration_content(calibration: Calibration) -> Mapping[str, object]:
    """The calibration as the mapping that a profile file holds."""
    pace = {} if calibration.pace is None else {"pace": float(f"{calibration.pace:.4g}")}
    return {
        "base": calibration.base,
        "run": calibration.run,
        "date": calibration.date,
        "samples": calibration.samples,
        **pace,
        "factors": {quantity: float(f"{factor:.4g}") for quantity, factor in calibration.factors},
    }
