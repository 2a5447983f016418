"""`realloc run` as a user types it: what it writes, and what it says when something is wrong.

Every case is a process of its own with forked ranks, so there are few of them.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from realloc.cli import main
from realloc.layout import shard_boxes
from realloc.model_shape import read_config, shape_from_config
from realloc.params import parameters
from realloc.plan import read_plan
from realloc.trace import read_trace
from runtime.attention import PackedSequences
from runtime.decoder import Decoder
from runtime.hf import load_boxes
from runtime.parallel import single_rank
from tests.run.workplace import Workplace


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def finished(workplace: Workplace) -> tuple[Path, str]:
    """A run that went well: its folder and what it printed."""
    plan = workplace.plan("good")
    code, out, err = workplace.run("run", plan.name, "--out", "good")
    assert code == 0, err
    return workplace.folder / "good", out


def test_run_says_what_happened(finished: tuple[Path, str]) -> None:
    folder, out = finished
    assert "iteration 2/2" in out
    assert "predicted and measured" in out
    assert "reallocate:actor:actor_gen" in out
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [0, 1]
    assert 0 < records[0]["rew_inf/scores"] <= 1
    assert {"actor_train/loss", "critic_train/loss", "actor_train/grad_norm"} <= records[1].keys()
    assert any((folder / "tensorboard").iterdir())


def test_samples_are_kept_and_shown(finished: tuple[Path, str]) -> None:
    folder, out = finished
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(s["iteration"], s["id"]) for s in samples] == [(0, 0), (0, 6), (1, 13), (1, 19)]
    prompts = {
        json.loads(line)["prompt"] for line in (folder.parent / "train.jsonl").read_text().splitlines()
    }
    for sample in samples:
        assert sample["prompt"] in prompts
        assert sample["scores"] == pytest.approx(min(1.0, len(sample["response"].split()) / 10))
    assert f"sample 19, scores {samples[-1]['scores']:.3f}: {samples[-1]['prompt']} →" in out


def test_trace_has_every_instruction_of_every_rank(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    trace, plan = read_trace(folder / "trace.jsonl"), read_plan(folder / "plan.yaml")
    found = {(r.iteration, r.rank, r.node) for r in trace.records}
    expected = {
        (iteration, rank, node.name)
        for iteration in range(2)
        for node in plan.augmented.nodes
        for rank in node.ranks
    }
    # a checkpoint after the last iteration, and after others that do not end while one is being written
    saved = {record for record in found if record[2] == "checkpoint"}
    paced = {record for record in found if record[2] == "pace"}  # at ends of iterations, not of all
    assert found - saved - paced == expected
    assert {(1, rank, "checkpoint") for rank in range(2)} <= saved
    assert all(r.end_s >= r.start_s and r.wait_s >= 0 for r in trace.records)
    for rank in range(2):
        mine = [r for r in trace.records if r.rank == rank]
        assert all(a.end_s <= b.start_s + 1e-6 for a, b in pairwise(mine))


def test_files_of_a_run_pass_check(workplace: Workplace, finished: tuple[Path, str]) -> None:
    code, out, err = workplace.run("check", "good/plan.yaml", "good/trace.jsonl")
    assert code == 0, err
    assert "plan:" in out
    assert "trace:" in out


def test_trained_model_loads_in_transformers(finished: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM

    folder = finished[0] / "models" / "actor"
    shape = shape_from_config(read_config(folder), "config")
    device = torch.device("cpu")
    params = load_boxes(folder, shape, shard_boxes(shape, 1, 1, 0, 0), torch.float32, device)
    assert params.keys() == {spec.name for spec in parameters(shape)}
    decoder = Decoder(shape, single_rank(device), torch.float32, params)
    tokens = torch.randint(0, shape.vocab, (23,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = decoder.logits(decoder.forward(tokens, PackedSequences((23,))))
        theirs = AutoModelForCausalLM.from_pretrained(folder)(tokens[None]).logits[0]
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-4)


def test_folder_in_use_is_left_alone(workplace: Workplace, finished: tuple[Path, str]) -> None:
    before = (finished[0] / "metrics.jsonl").read_text()
    code, _, err = workplace.run("run", "good.yaml", "--out", "good")
    assert code == 2
    assert "--overwrite" in err
    assert (finished[0] / "metrics.jsonl").read_text() == before


BAD_INPUT: Mapping[str, tuple[str, str]] = {
    "reward module": ("no_such_module:f", "cannot import 'no_such_module'"),
    "reward function": ("my_rewards:lenght", "has no such function"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_before_the_ranks_start(workplace: Workplace, name: str) -> None:
    reward, message = BAD_INPUT[name]
    plan = workplace.plan("bad", reward)
    code, _, err = workplace.run("run", plan.name, "--out", "bad")
    assert code == 2
    assert message in err
    assert "Traceback" not in err


FORBIDDEN: Mapping[str, str] = {
    "d1t8p1": "tp 8 does not divide the 4 attention heads",
    "d2t1p4": "pp 4 exceeds the 2 layers",
    "d2t2p1": "dp 2 x tp 2 x pp 1 = 4, but mesh node[0] has 8",
}


@pytest.mark.parametrize("strategy", FORBIDDEN)
def test_a_strategy_that_the_model_forbids(
    workplace: Workplace, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a plan written by hand: one message, and no folder is made."""
    plan = workplace.plan("forbidden", gpus=8, placements={"*": ("node0", "d8t1p1")})
    content = yaml.safe_load(plan.read_text())
    content["placements"]["actor_train"]["strategy"] = strategy
    plan.write_text(yaml.safe_dump(content))
    assert main(["run", str(plan), "--out", str(workplace.folder / "nowhere")]) == 2
    message = capsys.readouterr().err
    assert "actor_train" in message
    assert FORBIDDEN[strategy] in message
    assert "Traceback" not in message
    assert not (workplace.folder / "nowhere").exists()


FAILURES: Mapping[str, tuple[str, str]] = {
    "a reward that is not a number": ("my_rewards:not_a_number", "expected a finite number"),
    "too few rewards": ("my_rewards:too_few", "one number for each"),
    "a reward function that raises, with the row": ("my_rewards:raises", "train.jsonl, line "),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failing_reward_names_rank_and_call(workplace: Workplace, name: str) -> None:
    reward, message = FAILURES[name]
    plan = workplace.plan("failing", reward)
    code, out, err = workplace.run("run", plan.name, "--out", "failing", "--overwrite")
    assert code == 1, out
    assert message in err
    assert "iteration 0, rew_inf" in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 3
    assert not (workplace.folder / "failing" / "restarts.jsonl").exists()  # it would fail again


def test_killed_rank_is_named(workplace: Workplace) -> None:
    plan = workplace.plan("killed", "my_rewards:slow")
    process = workplace.start("run", plan.name, "--out", "killed", "--max-restarts", "0")
    deadline = time.monotonic() + 60
    while not (workplace.folder / "entered").exists():
        assert time.monotonic() < deadline, "no rank came to the reward function"
        time.sleep(0.1)
    time.sleep(1.0)  # the other rank too
    os.kill(_children(process.pid)[-1], signal.SIGKILL)
    killed_s = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - killed_s < 10
    assert process.returncode == 1
    assert "rank 1 on " in err
    assert "(iteration 0, rew_inf, instruction " in err
    assert "was killed by signal 9 (SIGKILL); it held 0." in err
    assert "Traceback" not in err


def _children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children()]
