"""The cost model and the planner against published measurements.

`python benchmarks/published.py FILE... [--quick] --json` reads files of the format of `published.yaml`, fits
each system's few free parameters on its rows marked `use: fit`, and predicts the others.

Fields of the last line: `rows` (the row's own fields, `section`, `use`, `measured`, `predicted`, `error`; of
ReaL's settings also `gain_measured` and `gain_predicted`, of the best plan found among those that ReaL could
run, and `gain_predicted_mcmc`, of the one that a Metropolis search finds among them; a row that cannot be
predicted has `predicted: null` and `reason`), `skipped` sections with reasons,
`error_predict` (mean absolute error of the explained rows that were not fitted), `parameters`, `splits`,
`left_out` (errors of fitted settings, each left out of the fit). `docs/published.md` says what is fitted and
what cannot be explained.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.provenance import provenance  # noqa: E402
from benchmarks.published_fit import Values, fit, left_out  # noqa: E402
from benchmarks.published_others import Collectives, Decode, device_of  # noqa: E402
from benchmarks.published_real import Real  # noqa: E402
from benchmarks.published_rows import FIT, PREDICT, Row, System, Unsupported  # noqa: E402
from benchmarks.published_runs import Runs  # noqa: E402
from benchmarks.published_training import Megatron, Titan  # noqa: E402
from realloc.errors import ReallocError  # noqa: E402
from realloc.files import read_yaml  # noqa: E402

SEARCH_S, QUICK_S = 6.0, 2.0


def system_of(section: str, content: Any, search_s: float) -> System:
    """The system that a section is about, by what its rows measure. Raises Unsupported."""
    if section.startswith("collectives") and isinstance(content, list):
        return Collectives(section, [row for row in content if isinstance(row, dict)])
    if not isinstance(content, dict):
        raise Unsupported(f"{section}: neither a mapping nor a list of collectives")
    given = content.get("rows")
    keys = (
        {key for row in given if isinstance(row, dict) for key in row} if isinstance(given, list) else set()
    )
    device = device_of(f"{content.get('source', '')} {section}")
    makers: Mapping[str, Callable[[], System]] = {
        "heuristic_s": lambda: Real(section, content, search_s),
        "tflops_per_gpu": lambda: Megatron(section, content, device or "h100-sxm"),
        "tokens_per_s_per_gpu": lambda: Titan(section, content, device or "h100-sxm"),
        "tokens_per_s": lambda: Decode(section, content, device or "a100-80gb"),
    }
    for key, make in makers.items():
        if key in keys:
            return make()
    raise Unsupported(f"{section}: no system is known whose rows say {', '.join(sorted(keys)) or 'nothing'}")


def compare(files: Sequence[Path], search_s: float) -> Mapping[str, Any]:
    """Everything of the last line but where it was run."""
    report: dict[str, Any] = {"rows": [], "skipped": {}, "parameters": {}, "left_out": {}, "splits": []}
    sections = merged(files)
    runs = {name: content for name, content in sections.items() if is_runs(content)}
    real: tuple[Real, Values] | None = None
    for section, content in sections.items():
        if section in runs:
            continue
        try:
            system = system_of(section, content, search_s)
            values = _fitted(section, system, report)
        except ReallocError as reason:
            report["skipped"][section] = str(reason)
            continue
        report["rows"] += [_row(system, row, values) for row in system.rows]
        if isinstance(system, Real):
            real = system, values
            report["splits"] += system.splits(values)
    for section, content in runs.items():
        try:
            if real is None:
                raise Unsupported(
                    f"{section}: is priced with the parameters of ReaL's rows, which are missing"
                )
            system = Runs(section, content, real[0])
            report["rows"] += [_row(system, row, real[1]) for row in system.rows]
        except ReallocError as reason:
            report["skipped"][section] = str(reason)
    report["error_predict"] = _mean_error(report["rows"], PREDICT)
    report["error_fit"] = _mean_error(report["rows"], FIT)
    return report


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """Sections of all files; rows of one section in several files are put together."""
    sections: dict[str, Any] = {}
    for path in files:
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise Unsupported(f"{path}: expected a mapping of sections")
        for section, found in content.items():
            before = sections.get(section)
            if isinstance(before, dict) and isinstance(found, dict):
                rows = [*(before.get("rows") or []), *(found.get("rows") or [])]
                sections[section] = {**before, **found, **({"rows": rows} if rows else {})}
            elif isinstance(before, list) and isinstance(found, list):
                sections[section] = [*before, *found]
            else:
                sections[section] = found
    return sections


def is_runs(content: Any) -> bool:
    return (
        isinstance(content, dict) and "rows" not in content and ("hours" in content or "seconds" in content)
    )


def _fitted(section: str, system: System, report: dict[str, Any]) -> Values:
    """Fits the system's parameters and says what came out."""
    targets = []
    for index, row in enumerate(system.rows):
        if row.use == FIT:
            try:
                system.predict(row, {p.name: p.start for p in system.parameters})
            except ReallocError:
                continue  # its own report says why
            targets += system.targets(row, index)
    values = fit(system.parameters, targets) if targets else {p.name: p.default for p in system.parameters}
    report["parameters"][section] = {
        p.name: {"value": values[p.name], "start": p.start, "is_fitted": bool(targets), "meaning": p.meaning}
        for p in system.parameters
    }
    if targets and system.parameters:
        errors = left_out(system.parameters, targets)
        report["left_out"][section] = {
            "errors": [{**system.rows[i].fields, "error": error} for i, error in errors.items()],
            "mean": mean(map(abs, errors.values())),
        }
    return values


def _row(system: System, row: Row, values: Values) -> Mapping[str, Any]:
    found: dict[str, Any] = {**row.fields, "section": row.section, "use": row.use, "measured": row.measured}
    found["explained"] = row.explained
    if row.note:
        found["note"] = row.note
    try:
        found["predicted"] = system.predict(row, values)
        if row.measured is not None:
            found["error"] = found["predicted"] / row.measured - 1.0
        found.update(system.more(row, values))
    except ReallocError as reason:
        found.setdefault("predicted", None)
        found["reason"] = str(reason)
    return found


def _mean_error(rows: Sequence[Mapping[str, Any]], use: str) -> float | None:
    errors = [abs(row["error"]) for row in rows if row["use"] == use and row["explained"] and "error" in row]
    return mean(errors) if errors else None


def show(report: Mapping[str, Any]) -> None:
    for row in report["rows"]:
        own = {k: v for k, v in row.items() if k not in _REPORTED}
        name = ", ".join(
            f"{key} {value}" for key, value in own.items() if not isinstance(value, (dict, list))
        )
        if row["predicted"] is None:
            print(f"{row['section']}: {name}: not predicted: {row['reason']}")
            continue
        gain = ""
        if row.get("gain_predicted"):
            gain = f"; gain {row['gain_measured'] or float('nan'):.2f}, predicted {row['gain_predicted']:.2f}"
            gain += f", by sampling {row['gain_predicted_mcmc'] or float('nan'):.2f}"
        mark = "" if row["explained"] else " (not explained)"
        error = f" ({row['error']:+.1%})" if "error" in row else ""
        numbers = f"{row['measured']}, predicted {row['predicted']:.4g}{error}"
        print(f"{row['section']}: {name} [{row['use']}]: {numbers}{gain}{mark}")
    for section, reason in report["skipped"].items():
        print(f"skipped: {section}: {reason}")
    for split in report["splits"]:
        print(f"split: {split}")
    for section, parameters in report["parameters"].items():
        given = ", ".join(f"{name} {p['value']:.4g}" for name, p in parameters.items())
        out = report["left_out"].get(section)
        print(f"{section}: {given or 'no parameters'}" + (f"; left out {out['mean']:.1%}" if out else ""))
    print(f"mean error of rows not fitted: {report['error_predict']}, of fitted ones: {report['error_fit']}")


_REPORTED = (
    *(
        "section",
        "use",
        "measured",
        "predicted",
        "error",
        "explained",
        "note",
        "reason",
        "plan",
        "source",
        "what",
    ),
    *(
        "gain_measured",
        "gain_predicted",
        "gain_predicted_mcmc",
        "searched_predicted",
        "gain_predicted_published_plan",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="files of published measurements")
    parser.add_argument("--quick", action="store_true", help="shorter searches")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parser.parse_args(arguments)
    try:
        report = compare(given.files, QUICK_S if given.quick else SEARCH_S)
    except ReallocError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(report)
    if given.json:
        print(json.dumps({**report, "provenance": provenance(())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
