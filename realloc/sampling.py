"""The `sampling` section of an experiment: how tokens are picked, and what ends a response.

Decides how the section is written; knows nothing of logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from realloc.errors import InputError
from realloc.files import Reader


@dataclass(frozen=True)
class Sampling:
    """How `generate` picks tokens, and what ends a response besides its maximum length.

    `temperature` 0 is greedy. Otherwise tokens come from the `top_k` most likely ones (0: all), of
    these from the fewest that have a share of `top_p`. `min_new_tokens`: before so many tokens no
    end-of-sequence token is drawn, and no stop string counts. `stop`: a response ends with the
    token after which its text contains one of these strings. `ignore_eos`: end-of-sequence tokens
    end nothing.

    Log-probabilities are those of the whole distribution at `temperature` (at 1 when greedy),
    before anything is left out, in `generate` as in `inference` and `train_step`.
    """

    temperature: float = 1.0
    ignore_eos: bool = False
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()


AS_IT_IS = Sampling()
"""From the whole distribution, until a response ends by itself."""


def parse_sampling(reader: Reader) -> Sampling:
    """Reads the section. Raises InputError."""
    sampling = Sampling(
        temperature=reader.number("temperature", 1.0, minimum=0.0, maximum=100.0),
        ignore_eos=reader.get("ignore_eos", bool, False),
        top_k=reader.integer("top_k", 0, minimum=0, maximum=100_000_000),
        top_p=reader.number("top_p", 1.0, minimum=0.0, maximum=1.0),
        min_new_tokens=reader.integer("min_new_tokens", 0, minimum=0, maximum=100_000_000),
        stop=_parse_stop(reader),
    )
    reader.done()
    return sampling


def _parse_stop(reader: Reader) -> tuple[str, ...]:
    """One string or a list of them, none of them empty."""
    value = reader.raw("stop", [])
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(text, str) and text for text in strings):
        raise InputError(
            f"{reader.at('stop')}: expected a list of strings that are not empty, got {value!r}."
        )
    return tuple(strings)


def sampling_content(sampling: Sampling) -> Mapping[str, Any]:
    """Temperature and ignore_eos, and whatever else is not its default."""
    always = ("temperature", "ignore_eos")
    return {
        name: list(value) if name == "stop" else value
        for name, value in vars(sampling).items()
        if name in always or value != getattr(AS_IT_IS, name)
    }
