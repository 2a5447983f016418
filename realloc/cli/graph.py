"""`realloc graph` and `realloc algorithms`: which calls an experiment has, and which algorithms there are."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realloc.cli.values import Commands, check_output

if TYPE_CHECKING:
    from realloc.dataflow import DataflowGraph


def add(commands: Commands) -> None:
    graph = commands.add_parser("graph", help="draw the dataflow graph of an experiment", allow_abbrev=False)
    graph.add_argument("experiment", metavar="EXPERIMENT", type=Path, help="the experiment's YAML file")
    graph.add_argument("-o", "--output", metavar="SVG", type=Path, help="write a picture to this file")
    graph.add_argument("--json", action="store_true", help="print the graph as JSON instead of text")
    graph.set_defaults(command=_graph)
    algorithms = commands.add_parser(
        "algorithms", help="list the algorithms and their dataflow graphs", allow_abbrev=False
    )
    algorithms.add_argument("--json", action="store_true", help="print the list as JSON instead of text")
    algorithms.set_defaults(command=_algorithms)


def _graph(arguments: argparse.Namespace) -> int:
    from planner.drawing import graph_svg, graph_text
    from realloc.experiment import read_experiment
    from realloc.files import write_text

    output: Path | None = arguments.output
    experiment = read_experiment(arguments.experiment)
    graph = experiment.graph()
    print(json.dumps(_content(graph), indent=2) if arguments.json else graph_text(graph))
    if output is not None:
        check_output(output, arguments.experiment)
        write_text(output, graph_svg(graph, f"{arguments.experiment.stem}: {experiment.algorithm}"))
        if not arguments.json:
            print(f"Wrote {output}.")
    return 0


def _algorithms(arguments: argparse.Namespace) -> int:
    from planner.words import paragraph
    from realloc.algorithm import BUILT_IN, resolve

    found: dict[str, Any] = {}
    for name in BUILT_IN:
        algorithm = resolve(name, "algorithms")
        documentation = sys.modules[type(algorithm).__module__].__doc__ or ""
        graph = algorithm.graph(_example(name))
        graph.check()
        found[name] = {"summary": documentation.strip().splitlines()[0], **_content(graph)}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, content in found.items():
        print(f"{name}: {content['summary']}")
        calls = (f"{call['name']} ({call['kind']} of {call['role']})" for call in content["calls"])
        print(paragraph(", ".join(calls), "    "))
    return 0


def _example(algorithm: str) -> Any:
    """An experiment that every built-in algorithm has a graph for: a reward model, pairs of samples."""
    from realloc.experiment import Experiment, ModelSpec, OptimizerSpec, Workload
    from realloc.lengths import Lengths
    from realloc.model_shape import resolve_shape

    shape = resolve_shape("llama-7b", "algorithms")
    models = {"reward": ModelSpec("reward", "llama-7b", shape, OptimizerSpec())}
    return Experiment(algorithm, models, Workload(64, Lengths(128.0, 128), Lengths(128.0, 128), 2))


def _content(graph: DataflowGraph) -> Mapping[str, Any]:
    """Roles (trained or frozen), calls and edges; `lag` 1 is a parameter version of the next iteration."""
    edges = graph.as_networkx().edges(data=True)
    return {
        "roles": {role: "frozen" if graph.trainer(role) is None else "trained" for role in graph.roles},
        "calls": [
            {
                "name": call.name,
                "kind": call.kind.value,
                "role": call.role,
                "reads": list(call.reads),
                "writes": list(call.writes),
            }
            for call in graph.calls
        ],
        "edges": [
            {"from": src, "to": dst, "keys": list(data["keys"]), "lag": data["lag"]}
            for src, dst, data in edges
        ],
    }
