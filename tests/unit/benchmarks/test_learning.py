"""The learning benchmark's own arithmetic: preferences, verdicts, the table, the picture."""

from __future__ import annotations

from math import hypot
from xml.etree import ElementTree

import pytest

from benchmarks.learning import _pairs, _verdict, table
from benchmarks.learning_plot import learning_plot


def test_pairs_are_the_best_and_the_worst_of_a_prompt() -> None:
    scores = [0.1, 0.5, -0.2, 0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    samples = [
        {"iteration": 0, "id": i, "prompt": f"p{i // 4}", "response": f"r{i}", "scores": score}
        for i, score in enumerate(scores)
    ]
    assert list(_pairs(samples)) == [
        {"prompt": "p0", "chosen": " r1", "rejected": " r2"},
        {"prompt": "p2", "chosen": " r8", "rejected": " r9"},
    ]


def test_improvement_has_to_exceed_the_spread() -> None:
    verdict = _verdict([0.0, 0.2, 0.1], [0.4, 0.2, 0.3])
    assert verdict["gain"] == pytest.approx(0.2)
    assert verdict["spread"] == pytest.approx(hypot(0.1, 0.1))
    assert verdict["improved"] is True
    assert _verdict([0.0, 0.2, 0.1], [0.3, 0.1, 0.2])["improved"] is False
    assert _verdict([0.0], [1.0])["improved"] is None


def test_the_table_has_a_line_for_each_algorithm() -> None:
    verdict = _verdict([0.0, 0.2], [1.0, 1.2])
    result = {"reward": verdict, "gold": verdict, "rewards": [[0.0] * 5] * 2}
    text = table({"ppo": result, "grpo": result})
    assert text.startswith("2 seeds, 5 iterations of 64 sequences")
    assert "| `grpo` | 0.100 | 1.100 | 0.200 | 0.100 | 1.100 | 0.200 |" in text


def test_the_picture_has_every_seed_and_the_mean() -> None:
    curves = [[0.0, 1.0, 4.0], [0.5, 1.5, 3.0]]
    svg = ElementTree.fromstring(learning_plot("ppo", [("reward", curves), ("nats", curves)]))
    lines = [element for element in svg.iter() if element.tag.endswith("polyline")]
    assert [line.get("class") for line in lines] == ["seed", "seed", "mean"] * 2
    points = [tuple(map(float, p.split(","))) for p in (lines[2].get("points") or "").split()]
    assert len(points) == 3
    heights = [y for _, y in points]
    assert heights == sorted(heights, reverse=True)
    # a flat curve is drawn too
    learning_plot("flat", [("reward", [[1.0, 1.0]])])
