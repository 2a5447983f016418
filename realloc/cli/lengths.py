"""`realloc lengths`: how long a run's sequences were, or a data set's are, as a workload says it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from realloc.cli.diff import read_run
from realloc.cli.values import Commands
from realloc.errors import InputError

if TYPE_CHECKING:
    from realloc.lengths import Lengths


def add(commands: Commands) -> None:
    lengths = commands.add_parser(
        "lengths",
        help="print the lengths of a run's or a data set's sequences, to plan with",
        description="Prints prompt and response lengths as the lines of an experiment's workload: those that "
        "a run had, or, of an experiment.yaml, those of its data with its model's tokenizer.",
        allow_abbrev=False,
    )
    lengths.add_argument(
        "source",
        metavar="RUN|EXPERIMENT",
        type=Path,
        help="a run's folder (its --out) or its trace.jsonl; or an experiment.yaml, for those of its data",
    )
    lengths.set_defaults(command=_lengths)


def _lengths(arguments: argparse.Namespace) -> int:
    if arguments.source.suffix in (".yaml", ".yml"):
        return _of_data(arguments.source)
    from realloc.lengths import run_lengths

    found = run_lengths(read_run(arguments.source))
    if found is None:
        raise InputError(f"{arguments.source}: the trace says nothing of lengths.")
    for key, lengths in zip(("prompt_tokens", "response_tokens"), found, strict=True):
        _print(key, lengths)
    return 0


def _of_data(path: Path) -> int:
    """The lengths of the experiment's data, whatever its workload says of them."""
    from realloc.columns import Want, wanted
    from realloc.experiment import read_experiment
    from realloc.lengths import lengths_of
    from realloc.pretrain import SECTION
    from realloc.text_lengths import TextLengths

    experiment = read_experiment(path)
    folder = next((spec.model for spec in experiment.models.values() if spec.has_weights), None)
    want = wanted(experiment.graph())
    texts = TextLengths(f"{path}: workload", folder, experiment.data, want)
    _print("prompt_tokens", lengths_of(texts.prompts(None)))
    if want is not Want.PROMPTS:
        _print("response_tokens", lengths_of(texts.responses(None)))
    if experiment.pretrain is not None:
        mixed = TextLengths(f"{path}: {SECTION}", folder, experiment.pretrain.data, Want.TEXTS)
        _print(f"{SECTION}: tokens", lengths_of(mixed.texts(None)))
    return 0


def _print(key: str, lengths: Lengths) -> None:
    from realloc.lengths import lengths_content

    content = lengths_content(lengths)
    rows = ", ".join(f"[{tokens}, {share:.4g}]" for tokens, share in content.get("histogram", ()))
    histogram = f", histogram: [{rows}]" if rows else ""
    print(f"{key}: {{max: {lengths.maximum}{histogram}}}")
