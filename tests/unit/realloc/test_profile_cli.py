"""`realloc profile` on several nodes: what contradicts itself is said before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from realloc.cli import main

TWO = ["--nnodes", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (TWO, "give --rdzv-endpoint HOST:PORT"),
        (
            [*TWO, "--node-rank", "2", "--rdzv-endpoint", "here:29400"],
            "--node-rank 2: nodes are numbered 0 to 1",
        ),
        (["--node-rank", "1"], "--node-rank 1: nodes are numbered 0 to 0"),
        # an address that is kept for documentation: nobody has it
        ([*TWO, "--rdzv-endpoint", "192.0.2.1:29400"], "192.0.2.1:29400: cannot be listened on"),
    ],
)
def test_nodes_that_cannot_meet(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "profile.yaml"
    assert main(["profile", "--quick", "-o", str(output), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()
