"""PPO as a dataflow graph of six calls (Ouyang et al. 2022, arXiv 2203.02155; Schulman et al. 2017).

Decides which calls an iteration has and which data they exchange. Knows nothing of meshes and
strategies; the tensor functions that it names are in `experiments.ppo_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.common import (
    ROLLOUT_KEYS,
    check_mini_batches,
    generate_call,
    given_hyperparameters,
    passes,
    ref_call,
)
from experiments.scoring import scoring
from realloc.dataflow import Average, Call, CallKind, DataflowGraph, DataKey, Mixture, Output, Per
from realloc.errors import InputError
from realloc.experiment import Experiment
from realloc.files import Reader

PRETRAIN = DataKey("pretrain_tokens", Per.TOKEN, "int64")
TRAIN_READS = ("tokens", "logprobs", "ref_logprobs", "scores", "values")


class PPO:
    """Actor, critic and reference model; the score comes from a reward model or from a function."""

    name = "ppo"
    functions = "experiments.ppo_functions"

    def hyperparameters(self, reader: Reader) -> Mapping[str, Any]:
        """Validated hyperparameters with every default filled in. Raises InputError.

        `kl_coef`: weight of the per-token penalty for leaving the reference model.
        `gamma`, `gae_lambda`: discount and decay of the advantage estimate.
        `clip_range`, `clip_range_high`: how far a token's probability ratio counts below and above 1 (the
        second is the first unless given).
        `value_clip_range`: how far a value counts from the one before training; 0 clips nothing.
        `reward_clip`: scores are clipped to plus or minus this; 0 clips nothing.
        `whiten_advantages`: shift and scale them to mean 0, variance 1 over the batch.
        `whiten_rewards`: scale the per-token rewards to variance 1 over the batch; their mean stays.
        `mini_batches`: optimizer steps in one pass over the batch; `epochs`: passes.

        `kl_target`: where not 0, `kl_coef` is only the first coefficient: each iteration changes it by the
        divergence of whole responses, in nats, against this target, as far as `kl_horizon` (sequences)
        allows (Ziegler et al. 2019, arXiv 1909.08593, section 2.2). `kl_estimator`: a token's penalty is
        its log ratio to the reference (`k1`), half the square of that (`k2`) or the non-negative estimate
        of GRPO (`k3`; all: Schulman 2020, "Approximating KL divergence").
        `score_normalization`: scores less their mean, over their standard deviation: of the `batch`, or of
        all iterations so far (`running`: Zheng et al. 2023, arXiv 2307.04964), before `reward_clip`.
        `missing_eos_penalty`: taken off the score of a response that the length limit cut.
        `critic_warmup`: iterations at the beginning in which the critic learns alone: the actor's steps have
        no gradient (weight decay and the learning rate's schedule go on).
        `ref_ema_decay`: the reference becomes this share of itself and the rest of the actor once an
        iteration (an exponential moving average); 1: it stays as it is.
        `ptx_coef`: where not 0, the actor's loss has this times the mean negative log-probability, in nats a
        token, of the texts in `pretrain_data`; each optimizer step has a part of an iteration's texts
        (PPO-ptx: Ouyang et al. 2022, equation 2 and appendix C.4). None of it while the critic learns alone.
        """
        clip = reader.number("clip_range", 0.2, minimum=1e-6)
        kl_coef = reader.number("kl_coef", 0.05, minimum=0.0)
        kl_target = reader.number("kl_target", 0.0, minimum=0.0)
        if kl_target > 0 and kl_coef == 0:
            raise InputError(f"{reader.at('kl_coef')}: 0 stays 0; with a kl_target it must be above 0.")
        return {
            "kl_coef": kl_coef,
            "gamma": reader.number("gamma", 1.0, minimum=0.0, maximum=1.0),
            "gae_lambda": reader.number("gae_lambda", 0.95, minimum=0.0, maximum=1.0),
            "clip_range": clip,
            "clip_range_high": reader.number("clip_range_high", clip, minimum=1e-6),
            "value_clip_range": reader.number("value_clip_range", 0.2, minimum=0.0),
            "reward_clip": reader.number("reward_clip", 0.0, minimum=0.0),
            "whiten_advantages": reader.get("whiten_advantages", bool, True),
            "whiten_rewards": reader.get("whiten_rewards", bool, False),
            "kl_target": kl_target,
            "kl_horizon": reader.number("kl_horizon", 10_000.0, minimum=1.0),
            "kl_estimator": reader.choice("kl_estimator", ("k1", "k2", "k3"), "k1"),
            "score_normalization": reader.choice("score_normalization", ("none", "batch", "running"), "none"),
            "missing_eos_penalty": reader.number("missing_eos_penalty", 0.0, minimum=0.0),
            "critic_warmup": reader.integer("critic_warmup", 0, minimum=0, maximum=100_000_000),
            "ref_ema_decay": reader.number("ref_ema_decay", 1.0, minimum=0.0, maximum=1.0),
            "ptx_coef": reader.number("ptx_coef", 0.0, minimum=0.0),
            **passes(reader, mini_batches=4),
        }

    def graph(self, experiment: Experiment) -> DataflowGraph:
        """The six calls of one iteration. Raises InputError without a source of scores."""
        given = given_hyperparameters(self, experiment)
        check_mini_batches(given, experiment)
        _check_horizon(given, experiment)
        mini_batches, epochs = given["mini_batches"], given["epochs"]
        mixes = given["ptx_coef"] > 0
        scores = scoring("PPO", experiment)
        calls = (
            generate_call(),
            *scores.calls,
            ref_call(),
            Call(
                "critic_inf", CallKind.INFERENCE, ("tokens",), ("values",), "critic", "tokens", Output.VALUES
            ),
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
                mixture=Mixture(PRETRAIN.name, "ptx_loss") if mixes else None,
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
        decay = given["ref_ema_decay"]
        averages = (Average("ref", "actor", decay),) if decay < 1.0 else ()
        keys = (*_keys(), *scores.keys, *((PRETRAIN,) if mixes else ()))
        return DataflowGraph(calls, keys, ("prompts",), averages)


def _check_horizon(given: Mapping[str, Any], experiment: Experiment) -> None:
    """Raises InputError where one iteration could turn an adaptive coefficient to 0 or below."""
    sequences, horizon = experiment.workload.sequences, given["kl_horizon"]
    if given["kl_target"] > 0 and sequences >= 5 * horizon:
        raise InputError(
            f"experiment: hyperparameters.kl_horizon: {horizon:g} is too short: each of the {sequences} "
            f"sequences of an iteration may take 0.2 / kl_horizon of kl_coef off it; give "
            f"more than {sequences / 5:g}."
        )


def _keys() -> tuple[DataKey, ...]:
    per_token = (DataKey(name, Per.RESPONSE_TOKEN) for name in ("values", "advantages", "returns"))
    return (*ROLLOUT_KEYS, *per_token)
