"""A comparison of predicted with measured in words and numbers: for people, and as JSON.

Decides how it looks; what is said is decided in `realloc.comparison`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from realloc.cluster import GIB
from realloc.comparison import OFF, Comparison, Line, pace_text


def comparison_text(comparison: Comparison) -> str:
    """A table and what stands out, for people."""
    rows: list[tuple[str, ...]] = [("", "where", "predicted", "measured", "ratio", "at pace")]
    for line in (*comparison.lines, comparison.total):
        name = f"  {line.term}" if line.node and line.term else line.name
        ratios = (_ratio(line.ratio), _ratio(comparison.at_pace(line)))
        rows.append((name, line.where, _number(line.predicted_s), _number(line.measured_s), *ratios))
    if comparison.pace is None:
        rows = [row[:-1] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = ["seconds per iteration, predicted and measured"]
    for row in rows:
        cells = [f"{cell:<{widths[i]}}" if i < 2 else f"{cell:>{widths[i]}}" for i, cell in enumerate(row)]
        text.append("  ".join(cells).rstrip())
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    text.insert(2, rule)
    text.insert(-1, rule)
    if comparison.pace is not None:
        found = comparison.pace
        text.append(
            f"Pace: {pace_text(found)} (a fixed piece of work took {found.work:.2f} times as long, "
            f"{found.low:.2f} to {found.high:.2f} in the middle half of {found.samples}; ranks had a core "
            f"for {found.core_share:.0%} of their computing time); 'at pace' is the ratio without that."
        )
    if (memory := comparison.memory) is not None:
        text.append(
            f"Peak memory of a GPU: {memory.predicted_bytes / GIB:.4g} GiB predicted, "
            f"{memory.measured_bytes / GIB:.4g} GiB measured, on rank {memory.rank} at {memory.node}: "
            f"x {memory.measured_bytes / memory.predicted_bytes:.2f}."
        )
    text += _finding_lines(comparison)
    if comparison.total.predicted_s is None:
        text.append("The plan has no predictions; `realloc diff PLAN RUN` makes them.")
    return "\n".join(text)


def _finding_lines(comparison: Comparison) -> Iterable[str]:
    """What is off by one cause in one line; a call whose terms are named is not named as well."""
    named = {finding.line.node for finding in comparison.findings if finding.line.node and finding.line.term}
    by_causes: dict[tuple[str, ...], list[str]] = {}
    for finding in comparison.findings:
        line = finding.line
        if line.term or line.node not in named:
            by_causes.setdefault(finding.causes, []).append(_off(line))
    for causes, names in by_causes.items():
        why = "; ".join(causes) or "no known cause, and `realloc calibrate` takes it into the profile"
        yield f"Off by more than {OFF:.0%}: {', '.join(names)}. Likely: {why}."


def _off(line: Line) -> str:
    return (
        f"{line.name} {_number(line.measured_s)} s"
        if line.ratio is None
        else f"{line.name} x {line.ratio:.2f}"
    )


def comparison_content(comparison: Comparison) -> Mapping[str, object]:
    """The comparison as a JSON object; seconds are in the keys' names."""
    return {
        "costs": comparison.costs,
        "pace": None if comparison.pace is None else dict(vars(comparison.pace)),
        "memory": None if comparison.memory is None else dict(vars(comparison.memory)),
        "iteration": _line_content(comparison, comparison.total),
        "lines": [_line_content(comparison, line) for line in comparison.lines],
        "findings": [
            {**_line_content(comparison, f.line), "causes": list(f.causes)} for f in comparison.findings
        ],
    }


def _line_content(comparison: Comparison, line: Line) -> dict[str, object]:
    return {
        "node": line.node,
        "term": line.term,
        "predicted_s": line.predicted_s,
        "measured_s": line.measured_s,
        "ratio": line.ratio,
        "ratio_at_pace": comparison.at_pace(line),
    }


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
