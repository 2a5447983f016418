"""The calls that score responses: reward models, Python functions and verifiers, and their weighted sum.

Decides how the sources of an experiment's scores become calls of a graph, for every algorithm that needs
scores. Knows graphs, not tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from realloc.dataflow import Call, CallKind, DataKey, Output, Per
from realloc.errors import InputError
from realloc.experiment import Experiment
from realloc.rewards import RewardSource, check_function_name, function_source


@dataclass(frozen=True)
class Scoring:
    """Calls that write the scores, and the keys of what they write besides."""

    calls: tuple[Call, ...]
    keys: tuple[DataKey, ...] = ()


def scoring(
    algorithm: str, experiment: Experiment, prefix: str = "", tokens: str = "tokens", scores: str = "scores"
) -> Scoring:
    """From the token ids `tokens` to one number a sequence, `scores`. `prefix` is of all names.

    One reward model is one inference call, functions and verifiers are one compute call; of several sources
    each reward model is a call of its own, so that the planner places it, and a compute call adds up. Who
    trains splits its batch by `tokens`, so all of them need to know its lengths too. Raises InputError
    without a source of scores.
    """
    sources = _sources(algorithm, experiment)
    models = [source for source in sources if source.model is not None]
    functions = tuple(source for source in sources if source.model is None)
    reads = tuple(dict.fromkeys((tokens, "tokens")))
    if not models:
        return Scoring((_functions_call(f"{prefix}rew_inf", functions, reads, scores),))
    if not functions and len(models) == 1 and models[0].weight == 1.0:
        return Scoring((_model_call(f"{prefix}rew_inf", models[0], reads, scores),))
    parts: list[tuple[str, float]] = []
    calls: list[Call] = []
    for source in models:
        key = f"{prefix}{source.model}_scores"
        calls.append(_model_call(f"{prefix}{source.model}_inf", source, reads, key))
        parts.append((key, source.weight))
    if functions:
        key = f"{prefix}function_scores"
        calls.append(_functions_call(f"{prefix}rew_functions", functions, reads, key))
        parts.append((key, 1.0))
    add = Call(
        name=f"{prefix}rew_sum",
        kind=CallKind.COMPUTE,
        reads=(*(key for key, _ in parts), *reads),
        writes=(scores,),
        sequence=parts[0][0],
        weights=tuple(parts),
    )
    return Scoring((*calls, add), tuple(DataKey(key, Per.SEQUENCE) for key, _ in parts))


def _sources(algorithm: str, experiment: Experiment) -> Sequence[RewardSource]:
    """The list of sources that the experiment has or that a short form stands for."""
    if experiment.rewards:
        if experiment.reward is not None:
            raise InputError("experiment: has both reward and rewards; move the function into the list.")
        roles = [source.model for source in experiment.rewards if source.model is not None]
        twice = next((role for i, role in enumerate(roles) if role in roles[:i]), None)
        if twice is not None:
            raise InputError(f"experiment: rewards: the model '{twice}' stands twice; add up its weights.")
        return experiment.rewards
    has_model = "reward" in experiment.models
    if has_model == (experiment.reward is not None):
        found = "has both" if has_model else "has neither"
        raise InputError(
            f"experiment: {algorithm} takes its scores from a model (models: reward: PATH), from a "
            f"function (reward: module:function), or from several of them (rewards: a list); this one "
            f"{found}; give exactly one."
        )
    if has_model:
        return (RewardSource("reward", model="reward"),)
    name = check_function_name(str(experiment.reward), "experiment: reward")
    return (function_source(name),)


def _model_call(name: str, source: RewardSource, reads: tuple[str, ...], scores: str) -> Call:
    return Call(name, CallKind.INFERENCE, reads, (scores,), source.model, reads[0], Output.SCORES)


def _functions_call(
    name: str, sources: tuple[RewardSource, ...], reads: tuple[str, ...], scores: str
) -> Call:
    call = Call(name, CallKind.COMPUTE, reads, (scores,), sequence=reads[0], rewards=sources)
    (first, *others) = sources
    if not others and first == function_source(str(first.function)):
        return replace(call, rewards=(), function=first.function)
    return call
