"""Verifiers: what they accept, what they refuse, and that no text makes them run code or grow numbers."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from experiments import verifiers
from realloc.functions import Sample


def sample(response: str, **row: object) -> Sample:
    return Sample(0, "prompt", response, True, row)


VALUES = {
    "42": Fraction(42),
    "-1,234,567.50": Fraction(-123456750, 100),
    "3/4": Fraction(3, 4),
    "\\frac{3}{4}": Fraction(3, 4),
    "\\dfrac12": Fraction(1, 2),
    "2\\frac{1}{2}": None,  # a mixed number or a product: nobody can tell
    "12.5%": Fraction(1, 8),
    "12.5\\%": Fraction(1, 8),
    "2^{10}": Fraction(1024),
    "(1 + 2) \\times 3": Fraction(9),
    "x = 7": Fraction(7),
    "3 \\text{ apples}": Fraction(3),
    "3.50 dollars": Fraction(7, 2),
    "12 cm^2": Fraction(12),
    "$18": Fraction(18),
    "1e3": Fraction(1000),
    "0.1": Fraction(1, 10),
    "1/0": None,
    "1e999999999": None,
    "0x10": None,
    "9**9**9": None,
    "2**100": None,
    "__import__('os').getcwd()": None,
    "'a'*9": None,
    "(" * 150 + "1" + ")" * 10: None,
    "1+" * 300 + "1": None,
    "": None,
}


@pytest.mark.parametrize("text", VALUES)
def test_value_of_an_expression(text: str) -> None:
    assert verifiers.value_of(text) == VALUES[text]


ARITHMETIC = {
    "so it is \\boxed{42}.": True,
    "first \\boxed{7}, no: \\boxed{\\frac{84}{2}}": True,
    "20 + 22 = 42 #### 42": True,
    "The answer is 42 apples.": True,
    "The answer is: 41.9": False,
    "17 then 42": True,
    "42 then 17": False,
    "forty-two": False,
    "": False,
    "\\boxed{42": True,  # no box, but its last number
}


@pytest.mark.parametrize("response", ARITHMETIC)
def test_arithmetic_compares_the_final_answer(response: str) -> None:
    assert verifiers.arithmetic([sample(response, answer="reasons ... #### 42")]) == [ARITHMETIC[response]]
    assert verifiers.arithmetic([sample(response, gold=42)], answer="gold") == [ARITHMETIC[response]]


def test_arithmetic_within_a_tolerance_and_on_words() -> None:
    close = sample("about 3.14", answer="3.1416")
    assert verifiers.arithmetic([close]) == [0.0]
    assert verifiers.arithmetic([close], tolerance=1e-3) == [1.0]
    assert verifiers.arithmetic([sample("The answer is Yes", answer="yes")]) == [1.0]


@pytest.mark.parametrize("filler", [" ", "\n", "$ ", "- ", "1 ", "answer "])
def test_long_responses_of_a_model_that_has_gone_astray_take_no_time(filler: str) -> None:
    began = time.process_time()
    assert verifiers.arithmetic([sample(filler * 1500, answer="42")]) == [0.0]
    assert time.process_time() - began < 1.0


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match="no column 'answer', only result"):
        verifiers.arithmetic([sample("1", result=1)])


def test_formats() -> None:
    assert verifiers.exact([sample(" Yes\n", answer="yes")]) == [0.0]
    assert verifiers.exact([sample(" Yes\n", answer="yes")], ignore_case=True) == [1.0]
    thought = [sample("<think>a\nb</think> 4"), sample("4 <think>a</think>"), sample("4")]
    assert verifiers.regex(thought, "<think>.*</think>") == [1.0, 1.0, 0.0]
    assert verifiers.regex(thought, "<think>.*</think> \\d", whole=True) == [1.0, 0.0, 0.0]
    texts = ['{"a": 1}', '```json\n{"a": 1, "b": 2}\n```', "[1]", "{a: 1}", ""]
    assert verifiers.json_object([sample(t) for t in texts]) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert verifiers.json_object([sample(t) for t in texts], keys=["b"]) == [0.0, 1.0, 0.0, 0.0, 0.0]
    words = [sample("a b c"), sample("a"), sample("")]
    assert verifiers.length(words, minimum=1, maximum=2) == [0.0, 1.0, 0.0]
    assert verifiers.length(words, unit="characters", minimum=4) == [1.0, 0.0, 0.0]
