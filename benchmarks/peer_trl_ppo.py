"""TRL's PPOTrainer on the models and prompts of a realloc experiment; runs in an environment of its own.

Started by `benchmarks/iteration.py`, alone or under torchrun. Reads one JSON file of settings and writes
one with each iteration's seconds, mean score and mean divergence. Imports nothing of this project.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "ACCELERATE_USE_CPU": "true",
}.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402


class Tokenizer(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Pads with an id that no model can sample, so that a padded position is never a sampled one."""

    beyond_vocabulary = 0

    @property
    def pad_token_id(self) -> int:
        return type(self).beyond_vocabulary


class Clock(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def main(settings_path: str, result_path: str) -> None:
    settings = json.loads(Path(settings_path).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    models = settings["models"]
    policy = LlamaForCausalLM.from_pretrained(models["actor"], dtype=torch.float32)
    Tokenizer.beyond_vocabulary = policy.config.vocab_size
    tokenizer = Tokenizer(
        tokenizer_file=str(Path(models["actor"]) / "tokenizer.json"),
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
    )
    rows = [json.loads(line) for line in Path(settings["prompts"]).read_text(encoding="utf-8").splitlines()]
    ids = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    data = Dataset.from_list([{"input_ids": i} for i in ids if len(i) <= settings["max_prompt"]])
    clock, local = Clock(), settings["sequences"] // processes
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
            output_dir=tempfile.mkdtemp(),
            seed=settings["seed"] + 1,
            # one micro-batch a mini-batch: with accumulation, accelerate would skip optimizer steps
            per_device_train_batch_size=local,
            gradient_accumulation_steps=1,
            num_mini_batches=settings["mini_batches"],
            num_ppo_epochs=settings["epochs"],
            total_episodes=settings["sequences"] * settings["iterations"],
            local_rollout_forward_batch_size=local,
            response_length=settings["max_response"],
            stop_token=None if settings["ignore_eos"] else "eos",
            temperature=1.0,
            kl_coef=settings["kl_coef"],
            vf_coef=1.0,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            adam_beta2=settings["beta2"],
            adam_epsilon=settings["eps"],
            num_sample_generations=0,
            eval_strategy="no",
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
    )
    clock.ends = [time.perf_counter()]
    trainer.train()
    if int(os.environ.get("RANK", "0")):
        return
    logged = [entry for entry in trainer.state.log_history if "objective/scores" in entry]
    result = {
        "seconds": [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)],
        "scores": [entry["objective/scores"] for entry in logged],
        "kls": [entry["objective/kl"] for entry in logged],
        "versions": {
            "trl": trl.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


def _classifier(folder: str) -> Any:
    return LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
