"""Fits the few free parameters of a published system to the settings that may be used for it.

Decides how parameters are fitted and how far that can be trusted; knows no systems. Errors are of the
logarithm, so that seconds and rates count alike. Parameters have a start and a spread (of the logarithm): a
normal prior, without which few settings would pin down nothing. Fitting is the mode of the posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

Values = Mapping[str, float]
SETTING_SPREAD = 0.03
"""How well a published number is expected to be met at best (of the logarithm)."""
STEP, SMALLEST_STEP = 0.3, 0.01


@dataclass(frozen=True)
class Parameter:
    """A free parameter: what it means, where it starts, and within which factor it may be expected.

    `default`: what came out of the fit that `docs/published.md` documents; for rows that come without any
    to fit on.
    """

    name: str
    meaning: str
    start: float
    spread: float
    default: float


@dataclass(frozen=True)
class Target:
    """A published number of a setting, and its prediction under parameter values."""

    setting: int
    measured: float
    predict: Callable[[Values], float]


def fit(parameters: Sequence[Parameter], targets: Sequence[Target]) -> dict[str, float]:
    """Values of least squared error, by coordinate descent with shrinking steps."""
    values = {p.name: p.start for p in parameters}
    steps = {p.name: STEP for p in parameters}
    best = _loss(parameters, targets, values)
    while max(steps.values(), default=0.0) > SMALLEST_STEP:
        for p in parameters:
            for sign in (1.0, -1.0):
                tried = {**values, p.name: values[p.name] * exp(sign * steps[p.name])}
                loss = _loss(parameters, targets, tried)
                if loss < best:
                    best, values = loss, tried
                    break
            else:
                steps[p.name] *= 0.5
    return values


def _loss(parameters: Sequence[Parameter], targets: Sequence[Target], values: Values) -> float:
    prior = sum((log(values[p.name] / p.start) / p.spread) ** 2 for p in parameters)
    return prior + sum((log(t.predict(values) / t.measured) / SETTING_SPREAD) ** 2 for t in targets)


def left_out(parameters: Sequence[Parameter], targets: Sequence[Target]) -> dict[int, float]:
    """Setting -> relative error of its first target when all its targets are left out of the fit."""
    errors: dict[int, float] = {}
    for setting in dict.fromkeys(target.setting for target in targets):
        rest = [target for target in targets if target.setting != setting]
        own = next(target for target in targets if target.setting == setting)
        errors[setting] = own.predict(fit(parameters, rest)) / own.measured - 1.0
    return errors
