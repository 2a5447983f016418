"""The planner's door: an experiment and a cluster in, a plan with predictions out."""

from __future__ import annotations

from dataclasses import replace

from cost_models.model import CostModel
from cost_models.profile import load_profile
from planner.assess import Assessment
from planner.candidates import build_candidates
from planner.keeping import Limits
from planner.predict import predictions_of
from planner.problem import Problem
from planner.result import SearchResult
from planner.search import methods
from planner.settle import settle
from realloc.cluster import Cluster
from realloc.errors import InputError
from realloc.experiment import Experiment
from realloc.files import nearest

DEFAULT_METHOD = "auto"
DEFAULT_TIME_LIMIT_S = 30.0
SETTLE_LIMIT_S = 5.0
"""For the neighbours of the plan that was found, where ranks share cores."""


def search_plan(
    experiment: Experiment,
    cluster: Cluster,
    *,
    method: str | None = None,
    time_limit_s: float | None = None,
    seed: int = 0,
    limits: Limits | None = None,
) -> SearchResult:
    """Searches the fastest plan that fits in memory: by `auto`, and for DEFAULT_TIME_LIMIT_S at most.

    Raises InputError for an unknown method or device, and InfeasibleError when nothing fits.
    """
    known = methods()
    method = DEFAULT_METHOD if method is None else method
    if method not in known:
        raise InputError(f"search: method '{method}' is not known.{nearest(method, known)}")
    costs = CostModel(experiment, experiment.graph(), cluster, load_profile(cluster.device))
    problem = _problem(costs, limits)
    limit_s = DEFAULT_TIME_LIMIT_S if time_limit_s is None else time_limit_s
    result = known[method](problem, limit_s, seed)
    if not result.interrupted:
        result = settle(problem, costs, result, min(limit_s, SETTLE_LIMIT_S))
    return _with_terms(result, costs)


def _with_terms(result: SearchResult, costs: CostModel) -> SearchResult:
    """The result with the plan's predictions as a run will be compared with: by term, on shared cores, and
    with the memory of each GPU's own stages, where search adds up the stages of calls that need most.

    Where calls slow each other down, the plan takes longer than search has proven; its bound holds.
    """
    plan = result.plan
    assert plan.predictions is not None
    assessment = Assessment(plan, costs)
    predictions = replace(predictions_of(assessment), lower_bound_s=plan.predictions.lower_bound_s)
    slower = assessment.iteration_s > result.iteration_s * (1 + 1e-6)
    return replace(
        result,
        plan=replace(plan, predictions=predictions),
        simulation=assessment.simulation if slower else result.simulation,
        memory=assessment.memory,
        proven=result.proven and not slower,
    )


def make_problem(experiment: Experiment, cluster: Cluster, limits: Limits | None = None) -> Problem:
    """Candidates and costs of an experiment on a cluster, with the device's own profile.

    Raises InputError for an unknown device and InfeasibleError when a call fits nowhere.
    """
    return _problem(CostModel(experiment, experiment.graph(), cluster, load_profile(cluster.device)), limits)


def _problem(costs: CostModel, limits: Limits | None) -> Problem:
    experiment, graph, cluster = costs.experiment, costs.graph, costs.cluster
    capacity = costs.memory_bytes
    candidates = build_candidates(experiment, graph, cluster, costs, capacity, limits)
    return Problem(experiment, graph, cluster, costs, candidates, capacity)
