"""TRL's GRPOTrainer on the model, prompts and reward of a realloc experiment; see `peer_trl`.

Imports nothing of this project but the reward, a module of the experiment's folder.
"""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
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
from datasets import Dataset  # isort: skip
from transformers import LlamaForCausalLM  # isort: skip
from trl import GRPOConfig, GRPOTrainer  # isort: skip


def main(settings_path: str, result_path: str) -> None:
    settings = read_settings(settings_path)
    folder = settings["models"]["actor"]
    tokenizer = tokenizer_of(folder)
    sys.path.insert(0, settings["code"])
    module, name = settings["reward"].split(":")
    function = getattr(importlib.import_module(module), name)
    # an iteration: one generation, and a step of the trainer for each mini-batch of each epoch
    steps = settings["mini_batches"] * settings["epochs"]

    def reward(completions: list[str], **_: Any) -> list[float]:
        return list(function([SimpleNamespace(response=text) for text in completions]))

    clock = Clock()
    trainer = GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=reward,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": text} for text, _ in prompts(settings, tokenizer)]),
        callbacks=[clock],
        args=GRPOConfig(
            **common_arguments(settings)
            | {"per_device_train_batch_size": local_sequences(settings) // settings["mini_batches"]},
            steps_per_generation=settings["mini_batches"],
            num_iterations=settings["epochs"],
            num_generations=settings["samples"],
            max_completion_length=settings["max_response"],
            max_steps=settings["iterations"] * steps,
            beta=settings["kl_coef"],
            use_bias_correction_kl=False,  # its default multiplies the divergence by the ratio
            epsilon=0.2,
            loss_type="grpo",
            scale_rewards="group",
            max_grad_norm=0.0,
            use_vllm=False,
        ),
    )
    clock.begin()
    trainer.train()
    trainer.accelerator.end_training()  # all together: a rank that leaves first would abort the others
    log = trainer.state.log_history
    scores, kls, lengths = (
        [entry[name] for entry in log if name in entry]
        for name in ("reward", "kl", "completions/mean_length")
    )
    write_result(result_path, clock, scores, kls, lengths, steps=steps)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
