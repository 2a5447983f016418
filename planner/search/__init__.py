"""Search methods, all behind `planner.search.method.Method`."""

from __future__ import annotations

from collections.abc import Mapping

from planner.search.auto import auto, greedy
from planner.search.branch import branch
from planner.search.exhaustive import exhaustive
from planner.search.mcmc import mcmc
from planner.search.method import Method


def methods() -> Mapping[str, Method]:
    """Name -> method."""
    return {"auto": auto, "branch": branch, "greedy": greedy, "mcmc": mcmc, "exhaustive": exhaustive}
