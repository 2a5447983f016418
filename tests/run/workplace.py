"""A folder from which `realloc run` is typed: tiny models, data, reward functions, plans."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.ranks.engine import make_plan, ppo_content, write_models

TINY = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48}
SPLIT = {
    "*": ("node0", "d2t1p1"),
    "actor_gen": ("node0:gpu[0]", "d1t1p1"),
    "actor_train": ("node0", "d1t1p2m2"),
    "critic_train": ("node0:gpu[1]", "d1t1p1m2"),
}
REWARDS = """
import os, pathlib, time

def length(samples):
    return [min(1.0, len(s.response.split()) / 10) for s in samples]

def not_a_number(samples):
    return [float("nan") for s in samples]

def too_few(samples):
    return [0.0]

def raises(samples):
    return [1 / 0 for s in samples]

def slow(samples):
    pathlib.Path(__file__).with_name("entered").touch()
    time.sleep(60)
    return [0.0 for s in samples]
"""


class Workplace:
    """A folder with tiny models, data, a reward module and plans, from which commands run."""

    def __init__(self, folder: Path, **shape: int) -> None:
        self.folder = folder
        self.models = dict(write_models(folder, **(TINY | shape)))
        self.models.pop("reward")
        (folder / "my_rewards.py").write_text(REWARDS)

    def plan(
        self,
        name: str,
        reward: str = "my_rewards:length",
        *,
        gpus: int = 2,
        placements: Mapping[str, Sequence[str]] = SPLIT,
        **changes: Any,
    ) -> Path:
        content = ppo_content(self.folder, self.models, **({"reward": reward, "iterations": 2} | changes))
        make_plan(self.folder, content, gpus, placements)
        return (self.folder / "plan.yaml").rename(self.folder / f"{name}.yaml")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-m", "realloc", *arguments]
        if arguments[0] == "run":
            command.append("--trust")  # the rewards of this folder
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err
