"""The dataflow graphs of the built-in algorithms, their hyperparameters, and the recipes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import experiments
from realloc.dataflow import CallKind
from realloc.errors import InputError
from realloc.experiment import Experiment, experiment_content, parse_experiment, read_experiment
from realloc.files import Reader

RECIPES = Path(experiments.__file__).parent / "recipes"
PPO: Mapping[str, Any] = {
    "algorithm": "ppo",
    "models": {"actor": "llama-7b", "critic": "llama-7b", "ref": "llama-7b", "reward": "llama-7b"},
    "workload": {"sequences": 8, "prompt_tokens": 16, "response_tokens": 16},
}
SFT: Mapping[str, Any] = {"algorithm": "sft", "models": {"actor": "llama-7b"}, "workload": PPO["workload"]}
DPO: Mapping[str, Any] = {
    "algorithm": "dpo",
    "models": {"actor": "llama-7b", "ref": "llama-7b"},
    "workload": {**PPO["workload"], "samples_per_prompt": 2},
}
GRPO: Mapping[str, Any] = {
    "algorithm": "grpo",
    "models": {"actor": "llama-7b", "ref": "llama-7b", "reward": "llama-7b"},
    "workload": DPO["workload"],
}
RAFT: Mapping[str, Any] = {
    "algorithm": "raft",
    "models": {"actor": "llama-7b", "reward": "llama-7b"},
    "workload": DPO["workload"],
}
NO_REWARD_MODEL = {role: name for role, name in PPO["models"].items() if role != "reward"}


def parse(content: Mapping[str, Any], **changes: Any) -> Experiment:
    return parse_experiment(Reader({**content, **changes}, "experiment.yaml"), Path("/nowhere"))


def test_ppo_has_the_six_calls_and_their_edges() -> None:
    graph = parse(PPO).graph()
    assert [call.name for call in graph.calls] == [
        "actor_gen",
        "rew_inf",
        "ref_inf",
        "critic_inf",
        "actor_train",
        "critic_train",
    ]
    assert set(graph.data_edges()) == {
        *(("actor_gen", dst) for dst in ("rew_inf", "ref_inf", "critic_inf", "actor_train", "critic_train")),
        *((src, "actor_train") for src in ("rew_inf", "ref_inf", "critic_inf")),
        *((src, "critic_train") for src in ("rew_inf", "ref_inf", "critic_inf")),
    }
    edges = graph.as_networkx().edges
    versions = {edge for edge in edges if edges[edge]["lag"] == 1}
    assert versions == {("actor_train", "actor_gen"), ("critic_train", "critic_inf")}
    assert [role for role in graph.roles if graph.trainer(role) is None] == ["reward", "ref"]


def test_a_reward_function_takes_the_place_of_the_reward_model() -> None:
    graph = parse(PPO, models=NO_REWARD_MODEL, reward="experiments.rewards:sentiment").graph()
    call = graph.by_name["rew_inf"]
    assert (call.kind, call.function, call.role) == (
        CallKind.COMPUTE,
        "experiments.rewards:sentiment",
        None,
    )
    assert call.sequence == "tokens"


def test_scores_need_exactly_one_source() -> None:
    with pytest.raises(InputError, match="has neither"):
        parse(PPO, models=NO_REWARD_MODEL)
    with pytest.raises(InputError, match="has both"):
        parse(PPO, reward="experiments.rewards:sentiment")


@pytest.mark.parametrize("reward", ["sentiment", "module:", ":function", ""])
def test_a_reward_function_is_named_with_its_module(reward: str) -> None:
    with pytest.raises(InputError, match="module:function"):
        parse(PPO, models=NO_REWARD_MODEL, reward=reward)


def test_hyperparameters_reach_the_calls_and_survive_a_round_trip() -> None:
    experiment = parse(PPO, hyperparameters={"mini_batches": 2, "epochs": 3, "kl_coef": "1e-3"})
    train = experiment.graph().by_name["actor_train"]
    assert (train.mini_batches, train.epochs) == (2, 3)
    assert experiment.hyperparameters is not None
    assert experiment.hyperparameters["kl_coef"] == 0.001
    assert experiment.hyperparameters["whiten_advantages"] is True
    assert parse(experiment_content(experiment)) == experiment


@pytest.mark.parametrize(
    ("content", "hyperparameters", "message"),
    [
        (PPO, {"kl_coeff": 0.1}, "unknown key 'kl_coeff'. Did you mean 'kl_coef'?"),
        (PPO, {"minibatches": 2}, "Did you mean 'mini_batches'?"),
        (PPO, {"gamma": 1.5}, "hyperparameters.gamma: 1.5 is above the most allowed, 1.0"),
        (PPO, {"clip_range": 0}, "hyperparameters.clip_range: 0.0 is below"),
        (PPO, {"gae_lambda": "high"}, "expected a number, found 'high'"),
        (PPO, {"whiten_advantages": 1}, "expected true or false, found 1"),
        (PPO, {"epochs": 0}, "hyperparameters.epochs: 0 is below the least allowed, 1"),
        (PPO, {"mini_batches": 9}, "9 mini-batches cannot be made of the 8 sequences"),
        (SFT, {"mini_batches": 9}, "9 mini-batches cannot be made of the 8 sequences"),
        (SFT, {"kl_coef": 0.1}, "unknown key 'kl_coef'"),
        (PPO, {"kl_coef": 0, "kl_target": 6}, "hyperparameters.kl_coef: 0 stays 0"),
        (PPO, {"kl_target": 6, "kl_horizon": 1.6}, "1.6 is too short: each of the 8 sequences"),
        (GRPO, {"overlong_buffer": 17}, "17 is more than the 16 tokens of the longest response"),
        (GRPO, {"dynamic_sampling": 4}, "dynamic_sampling: 4 of 4 prompts an iteration leaves none out"),
        (
            GRPO,
            {"dynamic_sampling": 1, "mini_batches": 3},
            "cannot be made of the 2 sequences of an iteration that",
        ),
        (RAFT, {"mini_batches": 5}, "5 mini-batches cannot be made of the 4 sequences of an iteration that"),
        (DPO, {"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing: does nothing with the loss 'ipo'"),
    ],
)
def test_bad_hyperparameters_say_what_to_change(
    content: Mapping[str, Any], hyperparameters: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        parse(content, hyperparameters=hyperparameters)
    assert message in str(error.value)


def test_sft_trains_one_role_on_tokens_of_the_data_set() -> None:
    graph = parse(SFT, data={"path": "x.jsonl", "response": "story"}).graph()
    assert [call.name for call in graph.calls] == ["actor_train"]
    assert graph.source_keys == ("tokens",)
    with pytest.raises(InputError, match="SFT trains on one response"):
        parse(SFT, data={"path": "x.jsonl", "chosen": "a", "rejected": "b"})


def test_what_is_selected_is_known_before() -> None:
    """Of 24 sequences, four samples to each of six prompts."""
    work = {**PPO["workload"], "sequences": 24, "samples_per_prompt": 4}
    raft = parse(RAFT, workload=work, hyperparameters={"keep": 3}).graph().by_name["actor_train"]
    assert (raft.num_sequences(24), raft.together) == (18, 1)
    pairs = parse({**GRPO, "algorithm": "iterative_dpo"}, workload=work, hyperparameters={}).graph()
    assert [pairs.by_name[name].num_sequences(24) for name in ("ref_inf", "actor_train")] == [12, 12]
    assert pairs.values_read("ref_inf", ("tokens", "scores")) == ("tokens", "scores")
    two = parse({**GRPO, "algorithm": "iterative_dpo"}, hyperparameters={}).graph()
    assert two.by_name["ref_inf"].select is None, "both samples of a prompt are chosen"
    for algorithm in ("grpo", "rloo"):
        graph = parse(
            {**GRPO, "algorithm": algorithm}, workload=work, hyperparameters={"dynamic_sampling": 5}
        )
        assert graph.graph().by_name["actor_train"].num_sequences(24) == 20


@pytest.mark.parametrize("content", [PPO, SFT, GRPO, RAFT], ids=["ppo", "sft", "grpo", "raft"])
def test_the_functions_that_a_graph_names_exist(content: Mapping[str, Any]) -> None:
    experiment = parse(content)
    module = importlib.import_module(experiment.resolve_algorithm().functions)
    for call in experiment.graph().calls:
        for name in (call.select, call.prepare, call.loss):
            assert name is None or callable(getattr(module, name))


def test_graphs_and_rewards_import_no_torch() -> None:
    code = (
        "import sys, experiments.ppo, experiments.sft, experiments.rewards; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["ppo_llama7b_16xh100", "ppo_llama70b_128xh100"])
def test_planning_recipes_parse(name: str) -> None:
    experiment = read_experiment(RECIPES / f"{name}.yaml")
    assert experiment.cluster is not None
    assert experiment.cluster.num_gpus == int(name.rsplit("_", 1)[1].removesuffix("xh100"))
    assert experiment.workload.sequences == 512
    assert experiment.graph().by_name["actor_train"].mini_batches == 4


def test_the_stories_recipe_parses_where_its_model_is(tmp_path: Path) -> None:
    from experiments.toy import write_tiny_model

    text = (RECIPES / "ppo_stories260k.yaml").read_text(encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    write_tiny_model(tmp_path / "stories260k", seed=0)
    experiment = read_experiment(tmp_path / "recipe.yaml")
    assert experiment.graph().by_name["rew_inf"].kind is CallKind.COMPUTE
    assert experiment.data is not None
    assert experiment.data.path == str(tmp_path / "tinystories" / "train.jsonl")
