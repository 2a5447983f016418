"""Seconds per PPO or GRPO iteration against TRL's trainers, and whether both learn alike.

Both sides get the same model folders (PPO: actor, reference, critic, reward model), prompts, lengths, batch,
epochs, mini-batches, optimizer and KL coefficient, and the same cores. realloc runs as a user runs it: the
machine is profiled, `realloc search` finds a plan for as many ranks as there are cores, `realloc run` runs
it. TRL runs in the faster of two ways, found out first: one process with a thread for each core, or one
process a core under torchrun. Then the two sides take turns, one seed a turn; the first iteration of each
turn warms up and is left out. `ratio` is TRL's median seconds over ours, at the worst of the shapes.

`learning` compares scores and divergences from the reference model over the iterations (see `curves`);
`same_curves` is the verdict on the shape whose models are trained ones, over enough iterations.

Beside it, `bound_s`: the seconds that the matrix products of an iteration alone take at the rate at which one
core multiplies large fp32 matrices, measured in the same run, times the cores. Nobody with these models,
lengths and epochs can be faster in fp32, so `best_ratio`, TRL's seconds over it, bounds `ratio`.

TRL removed PPO; 1.12.0 is the last release with it. It gets a virtual environment of its own, made on
first use (`--peer-venv`). Where it cannot be installed, `ratio` is null.

    python benchmarks/iteration.py [--quick] [--json] [--peer-venv DIR] [--shapes NAME ...]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.curves import compare_curves  # noqa: E402
from benchmarks.ppo_runs import (  # noqa: E402
    MAX_PROMPT,
    SHAPES,
    Ours,
    Shape,
    Turn,
    checked,
    prepare_models,
    realloc_command,
)
from benchmarks.provenance import provenance  # noqa: E402
from realloc.model_shape import read_config, shape_from_config  # noqa: E402
from realloc.params import parameters  # noqa: E402

PEERS = {name: ROOT / "benchmarks" / f"peer_trl_{name}.py" for name in ("ppo", "grpo")}
TRIAL = 3
"""Iterations by which TRL's faster way is found; the first is left out."""
QUICK = ("demo-0.3M", "llama-4M", "llama-4M-1step", "demo-0.3M-grpo")


class Peer:
    """TRL, as one process with all threads or as one process a core."""

    def __init__(self, shape: Shape, folder: Path, python: Path) -> None:
        self._shape, self._folder, self._python = shape, folder, python
        self.versions: Mapping[str, str] = {}
        # the fastest iteration: other work on the machine only ever adds to one
        trials = {ways: min(self.run(0, TRIAL, ways).steady) for ways in self._ways()}
        self.trials = {f"{p} x {t} threads": seconds for (p, t), seconds in trials.items()}
        self._best = min(trials, key=lambda ways: trials[ways])

    @staticmethod
    def _ways() -> Sequence[tuple[int, int]]:
        """(processes, threads of each)."""
        cores = len(os.sched_getaffinity(0))
        return [(1, cores), (cores, 1)] if cores > 1 else [(1, 1)]

    @property
    def way(self) -> str:
        return f"{self._best[0]} x {self._best[1]} threads"

    def run(self, seed: int, iterations: int, ways: tuple[int, int] | None = None) -> Turn:
        processes, threads = ways or self._best
        shape, folder = self._shape, self._folder
        settings = {
            "models": {role: str(folder / ("actor" if role == "ref" else role)) for role in shape.roles},
            "prompts": str(folder / "prompts.jsonl"),
            "max_prompt": MAX_PROMPT,
            "reward": "bench_reward:score",
            "code": str(folder),
            "threads": threads,
            "iterations": iterations,
            "seed": seed,
            **{k: v for k, v in vars(shape).items() if k not in ("name", "random", "curves")},
        }
        source, result = folder / "peer.json", folder / "peer-result.json"
        source.write_text(json.dumps(settings), encoding="utf-8")
        command = [str(self._python)]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
        checked([*command, str(PEERS[shape.algorithm]), str(source), str(result)], folder, environment)
        found = json.loads(result.read_text(encoding="utf-8"))
        self.versions = found["versions"]
        return Turn(*(tuple(found[name]) for name in ("seconds", "scores", "kls", "lengths")))


def ensure_peer(folder: Path) -> tuple[Path | None, str]:
    """The Python of a virtual environment that has TRL 1.12.0, made where there is none; else the reason."""
    python = folder / "bin" / "python"
    probe = [str(python), "-c", "import requests, trl.experimental.ppo"]
    quiet = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
    if python.exists() and not subprocess.run(probe, env=quiet, capture_output=True, check=False).returncode:
        return python, ""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*pip, "torch==2.13.0"],  # first, so that nothing else decides which build is fetched
        [*pip, "trl==1.12.0", "requests"],  # its GRPO imports the latter
    )
    for step in steps:
        result = subprocess.run(step, capture_output=True, text=True, check=False)
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            return None, f"{' '.join(step)} failed: {last}"
    return python, ""


def compare(
    shape: Shape, profile: Path, python: Path | None, *, seeds: int, iterations: int, flops: float
) -> dict[str, Any]:
    """One shape: both sides in turns.

    Other algorithms need their own experiment (`ppo_runs.Ours`) and peer script; all else stays.
    """
    with tempfile.TemporaryDirectory(prefix="realloc-iteration-") as name:
        folder = Path(name)
        prepare_models(shape, folder)
        ours = Ours(shape, folder, profile, iterations)
        peer = None if python is None else Peer(shape, folder, python)
        mine: list[Turn] = []
        theirs: list[Turn] = []
        for seed in range(seeds):
            mine.append(ours.run(seed))
            if peer is not None:
                theirs.append(peer.run(seed, iterations))
        result: dict[str, Any] = {
            "ours": _side(mine),
            "plan": ours.plan,
            "predicted_s": ours.predicted_s,
            "bound_s": bound_s(shape, folder / "actor", flops),
            "setting": {k: v for k, v in vars(shape).items() if k != "name"},
            "ratio": None,
        }
        if peer is not None:
            result["trl"] = _side(theirs) | {
                "way": peer.way,
                "trials_s": peer.trials,
                "versions": peer.versions,
            }
            result["ratio"] = result["trl"]["median_s"] / result["ours"]["median_s"]
            result["best_ratio"] = result["trl"]["median_s"] / result["bound_s"]
            result["learning"] = _learning(mine, theirs)
        return result


def bound_s(shape: Shape, model: Path, matmul_flops: float) -> float:
    """Seconds of one iteration's products: generation and the inferences once, training three times each.

    Of PPO that is three inferences and two trained models, of GRPO one of each. Per token and layer
    parameter 2 FLOPs forward, 4 backward; attention and the small heads are left out. Where responses end by
    themselves, they count as half their maximum.
    """
    model_shape = shape_from_config(read_config(model), str(model))
    per_layer = sum(prod(spec.shape) for spec in parameters(model_shape) if spec.name.startswith("layers.0."))
    response = shape.max_response if shape.ignore_eos else shape.max_response // 2
    tokens = shape.sequences * (12 + response)  # mean length of the demo's prompts
    layers = 2 * per_layer * model_shape.num_layers * tokens
    head = 2 * model_shape.hidden * model_shape.vocab * shape.sequences * response
    passes = 3 * shape.epochs
    if shape.algorithm == "grpo":
        return ((2 + passes) * layers + (2 + passes) * head) / matmul_flops
    return ((4 + 2 * passes) * layers + (2 + passes) * head) / matmul_flops


def matmul_flops() -> float:
    """FLOP/s of large fp32 products: one core's best moment, times the cores."""
    import torch

    torch.set_num_threads(1)
    a, weight = torch.randn(512, 1024), torch.randn(1024, 1024)
    multiply = torch.ops.mkldnn._linear_pointwise.default  # oneDNN, the faster of torch's libraries
    best = float("inf")
    for _ in range(100):
        start = time.perf_counter()
        multiply(a, weight, None, "none", [], "")
        best = min(best, time.perf_counter() - start)
    return 2.0 * 512 * 1024 * 1024 / best * len(os.sched_getaffinity(0))


def _side(turns: Sequence[Turn]) -> dict[str, Any]:
    seconds = sorted(s for turn in turns for s in turn.steady)
    return {
        "median_s": median(seconds),
        "quartiles_s": [seconds[len(seconds) // 4], seconds[(3 * len(seconds)) // 4]],
        "iterations": len(seconds),
        "scores": [turn.scores for turn in turns],
    }


def _learning(mine: Sequence[Turn], theirs: Sequence[Turn]) -> dict[str, Any]:
    return {
        "scores": compare_curves([t.scores for t in mine], [t.scores for t in theirs]),
        "kl": compare_curves([t.kls for t in mine], [t.kls for t in theirs]),
    }


def effort(shape: Shape, quick: bool) -> tuple[int, int]:
    """(seeds, iterations)."""
    if quick:
        return (2, 6) if shape.curves else (1, 5)
    return (3, 30) if shape.curves else (2, 8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no large shape, few seeds and iterations")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES], help="only these")
    default = Path.home() / ".cache" / "realloc-benchmarks" / "trl"
    parser.add_argument("--peer-venv", type=Path, default=default, help=f"TRL's (default: {default})")
    options = parser.parse_args(argv)
    names = options.shapes or (QUICK if options.quick else [s.name for s in SHAPES])
    python, problem = ensure_peer(options.peer_venv)
    shapes: dict[str, Any] = {}
    flops = matmul_flops()
    with tempfile.TemporaryDirectory(prefix="realloc-profile-") as folder:
        profile, ranks = Path(folder) / "profile.yaml", str(len(os.sched_getaffinity(0)))
        realloc_command(Path(folder), "profile", "--quick", "--ranks", ranks, "-o", str(profile))
        for shape in SHAPES:
            if shape.name in names:
                seeds, iterations = effort(shape, options.quick)
                row = compare(shape, profile, python, seeds=seeds, iterations=iterations, flops=flops)
                shapes[shape.name] = row
                if not options.json:
                    print(_line(shape.name, row), flush=True)
    if problem:
        print(f"TRL could not be installed, so there is no ratio. {problem}", file=sys.stderr)
    ratios = [row["ratio"] for row in shapes.values() if row["ratio"] is not None]
    result = {
        "benchmark": "iteration",
        "ratio": min(ratios) if ratios else None,
        "same_curves": _same_curves(shapes),
        "problem": problem or None,
        "shapes": shapes,
        "matmul_flops": flops,
        "provenance": provenance(("torch", "realloc")),
    }
    print(json.dumps(result))


def _same_curves(rows: Mapping[str, Mapping[str, Any]]) -> bool | None:
    """Whether both sides learn alike wherever that was compared; None where it was not."""
    compared = {shape.name for shape in SHAPES if shape.curves}
    found = [row["learning"] for name, row in rows.items() if name in compared and "learning" in row]
    verdicts = [curve["same"] for row in found for curve in row.values()]
    return None if not verdicts or None in verdicts else all(verdicts)


def _line(name: str, row: Mapping[str, Any]) -> str:
    text = f"{name:14}  bound {row['bound_s']:7.3f} s   realloc {row['ours']['median_s']:7.3f} s"
    if row["ratio"] is not None:
        final = row["learning"]["scores"]["final"]
        text += (
            f"   TRL {row['trl']['median_s']:7.3f} s ({row['trl']['way']})   ratio {row['ratio']:5.2f}   "
            f"final score {final['ours']:+.3f} and {final['trl']:+.3f}"
        )
    return text


if __name__ == "__main__":
    main()
