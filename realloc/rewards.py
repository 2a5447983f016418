"""Where scores come from: the `rewards` section of an experiment.

A list of sources, each a Python function, a built-in verifier or a reward model, with weights. Decides how
the section is written and what its defaults are; knows nothing of calls, processes or text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from realloc.errors import InputError
from realloc.files import Reader, nearest

ERROR, SKIP = "error", "skip"
MOST_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class RewardSource:
    """One source of scores: exactly one of `function` (module:function) and `model` (a role).

    A sample's score is the sum of its sources' numbers times their `weight`. A function gets `time_limit_s`
    for the samples of one rank. Where that fails it is asked again, one sample at a time, for
    `sample_time_limit_s` each (None: four times a fair share of the limit, at least 1 s), to find the sample
    that is to blame; `on_failure: error` ends the run with its name, `skip` marks it, so that it is left
    out of what is learned. `options` are passed to the function by name; a `verifier` is a function whose
    options are known.
    """

    name: str
    function: str | None = None
    model: str | None = None
    weight: float = 1.0
    time_limit_s: float = 60.0
    sample_time_limit_s: float | None = None
    on_failure: str = ERROR
    verifier: str | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """How messages name it: `arithmetic (experiments.verifiers:arithmetic)`."""
        return self.name if self.name == self.function else f"{self.name} ({self.function or self.model})"

    def alone_limit_s(self, samples: int) -> float:
        """Seconds for one sample when a batch of so many has failed."""
        if self.sample_time_limit_s is not None:
            return self.sample_time_limit_s
        return min(self.time_limit_s, max(1.0, 4 * self.time_limit_s / max(1, samples)))


def function_source(name: str) -> RewardSource:
    """The source that the short form `reward: module:function` stands for."""
    return RewardSource(name, function=name)


def parse_rewards(value: Any, where: str) -> tuple[RewardSource, ...]:
    """Reads the list; None is none. Raises InputError."""
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise InputError(
            f"{where}: expected a list of sources, such as - {{function: my_rewards:score, weight: 1.0}}."
        )
    sources = tuple(_parse_source(Reader(item, f"{where}[{i}]")) for i, item in enumerate(value))
    names = [source.name for source in sources]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InputError(
                f"{where}[{i}]: two rewards are named '{name}'; give one another name (name: ...)."
            )
    return sources


def rewards_content(sources: tuple[RewardSource, ...]) -> list[Mapping[str, Any]]:
    """The list that `parse_rewards` reads back to an equal value."""
    return [_source_content(source) for source in sources]


def check_function_name(name: str, where: str) -> str:
    """The name, if it is of the form module:function. Raises InputError."""
    module, _, function = name.partition(":")
    if not (module and function):
        raise InputError(
            f"{where}: '{name}' is not of the form module:function, such as experiments.rewards:sentiment."
        )
    return name


def _parse_source(reader: Reader) -> RewardSource:
    kinds = [kind for kind in ("function", "verifier", "model") if reader.has(kind)]
    if len(kinds) != 1:
        found = f"has {' and '.join(kinds)}" if kinds else "has none of them"
        raise InputError(f"{reader.where}: a source is one function, verifier or model; this one {found}.")
    (kind,) = kinds
    given = reader.get(kind, str)
    weight = reader.number("weight", 1.0, minimum=-1e9, maximum=1e9)
    name = reader.get("name", str, None)
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(
            f"{reader.at('name')}: '{name}' has other characters than letters, digits, _ . and -."
        )
    if kind == "model":
        reader.done()
        return RewardSource(name or given, model=given, weight=weight)
    options: Mapping[str, Any] = {}
    if kind == "verifier":
        if given not in VERIFIERS:
            raise InputError(f"{reader.at(kind)}: '{given}' is no verifier.{nearest(given, VERIFIERS)}")
        function, read_options = VERIFIERS[given]
        options = read_options(reader)
    else:
        function = check_function_name(given, reader.at(kind))
        options = _function_options(reader)
    source = RewardSource(
        name=name or given.rpartition(":")[2],
        function=function,
        weight=weight,
        time_limit_s=reader.number("time_limit_s", 60.0, minimum=0.01, maximum=MOST_SECONDS),
        sample_time_limit_s=reader.number("sample_time_limit_s", None, minimum=0.01, maximum=MOST_SECONDS),
        on_failure=reader.choice("on_failure", (ERROR, SKIP), ERROR),
        verifier=given if kind == "verifier" else None,
        options=tuple(sorted(options.items())),
    )
    reader.done()
    return source


def _source_content(source: RewardSource) -> Mapping[str, Any]:
    kind = "model" if source.model else "verifier" if source.verifier else "function"
    content: dict[str, Any] = {
        kind: source.model or source.verifier or source.function,
        "name": source.name,
        "weight": source.weight,
    }
    if source.model:
        return content
    default = RewardSource("")
    for name in ("time_limit_s", "sample_time_limit_s", "on_failure"):
        if getattr(source, name) != getattr(default, name):
            content[name] = getattr(source, name)
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in source.options if v is not None}
    if source.verifier:
        return content | options
    return content | ({"options": options} if options else {})


def _function_options(reader: Reader) -> Mapping[str, Any]:
    """`options`: plain values that the function gets as keywords."""
    child = reader.optional_child("options")
    if child is None:
        return {}
    options = {name: child.raw(name) for name in child.keys()}
    for name, value in options.items():
        if not name.isidentifier() or not isinstance(value, (str, int, float, bool)):
            raise InputError(f"{child.at(name)}: an option is a word with a text, a number, true or false.")
    return options


def _answer_options(reader: Reader) -> Mapping[str, Any]:
    return {"answer": reader.get("answer", str, "answer")}


def _arithmetic_options(reader: Reader) -> Mapping[str, Any]:
    tolerance = reader.number("tolerance", 0.0, minimum=0.0, maximum=1.0)
    return {**_answer_options(reader), "tolerance": tolerance}


def _exact_options(reader: Reader) -> Mapping[str, Any]:
    return {**_answer_options(reader), "ignore_case": reader.get("ignore_case", bool, False)}


def _pattern_options(reader: Reader) -> Mapping[str, Any]:
    pattern = reader.get("pattern", str)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{reader.at('pattern')}: no regular expression: {error}.") from None
    return {"pattern": pattern, "whole": reader.get("whole", bool, False)}


def _json_options(reader: Reader) -> Mapping[str, Any]:
    keys = reader.get("keys", list, [])
    if not all(isinstance(key, str) for key in keys):
        raise InputError(f"{reader.at('keys')}: expected a list of words.")
    return {"keys": tuple(keys)}


def _length_options(reader: Reader) -> Mapping[str, Any]:
    unit = reader.choice("unit", ("characters", "words"), "words")
    minimum = reader.integer("minimum", 0)
    maximum = reader.integer("maximum", None, minimum=1)
    if maximum is not None and maximum < minimum:
        raise InputError(f"{reader.where}: maximum {maximum} is below minimum {minimum}.")
    return {"unit": unit, "minimum": minimum, "maximum": maximum}


VERIFIERS: Mapping[str, tuple[str, Callable[[Reader], Mapping[str, Any]]]] = {
    "arithmetic": ("experiments.verifiers:arithmetic", _arithmetic_options),
    "exact": ("experiments.verifiers:exact", _exact_options),
    "math": ("experiments.verifiers:math", _answer_options),
    "regex": ("experiments.verifiers:regex", _pattern_options),
    "json": ("experiments.verifiers:json_object", _json_options),
    "length": ("experiments.verifiers:length", _length_options),
}
"""Name -> the function, and how its options are read (contract: `experiments.verifiers`)."""
