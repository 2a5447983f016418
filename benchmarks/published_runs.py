"""Whole runs of ReaL and of systems that are not modelled, beside the plans that their rules make.

The plan is priced with ReaL's parameters. For ReaL that is a prediction; for DeepSpeed-Chat and OpenRLHF it
says what their placement costs on one and the same runtime, which is no prediction of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.published_fit import Parameter, Target, Values
from benchmarks.published_real import Real, iteration_s
from benchmarks.published_rows import PREDICT, Row, Unsupported, number
from planner.baselines import BASELINES

OTHERS = {"deepspeed_chat": "deepspeed-chat", "openrlhf": "openrlhf", "verl": "verl", "megatron": "megatron"}
NOT_MODELLED = (
    "another runtime: the rule's placement is priced with ReaL's kernels and messages, not the system's own "
    "(gathering parameters layer by layer to generate, vLLM, weights copied through the host, idle roles)"
)


class Runs:
    """Seconds per iteration of runs whose hours, or seconds, were published."""

    parameters: Sequence[Parameter] = ()

    def __init__(self, section: str, content: Mapping[str, Any], real: Real) -> None:
        self._real = real
        text = f"{content.get('source', '')} {content.get('note', '')}"
        sizes = re.search(r"(\d+)_gpus_4x(\w+?)$", section) or re.search(r"_(\d+)gpus$", section)
        pair = re.search(r"_([\d.]+b)_([\d.]+b)_\d+gpus$", section)
        batch = re.search(r"bs (\d+)", text)
        lengths = re.search(r"(\d+) \+ (\d+)", text)
        if sizes is None or batch is None or lengths is None:
            raise Unsupported(f"{section}: its name or note does not give GPUs, batch and lengths")
        actor, critic = (pair[1], pair[2]) if pair else (sizes[2], sizes[2])
        fields = {
            "actor": actor,
            "critic": critic,
            "gpus": int(sizes[1]),
            "batch": int(batch[1]),
            "prompt": int(lengths[1]),
            "gen": int(lengths[2]),
        }
        self.rows = [
            Row(
                section,
                {"system": system, **fields},
                PREDICT,
                seconds,
                explained=system == "real",
                note="" if system == "real" else NOT_MODELLED,
            )
            for system, seconds in _seconds(section, content, text)
        ]

    def targets(self, row: Row, index: int) -> list[Target]:
        return []

    def predict(self, row: Row, values: Values) -> float:
        system = str(row.fields["system"])
        costs = self._real.costs(row, values)
        if system == "real":
            return self._real.searched(costs).iteration_s
        if system not in OTHERS:
            raise Unsupported(f"no rule is known for the system '{system}'")
        placements = BASELINES[OTHERS[system]].place(costs.experiment, costs.cluster, costs)
        return iteration_s(costs, placements)

    def more(self, row: Row, values: Values) -> Mapping[str, Any]:
        return {}


def _seconds(section: str, content: Mapping[str, Any], text: str) -> list[tuple[str, float]]:
    """(system, seconds per iteration)."""
    if isinstance(hours := content.get("hours"), dict):
        steps = re.search(r"(\d+) iterations x (\d+) steps", text)
        if steps is None:
            raise Unsupported(f"{section}: hours of an unknown number of steps")
        count = int(steps[1]) * int(steps[2])
        return [(name, value * 3600 / count) for name, given in hours.items() if (value := number(given))]
    seconds = content.get("seconds")
    if isinstance(seconds, dict) and (total := number(seconds.get("total"))):
        return [(section.partition("_")[0], total)]
    raise Unsupported(f"{section}: neither hours nor total seconds")
