"""PPO as a dataflow graph of six calls (Ouyang et al. 2022, arXiv 2203.02155; Schulman et al. 2017).

Decides which calls an iteration has and which data they exchange. Knows nothing of meshes and
strategies; the tensor functions that it names are in `experiments.ppo_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Output, Per
from realloc.errors import InputError
from realloc.experiment import Experiment
from realloc.files import Reader

TRAIN_READS = ("tokens", "logprobs", "ref_logprobs", "scores", "values")


class PPO:
    """Actor, critic and reference model; the score comes from a reward model or from a function."""

    name = "ppo"
    functions = "experiments.ppo_functions"

    def hyperparameters(self, reader: Reader) -> Mapping[str, Any]:
        """Validated hyperparameters with every default filled in. Raises InputError.

        `kl_coef`: weight of the per-token penalty for leaving the reference model.
        `gamma`, `gae_lambda`: discount and decay of the advantage estimate.
        `clip_range`: how far a token's probability ratio counts from 1.
        `value_clip_range`: how far a value counts from the one before training; 0 clips nothing.
        `reward_clip`: scores are clipped to plus or minus this; 0 clips nothing.
        `whiten_advantages`: shift and scale them to mean 0, variance 1 over the batch.
        `mini_batches`: optimizer steps in one pass over the batch; `epochs`: passes.
        """
        return {
            "kl_coef": reader.number("kl_coef", 0.05, minimum=0.0),
            "gamma": reader.number("gamma", 1.0, minimum=0.0, maximum=1.0),
            "gae_lambda": reader.number("gae_lambda", 0.95, minimum=0.0, maximum=1.0),
            "clip_range": reader.number("clip_range", 0.2, minimum=1e-6),
            "value_clip_range": reader.number("value_clip_range", 0.2, minimum=0.0),
            "reward_clip": reader.number("reward_clip", 0.0, minimum=0.0),
            "whiten_advantages": reader.get("whiten_advantages", bool, True),
            "mini_batches": reader.integer("mini_batches", 4, minimum=1, maximum=100_000),
            "epochs": reader.integer("epochs", 1, minimum=1, maximum=1000),
        }

    def graph(self, experiment: Experiment) -> DataflowGraph:
        """The six calls of one iteration. Raises InputError without exactly one source of scores."""
        given = experiment.hyperparameters
        if given is None:
            given = self.hyperparameters(Reader({}, "experiment: hyperparameters"))
        mini_batches, epochs = given["mini_batches"], given["epochs"]
        if mini_batches > experiment.workload.sequences:
            raise InputError(
                f"experiment: hyperparameters.mini_batches: {mini_batches} mini-batches cannot be made of "
                f"the {experiment.workload.sequences} sequences of an iteration; lower it, or raise "
                f"workload.sequences."
            )
        inference = CallKind.INFERENCE
        calls = (
            Call("actor_gen", CallKind.GENERATE, ("prompts",), ("tokens", "logprobs"), "actor", "prompts"),
            _score_call(experiment),
            Call("ref_inf", inference, ("tokens",), ("ref_logprobs",), "ref", "tokens", Output.LOGPROBS),
            Call("critic_inf", inference, ("tokens",), ("values",), "critic", "tokens", Output.VALUES),
            Call(
                name="actor_train",
                kind=CallKind.TRAIN_STEP,
                reads=TRAIN_READS,
                writes=(),
                role="actor",
                sequence="tokens",
                output=Output.LOGPROBS,
                prepare="prepare_actor",
                prepared=("advantages",),
                loss="actor_loss",
                mini_batches=mini_batches,
                epochs=epochs,
            ),
            Call(
                name="critic_train",
                kind=CallKind.TRAIN_STEP,
                reads=TRAIN_READS,
                writes=(),
                role="critic",
                sequence="tokens",
                output=Output.VALUES,
                prepare="prepare_critic",
                prepared=("returns",),
                loss="critic_loss",
                mini_batches=mini_batches,
                epochs=epochs,
            ),
        )
        return DataflowGraph(calls, _keys(), ("prompts",))


def _keys() -> tuple[DataKey, ...]:
    return (
        DataKey("prompts", Per.PROMPT_TOKEN, "int64"),
        DataKey("tokens", Per.TOKEN, "int64"),
        DataKey("logprobs", Per.RESPONSE_TOKEN),
        DataKey("ref_logprobs", Per.RESPONSE_TOKEN),
        DataKey("values", Per.RESPONSE_TOKEN),
        DataKey("scores", Per.SEQUENCE),
        DataKey("advantages", Per.RESPONSE_TOKEN),
        DataKey("returns", Per.RESPONSE_TOKEN),
    )


def _score_call(experiment: Experiment) -> Call:
    """`rew_inf`: inference with a reward model, or a reward function where one is named."""
    has_model = "reward" in experiment.models
    if has_model == (experiment.reward is not None):
        found = "has both" if has_model else "has neither"
        raise InputError(
            f"experiment: PPO takes its scores from a model (models: reward: PATH) or from a function "
            f"(reward: module:function); this one {found}; give exactly one."
        )
    if has_model:
        return Call(
            "rew_inf", CallKind.INFERENCE, ("tokens",), ("scores",), "reward", "tokens", Output.SCORES
        )
    module, colon, function = str(experiment.reward).partition(":")
    if not (module and colon and function):
        raise InputError(
            f"experiment: reward: '{experiment.reward}' is not of the form module:function, such as "
            f"experiments.rewards:sentiment."
        )
    return Call(
        "rew_inf", CallKind.COMPUTE, ("tokens",), ("scores",), sequence="tokens", function=experiment.reward
    )
