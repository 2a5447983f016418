"""Seconds per PPO iteration against TRL's PPOTrainer, and whether both learn alike.

Both sides get the same model folders (actor, reference, critic, reward model), prompts, lengths, batch,
epochs, mini-batches, optimizer and KL coefficient, and the same cores. realloc runs as a user runs it: the
machine is profiled, `realloc search` finds a plan for as many ranks as there are cores, `realloc run` runs
it. TRL runs in the faster of two ways, found out first: one process with a thread for each core, or one
process a core under torchrun. Then the two sides take turns, one seed a turn; the first iteration of each
turn warms up and is left out. `ratio` is TRL's median seconds over ours, at the worst of the shapes.

TRL removed PPO; 1.12.0 is the last release with it. It gets a virtual environment of its own, made on
first use (`--peer-venv`). Where it cannot be installed, `ratio` is null.

    python benchmarks/iteration.py [--quick] [--json] [--peer-venv DIR] [--shapes NAME ...]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from benchmarks.provenance import provenance  # noqa: E402
from experiments import toy  # noqa: E402
from realloc.augmented import Placement  # noqa: E402
from realloc.files import dump_yaml  # noqa: E402
from realloc.mesh import parse_mesh  # noqa: E402
from realloc.plan import ExecutionPlan, read_plan, write_plan  # noqa: E402
from realloc.strategy import parse_strategy  # noqa: E402
from realloc.trace import read_trace  # noqa: E402
from tests.tiny import write_tiny_llama  # noqa: E402

PEER = ROOT / "benchmarks" / "peer_trl_ppo.py"
DEMO = ROOT / "experiments" / "demo"
ROLES = ("actor", "ref", "critic", "reward")
MAX_PROMPT = 16


@dataclass(frozen=True)
class Shape:
    """One comparison. `random` are the arguments of a random Llama; None takes the demo's trained model.

    With `ignore_eos` every response has `max_response` tokens, else it ends where the model ends it.
    """

    name: str
    random: Mapping[str, int] | None
    sequences: int
    max_response: int
    learning_rate: float
    ignore_eos: bool
    mini_batches: int = 4
    epochs: int = 2
    kl_coef: float = 0.05
    beta2: float = 0.95
    eps: float = 1e-5


SHAPES = (
    Shape("demo-0.3M", None, 64, 48, 5e-4, ignore_eos=False),
    Shape(
        "llama-4M",
        {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 1024, "vocab": 192, "context": 128},
        32,
        64,
        2e-4,
        ignore_eos=True,
    ),
    Shape(
        "llama-15M",
        {"hidden": 288, "layers": 6, "heads": 6, "kv_heads": 6, "ffn": 768, "vocab": 32000, "context": 128},
        16,
        64,
        1e-4,
        ignore_eos=True,
    ),
)
QUICK = ("demo-0.3M", "llama-4M")


@dataclass(frozen=True)
class Turn:
    """What one run of one side measured: seconds and mean scores of its iterations."""

    seconds: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def steady(self) -> tuple[float, ...]:
        return self.seconds[1:]

    @property
    def final_score(self) -> float:
        """Mean over the last quarter of the iterations."""
        return mean(self.scores[-max(1, len(self.scores) // 4) :])


def prepare_models(shape: Shape, folder: Path) -> Mapping[str, Path]:
    """Writes the folders of the four models; the reference is the actor, the others have scalar heads."""
    paths = {role: folder / ("actor" if role == "ref" else role) for role in ROLES}
    for seed, role in enumerate(("actor", "critic", "reward")):
        head = "lm" if role == "actor" else "scalar"
        if shape.random is not None:
            tied = shape.random["vocab"] > 1000 and role == "actor"
            write_tiny_llama(paths[role], seed=seed, head=head, tied=tied, **shape.random)
            toy.write_tokenizer(paths[role])
        else:
            shutil.copytree(DEMO / "model", paths[role])
            if head == "scalar":
                _to_classifier(paths[role], seed)
    shutil.copy(DEMO / "prompts.jsonl", folder / "prompts.jsonl")
    return paths


def _to_classifier(folder: Path, seed: int) -> None:
    """Gives a causal model a random scalar head in place of its own."""
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)
    hidden = weights["model.norm.weight"].shape[0]
    scale = 1.0 / hidden**0.5
    weights["score.weight"] = scale * np.random.default_rng(seed).standard_normal((1, hidden), np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "tie_word_embeddings": False,
    }
    path.write_text(json.dumps(config), encoding="utf-8")


class Ours:
    """realloc, through its command line."""

    def __init__(
        self, shape: Shape, folder: Path, profile: Path, iterations: int, ranks: int | None = None
    ) -> None:
        """Searches a plan; `ranks`: as many as there are cores where None."""
        self._shape, self._folder, self._iterations = shape, folder, iterations
        self._ranks = ranks or len(os.sched_getaffinity(0))
        self._experiment()
        realloc_command(folder, "search", "experiment.yaml", "--device", str(profile), "-o", "plan.yaml")

    def place(self, placements: Mapping[str, tuple[str, str]]) -> None:
        """Puts a hand-written plan (call -> mesh, strategy) in place of the searched one."""
        searched = read_plan(self._folder / "plan.yaml")
        cluster = replace(searched.cluster, device="cpu")  # the profile's file is no part of this plan
        chosen = {
            name: Placement(parse_mesh(mesh, cluster, name), parse_strategy(strategy, name))
            for name, (mesh, strategy) in placements.items()
        }
        plan = ExecutionPlan(searched.experiment, cluster, chosen)
        plan.check()
        write_plan(plan, self._folder / "plan.yaml")

    @property
    def order(self) -> Sequence[str]:
        return read_plan(self._folder / "plan.yaml").node_order

    @property
    def trace(self) -> Path:
        """The last run's trace."""
        return self._folder / "out" / "trace.jsonl"

    @property
    def plan(self) -> Mapping[str, str]:
        return {name: str(p) for name, p in read_plan(self._folder / "plan.yaml").placements.items()}

    @property
    def predicted_s(self) -> float | None:
        predictions = read_plan(self._folder / "plan.yaml").predictions
        return None if predictions is None else predictions.iteration_s

    def run(self, seed: int) -> Turn:
        plan = self._folder / "plan.yaml"
        text = plan.read_text(encoding="utf-8")
        if seed:
            plan = self._folder / f"plan-{seed}.yaml"
            plan.write_text(text.replace("\n  seed: 0\n", f"\n  seed: {seed}\n"), encoding="utf-8")
            if read_plan(plan).experiment.seed != seed:
                raise AssertionError("the plan's seed was not replaced")
        out = self._folder / "out"
        realloc_command(self._folder, "run", str(plan), "--out", str(out), "--overwrite")
        ends: dict[int, float] = {}
        for record in read_trace(self.trace).records:
            ends[record.iteration] = max(ends.get(record.iteration, 0.0), record.end_s)
        seconds = [b - a for a, b in pairwise([0.0, *(ends[i] for i in sorted(ends))])]
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return Turn(tuple(seconds), tuple(_score(json.loads(line)) for line in lines))

    def _experiment(self) -> None:
        shape = self._shape
        optimizer = {
            "learning_rate": shape.learning_rate,
            "beta1": 0.9,
            "beta2": shape.beta2,
            "eps": shape.eps,
            "clip_norm": 0.0,  # TRL's PPO does not clip gradients
        }
        models: dict[str, Any] = {}
        for role in ROLES:
            path = str(self._folder / ("actor" if role == "ref" else role))
            models[role] = {"path": path, "optimizer": optimizer} if role in ("actor", "critic") else path
        content = {
            "algorithm": "ppo",
            "models": models,
            "data": {"path": str(self._folder / "prompts.jsonl"), "prompt": "prompt"},
            "workload": {
                "sequences": shape.sequences,
                "prompt_tokens": {"mean": 12, "max": MAX_PROMPT},
                "response_tokens": shape.max_response,
            },
            "hyperparameters": {
                "kl_coef": shape.kl_coef,
                "mini_batches": shape.mini_batches,
                "epochs": shape.epochs,
            },
            "sampling": {"ignore_eos": shape.ignore_eos},
            "iterations": self._iterations,
            "seed": 0,
            "cluster": {"gpus_per_node": self._ranks, "device": "cpu"},
        }
        text = dump_yaml("experiment", content)
        (self._folder / "experiment.yaml").write_text(text, encoding="utf-8")


class Peer:
    """TRL, as one process with all threads or as one process a core."""

    def __init__(self, shape: Shape, folder: Path, python: Path) -> None:
        self._shape, self._folder, self._python = shape, folder, python
        self.versions: Mapping[str, str] = {}
        trials = {ways: median(self.run(0, 3, ways).steady) for ways in self._ways()}
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
            "models": {role: str(folder / ("actor" if role == "ref" else role)) for role in ROLES},
            "prompts": str(folder / "prompts.jsonl"),
            "max_prompt": MAX_PROMPT,
            "threads": threads,
            "iterations": iterations,
            "seed": seed,
            **{k: v for k, v in vars(shape).items() if k not in ("name", "random")},
        }
        source, result = folder / "peer.json", folder / "peer-result.json"
        source.write_text(json.dumps(settings), encoding="utf-8")
        command = [str(self._python)]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
        _checked([*command, str(PEER), str(source), str(result)], folder, environment)
        found = json.loads(result.read_text(encoding="utf-8"))
        self.versions = found["versions"]
        return Turn(tuple(found["seconds"]), tuple(found["scores"]))


def _score(metrics: Mapping[str, Any]) -> float:
    """The mean score in a line of metrics.jsonl."""
    return float(next(value for name, value in metrics.items() if name == "rew_inf/scores"))


def realloc_command(folder: Path, *arguments: str) -> None:
    """Runs `realloc ARGUMENTS` in a folder, to its end."""
    _checked([sys.executable, "-m", "realloc", *arguments], folder)


def _checked(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
    """Runs a command to its end. Exits with the tail of its output when it fails."""
    merged = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    if environment is not None:
        del merged["PYTHONPATH"]  # the peer's own environment
    result = subprocess.run(command, cwd=folder, env=merged, capture_output=True, text=True, check=False)
    if result.returncode:
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-25:])
        raise SystemExit(f"{' '.join(command)} ended with {result.returncode}:\n{tail}")


def ensure_peer(folder: Path) -> tuple[Path | None, str]:
    """The Python of a virtual environment that has TRL 1.12.0, made where there is none; else the reason."""
    python = folder / "bin" / "python"
    probe = [str(python), "-c", "import trl.experimental.ppo"]
    quiet = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
    if python.exists() and not subprocess.run(probe, env=quiet, capture_output=True, check=False).returncode:
        return python, ""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*pip, "torch==2.13.0"],  # first, so that nothing else decides which build is fetched
        [*pip, "trl==1.12.0"],
    )
    for step in steps:
        result = subprocess.run(step, capture_output=True, text=True, check=False)
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            return None, f"{' '.join(step)} failed: {last}"
    return python, ""


def compare(
    shape: Shape, profile: Path, python: Path | None, *, seeds: int, iterations: int
) -> dict[str, Any]:
    """One shape: both sides in turns."""
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
            result["learning"] = _learning(mine, theirs)
        return result


def _side(turns: Sequence[Turn]) -> dict[str, Any]:
    seconds = sorted(s for turn in turns for s in turn.steady)
    return {
        "median_s": median(seconds),
        "quartiles_s": [seconds[len(seconds) // 4], seconds[(3 * len(seconds)) // 4]],
        "iterations": len(seconds),
        "scores": [turn.scores for turn in turns],
    }


def _learning(mine: Sequence[Turn], theirs: Sequence[Turn]) -> dict[str, Any]:
    """Mean scores at the end beside what they were at the start and how far seeds lie apart."""
    ours, peers = [t.final_score for t in mine], [t.final_score for t in theirs]
    spread = max(max(ours) - min(ours), max(peers) - min(peers))
    return {
        "start": mean(t.scores[0] for t in (*mine, *theirs)),
        "final_ours": mean(ours),
        "final_trl": mean(peers),
        "difference": mean(ours) - mean(peers),
        "spread_of_seeds": spread,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, one seed, few iterations")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES], help="only these")
    default = Path.home() / ".cache" / "realloc-benchmarks" / "trl"
    parser.add_argument("--peer-venv", type=Path, default=default, help=f"TRL's (default: {default})")
    options = parser.parse_args(argv)
    seeds, iterations = (1, 6) if options.quick else (3, 20)
    names = options.shapes or (QUICK if options.quick else [s.name for s in SHAPES])
    python, problem = ensure_peer(options.peer_venv)
    shapes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="realloc-profile-") as folder:
        profile, ranks = Path(folder) / "profile.yaml", str(len(os.sched_getaffinity(0)))
        realloc_command(Path(folder), "profile", "--quick", "--ranks", ranks, "-o", str(profile))
        for shape in SHAPES:
            if shape.name in names:
                row = compare(shape, profile, python, seeds=seeds, iterations=iterations)
                shapes[shape.name] = row
                if not options.json:
                    print(_line(shape.name, row), flush=True)
    if problem:
        print(f"TRL could not be installed, so there is no ratio. {problem}", file=sys.stderr)
    ratios = [row["ratio"] for row in shapes.values() if row["ratio"] is not None]
    result = {
        "benchmark": "iteration",
        "ratio": min(ratios) if ratios else None,
        "problem": problem or None,
        "shapes": shapes,
        "provenance": provenance(("torch", "realloc")),
    }
    print(json.dumps(result))


def _line(name: str, row: Mapping[str, Any]) -> str:
    text = f"{name:10}  realloc {row['ours']['median_s']:7.3f} s"
    if row["ratio"] is not None:
        learning = row["learning"]
        text += (
            f"   TRL {row['trl']['median_s']:7.3f} s ({row['trl']['way']})   ratio {row['ratio']:5.2f}   "
            f"final score {learning['final_ours']:+.3f} and {learning['final_trl']:+.3f} "
            f"from {learning['start']:+.3f}"
        )
    return text


if __name__ == "__main__":
    main()
