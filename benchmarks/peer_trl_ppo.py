"""TRL's PPOTrainer on the models and prompts of a realloc experiment; see `peer_trl`."""

from __future__ import annotations

import sys
from typing import Any

from peer_trl import (
    Clock,
    common_arguments,
    local_sequences,
    prompts,
    read_settings,
    tokenizer_of,
    write_result,
)

import torch  # isort: skip
from trl.experimental.ppo import ppo_trainer  # isort: skip
from datasets import Dataset  # isort: skip
from transformers import (  # isort: skip
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # isort: skip


class Tokenizer(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Pads with an id that no model can sample, so that a padded position is never a sampled one."""

    beyond_vocabulary = 0

    @property
    def pad_token_id(self) -> int:
        return type(self).beyond_vocabulary


def main(settings_path: str, result_path: str) -> None:
    settings = read_settings(settings_path)
    models = settings["models"]
    policy = LlamaForCausalLM.from_pretrained(models["actor"], dtype=torch.float32)
    Tokenizer.beyond_vocabulary = policy.config.vocab_size
    tokenizer = tokenizer_of(models["actor"], Tokenizer)
    data = Dataset.from_list([{"input_ids": ids} for _, ids in prompts(settings, tokenizer)])
    clock = Clock()
    trainer = PPOTrainer(
        model=policy,
        ref_model=LlamaForCausalLM.from_pretrained(models["ref"], dtype=torch.float32),
        reward_model=_classifier(models["reward"]).eval(),
        value_model=_classifier(models["critic"]),
        processing_class=tokenizer,
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        callbacks=[clock],
        args=PPOConfig(
            **common_arguments(settings),
            num_mini_batches=settings["mini_batches"],
            num_ppo_epochs=settings["epochs"],
            total_episodes=settings["sequences"] * settings["iterations"],
            local_rollout_forward_batch_size=local_sequences(settings),
            response_length=settings["max_response"],
            stop_token=None if settings["ignore_eos"] else "eos",
            kl_coef=settings["kl_coef"],
            vf_coef=1.0,
            num_sample_generations=0,
            eval_strategy="no",
        ),
    )
    lengths = _record_lengths()
    clock.begin()
    trainer.train()
    log = trainer.state.log_history
    scores, kls = (
        [entry[name] for entry in log if name in entry] for name in ("objective/scores", "objective/kl")
    )
    write_result(result_path, clock, scores, kls, lengths or [settings["max_response"]] * len(scores))


def _record_lengths() -> list[float]:
    """Mean tokens of each iteration's responses, as training adds them; none where nothing ends responses.

    The trainer does not log them: they are counted where it cuts a batch at its ends. One batch an iteration.
    """
    found: list[float] = []
    cut = ppo_trainer.truncate_response

    def counting(stop: int, pad: int, responses: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = cut(stop, pad, responses)
        found.append(float((result != pad).sum(1).double().mean()))
        return result

    ppo_trainer.truncate_response = counting
    return found


def _classifier(folder: str) -> Any:
    return LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
