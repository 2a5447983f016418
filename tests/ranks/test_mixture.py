"""PPO with a loss on pre-training texts: that of transformers, the same under any plan, and resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from realloc.experiment import parse_experiment
from realloc.files import Reader
from runtime.checkpoint import SaveOptions
from runtime.checkpoint_files import choose
from runtime.dataset import open_dataset
from tests.hf_models import load_oracle
from tests.ranks.engine import Outcome, assert_same, make_plan, ppo_content, run, write_models
from tests.ranks.test_checkpoint import run_part
from tests.ranks.test_plan_invariance import ALONE, GROUPED

LONGEST = 14
# actor_train splits the texts too: into chunks of stages, over replicas of which some have none, and both
PLANS: Mapping[str, tuple[int, str]] = {
    "stages, weight gradients put off": (2, "d1t1p2m2+zb"),
    "tensors and two chunks a stage": (4, "d1t2p2m3+i2+sp"),
    "parameters split, more replicas than texts": (4, "d4t1p1m2z3+full"),
    "replicas of stages": (4, "d2t1p2m2z1+gpipe+selective"),
}


def experiment(folder: Path, **changes: Any) -> dict[str, Any]:
    """Ten texts for four steps, of four different ones: two epochs and a half of them.

    What is sampled is not the model's own distribution, which the texts are learned by.
    """
    models = write_models(folder, **GROUPED)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    texts = [" ".join(row["story"].split()[: 4 + 3 * i]) for i, row in enumerate(rows[:4])]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    content = ppo_content(folder, models, sampling={"temperature": 0.7})
    content["hyperparameters"] = {"mini_batches": 2, "epochs": 2, "ptx_coef": 0.7}
    content["pretrain_data"] = {"path": str(folder / "texts.jsonl"), "sequences": 10, "tokens": LONGEST}
    return content | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixture")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Outcome:
    return run(make_plan(folder, experiment(folder), 1, ALONE), folder / "alone")


def by_hand(folder: Path, content: dict[str, Any]) -> tuple[float, float, int]:
    """Of the first iteration's texts: their loss, the norm of its gradient, and how many tokens they have."""
    mixed = open_dataset(parse_experiment(Reader(content, "experiment"), folder)).mixed
    assert mixed is not None
    batch = mixed.batch(0)
    assert batch.responses is not None
    model = load_oracle(Path(content["models"]["actor"]["path"]))
    total, learned, tokens = torch.zeros(()), 0, 0
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        assert len(prompt) == 1
        logprobs = model(torch.tensor([prompt + response])).logits[0, :-1].float().log_softmax(-1)
        total = total - logprobs.gather(1, torch.tensor(response)[:, None]).sum()
        learned, tokens = learned + len(response), tokens + 1 + len(response)
    loss = total / learned
    loss.backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.stack(norms).norm().item(), tokens


def test_loss_and_gradient_are_those_of_transformers(folder: Path) -> None:
    """With a coefficient beside which PPO's own gradient is as nothing."""
    content = experiment(folder, iterations=1, hyperparameters={"mini_batches": 1, "ptx_coef": 1e5})
    found = run(make_plan(folder, content, 1, ALONE), folder / "steep").metrics[0]
    loss, norm, tokens = by_hand(folder, content)
    assert found["actor_train/ptx_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["actor_train/loss"] == pytest.approx(1e5 * loss, rel=1e-4)
    assert found["actor_train/grad_norm"] == pytest.approx(1e5 * norm, rel=1e-3)
    assert found["actor_train/mixed_tokens"] == tokens


@pytest.mark.parametrize("name", PLANS)
def test_any_plan_mixes_in_the_same(name: str, folder: Path, alone: Outcome) -> None:
    gpus, strategy = PLANS[name]
    placements = {"*": ("node0:gpu[0]", "d1t1p1"), "actor_train": ("node0", strategy)}
    plan = make_plan(folder, experiment(folder), gpus, placements)
    assert_same(run(plan, folder / name.replace(" ", "-")), alone)
    falling = [metrics["actor_train/ptx_loss"] for metrics in alone.metrics]
    assert falling == sorted(falling, reverse=True)


def test_a_resumed_run_goes_on_within_an_epoch_of_texts(folder: Path, alone: Outcome) -> None:
    """Also under another plan: which texts come next is computed from the number of the iteration."""
    content = experiment(folder)
    plan = make_plan(folder, content, 1, ALONE)
    out = folder / "saved"
    run_part(plan, out, 0, 1, save=SaveOptions(every=1, keep=1))
    checkpoint, _ = choose(out, "iteration-1")
    same = run_part(plan, folder / "same", 1, 3, checkpoint=checkpoint)
    assert same.metrics == alone.metrics[1:]
    other = make_plan(folder, content, 2, {"*": ("node0", "d1t1p2m2")})
    resumed = run_part(other, folder / "other", 1, 3, checkpoint=checkpoint)
    assert_same(resumed, Outcome(alone.metrics[1:], alone.tokens[1:], alone.weights, ()))


def test_the_critic_learns_alone_without_texts_too(folder: Path) -> None:
    """The actor of an iteration of warm-up is the one before it."""
    warm = {"mini_batches": 2, "ptx_coef": 0.7, "critic_warmup": 3}
    found = run(make_plan(folder, experiment(folder, hyperparameters=warm), 1, ALONE), folder / "warm")
    assert [metrics["actor_train/grad_norm"] for metrics in found.metrics] == [0.0] * 3
    assert all(metrics["actor_train/ptx_loss"] > 0 for metrics in found.metrics)
