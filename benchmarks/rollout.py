"""Tokens per second of generation against `transformers`, on one rank and one thread of a CPU.

Ours runs as the runtime runs it: parameters as views of one flat buffer, `runtime.generation.generate`.
`transformers` runs `generate` and, where it works, `generate_batch` (continuous batching), with the
same weights, prompts, lengths, dtype and sampling. All take turns within one run, so that other work
on the machine hits all alike; medians. Equal: every response has the full length. Ragged: responses
end anywhere between 10% and 100% of it, each sequence at the same length on all sides.

    python benchmarks/rollout.py [--quick] [--json]

`bandwidth_share` is the bytes that decoding must read (all weights and the cached keys and values,
once per step) over the bytes that a plain read of as much memory moves in the same time. Ratios
are of elapsed time; `cpu_ratio_*` of the time the process had a core, which other work on the machine
disturbs less. The ratio to vLLM's CPU build is not measured here, since it needs an environment of its
own: `ratio_vllm` is null. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
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
from realloc.experiment import Sampling  # noqa: E402
from realloc.layout import compute_boxes  # noqa: E402
from realloc.model_shape import resolve_shape  # noqa: E402
from runtime.decoder import Decoder  # noqa: E402
from runtime.generation import generate  # noqa: E402
from runtime.hf import load_boxes  # noqa: E402
from runtime.parallel import single_rank  # noqa: E402
from runtime.parameters import allocate  # noqa: E402

DATA = Path(os.environ.get("REALLOC_DATA", ROOT.parent / "shared" / "data"))
Run = Callable[[Sequence[int]], float]
"""Generates responses of these lengths; returns the seconds it took."""


@dataclass(frozen=True)
class Case:
    """A model folder and what is generated with it."""

    name: str
    folder: Path
    batch: int
    prompt: int
    response: int

    def ragged(self) -> list[int]:
        """Evenly spread over 10% to 100% of the limit, in an order that is no order."""
        step = 0.9 / max(1, self.batch - 1)
        lengths = [round(self.response * (0.1 + step * i)) for i in range(self.batch)]
        return [lengths[(7 * i + 3) % self.batch] for i in range(self.batch)]

    def prompts(self, vocab: int) -> torch.Tensor:
        """int64 [batch, prompt] of ordinary tokens."""
        return torch.randint(3, vocab, (self.batch, self.prompt), generator=torch.Generator().manual_seed(0))


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


def ours(case: Case) -> tuple[Run, int, Decoder]:
    """How we generate, and the bytes of the weights that a decode step reads."""
    shape, context = resolve_shape(str(case.folder), "benchmark"), single_rank()
    boxes = compute_boxes(shape, context.strategy, context.at)
    params = allocate(boxes, torch.float32, context.device)
    loaded = load_boxes(case.folder, shape, boxes, torch.float32, context.device)
    for name, view in params.views.items():
        view.copy_(loaded[name])
    decoder = Decoder(shape, context, torch.float32, dict(params.views))
    prompts = case.prompts(shape.vocab).flatten()

    def run(lengths: Sequence[int]) -> float:
        start = time.perf_counter()
        result = generate(
            decoder,
            prompts=prompts,
            prompt_lengths=[case.prompt] * case.batch,
            sequence_ids=range(case.batch),
            max_new_tokens=case.response,
            limits=lengths,
            eos_ids=(),
            sampling=Sampling(),
            seed=0,
            iteration=0,
        )
        seconds = time.perf_counter() - start
        assert result.response_lengths == tuple(lengths)
        return seconds

    return run, 4 * params.flat.numel(), decoder


def transformers_generate(case: Case, model: Any) -> Run:
    """`generate`: the whole batch runs until its last sequence is done, as it does in practice."""
    import transformers as hf

    prompts = case.prompts(model.config.vocab_size)
    mask = torch.ones_like(prompts)

    class Lengths(hf.StoppingCriteria):  # type: ignore[misc]
        def __init__(self, lengths: Sequence[int]) -> None:
            self.totals = torch.tensor(lengths) + case.prompt

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.shape[1] >= self.totals

    def run(lengths: Sequence[int]) -> float:
        start = time.perf_counter()
        out = model.generate(
            prompts,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=case.response,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=hf.StoppingCriteriaList([Lengths(lengths)]),
        )
        seconds = time.perf_counter() - start
        assert out.shape == (case.batch, case.prompt + max(lengths)), out.shape
        return seconds

    return run


def transformers_generate_batch(case: Case, model: Any) -> Run:
    """`generate_batch`: continuous batching over a paged cache. Equal lengths only."""
    import transformers as hf

    prompts = case.prompts(model.config.vocab_size).tolist()
    config = hf.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=case.response,
        eos_token_id=-1,
        pad_token_id=0,
        num_blocks=case.batch * (case.prompt + case.response) // 16 + case.batch,
        max_batch_tokens=case.batch * case.prompt,
    )

    def run(lengths: Sequence[int]) -> float:
        assert min(lengths) == case.response
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            outputs = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        seconds = time.perf_counter() - start
        counts = [len(output.generated_tokens) for output in outputs.values()]
        assert counts == [case.response] * case.batch, counts
        return seconds

    return run


def read_bandwidth(size_bytes: int) -> float:
    """Bytes per second of reading a buffer of this size from front to back, again and again.

    The fastest of the ways that torch offers: a matrix-vector product, a sum, a copy.
    """
    rows = max(1, size_bytes // 4 // 1024)
    buffer, vector = torch.ones(rows, 1024), torch.ones(1024)
    target = torch.empty_like(buffer)
    ways: Sequence[tuple[Callable[[], object], int]] = (
        (lambda: torch.mv(buffer, vector), 1),
        (buffer.sum, 1),
        (lambda: target.copy_(buffer), 2),
    )
    best = 0.0
    for way, passes in ways:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
        best = max(best, passes * 4 * buffer.numel() / min(times))
    return best


def decode_bytes(case: Case, weights_bytes: int, decoder: Decoder, lengths: Sequence[int]) -> float:
    """Bytes that all decode steps must read: weights once per step, keys and values of live sequences."""
    shape = decoder.shape
    token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
    total = 0.0
    for step in range(1, max(lengths)):
        live = sum(length > step for length in lengths)
        total += weights_bytes + live * (case.prompt + step) * token
    return total


def measure(case: Case, repeats: int, *, with_batch: bool) -> Mapping[str, Any]:
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32).eval()
    mine, weights, decoder = ours(case)
    theirs = transformers_generate(case, model)
    runs: dict[str, tuple[Run, list[int]]] = {
        "ours_equal": (mine, [case.response] * case.batch),
        "theirs_equal": (theirs, [case.response] * case.batch),
        "ours_ragged": (mine, case.ragged()),
        "theirs_ragged": (theirs, case.ragged()),
    }
    problem = _try_generate_batch(case, runs) if with_batch else "left out of a quick run"
    times: dict[str, list[float]] = {name: [] for name in runs}
    cpu_times: dict[str, list[float]] = {name: [] for name in runs}
    bandwidths: list[float] = []
    for run, lengths in runs.values():
        run(lengths)
    for _ in range(repeats):
        for name, (run, lengths) in runs.items():
            start = time.process_time()
            times[name].append(run(lengths))
            cpu_times[name].append(time.process_time() - start)
        bandwidths.append(read_bandwidth(weights))
    seconds = {name: median(values) for name, values in times.items()}
    speed = {name: sum(runs[name][1]) / value for name, value in seconds.items()}

    def ratio(a: str, b: str, values: Mapping[str, Sequence[float]] = times) -> float:
        return round(median(y / x for x, y in zip(values[a], values[b], strict=True)), 3)

    # the prompts' pass is not decoding
    prefill = median(mine([1] * case.batch) for _ in range(3))
    moved = decode_bytes(case, weights, decoder, [case.response] * case.batch)
    share = moved / (seconds["ours_equal"] - prefill) / median(bandwidths)
    batch = "batch_equal" in runs
    return {
        "batch": case.batch,
        "prompt_tokens": case.prompt,
        "response_tokens": case.response,
        "parameters": weights // 4,
        "ratio_equal": ratio("ours_equal", "theirs_equal"),
        "ratio_ragged": ratio("ours_ragged", "theirs_ragged"),
        "cpu_ratio_equal": ratio("ours_equal", "theirs_equal", cpu_times),
        "cpu_ratio_ragged": ratio("ours_ragged", "theirs_ragged", cpu_times),
        "ratio_generate_batch": ratio("ours_equal", "batch_equal") if batch else None,
        "generate_batch_problem": problem,
        "bandwidth_share": round(share, 3),
        "read_bytes_per_s": round(median(bandwidths)),
        "tokens_per_s": {name: round(value, 1) for name, value in speed.items()},
        "spread": {name: round(max(v) / min(v), 2) for name, v in times.items()},
        "repeats": repeats,
    }


def _try_generate_batch(case: Case, runs: dict[str, tuple[Run, list[int]]]) -> str | None:
    """Adds `generate_batch` to the runs; returns why not."""
    import transformers as hf

    logging.disable(logging.CRITICAL)
    try:
        model = hf.AutoModelForCausalLM.from_pretrained(
            case.folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        run = transformers_generate_batch(case, model)
        run([case.response] * case.batch)
    except Exception as error:  # noqa: BLE001 (whatever keeps the peer from running is the result)
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        logging.disable(logging.NOTSET)
    runs["batch_equal"] = (run, [case.response] * case.batch)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, no generate_batch")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 3 if arguments.quick else 7
    shapes: dict[str, Mapping[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = [Case("llama-15m", write_llama(Path(folder) / "llama-15m"), 16, 64, 64)]
        stories = DATA / "stories260k"
        if (stories / "model.safetensors").exists():
            cases.append(Case("stories260k", stories, 16, 64, 64))
        for case in cases:
            shapes[case.name] = measure(case, repeats, with_batch=not arguments.quick)
            if not arguments.json:
                print(case.name, json.dumps(shapes[case.name], indent=1))
    worst = {key: min(s[key] for s in shapes.values()) for key in ("ratio_equal", "ratio_ragged")}
    result = {
        **worst,
        "bandwidth_share": shapes["llama-15m"]["bandwidth_share"],
        "ratio_vllm": None,
        "shapes": shapes,
        "provenance": provenance(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
