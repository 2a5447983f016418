"""The cost model against the published measurements beside the test data; skipped without them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.published import compare

DATA = Path(os.environ.get("REALLOC_DATA", Path(__file__).parents[3] / "shared" / "data"))
FILE = DATA.parent / "published.yaml"


@pytest.mark.skipif(not FILE.exists(), reason="no published measurements beside REALLOC_DATA")
def test_rows_that_were_not_fitted_are_within_15_percent_and_search_beats_every_heuristic():
    report = compare([FILE], 0.5)
    assert report["error_predict"] < 0.15
    settings = [row for row in report["rows"] if row["section"].startswith("real_v1")]
    assert len(settings) >= 12
    for row in settings:
        assert row["gain_predicted"] > 1.0
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.2)
