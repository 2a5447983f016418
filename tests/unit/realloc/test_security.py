"""What a file may not do: run code unasked, leave its folder; and what no module of ours may use."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from realloc.cli import main
from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Per
from realloc.errors import InputError
from realloc.experiment import read_experiment
from realloc.plan import read_plan
from realloc.trust import check_functions, is_ours, module_file
from tests.unit.realloc.make import plan_mapping, write

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("realloc", "cost_models", "planner", "runtime", "experiments", "benchmarks", "tests")
MARK = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
ALGORITHM = MARK + "from experiments.ppo import PPO as Mine\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module of the user's, which says when it is imported."""
    (tmp_path / "mine_of_a_test.py").write_text(
        ALGORITHM + "def score(samples): return [0.0] * len(samples)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("mine_of_a_test", None)


def plan_with(folder: Path, **experiment: object) -> Path:
    content = plan_mapping()
    content["experiment"] |= experiment
    if "reward" in experiment:
        del content["experiment"]["models"]["reward"]
        content["placements"]["rew_inf"] = {"mesh": "node0", "strategy": "d8t1p1"}
    content["cluster"]["device"] = "h100-sxm"
    return write(folder / "plan.yaml", content)


def test_a_plan_imports_no_algorithm_unless_trusted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = plan_with(folder, algorithm="mine_of_a_test:Mine")
    for command in (["check"], ["explain"], ["simulate"], ["run", "--out", "o"], ["report", "-o", "r.html"]):
        assert main([command[0], str(path), *command[1:]]) == 2
        message = capsys.readouterr().err
        assert "algorithm: mine_of_a_test:Mine" in message
        assert str(folder / "mine_of_a_test.py") in message
        assert "--trust" in message
    assert not (folder / "ran").exists()
    assert main(["check", "--trust", str(path)]) == 0
    assert (folder / "ran").exists()


def test_an_experiment_is_the_users_own(folder: Path) -> None:
    content = yaml.safe_load(plan_with(folder, algorithm="mine_of_a_test:Mine").read_text())["experiment"]
    path = write(folder / "e.yaml", {"realloc": "experiment/1", **content})
    assert read_experiment(path).algorithm == "mine_of_a_test:Mine"
    assert (folder / "ran").exists()


def test_a_reward_is_named_with_its_file_and_not_imported(folder: Path) -> None:
    plan = read_plan(plan_with(folder, reward="mine_of_a_test:score"))  # reading and planning run no reward
    with pytest.raises(InputError) as refused:
        check_functions(plan.graph, "plan", trust=False)
    assert f"reward: mine_of_a_test:score ({folder / 'mine_of_a_test.py'})" in str(refused.value)
    check_functions(plan.graph, "plan", trust=True)
    ours = read_plan(plan_with(folder, reward="experiments.rewards:cheerful_story"))
    check_functions(ours.graph, "plan", trust=False)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("entry", "ours"),
    [
        ("experiments.ppo:PPO", True),
        ("experiments.rewards:sentiment", True),
        ("experiments.rewards:_private", False),
        ("experiments:x", False),
        ("experiments_of_mine.x:y", False),
        ("os:system", False),
        ("experiments.rewards:os.system", False),
    ],
)
def test_what_counts_as_ours(entry: str, ours: bool) -> None:
    assert is_ours(entry) == ours


def test_modules_are_found_without_their_packages_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "loud_package"
    package.mkdir()
    (package / "__init__.py").write_text(MARK)
    (package / "inner.py").write_text(MARK)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert module_file("loud_package.inner:f") == str(package / "inner.py")
    assert module_file("loud_package.none:f") == "not found"
    assert not (package / "ran").exists()


@pytest.mark.parametrize("name", ["../../escape", "a/b", "", ".", "..", ".hidden", "a:b", "x" * 200, "a\n"])
def test_names_that_could_lead_out_of_a_folder(name: str) -> None:
    graphs = [
        DataflowGraph(
            (Call(call, CallKind.GENERATE, ("p",), ("t",), role, "p"),),
            (DataKey("p", Per.PROMPT_TOKEN, "int64"), DataKey("t", Per.TOKEN, "int64")),
            ("p",),
        )
        for call, role in ((name, "actor"), ("gen", name))
    ]
    for graph in graphs:
        with pytest.raises(InputError):
            graph.check()


FORBIDDEN = {
    "pickle": "runs code when read",
    "cPickle": "runs code when read",
    "dill": "runs code when read",
    "cloudpickle": "runs code when read",
    "shelve": "pickles",
    "marshal": "runs code when read",
    "torch.load": "unpickles",
    "torch.save": "pickles",
    "torch.distributed.checkpoint": "pickles its metadata",
    "dist.all_gather_object": "pickles",
    "dist.gather_object": "pickles",
    "dist.broadcast_object_list": "pickles",
    "dist.scatter_object_list": "pickles",
    "dist.send_object_list": "pickles",
    "dist.recv_object_list": "pickles",
    "torch.distributed.rpc": "pickles",
    "multiprocessing.Queue": "pickles",
    "multiprocessing.Manager": "pickles, and listens",
}
PRIVATE_PIPES = {
    "planner/cores.py": "results of forked children, through an anonymous pipe that nobody else holds",
    "tests/ranks/launch.py": "results of forked test ranks, in the same way",
}
"""The only places where multiprocessing pickles: both ends are this process and its own children."""


def used_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports or looks up."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            parts = [node.attr]
            value: ast.expr = node.value
            while isinstance(value, ast.Attribute):
                parts.append(value.attr)
                value = value.value
            if isinstance(value, ast.Name):
                yield ".".join([value.id, *reversed(parts)])
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield "allow_pickle"


def offences(path: Path) -> list[str]:
    """Uses of pickle in a module, and of multiprocessing's pipes where they are not listed."""
    found = []
    for name in used_names(ast.parse(path.read_text(encoding="utf-8"))):
        if name in FORBIDDEN:
            found.append(f"{name}: {FORBIDDEN[name]}")
        last = name.rpartition(".")[2]
        if last in ("Pipe", "SimpleQueue", "JoinableQueue", "Pool", "ProcessPoolExecutor", "allow_pickle"):
            found.append(f"{name}: pickles")
    return found


def test_no_pickle_anywhere() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 200
    found = {str(path.relative_to(ROOT)): names for path in files if (names := offences(path))}
    assert set(found) <= set(PRIVATE_PIPES), found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch.distributed as dist\ndist.all_gather_object([], 1)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import torch.distributed.checkpoint as dcp",
        "import multiprocessing\nmultiprocessing.Queue()",
    ],
)
def test_the_search_for_pickle_finds_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.py"
    path.write_text(text)
    assert offences(path)
