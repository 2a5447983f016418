"""Sums of two digits: a task that a rule can verify, for a model that knows nothing yet.

Decides the task's words, its rows and a random initial model; what is right, a verifier says
(`experiments.verifiers:arithmetic`). Knows nothing of training.

`python -m experiments.sums OUT [--seed N]` writes OUT/{train,test}.jsonl, OUT/model and the recipe as
OUT/experiment.yaml.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from experiments.toy import SPECIAL_TOKENS, write_tiny_model, write_tokenizer
from realloc.files import write_text

LARGEST = 9
NUM_TEST = 10
WORDS = (*SPECIAL_TOKENS, "+", "=", *map(str, range(2 * LARGEST + 1)))


def write_task(folder: Path, seed: int) -> None:
    """Writes every sum once, columns `prompt` ("3 + 4 =") and `answer`; `NUM_TEST` of them to test.jsonl."""
    digits = range(LARGEST + 1)
    rows = [{"prompt": f"{a} + {b} =", "answer": a + b} for a in digits for b in digits]
    random.Random(seed).shuffle(rows)
    for name, part in (("test", rows[:NUM_TEST]), ("train", rows[NUM_TEST:])):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    write_tokenizer(folder / "model", WORDS)
    write_tiny_model(folder / "model", seed, len(WORDS))
    recipe = Path(__file__).parent / "recipes" / "sums.yaml"
    write_text(folder / "experiment.yaml", recipe.read_text())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.sums", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    write_task(given.out, given.seed)


if __name__ == "__main__":
    main()
