"""From a plan to a run and back, as a user types it: simulate, run, diff, calibrate, lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cost_models.profile import HardwareProfile, Provenance, write_profile
from realloc.cli import main
from realloc.files import dump_yaml
from realloc.plan import read_plan
from realloc.trace import read_trace
from runtime.machine import this_machine
from tests.ranks.engine import ppo_content
from tests.run.workplace import Workplace
from tests.unit.cost_models.cases import profile

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace with a profile that is said to be of this machine, and a run planned with it."""
    made = Workplace(tmp_path_factory.mktemp("truth"))
    write_profile(_of_this_machine(), made.folder / "profile.yaml")
    content = ppo_content(made.folder, made.models, reward="my_rewards:length", iterations=4)
    content["workload"]["prompt_tokens"] = "measured"
    content["cluster"] = {"gpus_per_node": 2, "device": "profile.yaml"}
    (made.folder / "experiment.yaml").write_text(dump_yaml("experiment", content))
    code, _, err = made.run("search", "experiment.yaml", "-o", "searched.yaml", "--time-limit", "2")
    assert code == 0, err
    code, out, err = made.run("run", "searched.yaml", "--out", "ran")
    assert code == 0, err
    made.folder.joinpath("said.txt").write_text(out)
    return made


def _of_this_machine() -> HardwareProfile:
    """Guesses, several times too slow, so that no busy machine makes them right."""
    device = this_machine(False).device
    return profile(
        provenance=Provenance("analytic", device, "2026-01-01"), launch_s=1e-4, call_s=1e-3, sequence_s=1e-4
    )


@pytest.fixture
def typed(workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Runs a command in the workplace, in this process: (exit code, output, errors)."""
    monkeypatch.chdir(workplace.folder)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_run_ends_with_its_comparison_and_diff_says_the_same(workplace: Workplace, typed: Typed):
    said = (workplace.folder / "said.txt").read_text()
    code, out, err = typed("diff", "searched.yaml", "ran")
    assert code == 0, err
    assert out.strip() in said
    # guessed costs are off, and the reason is said
    assert "Off by more than 20%" in out
    assert "not measured" in out


def test_the_trace_has_terms_and_lengths(workplace: Workplace):
    trace = read_trace(workplace.folder / "ran" / "trace.jsonl")
    assert [item.iteration for item in trace.lengths] == [0, 1, 2, 3]
    assert sum(count for _, count in trace.lengths[0].response) == 12
    trained = [r for r in trace.records if r.node == "actor_train"]
    assert all(0 < r.terms["optimizer"] < r.end_s - r.start_s for r in trained)
    assert all(r.cpu_s > 0 for r in trained)
    assert trace.machine is not None
    assert trace.machine.device == this_machine(False).device


def test_measured_prompts_are_those_of_the_run(workplace: Workplace, typed: Typed):
    planned = read_plan(workplace.folder / "searched.yaml").experiment.workload.prompt
    code, out, err = typed("lengths", "ran")
    assert code == 0, err
    trace = read_trace(workplace.folder / "ran" / "trace.jsonl")
    seen = [tokens for item in trace.lengths for tokens, _ in item.prompt]
    assert planned.histogram
    assert {tokens for tokens, _ in planned.histogram} >= set(seen)
    assert out.startswith("prompt_tokens: {max: ")
    assert "response_tokens: {max: " in out


def test_calibrate_makes_the_next_predictions_better(typed: Typed):
    code, out, err = typed("calibrate", "ran", "-o", "better.yaml")
    assert code == 0, err
    assert "train_step.optimizer" in out
    diffs = {}
    for device in ("profile.yaml", "better.yaml"):
        code, out, err = typed("diff", "searched.yaml", "ran", "--device", device, "--json")
        assert code == 0, err
        content = json.loads(out)
        whole = [line for line in content["lines"] if line["node"] and not line["term"]]
        diffs[device] = abs(sum(line["measured_s"] - line["predicted_s"] for line in whole))
    assert diffs["better.yaml"] < 0.5 * diffs["profile.yaml"]


def test_simulate_shows_the_plan_without_running_it(workplace: Workplace, typed: Typed):
    code, out, err = typed("simulate", "searched.yaml", "--trace", "plan.json")
    assert code == 0, err
    assert "Critical path" in out
    assert json.loads((workplace.folder / "plan.json").read_text())["traceEvents"]


def test_what_does_not_belong_together_is_one_message(workplace: Workplace, typed: Typed, tmp_path: Path):
    other = workplace.plan("other")
    (tmp_path / "empty").mkdir()
    trace = workplace.folder / "ran" / "trace.jsonl"
    bare = tmp_path / "bare.jsonl"
    bare.write_text(trace.read_text().splitlines()[0] + "\n")
    for arguments, message in (
        (("diff", str(other), "ran"), "of another plan"),
        (("diff", "searched.yaml", str(tmp_path / "empty")), "has no trace.jsonl"),
        (("diff", "searched.yaml", str(bare)), "has no records"),
        (("calibrate", str(tmp_path / "empty"), "-o", "x.yaml"), "is no run's folder"),
        (("calibrate", "ran", "-o", "x.yaml", "--device", "h100-sxm"), "the run was on"),
        (("lengths", str(bare)), "says nothing of lengths"),
        (("simulate", "searched.yaml", "--device", "h100-sx"), "Did you mean"),
    ):
        code, _, err = typed(*arguments)
        assert code == 2, (arguments, err)
        assert message in err, (arguments, err)
        assert err.count("\n") == 1, err
