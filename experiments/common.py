"""What several algorithms share: keys, the calls that generate and compare, checks of hyperparameters.

Knows graphs, not tensors: the shared tensor functions are in `experiments.shared_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.scoring import scoring
from realloc.algorithm import Algorithm
from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Output, Per
from realloc.errors import InputError
from realloc.experiment import Experiment
from realloc.files import Reader

ROLLOUT_KEYS = (
    DataKey("prompts", Per.PROMPT_TOKEN, "int64"),
    DataKey("tokens", Per.TOKEN, "int64"),
    DataKey("logprobs", Per.RESPONSE_TOKEN),
    DataKey("ref_logprobs", Per.RESPONSE_TOKEN),
    DataKey("scores", Per.SEQUENCE),
)


def given_hyperparameters(algorithm: Algorithm, experiment: Experiment) -> Mapping[str, Any]:
    """The experiment's, or the defaults where it was made without any."""
    if experiment.hyperparameters is not None:
        return experiment.hyperparameters
    return algorithm.hyperparameters(Reader({}, "experiment: hyperparameters"))


def passes(reader: Reader, mini_batches: int = 1) -> Mapping[str, int]:
    """`mini_batches`: optimizer steps in one pass over the batch; `epochs`: passes."""
    return {
        "mini_batches": reader.integer("mini_batches", mini_batches, minimum=1, maximum=100_000),
        "epochs": reader.integer("epochs", 1, minimum=1, maximum=1000),
    }


def check_mini_batches(
    given: Mapping[str, Any], experiment: Experiment, together: int = 1, selected: int = 0
) -> None:
    """Raises InputError when a mini-batch would be empty; each `together` sequences are in one.

    `selected`: so many sequences of an iteration are trained on; 0: all.
    """
    sequences = selected or experiment.workload.sequences
    if given["mini_batches"] > sequences // together:
        of = f", {together} of which stay together" if together > 1 else ""
        trained = " that are selected" if selected else ""
        raise InputError(
            f"experiment: hyperparameters.mini_batches: {given['mini_batches']} mini-batches cannot be made "
            f"of the {sequences} sequences of an iteration{trained}{of}; lower it, or raise "
            f"workload.sequences."
        )


def dynamic_sampling(reader: Reader) -> Mapping[str, int]:
    """`dynamic_sampling`: so many of an iteration's prompts are trained on, first of all those whose samples
    differ in their scores (Yu et al. 2025, arXiv 2503.14476, section 3.2); 0: all prompts.
    """
    return {"dynamic_sampling": reader.integer("dynamic_sampling", 0, minimum=0, maximum=100_000_000)}


def check_samples(algorithm: str, least: int, experiment: Experiment) -> None:
    """Raises InputError for fewer samples of a prompt than the algorithm compares."""
    found = experiment.workload.samples_per_prompt
    if found < least:
        raise InputError(
            f"experiment: workload.samples_per_prompt: {algorithm} compares the responses to one prompt and "
            f"needs at least {least} of them, found {found}."
        )


def check_pairs(algorithm: str, experiment: Experiment) -> None:
    """Raises InputError unless the data are preferences: two sequences for each prompt."""
    data, samples = experiment.data, experiment.workload.samples_per_prompt
    if data is not None and data.chosen is None and (data.response or data.text or data.messages):
        raise InputError(
            f"experiment: data: {algorithm} learns from preferences; name the columns of the two responses "
            f"with the keys 'chosen' and 'rejected'."
        )
    if samples != 2:
        raise InputError(
            f"experiment: workload.samples_per_prompt: {algorithm} has two sequences for each prompt, the "
            f"chosen and the rejected one, so it must be 2, found {samples}."
        )


def generate_call() -> Call:
    """`actor_gen`: tokens and the log-probabilities with which they were drawn."""
    return Call("actor_gen", CallKind.GENERATE, ("prompts",), ("tokens", "logprobs"), "actor", "prompts")


def ref_call() -> Call:
    """`ref_inf`: log-probabilities under the reference model."""
    return Call(
        "ref_inf", CallKind.INFERENCE, ("tokens",), ("ref_logprobs",), "ref", "tokens", Output.LOGPROBS
    )


def ref_calls(given: Mapping[str, Any]) -> tuple[Call, ...]:
    """`ref_call` where something is made of its result: with a `kl_coef` that is not 0."""
    return (ref_call(),) if given["kl_coef"] > 0 else ()


def policy_train_call(given: Mapping[str, Any], reads: tuple[str, ...], selected: int = 0) -> Call:
    """`actor_train` on `prepare_actor`'s advantages and `actor_loss`, of algorithms without a critic.

    `reads` are keys besides tokens and log-probabilities. `selected`: `select_prompts` picks so many.
    """
    compared = ("ref_logprobs",) if given["kl_coef"] > 0 else ()
    return Call(
        name="actor_train",
        kind=CallKind.TRAIN_STEP,
        reads=("tokens", "logprobs", *compared, *reads),
        writes=(),
        role="actor",
        sequence="tokens",
        output=Output.LOGPROBS,
        prepare="prepare_actor",
        prepared=("advantages",),
        loss="actor_loss",
        mini_batches=given["mini_batches"],
        epochs=given["epochs"],
        select="select_prompts" if selected else None,
        selected=selected,
    )


def critic_free_graph(
    algorithm: Algorithm, title: str, experiment: Experiment, advantages: Per, least_samples: int
) -> DataflowGraph:
    """Generation, scores, the reference model where it is compared with, and training on advantages.

    `advantages` says whether a sequence has one or each of its tokens. Raises InputError for fewer than
    `least_samples` of a prompt.
    """
    given = given_hyperparameters(algorithm, experiment)
    work, learned = experiment.workload, given.get("dynamic_sampling", 0)
    check_samples(title, least_samples, experiment)
    if learned >= work.prompts:
        raise InputError(
            f"experiment: hyperparameters.dynamic_sampling: {learned} of {work.prompts} prompts an iteration "
            f"leaves none out; lower it, or raise workload.sequences."
        )
    selected = learned * work.samples_per_prompt
    check_mini_batches(given, experiment, selected=selected)
    scores = scoring(title, experiment)
    calls = (
        generate_call(),
        *scores.calls,
        *ref_calls(given),
        policy_train_call(given, ("scores",), selected),
    )
    keys = (*ROLLOUT_KEYS, *scores.keys, DataKey("advantages", advantages))
    return DataflowGraph(calls, keys, ("prompts",))
