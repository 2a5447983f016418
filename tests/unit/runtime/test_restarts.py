"""Who is blamed when ranks fail, and which failures are worth another attempt."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch.distributed as dist

from realloc.errors import InputError, RunError
from runtime.heartbeat import LOADING, Beat
from runtime.restarts import Restarts
from runtime.verdict import (
    DISK,
    ERROR,
    KILLED,
    OTHER,
    OUT_OF_MEMORY,
    PEER,
    USER,
    Failure,
    RankError,
    cause_of,
    failure_of,
    read_errors,
)
from runtime.watchdog import DIED, HUNG, Evidence, Finding
from tests.unit.runtime.test_checkpoint_files import write_checkpoint
from tests.unit.runtime.test_watchdog import PROGRAM

BEATS = {4: Beat(2, 0, 9, False, ""), 5: Beat(2, 1, 9, False, ""), 6: Beat(0, LOADING, 9, False, "")}


def evidence(codes: dict[int, int], finding: Finding | None = None, oom_kills: int = 0) -> Evidence:
    return Evidence(finding, BEATS, codes, {5: 3 * 10**9}, oom_kills)


def test_the_cause_goes_before_what_follows_from_it() -> None:
    peer = RankError(4, 1.0, "RuntimeError", "Connection closed by peer", PEER)
    own = RankError(5, 2.0, "ValueError", "a flaw", OTHER)
    user = RankError(6, 3.0, "RunError", "no reward", USER)

    killed = failure_of(evidence({4: 1, 5: -signal.SIGKILL}), [peer], PROGRAM)
    assert (killed.kind, killed.rank, killed.iteration, killed.instruction) == (KILLED, 5, 2, "call1")
    assert "instruction 2 of 3) was killed by signal 9 (SIGKILL); it held 3.00 GB" in killed.message
    assert failure_of(evidence({5: -signal.SIGKILL}, oom_kills=1), [], PROGRAM).kind == OUT_OF_MEMORY

    raised = failure_of(evidence({4: 1, 5: 1}), [peer, own], PROGRAM)
    assert (raised.kind, raised.rank, raised.is_secondary, raised.is_final) == (ERROR, 5, False, False)
    # gloo aborts a process whose peer is gone
    assert failure_of(evidence({4: -signal.SIGABRT, 5: 1}), [own], PROGRAM).rank == 5
    assert failure_of(evidence({4: 1}), [peer], PROGRAM).is_secondary
    refused = failure_of(evidence({6: 1}), [user], PROGRAM)
    assert refused.is_final
    assert refused.message.endswith("(before the first iteration) failed: no reward")

    hung = Finding(HUNG, 4, BEATS[4], "hangs")
    assert failure_of(evidence({5: -signal.SIGKILL}, hung), [peer], PROGRAM).rank == 4
    died = Finding(DIED, 4, BEATS[4], "has ended")
    assert failure_of(evidence({4: 0}, died), [], PROGRAM).message.endswith("ended with exit code 0")


def test_an_error_that_was_cut_short_is_no_error(tmp_path: Path) -> None:
    reserve = tmp_path / "errors"
    reserve.mkdir()
    error = RankError(0, 1.0, "ValueError", "a flaw", OTHER)
    text = json.dumps(asdict(error))
    for rank, content in enumerate((text, text[:20], "")):
        (reserve / f"rank-{rank}.json").write_text(content.ljust(4096))
    assert read_errors(tmp_path, range(4)) == [error]


def test_causes_of_errors() -> None:
    assert cause_of(InputError("no")) == USER
    assert cause_of(OSError(28, "No space left on device")) == DISK
    assert cause_of(OSError(2, "No such file")) == OTHER
    assert cause_of(dist.DistNetworkError("gone")) == PEER
    assert cause_of(RuntimeError("a flaw")) == OTHER


def test_what_is_tried_again_and_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = Failure(KILLED, "here", "rank 5 was killed", 5, 2, "call1", "call1")
    restarts = Restarts(tmp_path, 3, trust=True)
    assert restarts.after(lost) is None
    for number in (1, 2):
        write_checkpoint(tmp_path, number)
    found = restarts.after(lost)
    assert found is not None
    assert found[0].name == "iteration-2"
    (found[0] / "rank-0.safetensors").write_bytes(b"damaged")
    found = restarts.after(lost)
    assert found is not None
    assert found[1].iteration == 1
    assert "restart 3 of 3, from iteration-1" in capsys.readouterr().err
    with pytest.raises(RunError, match="--max-restarts is 3") as caught:
        restarts.after(lost)
    assert f"realloc run --resume {tmp_path} --trust\n" in str(caught.value)
    rows = [json.loads(line) for line in (tmp_path / "restarts.jsonl").read_text().splitlines()]
    assert [(row["restart"], row["from_iteration"], row["rank"]) for row in rows] == [
        (1, 0, 5),
        (2, 2, 5),
        (3, 1, 5),
    ]


def test_what_would_fail_again_is_not_tried(tmp_path: Path) -> None:
    lost = Failure(KILLED, "here", "rank 5 was killed", 5, 2, "call1", "call1")
    with pytest.raises(RunError, match="rank 5 was killed"):
        Restarts(tmp_path, 3).after(replace(lost, is_final=True))
    restarts = Restarts(tmp_path, 9)
    restarts.after(lost)
    restarts.after(replace(lost, rank=4))
    restarts.after(lost)
    with pytest.raises(RunError, match="in the same place before"):
        restarts.after(lost)
    write_checkpoint(tmp_path, 3)
    assert restarts.after(replace(lost, iteration=3)) is not None
