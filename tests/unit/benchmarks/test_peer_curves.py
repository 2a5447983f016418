"""The verdict on curves of two trainers, on curves made by hand; their picture."""

from __future__ import annotations

from xml.etree import ElementTree

from benchmarks.peer_curves import SETUPS, judge, picture

QUANTITIES = ("scores", "kls", "lengths")


def rising(shift: float, gain: float = 4.0) -> list[list[float]]:
    """Curves of three seeds, 0.1 apart, that rise by `gain` over twenty iterations."""
    return [[gain * i / 19 + shift + 0.1 * (seed - 1) for i in range(20)] for seed in range(3)]


def test_curves_have_to_end_within_one_joint_spread() -> None:
    near = {key: {"ours": rising(0.1), "trl": rising(0.0), "control": rising(0.0, 2.0)} for key in QUANTITIES}
    found = judge(near)
    assert (found["same"], found["rises"], found["told_apart"]) == (True, True, True)
    # 0.2 is more than the joint spread of 0.14, and less than twice that
    far = {**near, "lengths": {**near["lengths"], "ours": rising(0.2)}}
    found = judge(far)
    assert found["same"] is False
    assert found["verdicts"]["scores"]["same"] is True
    assert found["verdicts"]["lengths"]["share_within"] == 1.0


def test_what_does_not_rise_or_cannot_be_told_apart_says_so() -> None:
    flat = {key: {side: rising(0.0, 0.5) for side in ("ours", "trl", "control")} for key in QUANTITIES}
    found = judge(flat)
    assert (found["same"], found["rises"], found["told_apart"]) == (True, False, False)
    single = {name: {side: curves[:1] for side, curves in flat[name].items()} for name in QUANTITIES}
    assert judge(single)["same"] is None


def test_the_picture_has_both_sides() -> None:
    curves = {key: {"ours": rising(0.1), "trl": rising(0.0)} for key in QUANTITIES}
    svg = ElementTree.fromstring(picture(SETUPS["ppo"], curves))
    lines = [element.get("class") for element in svg.iter() if element.tag.endswith("polyline")]
    assert lines == [*["seed"] * 3, *["other-seed"] * 3, "mean", "other-mean"] * 3
    texts = [element.text for element in svg.iter() if element.tag.endswith("text")]
    assert {"realloc", "TRL", "ppo: nats a response from the reference"} <= set(texts)
