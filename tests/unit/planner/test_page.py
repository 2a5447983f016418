"""The page stands alone, is well formed, shows every call, and draws nothing outside its drawings."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cost_models.model import CostModel
from cost_models.profile import load_profile
from planner.assess import Assessment, ordered
from planner.baselines import BASELINES
from planner.explain import Explanation, explain
from planner.page import colours
from planner.page.cluster_map import node_kinds
from planner.page.document import plan_page
from planner.page.memory_chart import steps
from planner.page.svg import ticks
from realloc.augmented import Placement
from realloc.cluster import Cluster
from realloc.errors import InputError
from realloc.experiment import read_experiment
from realloc.mesh import DeviceMesh
from realloc.plan import ExecutionPlan
from realloc.strategy import parse_strategy
from realloc.trace import Trace, TraceRecord

RECIPES = Path(__file__).parents[3] / "experiments" / "recipes"


class Page(HTMLParser):
    """What a page is made of; fails on tags that do not close each other."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.links: list[str] = []
        self.shapes: list[tuple[str, dict[str, str], tuple[float, float]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self._box = (0.0, 0.0)
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        if tag == "svg":
            assert values["aria-label"]
            left, top, width, height = map(float, values["viewbox"].split())
            assert (left, top) == (0, 0)
            self._box = (width, height)
        if "id" in values:
            self.ids.append(values["id"])
        for key in ("src", "href", "action", "data", "xlink:href"):
            if key in values:
                (self.links if values[key].startswith("#") else self.addresses).append(values[key])
        if tag in ("rect", "line", "circle", "polyline", "text"):
            self.shapes.append((tag, values, self._box))
        if tag not in ("meta", "line", "polyline", "circle"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "line", "polyline", "circle"):
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def outside(page: Page) -> list[Any]:
    """Shapes that leave their drawing, by more than rounding."""
    found = []
    for tag, values, (width, height) in page.shapes:
        if tag == "rect":
            x, y = float(values["x"]), float(values["y"])
            points = [(x, y), (x + float(values["width"]), y + float(values["height"]))]
        elif tag == "line":
            points = [(float(values["x1"]), float(values["y1"])), (float(values["x2"]), float(values["y2"]))]
        elif tag == "text":
            points = [(float(values["x"]), float(values["y"]))]
        else:
            continue
        if any(not (-0.2 <= x <= width + 0.2 and -0.2 <= y <= height + 0.2) for x, y in points):
            found.append((tag, values))
    return found


def small() -> ExecutionPlan:
    """Two nodes of four; calls on slices, whole nodes and everything, with loads from the host."""
    cluster = Cluster(2, 4, "h100-sxm")
    experiment = read_experiment(RECIPES / "ppo_llama7b_16xh100.yaml")

    def at(first: int, size: int, strategy: str) -> Placement:
        return Placement(DeviceMesh(first, size, 4), parse_strategy(strategy, "test"))

    placements = {
        "actor_gen": at(0, 8, "d2t4p1m8"),
        "rew_inf": at(4, 2, "d1t2p1m8+offload"),
        "ref_inf": at(6, 2, "d1t2p1m8"),
        "critic_inf": at(0, 4, "d1t4p1m8"),
        "actor_train": at(0, 8, "d2t4p1m8z1+sp+full"),
        "critic_train": at(4, 4, "d1t4p1m16+sp+full+offload"),
    }
    return ExecutionPlan(experiment, cluster, placements)


def large() -> ExecutionPlan:
    cluster = Cluster(128, 8, "h100-sxm")
    experiment = read_experiment(RECIPES / "ppo_llama70b_128xh100.yaml")
    costs = CostModel(experiment, experiment.graph(), cluster, load_profile(cluster.device))
    placements = dict(BASELINES["megatron"].place(experiment, cluster, costs))
    placements["rew_inf"] = Placement(DeviceMesh(1016, 8, 8), parse_strategy("d8t1p1m8", "test"))
    placements["critic_inf"] = Placement(DeviceMesh(0, 4, 8), parse_strategy("d4t1p1m8", "test"))
    return ordered(ExecutionPlan(experiment, cluster, placements), costs)


@pytest.fixture(scope="module", params=["8 GPUs", "1,024 GPUs"])
def found(request) -> Explanation:
    return explain(small() if request.param == "8 GPUs" else large(), 0.0)


def test_the_page_stands_alone_and_is_well_formed(found: Explanation) -> None:
    text = plan_page(found, "a plan & <its> page")
    page = Page(text)
    assert page.addresses == []
    assert not re.search(r"https?:|url\(|@import|//[a-z]", text)
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} == set(page.ids)
    assert outside(page) == []
    assert "a plan & <its> page" in page.texts
    for name, placement in found.assessment.plan.placements.items():
        assert page.texts.count(name) >= 3
        assert any(str(placement.strategy) in line for line in page.texts)
    assert len(text) < 400_000


def test_with_a_run(found: Explanation) -> None:
    plan = found.assessment.plan
    records = []
    for iteration in range(3):
        for name in plan.node_order:
            node = plan.augmented.by_name[name]
            start = found.assessment.simulation.start_s[name] + iteration * found.assessment.iteration_s
            spent = 1.25 * found.assessment.node_s[name]
            records += [
                TraceRecord(iteration, rank, name, str(node.kind), start, start + spent)
                for rank in node.ranks
            ]
    trace = Trace(plan.cluster.num_gpus, tuple(records))
    page = Page(plan_page(found, "run", trace))
    assert outside(page) == []
    assert "per iteration, measured" in page.texts
    assert "actor_gen measured" in page.texts
    other = Trace(plan.cluster.num_gpus, tuple(r for r in records if r.node != "actor_gen"))
    with pytest.raises(InputError, match="actor_gen"):
        plan_page(found, "run", other)


def test_nodes_that_are_alike_are_drawn_once() -> None:
    kinds = node_kinds(Assessment(large()))
    assert [(kind.first, kind.last) for kind in kinds] == [(0, 0), (1, 126), (127, 127)]
    assert kinds[0].title == "node 0"
    assert kinds[1].title == "nodes 1-126 (126 alike)"
    assert dict(kinds[0].bars)["critic_inf"] == range(4)
    assert "rew_inf" not in dict(kinds[1].bars)


def test_memory_over_time_peaks_where_the_plan_does() -> None:
    a = Assessment(small())
    peaks = {}
    for shared in a.shared:
        found = steps(a, shared)
        assert found[0].start_s == 0
        assert found[-1].end_s == pytest.approx(a.iteration_s)
        for before, after in pairwise(found):
            assert after.start_s == pytest.approx(before.end_s)
        peaks[shared.ranks] = max(step.total_bytes for step in found)
    assert max(peaks.values()) == a.memory.total_bytes
    assert a.memory.gpu in next(ranks for ranks, peak in peaks.items() if peak == a.memory.total_bytes)


def test_ink_contrasts_with_every_colour() -> None:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    found = [colours.shaded(i) for i in range(20)]
    assert len(set(found)) == 20
    for colour in [*found, colours.NEUTRAL]:
        low, high = sorted((luminance(colour), luminance(colours.ink_on(colour))))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_ticks_are_round_and_within() -> None:
    assert list(ticks(10.0, 5)) == [0, 2, 4, 6, 8, 10]
    assert list(ticks(0.31, 4)) == pytest.approx([0, 0.1, 0.2, 0.3])
