"""Supervised training on what the assistant says alone: by hand, and the same on several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from realloc.experiment import parse_experiment
from realloc.files import Reader
from runtime.dataset import open_dataset
from tests.hf_models import load_oracle
from tests.ranks.engine import assert_same, make_plan, ppo_content, run, write_models

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + ' <eos> ' }}"
    "{% else %}{{ '<bos> ' + m.content + ' ' }}{% endif %}{% endfor %}"
)


def experiment(folder: Path) -> dict[str, Any]:
    models = write_models(folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    stories = [row["story"].split() for row in rows]
    path = folder / "chats.jsonl"
    with path.open("w") as stream:
        for words in stories:
            texts = [" ".join(part) for part in (words[:3], words[3:6], words[6:8], words[8:12])]
            roles = ("user", "assistant", "user", "assistant")
            messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
            stream.write(json.dumps({"messages": messages}) + "\n")
    (folder / "t.jinja").write_text(TEMPLATE)
    content = ppo_content(folder, {"actor": models["actor"]})
    content["data"] = {
        "path": str(path),
        "chat_template": str(folder / "t.jinja"),
        "loss_on": "assistant",
    }
    content["workload"] |= {"prompt_tokens": 16, "response_tokens": 24}
    content.pop("reward", None)
    return content | {"algorithm": "sft", "hyperparameters": {}}


def by_hand(folder: Path, content: dict[str, Any]) -> float:
    """Mean negative log-probability of the learned tokens of the first iteration."""
    batch = open_dataset(parse_experiment(Reader(content, "experiment"), folder)).batch(0)
    assert batch.responses is not None
    assert batch.masks is not None
    model, total, count = load_oracle(Path(content["models"]["actor"]["path"])), 0.0, 0
    for prompt, response, mask in zip(batch.prompts, batch.responses, batch.masks, strict=True):
        assert 0 < sum(mask) < len(mask)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.float().log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        total -= float((logprobs * torch.tensor(mask)).sum())
        count += sum(mask)
    return total / count


def test_only_what_the_assistant_says_is_learned(tmp_path: Path) -> None:
    content = experiment(tmp_path)
    alone = run(make_plan(tmp_path, content, 1, {"*": ("node0", "d1t1p1")}), tmp_path / "alone")
    assert alone.metrics[0]["actor_train/loss"] == pytest.approx(by_hand(tmp_path, content), rel=1e-5)
    plan = make_plan(tmp_path, content, 4, {"*": ("node0", "d2t1p2m2")})
    assert_same(run(plan, tmp_path / "several"), alone)
