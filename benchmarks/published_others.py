"""Decoding rates, bus bandwidths, and measurements of systems whose runtime is not modelled."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.published_fit import Parameter, Target, Values
from benchmarks.published_rows import SOURCE, Row, Unsupported, experiment_of, number, rows_of, shape_of
from cost_models.link import traffic_share
from cost_models.model import CostModel
from cost_models.profile import load_profile
from realloc.augmented import Placement
from realloc.cluster import Cluster
from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Per
from realloc.mesh import DeviceMesh
from realloc.strategy import Strategy, forbidden


class Decode:
    """Output tokens/s of generating equal responses, prompts included in the seconds."""

    parameters: Sequence[Parameter] = (
        Parameter("launch_s", "seconds of one operator's launch in the serving engine", 3e-6, 0.7, 1.88e-6),
    )

    def __init__(self, section: str, content: Mapping[str, Any], device: str) -> None:
        self.rows, self._device = rows_of(section, content, "tokens_per_s"), device

    def targets(self, row: Row, index: int) -> list[Target]:
        assert row.measured is not None, "rows to fit on have a number"
        return [Target(index, row.measured, lambda values: self.predict(row, values))]

    def predict(self, row: Row, values: Values) -> float:
        shape, tp, batch = shape_of(row.fields.get("model")), row.count("tp", 1), row.count("batch", 1)
        gen, prompt = row.count("gen", 128), row.count("prompt", 128)
        strategy = Strategy(tp=tp)
        if why := forbidden(strategy, shape):
            raise Unsupported(why)
        call = Call("actor_gen", CallKind.GENERATE, ("prompts",), ("tokens",), "actor", "prompts")
        keys = (DataKey("prompts", Per.PROMPT_TOKEN, "int64"), DataKey("tokens", Per.TOKEN, "int64"))
        experiment = experiment_of({"actor": shape}, batch, prompt, gen)
        profile = load_profile(self._device)
        launch = values["launch_s"]
        profile = replace(
            profile, launch_s=launch, call_s=0.0, attention=replace(profile.attention, launch_s=launch)
        )
        graph = DataflowGraph((call,), keys, ("prompts",))
        costs = CostModel(experiment, graph, Cluster(1, max(8, tp), self._device), profile)
        placement = Placement(DeviceMesh(0, tp, max(8, tp)), strategy)
        return batch * gen / costs.call_s(call, placement)

    def more(self, row: Row, values: Values) -> Mapping[str, Any]:
        return {}


class Collectives:
    """Bus bandwidths that the built-in profiles were made from: a check that they say so."""

    parameters: Sequence[Parameter] = ()

    def __init__(self, section: str, content: Sequence[Mapping[str, Any]]) -> None:
        self.rows: list[Row] = []
        for given in content:
            # a comma ends a value in YAML's braces: what follows is a key without one
            words = [str(given.get("what", "")), *(str(key) for key, value in given.items() if value is None)]
            what, values = ", ".join(words), given.get("bytes_per_s")
            many = values if isinstance(values, list) else [values]
            groups = re.search(r"(\d+(?:/\d+)+) GPUs", what)
            ranks = [int(n) for n in groups[1].split("/")] if groups else [8] * len(many)
            for count, value in zip(ranks, many, strict=False):
                measured = number(value)
                if measured is not None:
                    fields = {"source": given.get("source"), "what": what, "ranks": count}
                    self.rows.append(Row(section, fields, SOURCE, measured))
        if not self.rows:
            raise Unsupported(f"{section}: no row has a bytes_per_s")

    def targets(self, row: Row, index: int) -> list[Target]:
        return []

    def predict(self, row: Row, values: Values) -> float:
        """Bytes/s of a very large all-reduce, as bus bandwidth; a NIC's share across nodes."""
        what = str(row.fields["what"]).lower()
        if nic := re.search(r"(\d+) ?gb/s nic", what):
            return load_profile(f"h100-sxm@{nic[1]}gb").inter_node.bytes_per_s
        device = device_of(what)
        if device is None or "all-reduce" not in what:
            raise Unsupported(f"no profile has a number for '{what}'")
        ranks = row.count("ranks")
        ring, *switched = load_profile(device).intra_node.ways("all_reduce", ranks)
        if "nvls" in what and not switched:
            raise Unsupported(f"the profile {device} has no all-reduce in the switch for {ranks} GPUs")
        way = switched[0] if "nvls" in what else ring
        return way.bytes_per_s * traffic_share("all_reduce", ranks)

    def more(self, row: Row, values: Values) -> Mapping[str, Any]:
        return {}


def device_of(text: str) -> str | None:
    """The built-in profile that a source's text names."""
    found = text.lower()
    for pattern, name in (
        (r"h200", "h200"),
        (r"h800", "h800"),
        (r"b200", "b200"),
        (r"h100", "h100-sxm"),
        (r"a100[- ]?40|a100.{0,12}40 ?gb", "a100-40gb"),
        (r"a100", "a100-80gb"),
    ):
        if re.search(pattern, found):
            return name
    return None
