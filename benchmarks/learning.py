"""What algorithms learn: held-out reward before and after, and learning curves as pictures, over seeds.

The three-step pipeline on stories260K and TinyStories, every step planned and run by realloc's command line:
supervised training, a reward model, and then each algorithm with that reward model. Preferences are pairs
of the supervised model's own responses, the better one by a rule (`experiments.rewards:sentiment`) that
stands for a person; nothing but the reward model sees it. So `gold`, that rule on held-out responses, shows
whether what was learned is more than the reward model's errors. PPO's critic begins as the reward model.

`improved`: the mean held-out reward after training exceeds that before by more than the spread, the joint
standard deviation over the seeds. Writes DIR/ALGORITHM.svg and DIR/table.md (`--out`, default docs/curves).

    python benchmarks/learning.py [--quick] [--json] [--algorithms NAME ...] [--seeds K] [--out DIR]

Data: REALLOC_DATA, default ../shared/data. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from math import hypot
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.learning_plot import learning_plot  # noqa: E402
from benchmarks.ppo_runs import realloc_command  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from experiments.rewards import sentiment  # noqa: E402
from realloc.files import dump_yaml, write_text  # noqa: E402
from realloc.functions import Sample  # noqa: E402

SEQUENCES, RESPONSE, MAX_PROMPT = 64, 48, 32
HELD_OUT = 360
"""Sequences by which a model is judged: 90 prompts of the test file, four responses each."""
GROUPS = {"samples_per_prompt": 4}
ALGORITHMS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "ppo": ({"kl_coef": 0.1, "mini_batches": 2, "epochs": 2}, {}),
    "grpo": ({"kl_coef": 0.1, "mini_batches": 2, "epochs": 2}, GROUPS),
    "rloo": ({"kl_coef": 0.1, "mini_batches": 2, "epochs": 2, "whiten_advantages": True}, GROUPS),
    "remax": ({"kl_coef": 0.1, "mini_batches": 2}, {}),
    "reinforce_pp": ({"kl_coef": 0.1, "mini_batches": 2, "epochs": 2}, {}),
    "iterative_dpo": ({"beta": 0.1, "mini_batches": 2}, GROUPS),
}
LEARNING_RATE = 1e-4


class Pipeline:
    """Runs of realloc in one folder, on two ranks unless told."""

    def __init__(self, folder: Path, data: Path, iterations: int = 30, *, ranks: int = 2) -> None:
        """`iterations`: of each algorithm that is to `learn`."""
        self._folder, self._data, self._iterations, self._ranks = folder, data, iterations, ranks
        self._profile = folder / "profile.yaml"
        realloc_command(folder, "profile", "--quick", "--ranks", str(ranks), "-o", str(self._profile))
        self.sft = self._sft()
        self.reward, self.accuracy = self._reward_model()

    def learn(self, algorithm: str, seed: int) -> Path:
        """Runs an algorithm from the supervised model; the run's folder."""
        hyperparameters, workload = ALGORITHMS[algorithm]
        models: dict[str, Any] = {"actor": _trained(self.sft, LEARNING_RATE), "ref": str(self.sft)}
        models["reward"] = str(self.reward)
        if algorithm == "ppo":
            models["critic"] = _trained(self.reward, 5 * LEARNING_RATE)
        content = {
            "algorithm": algorithm,
            "models": models,
            "data": self._prompts("train"),
            "workload": _workload(SEQUENCES, **workload),
            "hyperparameters": hyperparameters,
        }
        return self._run(f"{algorithm}-{seed}", content, self._iterations, seed)

    def judge(self, name: str, actor: Path, seed: int) -> tuple[float, float]:
        """Mean reward and mean gold score of a model's responses to the held-out prompts."""
        models = {"actor": str(actor), "reward": str(self.reward)}
        content = {
            "algorithm": "benchmarks.evaluation:Evaluation",
            "models": models,
            "data": self._prompts("test"),
            "workload": _workload(HELD_OUT, **GROUPS),
        }
        samples = _lines(self._run(f"judge-{name}", content, 1, 1000 + seed, HELD_OUT) / "samples.jsonl")
        return fmean(s["scores"] for s in samples), fmean(map(_gold, samples))

    def _sft(self) -> Path:
        content = {
            "algorithm": "sft",
            "models": {"actor": _trained(self._data / "stories260k", 1e-4)},
            "data": {**self._prompts("train"), "response": "story"},
            "workload": _workload(SEQUENCES),
        }
        return self._run("sft", content, 20, 0) / "models" / "actor"

    def _reward_model(self) -> tuple[Path, float]:
        """The model, and its accuracy on the last pairs, which it had not seen before."""
        content = {
            "algorithm": "benchmarks.evaluation:Evaluation",
            "models": {"actor": str(self.sft)},
            "reward": "experiments.rewards:sentiment",
            "data": self._prompts("train"),
            "workload": _workload(256, **GROUPS),
        }
        samples = _lines(self._run("answers", content, 40, 0, 256) / "samples.jsonl")
        pairs = list(_pairs(samples))
        path = self._folder / "pairs.jsonl"
        write_text(path, "".join(json.dumps(pair) + "\n" for pair in pairs))
        content = {
            "algorithm": "reward",
            "models": {"reward": _trained(self.sft, 1e-3)},
            "data": {"path": str(path), "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
            "workload": _workload(2 * SEQUENCES, samples_per_prompt=2),
        }
        out = self._run("reward", content, len(pairs) // SEQUENCES, 0)
        accuracies = [line["reward_train/accuracy"] for line in _lines(out / "metrics.jsonl")]
        return out / "models" / "reward", fmean(accuracies[-5:])

    def _run(
        self, name: str, content: Mapping[str, Any], iterations: int, seed: int, samples: int = 2
    ) -> Path:
        """Searches a plan and runs it; the run's folder."""
        cluster = {"gpus_per_node": self._ranks, "device": "cpu"}
        whole = {**content, "iterations": iterations, "seed": seed, "cluster": cluster}
        write_text(self._folder / f"{name}.yaml", dump_yaml("experiment", whole))
        plan, out = f"{name}-plan.yaml", self._folder / name
        options = ("--device", str(self._profile), "--time-limit", "5")
        realloc_command(self._folder, "search", f"{name}.yaml", *options, "-o", plan)
        save = ("--trust", "--save-every", "0", "--samples", str(samples))
        realloc_command(self._folder, "run", plan, "--out", str(out), "--overwrite", *save)
        return out

    def _prompts(self, split: str) -> Mapping[str, str]:
        return {"path": str(self._data / "tinystories" / f"{split}.jsonl"), "prompt": "prompt"}


def _workload(sequences: int, **more: Any) -> Mapping[str, Any]:
    prompt = {"mean": 19, "max": MAX_PROMPT}
    return {"sequences": sequences, "prompt_tokens": prompt, "response_tokens": RESPONSE, **more}


def _trained(model: Path, learning_rate: float) -> Mapping[str, Any]:
    return {"path": str(model), "optimizer": {"learning_rate": learning_rate, "eps": 1e-5}}


def _lines(path: Path) -> list[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _gold(sample: Mapping[str, Any]) -> float:
    return sentiment([Sample(0, sample["prompt"], sample["response"], finished=False)])[0]


def _pairs(samples: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, str]]:
    """The best and the worst of each prompt's responses, where the rule tells them apart."""
    groups: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault((sample["iteration"], sample["id"] // GROUPS["samples_per_prompt"]), []).append(
            sample
        )
    for group in groups.values():
        best, worst = (choose(group, key=lambda s: s["scores"]) for choose in (max, min))
        if best["scores"] > worst["scores"]:
            prompt = best["prompt"]
            yield {"prompt": prompt, "chosen": f" {best['response']}", "rejected": f" {worst['response']}"}


def measure(pipeline: Pipeline, algorithm: str, seeds: int, before: Sequence[tuple[float, float]]) -> Any:
    """Runs and judges all seeds of one algorithm. `before`: the supervised model's judgements."""
    start, runs, after = time.monotonic(), [], []
    for seed in range(seeds):
        out = pipeline.learn(algorithm, seed)
        runs.append(_lines(out / "metrics.jsonl"))
        after.append(pipeline.judge(f"{algorithm}-{seed}", out / "models" / "actor", seed))
    rewards = [[line["rew_inf/scores"] for line in run] for run in runs]
    kls = [[line["actor_train/ref_kl"] for line in run if "actor_train/ref_kl" in line] for run in runs]
    result: dict[str, Any] = {"rewards": rewards, "kls": kls if all(kls) else None}
    for index, name in enumerate(("reward", "gold")):
        result[name] = _verdict([pair[index] for pair in before], [pair[index] for pair in after])
    return result | {"seconds": time.monotonic() - start}


def _verdict(before: Sequence[float], after: Sequence[float]) -> Mapping[str, Any]:
    spread = hypot(stdev(before), stdev(after)) if len(after) > 1 else None
    gain = fmean(after) - fmean(before)
    improved = None if spread is None else gain > spread
    return {"before": before, "after": after, "gain": gain, "spread": spread, "improved": improved}


def table(results: Mapping[str, Any]) -> str:
    """Markdown: held-out reward and gold score before and after, with the spread over the seeds."""
    rewards = next(iter(results.values()))["rewards"]
    seeds = "1 seed" if len(rewards) == 1 else f"{len(rewards)} seeds"
    lines = [
        f"{seeds}, {len(rewards[0])} iterations of {SEQUENCES} sequences, learning rate "
        f"{LEARNING_RATE:g}, two CPU ranks.",
        "",
        "| algorithm | held-out reward before | after | spread | rule before | after | spread |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        cells = []
        for kind in ("reward", "gold"):
            verdict = result[kind]
            spread = "" if verdict["spread"] is None else f"{verdict['spread']:.3f}"
            cells += [f"{fmean(verdict['before']):.3f}", f"{fmean(verdict['after']):.3f}", spread]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few iterations")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "curves")
    options = parser.parse_args(argv)
    seeds, iterations = (1, 10) if options.quick else (options.seeds, 30)
    data = Path(os.environ.get("REALLOC_DATA", ROOT.parent / "shared" / "data")).resolve()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="realloc-learning-") as folder:
        pipeline = Pipeline(Path(folder), data, iterations)
        before = [pipeline.judge("sft", pipeline.sft, seed) for seed in range(seeds)]
        if not options.json:
            print(f"reward model: accuracy {pipeline.accuracy:.3f} on new pairs", flush=True)
        for name in options.algorithms:
            result = results[name] = measure(pipeline, name, seeds, before)
            charts = [("reward", result["rewards"])]
            if result["kls"] is not None:
                charts.append(("nats a token from the reference", result["kls"]))
            write_text(options.out / f"{name}.svg", learning_plot(name, charts))
            if not options.json:
                print(_line(name, result), flush=True)
    write_text(options.out / "table.md", table(results))
    verdicts = [result["reward"]["improved"] for result in results.values()]
    summary = {
        "benchmark": "learning",
        "improved": None if None in verdicts else all(verdicts),
        "reward_model_accuracy": pipeline.accuracy,
        "algorithms": results,
        "provenance": provenance(("torch", "realloc")),
    }
    print(json.dumps(summary))


def _line(name: str, result: Mapping[str, Any]) -> str:
    parts = []
    for kind in ("reward", "gold"):
        verdict = result[kind]
        spread = "" if verdict["spread"] is None else f" (spread {verdict['spread']:.3f})"
        parts.append(f"{kind} {fmean(verdict['before']):.3f} -> {fmean(verdict['after']):.3f}{spread}")
    return f"{name:14} {'   '.join(parts)}   {result['seconds']:.0f} s"


if __name__ == "__main__":
    main()
