"""Tokens per second of generation against `transformers`, on one rank and one thread of a CPU.

Ours runs as the runtime runs it: parameters as views of one flat buffer, `runtime.generation.generate`.
`transformers` runs `generate` with the same weights, prompts, lengths, dtype and sampling; so do, where
they run, its `generate_batch` (continuous batching) and vLLM (see `rollout_peers`). All take turns
within one run, so that other work on the machine hits all alike; medians of ratios.

equal            as many sequences as slots, every response has the full length
ragged           sixteen times as many sequences as slots (a rollout has hundreds, a cache has room for
                 few), responses end anywhere between 10% and 100% of the limit, in a fixed order that
                 no side may know beforehand. `generate` takes them in batches of as many as there are
                 slots, each of which runs until its longest response ends; ours lets the next sequence
                 in when one ends. `steps` says what that alone can bring.
ragged_at_once   the hard variant: no more sequences than slots, so that nobody waits for a free one

    python benchmarks/rollout.py [--quick] [--json] [--vllm-venv DIR]

`bandwidth_share` is the bytes that decoding must read (all weights and the cached keys and values,
once per step) over the bytes that a plain read of as much memory moves in the same time;
`compute_share` the same for the multiply-adds of the weights, against a product of large matrices. At 16
rows a core that multiplies fast is bound by the second before the first. Ratios are of elapsed time;
`cpu_ratio_*` of the time the process had a core, which other work on the machine disturbs less. The
top level has the worst over the models; `ratio_vllm` is null where vLLM does not run. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402

from benchmarks.provenance import provenance  # noqa: E402
from benchmarks.rollout_bounds import shares, steps_continuous, steps_in_batches  # noqa: E402
from benchmarks.rollout_peers import Peer, PeerProblem  # noqa: E402
from realloc.layout import compute_boxes  # noqa: E402
from realloc.model_shape import ModelShape, resolve_shape  # noqa: E402
from realloc.sampling import Sampling  # noqa: E402
from runtime.decoder import Decoder  # noqa: E402
from runtime.generation import generate  # noqa: E402
from runtime.hf import load_boxes  # noqa: E402
from runtime.parallel import single_rank  # noqa: E402
from runtime.parameters import allocate  # noqa: E402

DATA = Path(os.environ.get("REALLOC_DATA", ROOT.parent / "shared" / "data"))
ROUNDS = 16
"""How many times more sequences than slots the ragged workload has."""
Run = Callable[[Sequence[int]], float]
"""Generates responses of these lengths; returns the seconds it took."""


@dataclass(frozen=True)
class Case:
    """A model folder and what is generated with it: `slots` sequences at a time."""

    name: str
    folder: Path
    slots: int
    prompt: int
    response: int

    def ragged(self, num: int) -> list[int]:
        """Evenly spread over 10% to 100% of the limit, in an order that is no order."""
        step = 0.9 / (num - 1)
        lengths = [round(self.response * (0.1 + step * i)) for i in range(num)]
        order = torch.randperm(num, generator=torch.Generator().manual_seed(0))
        return [lengths[i] for i in order.tolist()]

    def prompts(self, vocab: int, num: int) -> torch.Tensor:
        """int64 [num, prompt] of ordinary tokens."""
        return torch.randint(3, vocab, (num, self.prompt), generator=torch.Generator().manual_seed(0))


def write_llama(folder: Path) -> Path:
    """A random Llama of 15.2M parameters: the shape of the TinyStories model of that size."""
    import transformers as hf

    config = hf.LlamaConfig(
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=32000,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def ours(case: Case) -> tuple[Run, int, ModelShape]:
    """How we generate, and how many weights a decode step reads."""
    shape, context = resolve_shape(str(case.folder), "benchmark"), single_rank()
    boxes = compute_boxes(shape, context.strategy, context.at)
    params = allocate(boxes, torch.float32, context.device)
    loaded = load_boxes(case.folder, shape, boxes, torch.float32, context.device)
    for name, view in params.views.items():
        view.copy_(loaded[name])
    decoder = Decoder(shape, context, torch.float32, dict(params.views))

    def run(lengths: Sequence[int]) -> float:
        num = len(lengths)
        prompts = case.prompts(shape.vocab, num).flatten()
        start = time.perf_counter()
        result = generate(
            decoder,
            prompts=prompts,
            prompt_lengths=[case.prompt] * num,
            sequence_ids=range(num),
            max_new_tokens=case.response,
            limits=lengths,
            eos_ids=(),
            sampling=Sampling(),
            seed=0,
            iteration=0,
            micro_batches=num // case.slots,
        )
        seconds = time.perf_counter() - start
        assert result.response_lengths == tuple(lengths)
        return seconds

    return run, params.flat.numel(), shape


def transformers_generate(case: Case, model: Any) -> Run:
    """`generate`, a batch at a time: each runs until its last sequence is done, as it does in practice."""
    import transformers as hf

    class Lengths(hf.StoppingCriteria):  # type: ignore[misc]
        def __init__(self, lengths: Sequence[int]) -> None:
            self.totals = torch.tensor(lengths) + case.prompt

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.shape[1] >= self.totals

    def run_batch(prompts: torch.Tensor, lengths: Sequence[int]) -> None:
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=case.response,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=hf.StoppingCriteriaList([Lengths(lengths)]),
        )
        assert out.shape == (len(lengths), case.prompt + max(lengths)), out.shape

    def run(lengths: Sequence[int]) -> float:
        prompts = case.prompts(model.config.vocab_size, len(lengths))
        start = time.perf_counter()
        for first in range(0, len(lengths), case.slots):
            rows = slice(first, first + case.slots)
            run_batch(prompts[rows], lengths[rows])
        return time.perf_counter() - start

    return run


def workloads(case: Case) -> Mapping[str, tuple[list[int], int]]:
    """Lengths of the responses and how many sequences run at a time."""
    return {
        "equal": ([case.response] * case.slots, case.slots),
        "ragged": (case.ragged(ROUNDS * case.slots), case.slots),
        "ragged_at_once": (case.ragged(case.slots), case.slots),
    }


@dataclass
class Times:
    """Seconds of each repeat, by side and workload."""

    elapsed: dict[tuple[str, str], list[float]]
    cpu: dict[tuple[str, str], list[float]]

    def ratio(self, side: str, work: str, *, cpu: bool = False) -> float | None:
        """How many times longer `side` takes than we do; None if it has not run."""
        values = self.cpu if cpu else self.elapsed
        if (side, work) not in values:
            return None
        pairs = zip(values["ours", work], values[side, work], strict=True)
        return round(median(theirs / ours for ours, theirs in pairs), 3)


def take_turns(case: Case, sides: Mapping[str, Run], repeats: int) -> tuple[Times, dict[str, str]]:
    """Runs every side on every workload, again and again; a peer with a problem is left out."""
    times, problems = Times({}, {}), dict[str, str]()
    live = dict(sides)
    for repeat in range(repeats + 1):  # the first warms up
        for work, (lengths, _) in workloads(case).items():
            for side in list(live):
                start = time.process_time()
                try:
                    seconds = live[side](lengths)
                except PeerProblem as problem:
                    problems[side] = str(problem)
                    del live[side]
                    for values in (times.elapsed, times.cpu):
                        for key in [key for key in values if key[0] == side]:
                            del values[key]
                    continue
                if repeat:
                    times.elapsed.setdefault((side, work), []).append(seconds)
                    times.cpu.setdefault((side, work), []).append(time.process_time() - start)
    return times, problems


def measure(case: Case, repeats: int, peers: Mapping[str, Path]) -> Mapping[str, Any]:
    """`peers`: which to run, with the Python of each."""
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32).eval()
    mine, num_weights, shape = ours(case)
    sides: dict[str, Run] = {"ours": mine, "generate": transformers_generate(case, model)}
    started: list[Peer] = []
    problems: dict[str, str] = {}
    for kind, python in peers.items():
        try:
            started.append(Peer(kind, python, case.folder, case.slots, case.prompt + case.response))
            sides[kind] = peer_run(case, shape.vocab, started[-1])
        except (PeerProblem, OSError) as problem:
            problems[kind] = str(problem)
    try:
        times, failed = take_turns(case, sides, repeats)
    finally:
        for peer in started:
            peer.close()
    equal = times.elapsed["ours", "equal"]
    # the prompts' pass is not decoding
    prefill = median(mine([1] * case.slots) for _ in range(3))
    decoding = [seconds - prefill for seconds in equal]
    works = workloads(case)
    tokens = {work: sum(lengths) for work, (lengths, _) in works.items()}
    batches, continuous = (
        {work: count(*works[work]) for work in works} for count in (steps_in_batches, steps_continuous)
    )
    return {
        "sequences": {work: len(lengths) for work, (lengths, _) in works.items()},
        "slots": case.slots,
        "prompt_tokens": case.prompt,
        "response_tokens_limit": case.response,
        "parameters": num_weights,
        **{f"ratio_{work}": times.ratio("generate", work) for work in works},
        **{f"cpu_ratio_{work}": times.ratio("generate", work, cpu=True) for work in works},
        "steps": {"generate": batches, "ours": continuous},
        **{f"ratio_{kind}": {w: times.ratio(kind, w) for w in works} for kind in ("generate_batch", "vllm")},
        "problems": problems | failed,
        **shares(shape, num_weights, case.prompt, works["equal"][0], decoding),
        "prefill_s": round(prefill, 4),
        "tokens_per_s": {
            f"{side}_{work}": round(tokens[work] / median(values), 1)
            for (side, work), values in times.elapsed.items()
        },
        "spread": {f"{s}_{w}": round(max(v) / min(v), 2) for (s, w), v in times.elapsed.items()},
        "repeats": repeats,
    }


def peer_run(case: Case, vocab: int, peer: Peer) -> Run:
    return lambda lengths: peer.run(case.prompts(vocab, len(lengths)).tolist(), lengths)


def find_peers(quick: bool, vllm_venv: Path) -> tuple[Mapping[str, Path], Mapping[str, str]]:
    """Peers that can be tried, with their Pythons; why the others cannot."""
    if quick:
        return {}, {"generate_batch": "left out of a quick run", "vllm": "left out of a quick run"}
    peers, python = {"generate_batch": Path(sys.executable)}, vllm_venv / "bin" / "python"
    if not python.exists():
        return peers, {"vllm": f"there is no {python}"}
    return {**peers, "vllm": python}, {}


def summary(shapes: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The worst over the models."""
    keys = ("ratio_equal", "ratio_ragged", "ratio_ragged_at_once", "bandwidth_share", "compute_share")
    worst: dict[str, Any] = {key: min(shape[key] for shape in shapes.values()) for key in keys}
    for kind in ("generate_batch", "vllm"):
        ratios = [r for shape in shapes.values() for r in shape[f"ratio_{kind}"].values() if r is not None]
        worst[f"ratio_{kind}"] = min(ratios, default=None)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, `generate` alone")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    default = Path.home() / ".cache" / "realloc-benchmarks" / "vllm"
    parser.add_argument("--vllm-venv", type=Path, default=default, help=f"where vLLM is (default: {default})")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peers, missing = find_peers(arguments.quick, arguments.vllm_venv)
    shapes: dict[str, Mapping[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = [Case("llama-15m", write_llama(Path(folder) / "llama-15m"), 16, 64, 64)]
        stories = DATA / "stories260k"
        if (stories / "model.safetensors").exists():
            cases.append(Case("stories260k", stories, 16, 64, 64))
        for case in cases:
            shapes[case.name] = measure(case, 3 if arguments.quick else 7, peers)
            if not arguments.json:
                print(case.name, json.dumps(shapes[case.name], indent=1))
    result = {
        **summary(shapes),
        "set_up": f"ragged: {ROUNDS} x slots sequences; `generate` takes batches of slots, to the longest",
        "not_tried": missing,
        "shapes": shapes,
        "provenance": provenance(("torch", "transformers")),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
