"""The command line: what it prints, what it writes, and how each kind of failure ends."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from realloc import __version__, cli
from realloc.cli import main
from realloc.errors import RunError
from realloc.plan import read_plan
from realloc.trace import TraceRecord, trace_lines
from tests.unit.realloc.make import experiment_mapping, plan_mapping, write

ROOT = Path(__file__).parents[3]


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that must end with code 2, one message and no traceback."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("realloc: error: ")
    assert "Traceback" not in captured.err
    return captured.err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What argparse says about arguments that it refuses."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "realloc", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().partition(".")[0] for line in lines}


def test_help_comes_at_once_and_imports_nothing_heavy() -> None:
    taken = []
    for _ in range(3):  # the machine may be busy with other work
        began = time.perf_counter()
        done = start("--help")
        taken.append(time.perf_counter() - began)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: realloc")
        assert not imported(done) & {"torch", "numpy", "networkx", "yaml", "planner", "runtime"}
        if taken[-1] < 1.0:
            break
    assert min(taken) < 1.0


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "experiment.yaml", small_experiment())
    done = start("search", str(path), "--time-limit", "1")
    assert done.returncode == 0, done.stderr
    assert "planner" in imported(done)
    assert not imported(done) & {"torch", "transformers", "runtime"}


def test_version_and_unknown_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"realloc {__version__}\n"
    assert "invalid choice: 'serch'" in refusal(capsys, "serch")
    assert "required: COMMAND" in refusal(capsys)
    assert "unrecognized arguments: --sed" in refusal(capsys, "search", "e.yaml", "--sed", "1")
    assert "required: FILE" in refusal(capsys, "check")
    assert "required: FILE" in refusal(capsys, "check")


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "soon", ""])
def test_wrong_time_limits(capsys: pytest.CaptureFixture[str], limit: str) -> None:
    assert "argument --time-limit" in refusal(capsys, "search", "e.yaml", f"--time-limit={limit}")


@pytest.mark.parametrize("number", ["-1", "x", "1.5", "9" * 5000, str(2**31)])
def test_wrong_counts(capsys: pytest.CaptureFixture[str], number: str) -> None:
    assert "argument --seed" in refusal(capsys, "search", "e.yaml", f"--seed={number}")
    assert "argument --iterations" in refusal(capsys, "run", "p.yaml", f"--iterations={number}")
    assert "argument --ranks" in refusal(capsys, "profile", f"--ranks={number}")
    assert "must be at least 1" in refusal(capsys, "run", "p.yaml", "--iterations=0")


def small_experiment() -> dict[str, Any]:
    content = experiment_mapping()
    content["models"] = dict.fromkeys(content["models"], "pythia-14m")
    content["workload"] = {"sequences": 8, "prompt_tokens": 16, "response_tokens": 16}
    content["hyperparameters"] = {"mini_batches": 1}
    content["cluster"] = {"nodes": 1, "gpus_per_node": 2, "device": "h100-sxm"}
    return content


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    return write(tmp_path / "experiment.yaml", small_experiment())


def test_search_writes_a_plan_that_is_read_back(
    experiment: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "deep" / "plan.yaml"
    arguments = ["search", str(experiment), "-o", str(output), "--time-limit", "2", "--seed", "3"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "actor_train" in printed
    assert f"\nWrote {output}; run it with: realloc run {output}\n" in printed
    plan = read_plan(output)
    assert plan.cluster.num_gpus == 2
    assert plan.predictions is not None
    assert main(["check", str(output)]) == 0
    assert capsys.readouterr().out.startswith(f"{output}: plan: ppo of actor pythia-14m")


def test_search_prints_json_alone(
    experiment: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "plan.yaml"
    assert main(["search", str(experiment), "--time-limit", "2", "--json", "-o", str(output)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert set(content["placements"]) == set(read_plan(output).placements)
    assert content["iteration_s"] > 0


def test_search_without_output_says_how_to_keep_the_plan(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(experiment), "--time-limit", "2"]) == 0
    assert "give -o plan.yaml to keep it" in capsys.readouterr().out


def test_options_change_the_cluster(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.yaml"
    search = ["search", str(experiment), "--time-limit", "1", "-o", str(output)]
    assert main([*search, "--gpus-per-node", "4"]) == 0
    assert str(read_plan(output).cluster) == "1 node x 4 h100-sxm"
    cluster = write(tmp_path / "c.yaml", "realloc: cluster/1\ngpus_per_node: 1\ndevice: a100-80gb\n")
    assert main([*search, "--cluster", str(cluster)]) == 0
    assert str(read_plan(output).cluster) == "1 node x 1 a100-80gb"
    assert "--cluster and --nodes both describe the cluster" in failure(
        capsys, *search, "--cluster", cluster, "--nodes", 2
    )


def test_search_without_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = small_experiment()
    del content["cluster"]
    path = write(tmp_path / "e.yaml", content)
    found = failure(capsys, "search", path)
    assert "names no cluster. Give --cluster FILE, or --nodes N --gpus-per-node G --device NAME" in found
    found = failure(capsys, "search", path, "--nodes", 2, "--device", "h100-sxm")
    assert "so --gpus-per-node is needed beside --nodes" in found
    found = failure(capsys, "search", path, "--nodes", 0, "--device", "cpu", "--gpus-per-node", 2)
    assert "command line: cluster.nodes: 0 is below" in found


def test_search_refuses_before_it_works(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such file" in failure(capsys, "search", tmp_path / "none.yaml")
    assert "would overwrite the experiment" in failure(capsys, "search", experiment, "-o", experiment)
    assert "is a directory; name a file" in failure(capsys, "search", experiment, "-o", tmp_path)
    assert "method 'guess' is not known" in failure(capsys, "search", experiment, "--method", "guess")
    assert "device 'h1000'" in failure(capsys, "search", experiment, "--device", "h1000")
    plan = write(tmp_path / "plan.yaml", plan_mapping())
    assert "is a realloc plan file, expected a experiment" in failure(capsys, "search", plan)


def test_check_says_what_files_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    records = [TraceRecord(i, 0, "gen", "call", float(i), i + 1.0) for i in range(3)]
    trace.write_text("\n".join(trace_lines(2, records)), encoding="utf-8")
    header = tmp_path / "trace.yaml"  # a trace's header alone is YAML too
    header.write_text(next(iter(trace_lines(2, records))), encoding="utf-8")
    files = {
        write(tmp_path / "e.yaml", experiment_mapping()): "experiment: ppo of actor llama-7b",
        write(tmp_path / "p.yaml", plan_mapping()): "12.5 s an iteration predicted",
        write(tmp_path / "c.yaml", "realloc: cluster/1\ngpus_per_node: 4\ndevice: x"): "1 node x 4 x, 4 GPUs",
        ROOT / "cost_models" / "profiles" / "h100-sxm.yaml": "profile: NVIDIA H100",
        trace: "trace: 2 ranks, 3 iterations, 3 records, 1 s an iteration",
        header: "trace: 2 ranks, 0 iterations, 0 records",
    }
    assert main(["check", *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, (path, expected) in zip(lines, files.items(), strict=True):
        assert line.startswith(f"{path}: ")
        assert expected in line


def test_check_goes_on_after_a_wrong_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.yaml", "realloc: cluster/1\ngpus_per_node: 4\ndevice: x")
    bad = write(tmp_path / "bad.yaml", "realloc: cluster/1\ngpus_per_node: 4\ndevise: x")
    assert main(["check", str(bad), str(good), str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == f"{good}: cluster: 1 node x 4 x, 4 GPUs\n"
    assert captured.err.splitlines() == [
        f"realloc: error: {bad}: the key 'device' is missing (expected text).",
        f"realloc: error: {tmp_path}: is a directory, expected a file.",
    ]


def test_run_refuses_a_wrong_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in failure(capsys, "run", tmp_path / "none.yaml", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_recipe_is_a_valid_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    recipes = sorted((ROOT / "experiments" / "recipes").glob("*_*x*.yaml"))  # those of named shapes
    assert recipes
    assert main(["check", *map(str, recipes)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(recipes)


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (RunError("rank 3 died."), 1, "realloc: error: rank 3 died.\n"),
        (KeyboardInterrupt(), 130, "realloc: interrupted\n"),
    ],
)
def test_how_commands_end(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    expected: str,
) -> None:
    def command(arguments: object) -> int:
        raise error

    monkeypatch.setattr(cli.check, "_check", command)
    assert main(["check", "x"]) == code
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("error", [ValueError("a bug"), BrokenPipeError("a socket of ours")])
def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def command(arguments: object) -> int:
        raise error

    monkeypatch.setattr(cli.check, "_check", command)
    with pytest.raises(type(error), match=str(error)):
        main(["check", "x"])


def test_a_reader_that_stops_is_no_error(tmp_path: Path) -> None:
    """As in `realloc check ... | head -1`: silent, with the code that SIGPIPE gives."""
    path = write(tmp_path / "c.yaml", "realloc: cluster/1\ngpus_per_node: 4\ndevice: x")
    command = [sys.executable, "-m", "realloc", "check", *[str(path)] * 2000]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141
