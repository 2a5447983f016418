"""Whether GRPO and PPO learn as TRL's trainers do: reward, divergence and length by iteration, over seeds.

Both sides begin with the same folders of stories260K after supervised training on stories that end after two
sentences, so that responses end by themselves and their length is something to learn too. They get the same
prompts, reward, batch, mini-batches, epochs, optimizer and coefficients. PPO's reward model, from which its
critic begins too, is trained as in `benchmarks/learning.py`; GRPO's reward is the rule behind it,
`experiments.rewards:sentiment`. realloc plans and runs by its command line, on one rank; TRL is one process.

The criterion, for each of mean reward, divergence from the reference and response length: the means over the
last quarter of the iterations, averaged over the seeds, differ by no more than the joint spread
sqrt(a^2 + b^2), a and b being the standard deviations over the seeds of either side; and in nine of ten
iterations the sides' means differ by no more than twice the joint spread of that iteration. `same` is whether
all curves of both algorithms meet it; `rises`, whether the reward's gain is at least ten joint spreads.
`--control` says what the criterion can see: realloc at half the learning rate, against TRL at the whole;
`told_apart` is whether that fails it.

    python benchmarks/peer_curves.py [--quick] [--json] [--algorithms NAME ...] [--seeds K] [--control]
                                     [--out DIR] [--work DIR]

With `--work`, models and finished runs stay in that folder, and those found there are not repeated: so seeds
can be added. Writes DIR/trl.json and DIR/ALGORITHM_trl.svg (default docs/curves). Data: REALLOC_DATA, default
../shared/data. TRL's environment is that of `benchmarks/iteration.py`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.curves import compare_curves  # noqa: E402
from benchmarks.iteration import PEERS, ensure_peer  # noqa: E402
from benchmarks.learning import MAX_PROMPT, RESPONSE, Pipeline  # noqa: E402
from benchmarks.learning_plot import Curves, comparison_plot  # noqa: E402
from benchmarks.ppo_runs import Turn, checked, read_turn  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from realloc.files import write_text  # noqa: E402
from realloc.tokenizer import read_tokenizer  # noqa: E402

SENTENCES = 2
"""Of a story, after the prompt."""
REWARD = "experiments.rewards:sentiment"
RISE = 10.0
_END = re.compile(r"(?<=[.!?])[\s]+")


@dataclass(frozen=True)
class Setup:
    """What both sides are told of an algorithm; names are those of `peer_trl`'s settings."""

    algorithm: str
    kl_coef: float
    iterations: int
    samples: int = 1
    sequences: int = 64
    mini_batches: int = 2
    epochs: int = 2
    learning_rate: float = 2e-4
    beta2: float = 0.95
    eps: float = 1e-5
    max_response: int = RESPONSE
    ignore_eos: bool = False

    @property
    def kl_unit(self) -> str:
        """GRPO's is the estimate that its loss has, PPO's the log ratio of whole responses."""
        return "nats a token" if self.algorithm == "grpo" else "nats a response"


SETUPS = {
    "ppo": Setup("ppo", kl_coef=0.1, iterations=20),
    "grpo": Setup("grpo", kl_coef=0.04, iterations=30, samples=8, learning_rate=1e-4),
}


class ShortStories(Pipeline):
    """Supervised training and the reward model on stories that end after a few sentences; then both sides."""

    def ours(self, setup: Setup, seed: int, *, slow: bool = False) -> Turn:
        """`slow`: the control, at half the learning rate."""
        optimizer = {
            "learning_rate": setup.learning_rate / (2 if slow else 1),
            "beta2": setup.beta2,
            "eps": setup.eps,
            "clip_norm": 0.0,  # TRL's PPO does not clip gradients
        }
        trained = {role: {"path": str(path), "optimizer": optimizer} for role, path in self._starts(setup)}
        content: dict[str, Any] = {
            "algorithm": setup.algorithm,
            "models": {"actor": trained["actor"], "ref": str(self.sft)},
            "data": self._prompts("train"),
            "workload": {
                "sequences": setup.sequences,
                "prompt_tokens": {"mean": 19, "max": MAX_PROMPT},
                "response_tokens": setup.max_response,
                "samples_per_prompt": setup.samples,
            },
            "hyperparameters": {
                "kl_coef": setup.kl_coef,
                "mini_batches": setup.mini_batches,
                "epochs": setup.epochs,
            },
        }
        if setup.algorithm == "ppo":
            content["models"] |= {"critic": trained["critic"], "reward": str(self.reward)}
        else:
            content["reward"] = REWARD
        name = f"{setup.algorithm}-{seed}-{setup.iterations}{'-slow' if slow else ''}"
        return read_turn(self._run(name, content, setup.iterations, seed))

    def theirs(self, setup: Setup, seed: int, python: Path) -> tuple[Turn, Mapping[str, str]]:
        """TRL's turn, and the versions of its packages."""
        models = {role: str(path) for role, path in self._starts(setup)}
        settings = {
            **vars(setup),
            "models": models | {"ref": str(self.sft), "reward": str(self.reward)},
            "prompts": self._prompts("train")["path"],
            "max_prompt": MAX_PROMPT,
            "reward": REWARD,
            "code": str(ROOT),
            "threads": 1,
            "seed": seed,
        }
        name = f"trl-{setup.algorithm}-{seed}-{setup.iterations}"
        source, result = self._folder / f"{name}.json", self._folder / f"{name}-result.json"
        if not result.exists():
            write_text(source, json.dumps(settings))
            command = [str(python), str(PEERS[setup.algorithm]), str(source), str(result)]
            checked(command, self._folder, {"OMP_NUM_THREADS": "1"})
        found = json.loads(result.read_text(encoding="utf-8"))
        turn = Turn(*(tuple(found[name]) for name in ("seconds", "scores", "kls", "lengths")))
        return turn, found["versions"]

    def _run(
        self, name: str, content: Mapping[str, Any], iterations: int, seed: int, samples: int = 2
    ) -> Path:
        """As the pipeline does, unless that has been done before."""
        done = self._folder / f"{name}.done"
        if not done.exists():
            super()._run(name, content, iterations, seed, samples)
            write_text(done, "")
        return self._folder / name

    def _starts(self, setup: Setup) -> Sequence[tuple[str, Path]]:
        """The folders from which trained models begin."""
        actor = ("actor", self.sft)
        return (actor, ("critic", self.reward)) if setup.algorithm == "ppo" else (actor,)

    def _sft(self) -> Path:
        trained = {"learning_rate": 1e-3, "eps": 1e-5}
        content = {
            "algorithm": "sft",
            "models": {"actor": {"path": str(self._data / "stories260k"), "optimizer": trained}},
            "data": {**self._prompts("train"), "response": "story"},
            "workload": {
                "sequences": 64,
                "prompt_tokens": {"mean": 19, "max": MAX_PROMPT},
                "response_tokens": RESPONSE,
            },
        }
        return self._run("sft", content, 60, 0) / "models" / "actor"

    def _prompts(self, split: str) -> Mapping[str, str]:
        """The stories' beginnings; those of which the prompt or the rest is too long are left out."""
        path = self._folder / f"{split}.jsonl"
        if not path.exists():
            encode = read_tokenizer(self._data / "stories260k").backend.encode
            lines = (self._data / "tinystories" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            rows = []
            for row in map(json.loads, lines):
                rest = _END.split(row["story"][len(row["prompt"]) :].strip())
                story = f"{row['prompt']} {' '.join(rest[:SENTENCES])}"
                prompt = len(encode(row["prompt"]).ids)
                if prompt <= MAX_PROMPT and len(encode(story).ids) - prompt < RESPONSE:
                    rows.append({"prompt": row["prompt"], "story": story})
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(path), "prompt": "prompt"}


def measure(stories: ShortStories, setup: Setup, seeds: int, python: Path, control: bool) -> dict[str, Any]:
    """All seeds of one algorithm, the sides in turns, and then the control."""
    sides: dict[str, list[Turn]] = {"ours": [], "trl": []}
    versions: Mapping[str, str] = {}
    for seed in range(seeds):
        sides["ours"].append(stories.ours(setup, seed))
        turn, versions = stories.theirs(setup, seed, python)
        sides["trl"].append(turn)
    if control:
        sides["control"] = [stories.ours(setup, seed, slow=True) for seed in range(seeds)]
    result: dict[str, Any] = {"setting": vars(setup), "trl_versions": versions}
    result["curves"] = {
        name: {side: _rounded([getattr(turn, name) for turn in turns]) for side, turns in sides.items()}
        for name in ("scores", "kls", "lengths")
    }
    return result | judge(result["curves"])


def judge(curves: Mapping[str, Mapping[str, Curves]]) -> dict[str, Any]:
    """The criterion on curves of each quantity and side: `ours`, `trl`, and `control` if that was run.

    Verdicts are None with a single seed.
    """
    verdicts, controls = {}, {}
    for name, sides in curves.items():
        found = compare_curves(sides["ours"], sides["trl"], end_spreads=1.0)
        kept = ("final", "final_difference", "final_joint_spread", "share_within", "same")
        verdicts[name] = {key: found[key] for key in kept if key in found}
        verdicts[name]["first"] = {side: fmean(c[0] for c in sides[side]) for side in ("ours", "trl")}
        if "control" in sides:
            controls[name] = compare_curves(sides["control"], sides["trl"], end_spreads=1.0)["same"]
    scores = verdicts["scores"]
    if scores["same"] is None:
        return {"verdicts": verdicts, "same": None, "rises": None, "control": None, "told_apart": None}
    gains = [scores["final"][side] - scores["first"][side] for side in ("ours", "trl")]
    return {
        "verdicts": verdicts,
        "same": all(verdict["same"] for verdict in verdicts.values()),
        "rises": min(gains) >= RISE * scores["final_joint_spread"],
        "control": controls or None,
        "told_apart": not all(controls.values()) if controls else None,
    }


def _rounded(curves: Curves) -> list[list[float]]:
    return [[round(value, 5) for value in curve] for curve in curves]


def picture(setup: Setup, curves: Mapping[str, Mapping[str, Curves]]) -> str:
    """The SVG: both sides' curves of reward, divergence and length."""
    titles = {"scores": "reward", "kls": f"{setup.kl_unit} from the reference", "lengths": "response tokens"}
    charts = [(title, [curves[name][side] for side in ("ours", "trl")]) for name, title in titles.items()]
    return comparison_plot(setup.algorithm, ("realloc", "TRL"), charts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, few iterations")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    parser.add_argument("--algorithms", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--control", action="store_true", help="also what has to be told apart")
    parser.add_argument("--work", type=Path, help="folder that keeps models and finished runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "curves")
    default = Path.home() / ".cache" / "realloc-benchmarks" / "trl"
    parser.add_argument("--peer-venv", type=Path, default=default, help=f"TRL's (default: {default})")
    options = parser.parse_args(argv)
    seeds = 2 if options.quick else options.seeds
    python, problem = ensure_peer(options.peer_venv)
    if python is None:
        raise SystemExit(f"TRL could not be installed, so there is nothing to compare with. {problem}")
    data = Path(os.environ.get("REALLOC_DATA", ROOT.parent / "shared" / "data")).resolve()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="realloc-peer-curves-") as temporary:
        folder = (options.work or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        stories = ShortStories(folder, data, ranks=1)
        for name in options.algorithms:
            setup = replace(SETUPS[name], iterations=8) if options.quick else SETUPS[name]
            row = found[name] = measure(stories, setup, seeds, python, options.control)
            write_text(options.out / f"{name}_trl.svg", picture(setup, row["curves"]))
            if not options.json:
                print(_line(name, row), flush=True)
    same = [row["same"] for row in found.values()]
    summary = {
        "benchmark": "peer_curves",
        "same": None if None in same else all(same),
        "seeds": seeds,
        "reward_model_accuracy": stories.accuracy,
        "algorithms": found,
        "provenance": provenance(("torch", "realloc")),
    }
    write_text(options.out / "trl.json", json.dumps(summary) + "\n")
    print(json.dumps(summary))


def _line(name: str, row: Mapping[str, Any]) -> str:
    parts = []
    for quantity, verdict in row["verdicts"].items():
        first, final = ("{ours:.3f} and {trl:.3f}".format(**verdict[k]) for k in ("first", "final"))
        spread = verdict.get("final_joint_spread", float("nan"))
        parts.append(f"{quantity} {first} -> {final} (spread {spread:.3f})")
    verdicts = f"same: {row['same']}, rises: {row['rises']}, control told apart: {row['told_apart']}"
    return f"{name:5} {verdicts}   {'   '.join(parts)}"


if __name__ == "__main__":
    main()
