"""What TRL's trainers share as peers of realloc: settings in, measurements out; in an environment of its own.

Imported by `peer_trl_ppo` and `peer_trl_grpo`, which `benchmarks/iteration.py` and
`benchmarks/peer_curves.py` start, alone or under torchrun. Imports nothing of this project. Import it before
anything of TRL: it makes the process quiet and keeps it on CPUs.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
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
from transformers import PreTrainedTokenizerFast, TrainerCallback  # noqa: E402


class Clock(TrainerCallback):  # type: ignore[misc]
    """The moments at which steps end, after that of the beginning."""

    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def begin(self) -> None:
        self.ends = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> Sequence[float]:
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]


def read_settings(path: str) -> dict[str, Any]:
    """The settings of `benchmarks/iteration.py`; sets the threads that they ask for."""
    settings: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    return settings


def local_sequences(settings: Mapping[str, Any]) -> int:
    """Sequences of one iteration for each process."""
    return int(settings["sequences"]) // int(os.environ.get("WORLD_SIZE", "1"))


def tokenizer_of(folder: str, kind: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast) -> Any:
    named = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    return kind(
        tokenizer_file=str(Path(folder) / "tokenizer.json"),
        eos_token=named["eos_token"],
        pad_token=named["pad_token"],
        padding_side="left",
    )


def prompts(settings: Mapping[str, Any], tokenizer: Any) -> list[tuple[str, list[int]]]:
    """The prompts that are not too long, as text and as token ids."""
    lines = Path(settings["prompts"]).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    pairs = [(text, tokenizer(text)["input_ids"]) for text in texts]
    return [(text, ids) for text, ids in pairs if len(ids) <= settings["max_prompt"]]


def common_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the configurations of all trainers have in common."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "seed": settings["seed"] + 1,
        "per_device_train_batch_size": local_sequences(settings),
        # one micro-batch a mini-batch: with accumulation, accelerate would skip PPO's optimizer steps
        "gradient_accumulation_steps": 1,
        "temperature": 1.0,
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "adam_beta2": settings["beta2"],
        "adam_epsilon": settings["eps"],
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def write_result(
    path: str,
    clock: Clock,
    scores: Sequence[float],
    kls: Sequence[float],
    lengths: Sequence[float],
    *,
    steps: int = 1,
) -> None:
    """Each iteration's seconds, score, divergence and mean length of responses.

    An iteration has so many `steps` of the trainer's, of which the seconds are the sum, the divergences the
    mean.
    """
    if int(os.environ.get("RANK", "0")):
        return
    starts = range(0, len(clock.seconds), steps)
    result = {
        "seconds": [sum(clock.seconds[i : i + steps]) for i in starts],
        "scores": scores,
        "kls": [sum(kls[i : i + steps]) / steps for i in starts],
        "lengths": lengths,
        "versions": {module.__name__: module.__version__ for module in (trl, torch, transformers)},
    }
    Path(path).write_text(json.dumps(result), encoding="utf-8")
