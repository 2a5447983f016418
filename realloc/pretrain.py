"""The `pretrain_data` section of an experiment: texts that a train_step mixes in.

Decides how the section is written, and that it belongs to the graph. What is learned from the texts, the
algorithm decides (`realloc.dataflow.Mixture`); which text comes when, `runtime.dataset`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realloc.columns import Want
from realloc.data_spec import DataSpec, data_content, parse_data
from realloc.dataflow import DataflowGraph
from realloc.errors import InputError
from realloc.files import Reader
from realloc.lengths import Lengths, lengths_content, parse_lengths
from realloc.text_lengths import TextLengths

SECTION = "pretrain_data"
_REFUSED = {
    "loss_on": "texts are learned whole, but for their first token",
    "holdout": "all rows are learned from; evaluation takes those of data",
    "holdout_path": "all rows are learned from; evaluation takes those of data",
    "holdout_split": "all rows are learned from; evaluation takes those of data",
}


@dataclass(frozen=True)
class PretrainData:
    """Texts, how many of them an iteration learns, and their lengths: they are cut at `tokens.maximum`."""

    data: DataSpec
    sequences: int
    tokens: Lengths


def parse_pretrain(reader: Reader, folder: Path, tokenizer: str | None) -> PretrainData:
    """Reads the section, whose keys are those of `data`, `sequences` and `tokens`.

    `tokenizer`: the folder of the model that measures its texts. Raises InputError.
    """
    for key, why in _REFUSED.items():
        if reader.has(key):
            raise InputError(f"{reader.at(key)}: has no place here: {why}.")
    sequences = reader.integer("sequences", minimum=1, maximum=100_000_000)
    lengths = reader.raw("tokens")  # read below: measuring takes the rest of the section
    data = parse_data(reader, folder, SECTION)
    texts = TextLengths(reader.where, tokenizer, data, Want.TEXTS).texts
    tokens = parse_lengths(Reader({"tokens": lengths}, reader.where), "tokens", texts)
    if tokens.maximum < 2:
        raise InputError(f"{reader.at('tokens')}: texts of one token teach nothing; allow at least 2.")
    return PretrainData(data, sequences, tokens)


def pretrain_content(pretrain: PretrainData) -> Mapping[str, Any]:
    """The section as the mapping that `parse_pretrain` reads back to an equal value."""
    lengths = lengths_content(pretrain.tokens)
    return {**data_content(pretrain.data), "sequences": pretrain.sequences, "tokens": lengths}


def check_mixtures(graph: DataflowGraph, pretrain: PretrainData | None, contexts: Mapping[str, int]) -> None:
    """Raises InputError unless the section is there where the graph mixes it in, and for all of its steps.

    `contexts`: the longest sequence of each role's model; texts must not be longer.
    """
    if pretrain is None:
        for call in graph.calls:
            if call.mixture is not None:
                raise InputError(
                    f"experiment: {SECTION}: {call.name} mixes in a loss on texts, and none are given; add "
                    f"{SECTION}: {{path: FILE.jsonl, text: COLUMN, sequences: N, tokens: LONGEST}}."
                )
        return
    if not graph.mixtures:
        raise InputError(
            f"experiment: {SECTION}: nothing learns from it; take it out, or use an algorithm that mixes it "
            f"in: ppo with hyperparameters.ptx_coef above 0."
        )
    for call in graph.calls:
        if call.mixture is None:
            continue
        steps, longest = call.mini_batches * call.epochs, pretrain.tokens.maximum
        if pretrain.sequences < steps:
            raise InputError(
                f"experiment: {SECTION}.sequences: {pretrain.sequences} texts an iteration cannot be spread "
                f"over the {steps} optimizer steps of {call.name} (mini_batches times epochs); raise it to "
                f"that, or lower those."
            )
        context = contexts.get(str(call.role), longest)
        if longest > context:
            raise InputError(
                f"experiment: {SECTION}.tokens: texts of up to {longest} tokens, but {call.role}'s model has "
                f"a context of {context}; lower the maximum: longer texts are cut."
            )
