"""Dataflow graphs as text and pictures: every call, in columns that follow the data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from planner.drawing import columns, graph_svg, graph_text
from realloc.algorithm import BUILT_IN
from realloc.cli import main
from realloc.dataflow import DataflowGraph
from realloc.experiment import parse_experiment
from realloc.files import Reader


def graph_of(algorithm: str) -> DataflowGraph:
    models = {"ppo": ("actor", "critic", "ref", "reward"), "dpo": ("actor", "ref")}
    content = {
        "algorithm": algorithm,
        "models": dict.fromkeys(models.get(algorithm, ("actor", "ref", "reward")), "llama-7b"),
        "workload": {
            "sequences": 8, "prompt_tokens": 16, "response_tokens": 16, "samples_per_prompt": 2
        },
    }  # fmt: skip
    return parse_experiment(Reader(content, "experiment.yaml"), Path("/nowhere")).graph()


@pytest.mark.parametrize("algorithm", ["ppo", "remax", "dpo"])
def test_calls_stand_right_of_what_they_read_from(algorithm: str) -> None:
    graph = graph_of(algorithm)
    at = {call.name: x for x, column in enumerate(columns(graph)) for call in column}
    assert at.keys() == graph.by_name.keys()
    assert all(at[src] < at[dst] for src, dst in graph.data_edges())


def test_text_says_who_reads_what_from_whom() -> None:
    text = " ".join(graph_text(graph_of("remax")).split())
    assert "greedy_gen generate of actor, greedy; reads prompts from the data set" in text
    assert "greedy_scores from greedy_rew_inf" in text
    chosen = " ".join(graph_text(graph_of("iterative_dpo")).split())
    assert "actor_train train_step of actor, on 8 selected sequences; reads" in chosen
    assert "actor_train gives actor_gen, greedy_gen the parameters of the next iteration." in text


@pytest.mark.parametrize("algorithm", ["ppo", "remax", "dpo"])
def test_a_picture_is_xml_within_its_view_box(algorithm: str) -> None:
    graph = graph_of(algorithm)
    root = ElementTree.fromstring(graph_svg(graph, "a <title>"))
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    texts = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert graph.by_name.keys() <= texts
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert len(lines) == graph.as_networkx().number_of_edges()
    for line in lines:
        for x, y in (map(float, point.split(",")) for point in line.attrib["points"].split()):
            assert 0 <= x <= width
            assert 0 <= y <= height


def test_algorithms_are_listed_with_their_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["algorithms", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(BUILT_IN)
    names = {"ppo", "grpo", "rloo", "remax", "reinforce_pp", "raft", "dpo", "iterative_dpo", "sft", "reward"}
    assert names <= set(found)
    assert [call["kind"] for call in found["remax"]["calls"]].count("generate") == 2
    assert {"from": "actor_train", "to": "actor_gen", "keys": [], "lag": 1} in found["grpo"]["edges"]
    assert main(["algorithms"]) == 0
    assert re.search(r"^rloo: .*\n +actor_gen \(generate of actor\)", capsys.readouterr().out, re.M)


def test_graph_draws_an_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "realloc: experiment/1\nalgorithm: dpo\nmodels: {actor: llama-7b, ref: llama-7b}\nworkload: "
        "{sequences: 8, prompt_tokens: 4, response_tokens: 4, samples_per_prompt: 2}\n"
    )
    assert main(["graph", str(path), "-o", str(tmp_path / "x.svg")]) == 0
    assert "ref_logprobs from ref_inf" in capsys.readouterr().out
    assert (tmp_path / "x.svg").read_text().startswith("<svg")
    assert main(["graph", str(path), "-o", str(path)]) == 2
