"""Verifiers: rewards of 1 for a response that is right, by rule, and 0 for one that is not.

Reward functions (`realloc.functions.RewardFunction`) with options; `realloc.rewards` says how experiments
name them. What is right stands in a column of the sample's row. No models, no torch.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from operator import add, mul, sub, truediv
from typing import Any

from realloc.functions import Sample

LONGEST_EXPRESSION = 200
LARGEST_EXPONENT = 64
_NUMBER = r"\d[\d,]*\.?\d*(?:[eE][+-]?\d+)?|\.\d+"
# nothing that begins with spaces: a response of spaces alone would take cubic time
_LAST_NUMBER = re.compile(rf"(?:[-+]\s*)?(?:[$€£]\s*)?(?:{_NUMBER})(?:\s*/\s*(?:{_NUMBER}))?\s*%?")
_MARKED = re.compile(r"####\s*([^\n]+)")
_SAID = re.compile(r"(?:answer|result)\s*(?:is|=|:)+\s*([^\n]+)", re.IGNORECASE)
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_TEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{[^{}]*\}")
_UNIT = re.compile(
    r"(?<=[\d)%])\s*(?:\^?\\circ|°|[a-zA-Z][a-zA-Z.]*(?:\s+[a-zA-Z]+)*)(?:\^\{?[23]\}?|²|³)?\s*$"
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
_SIGNS: Mapping[str, str] = {
    "\\times": "*",
    "\\cdot": "*",
    "\\div": "/",
    "\\left": "",
    "\\right": "",
    "\\,": "",
    "\\!": "",
    "\\;": "",
    "\\ ": "",
    "\\$": "",
    "\\%": "%",
    "×": "*",
    "·": "*",
    "÷": "/",
    "−": "-",
    "–": "-",
    "^": "**",
    "$": "",
    "€": "",
    "£": "",
    "{": "(",
    "}": ")",
}
_OPERATIONS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: add,
    ast.Sub: sub,
    ast.Mult: mul,
    ast.Div: truediv,
}


def arithmetic(samples: Sequence[Sample], answer: str = "answer", tolerance: float = 0.0) -> list[float]:
    """Whether a response's final answer has the value of the row's, but for a relative `tolerance`.

    The final answer is the last `\\boxed{...}`, what follows the last `####`, what follows the last "answer
    is", or the last number. It may be an expression of whole numbers, decimals, fractions and percentages;
    thousands may have commas, and a unit may follow.
    """
    return [float(_equal(_final(s.response), _final(_column(s, answer)), tolerance)) for s in samples]


def exact(samples: Sequence[Sample], answer: str = "answer", ignore_case: bool = False) -> list[float]:
    """Whether the whole response, spaces around it aside, is the row's answer."""

    def plain(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    return [float(plain(s.response) == plain(_column(s, answer))) for s in samples]


def math(samples: Sequence[Sample], answer: str = "answer") -> list[float]:
    """Whether the answers are equal as mathematics, by the library math-verify."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise RuntimeError("the verifier 'math' needs math-verify: pip install 'realloc[verify]'") from None
    return [float(bool(verify(parse(_column(s, answer)), parse(s.response)))) for s in samples]


def regex(samples: Sequence[Sample], pattern: str = "", whole: bool = False) -> list[float]:
    """Whether the pattern occurs in the response, or, with `whole`, is all of it."""
    compiled = re.compile(pattern, re.DOTALL)
    find = compiled.fullmatch if whole else compiled.search
    return [float(find(sample.response) is not None) for sample in samples]


def json_object(samples: Sequence[Sample], keys: Sequence[str] = ()) -> list[float]:
    """Whether the response, between ``` marks or not, is a JSON object that has these `keys`."""
    return [float(_is_object(sample.response, keys)) for sample in samples]


def length(
    samples: Sequence[Sample], unit: str = "words", minimum: int = 0, maximum: int | None = None
) -> list[float]:
    """Whether the response has so many words or characters."""
    counts = [len(s.response.split() if unit == "words" else s.response) for s in samples]
    return [float(minimum <= n and (maximum is None or n <= maximum)) for n in counts]


def value_of(text: str) -> Fraction | None:
    """The value of an arithmetic expression, None if it has none. Runs no code, lets no number grow large."""
    if len(text) > LONGEST_EXPRESSION:
        return None
    plain = _TEX_TEXT.sub("", text.strip().rstrip("."))
    for _ in range(4):  # fractions of fractions
        plain = _FRACTION.sub(lambda m: f"(({m[1] or m[2]})/({m[3] or m[4]}))", plain)
    plain = _UNIT.sub("", plain.strip())
    for sign, meaning in _SIGNS.items():
        plain = plain.replace(sign, meaning)
    plain = _THOUSANDS.sub("", plain)
    plain = re.sub(rf"({_NUMBER})\s*%", r"(\1/100)", plain)
    plain = plain.rpartition("=")[2]  # "x = 3" and "1 + 2 = 3"
    try:
        return _evaluate(ast.parse(plain.strip(), mode="eval").body, plain.strip())
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr, source: str) -> Fraction:
    """Raises ValueError for anything but arithmetic."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        written = ast.get_source_segment(source, node) or ""
        if abs(int(written.lower().partition("e")[2] or 0)) > LARGEST_EXPONENT:
            raise ValueError("no number to compute with")
        return Fraction(written)  # as it was written: 0.1 is a tenth
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _evaluate(node.operand, source)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, source), _evaluate(node.right, source)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](left, right)
    raise ValueError("no arithmetic")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    size = max(abs(base.numerator), base.denominator).bit_length()
    if exponent.denominator != 1 or abs(exponent) > LARGEST_EXPONENT or size > LARGEST_EXPONENT:
        raise ValueError("no power to compute")
    return Fraction(base ** int(exponent))


def _final(text: str) -> str:
    """The part of a text that is its answer."""
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    for pattern in (_MARKED, _SAID):
        if found := pattern.findall(text):
            return str(found[-1]).strip()
    if value_of(text) is None and (numbers := _LAST_NUMBER.findall(text)):
        return str(numbers[-1])
    return text


def _boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces within it balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, first = 0, start + len("\\boxed{")
    for at in range(first - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[first:at]
    return None


def _equal(found: str, expected: str, tolerance: float) -> bool:
    """Whether two answers have one value, or, where the expected one has none, one text."""
    want, got = value_of(expected), _value_within(found)
    if want is None:
        return found.strip().casefold() == expected.strip().casefold()
    return got is not None and abs(got - want) <= Fraction(tolerance) * abs(want)


def _value_within(text: str) -> Fraction | None:
    """The value of the text, or of the last number in it: "about 42 in all"."""
    value = value_of(text)
    if value is None and (numbers := _LAST_NUMBER.findall(text)):
        return value_of(numbers[-1])
    return value


def _is_object(response: str, keys: Sequence[str]) -> bool:
    text = response.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3].removeprefix("json")
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and all(key in value for key in keys)


def _column(sample: Sample, name: str) -> str:
    if name not in sample.row:
        raise ValueError(f"the row has no column '{name}', only {', '.join(map(str, sample.row)) or 'none'}")
    return str(sample.row[name])
