"""TRL's GRPOTrainer on the model, prompts and reward of a realloc experiment; in an environment of its own.

Started by `benchmarks/iteration.py`, alone or under torchrun. Reads one JSON file of settings and writes
one with each iteration's seconds, mean score and mean divergence. Imports nothing of this project but the
reward, a module of the experiment's folder.
"""

from __future__ import annotations

import importlib
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
    "ACCELERATE_USE_CPU": "true",
}.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


class Clock(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def main(settings_path: str, result_path: str) -> None:
    settings = json.loads(Path(settings_path).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    folder = settings["models"]["actor"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(folder) / "tokenizer.json"),
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
    )
    rows = [json.loads(line) for line in Path(settings["prompts"]).read_text(encoding="utf-8").splitlines()]
    texts = [row["prompt"] for row in rows]
    data = Dataset.from_list(
        [{"prompt": t} for t in texts if len(tokenizer(t)["input_ids"]) <= settings["max_prompt"]]
    )
    sys.path.insert(0, str(Path(settings["prompts"]).parent))
    share = importlib.import_module("bench_reward").share

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [share(text) for text in completions]

    clock = Clock()
    trainer = GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=reward,
        processing_class=tokenizer,
        train_dataset=data,
        callbacks=[clock],
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            seed=settings["seed"] + 1,
            per_device_train_batch_size=settings["sequences"] // processes,
            gradient_accumulation_steps=1,
            num_generations=settings["samples"],
            max_completion_length=settings["max_response"],
            max_steps=settings["iterations"],
            beta=settings["kl_coef"],
            epsilon=0.2,
            loss_type="grpo",
            scale_rewards="group",
            temperature=1.0,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            adam_beta2=settings["beta2"],
            adam_epsilon=settings["eps"],
            max_grad_norm=0.0,
            use_vllm=False,
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
    trainer.accelerator.end_training()  # all together: a rank that leaves first would abort the others
    if int(os.environ.get("RANK", "0")):
        return
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    result = {
        "seconds": [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)],
        "scores": [entry["reward"] for entry in logged],
        "kls": [entry["kl"] for entry in logged],
        "versions": {
            "trl": trl.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
