"""The algorithm that the documentation shows plans and runs from a user's folder, as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.run.workplace import Workplace

PAGE = Path(__file__).parents[2] / "docs" / "algorithms.md"


def test_the_documented_algorithm_plans_and_runs(tmp_path: Path) -> None:
    graph, functions = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (experiment,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S)
    assert len((graph + functions + experiment).splitlines()) < 80
    place = Workplace(tmp_path)
    (tmp_path / "actor").rename(tmp_path / "my-llama")
    for name, text in (("gspo.py", graph), ("gspo_functions.py", functions), ("gspo.yaml", experiment)):
        (tmp_path / name).write_text(text)
    code, _, err = place.run("search", "gspo.yaml", "-o", "plan.yaml", "--time-limit", "2")
    assert code == 0, err
    code, _, err = place.run("run", "plan.yaml", "--out", "out")
    assert code == 0, err
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2
    # advantages of a group add up to 0, so the loss does at first, not its gradient
    norms = [record["actor_train/grad_norm"] for record in metrics]
    assert norms[0] > 0
    assert norms[0] != norms[1]
