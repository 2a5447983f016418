"""How each call's seconds split, predicted and, where a run was traced, measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.assess import Assessment
from planner.budget import budget, kinds_of
from planner.page.colours import NEUTRAL, PALETTE, ink_on
from planner.page.svg import WIDTH, Drawing, text_width, ticks
from planner.words import seconds, share
from realloc.comparison import TIMED, WAITING, measured_terms, timed_terms
from realloc.trace import Trace

UNDIVIDED = "not timed by term"
SPLIT_COLOURS: Mapping[str, str] = {
    "compute": PALETTE[0],
    "communication": PALETTE[1],
    "bubble": PALETTE[3],
    "overhead": PALETTE[4],
    "tp_communication": PALETTE[1],
    "dp_communication": PALETTE[6],
    "pipeline": PALETTE[3],
    "optimizer": PALETTE[2],
    "moves": PALETTE[5],
    WAITING: NEUTRAL,
    "idle": NEUTRAL,
    UNDIVIDED: NEUTRAL,
}
BAR, GAP = 20.0, 4.0
_WORDS = {"tp_communication": "tp", "dp_communication": "dp", "communication": "comm."}


@dataclass(frozen=True)
class Bar:
    """One bar of a call: `what` is predicted or measured."""

    call: str
    what: str
    parts: Mapping[str, float]

    @property
    def total_s(self) -> float:
        return sum(self.parts.values())


def bars(assessment: Assessment, trace: Trace | None) -> tuple[Bar, ...]:
    """For each call the predicted split; with a trace in the terms that runs time, and the measured one."""
    found = []
    measured = {} if trace is None else measured_terms(trace)
    whole = {} if trace is None else trace.node_seconds()
    for name in sorted(assessment.plan.placements, key=lambda n: assessment.simulation.start_s[n]):
        time = assessment.call_time(name)
        if trace is None:
            found.append(Bar(name, "predicted", time.kinds))
            continue
        found.append(Bar(name, "predicted", timed_terms(time.terms)))
        found.append(Bar(name, "measured", measured.get(name, {UNDIVIDED: whole.get(name, 0.0)})))
    return tuple(found)


def split_kinds(found: tuple[Bar, ...]) -> tuple[str, ...]:
    """The parts that any bar has, in a fixed order."""
    present = {part for bar in found for part, spent in bar.parts.items() if spent > 0}
    order = ("compute", "communication", *TIMED, "bubble", "overhead", WAITING, UNDIVIDED)
    return tuple(part for part in order if part in present)


def split_chart(found: tuple[Bar, ...]) -> str:
    left = max(text_width(f"{bar.call} {bar.what}") for bar in found) + 14
    height = len(found) * (BAR + GAP) + 40
    longest = max(bar.total_s for bar in found)
    scale = (WIDTH - left - 130) / max(longest, 1e-12)
    drawing = Drawing(height, "seconds of every call by what they are spent on")
    foot = len(found) * (BAR + GAP)
    for value in ticks(longest, 8):
        drawing.line(left + value * scale, 0, left + value * scale, foot, "grid")
        drawing.text(left + value * scale, foot + 15, f"{value:.3g}", anchor="middle", size=11)
    drawing.text(left, foot + 33, "seconds", size=11, css="faint")
    for i, bar in enumerate(found):
        y, x = i * (BAR + GAP), left
        name = f"{bar.call} {bar.what}" if len({b.what for b in found}) > 1 else bar.call
        drawing.text(
            left - 8, y + BAR / 2 + 4, name, anchor="end", css="faint" if bar.what == "measured" else ""
        )
        for part in split_kinds(found):
            spent = bar.parts.get(part, 0.0)
            if spent <= 0:
                continue
            colour = SPLIT_COLOURS[part]
            name = part.replace("_", " ")
            title = f"{bar.call}, {bar.what}: {name} {seconds(spent)} ({share(spent, bar.total_s)})"
            drawing.rect(x, y, max(spent * scale, 0.6), BAR, colour, title=title, call=bar.call)
            word = _WORDS.get(part, part)
            drawing.label(
                x, y, spent * scale, BAR, (f"{word} {share(spent, bar.total_s)}", word), ink_on(colour)
            )
            x += spent * scale
        drawing.text(x + 6, y + BAR / 2 + 4, seconds(bar.total_s))
    return drawing.markup()


def whole_kinds(assessment: Assessment) -> tuple[str, ...]:
    """What all GPUs' time is spent on, as far as it can be seen."""
    least = 0.0001 * assessment.iteration_s
    return tuple(kind for kind, spent in kinds_of(budget(assessment)).items() if spent > least)


def whole_chart(assessment: Assessment) -> str:
    """All GPUs' time as one bar."""
    totals = kinds_of(budget(assessment))
    drawing = Drawing(34, "what all GPUs' time is spent on")
    x = 0.0
    for kind in whole_kinds(assessment):
        spent = totals[kind]
        wide = spent / assessment.iteration_s * WIDTH
        colour = SPLIT_COLOURS[kind]
        text = f"{kind} {share(spent, assessment.iteration_s)}"
        drawing.rect(x, 2, wide, 30, colour, title=text)
        drawing.label(x, 2, wide, 30, (text, share(spent, assessment.iteration_s)), ink_on(colour))
        x += wide
    return drawing.markup()
