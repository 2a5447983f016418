"""A reward model trained on HH-RLHF's preferences from a pretrained model, and how often it is right.

Plans and runs `experiments/recipes/reward_hh_smollm2.yaml`, then scores every pair of the held-out half with
the model that the run wrote. The last line is a JSON object: `accuracy` and its standard error (binomial),
by half as well, and what simpler judges reach on the same pairs: a TF-IDF pairwise model 0.554 (published
with the data), and `longer_wins`, which is counted here.

    python benchmarks/reward_hh.py --model SMOLLM2 --data HH_RLHF [--iterations N] [--quick] --json
    python benchmarks/reward_hh.py --run OUT/run --data HH_RLHF --json      # a run of before: judging alone
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.provenance import provenance  # noqa: E402
from realloc.columns import Want  # noqa: E402
from realloc.data_spec import DataSpec  # noqa: E402
from realloc.examples import Limits, open_examples  # noqa: E402
from realloc.files import read_yaml  # noqa: E402
from realloc.model_shape import resolve_shape  # noqa: E402
from runtime.attention import pack  # noqa: E402
from runtime.decoder import Decoder  # noqa: E402
from runtime.hf import load_boxes  # noqa: E402
from runtime.parallel import single_rank  # noqa: E402
from runtime.tokenizer import read_tokenizer  # noqa: E402

RECIPE = ROOT / "experiments" / "recipes" / "reward_hh_smollm2.yaml"
TFIDF = 0.554
PACK_TOKENS = 2048


def train(arguments: argparse.Namespace, out: Path) -> Path:
    """Plans and runs the recipe; returns the folder of the run."""
    content = read_yaml(RECIPE)
    content["models"]["reward"]["path"] = str(arguments.model.resolve())
    for key, name in (("path", "train.jsonl"), ("holdout_path", "test.jsonl")):
        content["data"][key] = str((arguments.data / name).resolve())
    content["cluster"]["gpus_per_node"] = arguments.ranks
    if arguments.iterations is not None:
        content["iterations"] = arguments.iterations
    (out / "experiment.yaml").write_text(yaml.safe_dump(content))
    commands = (
        ["search", str(out / "experiment.yaml"), "-o", str(out / "plan.yaml")],
        # a checkpoint is three times the model
        ["run", str(out / "plan.yaml"), "--out", str(out / "run"), "--save-every", "10"],
    )
    for command in commands:
        subprocess.run([sys.executable, "-m", "realloc", *command], check=True, cwd=ROOT, stdout=sys.stderr)
    return out / "run"


def training(run: Path) -> dict[str, Any]:
    """What the run took and learned; of losses and accuracies those of each quarter."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    experiment = read_yaml(run / "plan.yaml")["experiment"]
    edges = [len(metrics) * quarter // 4 for quarter in range(5)]
    quarters = [metrics[start:stop] for start, stop in pairwise(edges) if stop > start]
    return {
        "iterations": len(metrics),
        "pairs": len(metrics) * experiment["workload"]["sequences"] // 2,
        "tokens": sum(m["reward_train/tokens"] for m in metrics),
        "seconds": sum(m["seconds"] for m in metrics),
        "workload": experiment["workload"],
        "optimizer": experiment["models"]["reward"]["optimizer"],
        "first_loss": metrics[0]["reward_train/loss"],
        "loss": [_mean([m["reward_train/loss"] for m in quarter]) for quarter in quarters],
        "accuracy": [_mean([m["reward_train/accuracy"] for m in quarter]) for quarter in quarters],
    }


def judge(run: Path, data: Path, most: int | None) -> dict[str, Any]:
    """How often the run's model scores the chosen response higher, on the pairs of test.jsonl."""
    folder = run / "models" / "reward"
    experiment = read_yaml(run / "plan.yaml")["experiment"]
    spec = DataSpec((str(data / "test.jsonl"),), long_prompts=experiment["data"]["long_prompts"])
    limits = Limits(*(experiment["workload"][key]["max"] for key in ("prompt_tokens", "response_tokens")))
    found = open_examples(spec, Want.PAIRS, read_tokenizer(folder), limits)
    examples = found.read(found.scan()[0][:most])
    scores = score(folder, [e.prompt + r for e in examples for r in e.responses])
    right = [chosen > rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)]
    longer = [len(e.row["chosen"]) > len(e.row["rejected"]) for e in examples]
    half = ["harmless" if str(e.row["id"]).startswith("harmless") else "helpful" for e in examples]
    accuracy = sum(right) / len(right)
    return {
        "pairs": len(right),
        "accuracy": accuracy,
        "standard_error": (accuracy * (1 - accuracy) / len(right)) ** 0.5,
        "by_half": {
            name: _mean([r for r, h in zip(right, half, strict=True) if h == name])
            for name in sorted(set(half))
        },
        "longer_wins": _mean(longer),
        "tfidf": TFIDF,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def score(folder: Path, sequences: Sequence[Sequence[int]]) -> list[float]:
    """The score of each sequence's last token; sequences are packed, those of like length together."""
    shape = replace(resolve_shape(str(folder), "model"), head="scalar")
    decoder = Decoder(shape, single_rank(), torch.float32)
    decoder.params.update(load_boxes(folder, shape, decoder.boxes, torch.float32, torch.device("cpu")))
    scores = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    while order:
        batch = [order.pop()]
        while order and sum(len(sequences[i]) for i in (*batch, order[-1])) <= PACK_TOKENS:
            batch.append(order.pop())
        lengths = tuple(len(sequences[i]) for i in batch)
        tokens = torch.tensor([token for i in batch for token in sequences[i]])
        with torch.no_grad():
            hidden = decoder.forward(tokens, pack(lengths))
            values = decoder.scalar(hidden[torch.tensor(lengths).cumsum(0) - 1])
        for i, value in zip(batch, values.tolist(), strict=True):
            scores[i] = value
    return scores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="the pretrained model's folder")
    parser.add_argument("--run", type=Path, help="the folder of a run of before: judge its model alone")
    parser.add_argument("--data", type=Path, required=True, help="the folder with train.jsonl and test.jsonl")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where the run goes (default: a folder that is removed)")
    parser.add_argument("--quick", action="store_true", help="2 iterations, 8 pairs: whether it works at all")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.run is None):
        parser.error("give --model to train, or --run to judge")
    if arguments.quick:
        arguments.iterations = 2
    torch.set_num_threads(arguments.ranks)
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        run = arguments.run or train(arguments, out)
        result = {
            "benchmark": "reward_hh",
            "training": training(run),
            **judge(run, arguments.data, 8 if arguments.quick else None),
            "provenance": provenance(),
        }
    if not arguments.json:
        print(f"right in {result['accuracy']:.1%} of {result['pairs']} pairs (TF-IDF {TFIDF:.1%})")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
