"""How long a checkpoint keeps training from going on: written in the background, and in the gap itself.

One process trains nothing but holds the state of a trained model (parameters and both AdamW moments
in fp32) and computes matrix products between checkpoints, as many as fill longer than a write takes.
Both ways of saving take turns within one run, together with iterations that save nothing, so that
other work on the machine hits all alike. Medians.

    python benchmarks/checkpoint.py [--quick] [--json]

The last line is one JSON object: `ratio` is how many times shorter the gap is (synchronous over
background), `slowdown` what the iteration that a background write overlaps takes over an undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.provenance import provenance  # noqa: E402
from runtime.checkpoint import SaveOptions, Saver  # noqa: E402
from runtime.checkpoint_files import checkpoints_folder, list_checkpoints, verify  # noqa: E402
from runtime.roles import load_roles  # noqa: E402
from runtime.worker import make_plan_groups  # noqa: E402
from tests.ranks.engine import make_plan, ppo_content, write_models  # noqa: E402

SMALL = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 4, "ffn": 128}
SIXTY_MB = {"hidden": 256, "layers": 2, "heads": 8, "kv_heads": 8, "ffn": 1280}
"""2.5M parameters in each of two trained roles, 12 bytes each."""


def savers(folder: Path, shape: dict[str, int]) -> dict[str, Saver]:
    """One saver for each way, of the same roles."""
    content = ppo_content(folder, write_models(folder, **shape), iterations=1000)
    plan = make_plan(folder, content, 1, {"*": ("node0", "d1t1p1")})
    roles = load_roles(plan, make_plan_groups(plan, 0, timedelta(seconds=60)), torch.device("cpu"))
    made = {}
    for name, background in (("background", True), ("synchronous", False)):
        store = dist.FileStore(str(folder / f"store-{name}"), 1)
        options = SaveOptions(every=1, keep=1, background=background)
        made[name] = Saver(folder / name, plan, roles, 0, store, options)
    return made


def iteration(products: int) -> float:
    """Seconds for that many matrix products."""
    a = torch.ones(512, 512)
    began = time.perf_counter()
    for _ in range(products):
        torch.mm(a, a)
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller state, fewer repetitions")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    repeats, products = (4, 100) if options.quick else (12, 200)
    blocked: dict[str, list[float]] = {"background": [], "synchronous": []}
    after: dict[str, list[float]] = {"nothing": [], "background": [], "synchronous": []}
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=ROOT) as name:
        folder = Path(name)
        made = savers(folder, SMALL if options.quick else SIXTY_MB)
        with made["background"], made["synchronous"]:
            for number in range(repeats + 1):
                after["nothing"].append(iteration(products))
                for way, saver in made.items():
                    began = time.perf_counter()
                    saver.save(number)
                    blocked[way].append(time.perf_counter() - began)
                    after[way].append(iteration(products))
        (checkpoint,) = list_checkpoints(checkpoints_folder(folder / "background"))
        num_bytes = sum(file.num_bytes for file in verify(checkpoint).files.values())
    # the first of each makes the host buffers
    gaps = {way: median(seconds[1:]) for way, seconds in blocked.items()}
    busy = {way: median(seconds[1:]) for way, seconds in after.items()}
    result = {
        "ratio": median(b / a for a, b in list(zip(*blocked.values(), strict=True))[1:]),
        "state_bytes": num_bytes,
        "blocked_s": gaps,
        "first_blocked_s": {way: seconds[0] for way, seconds in blocked.items()},
        "iteration_s": busy,
        "slowdown": busy["background"] / busy["nothing"],
        "repeats": repeats,
        "provenance": provenance(),
    }
    if not options.json:
        print(f"{num_bytes / 1e6:.1f} MB: blocked {1e3 * gaps['background']:.1f} ms in the background, ")
        print(f"{1e3 * gaps['synchronous']:.1f} ms in the gap; ratio {result['ratio']:.1f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
