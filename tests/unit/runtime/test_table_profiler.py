"""What is measured of which models, and what is kept of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import experiments
from realloc.errors import InputError
from realloc.experiment import read_experiment
from realloc.lengths import raggedness
from realloc.model_zoo import named_shapes
from realloc.sampling import Sampling
from runtime.layer_benchmarks import Effort, ShardBenchmarks, pack_lengths
from runtime.measuring_plan import Sizes, Work, experiment_sizes, subjects
from runtime.point_runner import PointRunner
from runtime.table_profiler import ROUNDS, TableSpec, measure_tables, wanted
from runtime.table_rows import Kept, rising, table_rows
from tests.ranks.engine import ppo_content, write_models

SHAPE = named_shapes()["qwen2.5-0.5b"]
SIZES = Sizes(64, 100, 50, ragged=0.5, ragged_prompts=0.5, mini_batch=16, longest=200)


@given(st.integers(1, 64), st.integers(1, 500), st.sampled_from((0.0, 0.15, 0.5)))
def test_packs_have_the_mean_asked_for(sequences: int, tokens: int, ragged: float):
    lengths = pack_lengths(sequences, tokens, ragged)
    assert len(lengths) == sequences
    assert min(lengths) >= 1
    if tokens >= 8:
        assert sum(lengths) == pytest.approx(sequences * tokens, abs=1)
    assert tokens * (1 - ragged) - 1 <= min(lengths) <= max(lengths) <= tokens * (1 + ragged) + 1
    if ragged == 0.5 and sequences > 1 and tokens >= 8 * sequences:
        assert len(set(lengths)) == sequences
    if sequences == 64 and tokens >= 100:
        mean = sum(lengths) / sequences
        square = sum(length**2 for length in lengths) / sequences
        assert raggedness(mean, square) == pytest.approx(ragged, abs=0.05)


@given(st.dictionaries(st.tuples(*[st.integers(1, 5).map(float)] * 2), st.floats(1e-6, 10), min_size=1))
def test_evened_seconds_rise_and_risen_ones_stay(values: dict[tuple[float, float], float]):
    result = rising(values)
    assert result.keys() == values.keys()
    assert min(values.values()) <= min(result.values())
    assert max(result.values()) <= max(values.values())
    for (x, y), seconds in result.items():
        assert all(seconds <= other for (a, b), other in result.items() if a >= x and b >= y)
    assert rising(result) == result


def test_a_layer_is_measured_once_for_all_models_that_have_it():
    critic = replace(SHAPE, head="scalar")
    made = subjects([(SHAPE, "float32", SIZES), (critic, "float32", SIZES)], 1, quick=False)
    actor, other = made
    assert {Work.DECODE, Work.PREFILL, Work.TRAINING} <= {point.work for point in actor.points}
    # the critic's head is another: only passes at the sequences' own length are worth running again
    assert {point.work for point in other.points} <= {Work.INFERENCE, Work.TRAINING, Work.GENERATE}
    assert len(other.points) < len(actor.points)


def test_every_degree_that_divides_is_measured():
    made = subjects([(SHAPE, "float32", SIZES)], 8, quick=True)
    assert [subject.tp for subject in made] == [1, 2]  # 14 heads


def test_points_end_at_what_the_workload_asks():
    (subject,) = subjects([(SHAPE, "float32", SIZES)], 1, quick=True)
    assert max(p.count for p in subject.points if p.work is Work.TRAINING) == 16
    assert max(p.count for p in subject.points if p.work is Work.DECODE) == 64
    assert max(p.length for p in subject.points if p.work is Work.DECODE) == 200


def test_a_generate_call_is_all_of_its_parts():
    shape = replace(SHAPE, num_layers=1, hidden=16, ffn_dim=16, vocab=64)
    shape = replace(shape, num_heads=2, num_kv_heads=1, head_dim=8, rotary_dim=8)
    bench = ShardBenchmarks(shape, "float32", 1, None, torch.device("cpu"))
    start = time.process_time()
    first, second = bench.generate(3, 5, 7, Sampling(), Effort(2, 0.0))
    spent = time.process_time() - start  # of three calls: the first does not count
    for call in (first, second):
        assert len(call.steps) == len(call.beside) == 6  # the first token comes with the prompts
        assert all(0 < beside < whole for beside, whole in zip(call.beside, call.steps, strict=True))
        assert call.total == pytest.approx(call.first + sum(call.steps) + call.last)
    assert first.total + second.total < spent


def test_training_is_measured_as_a_run_trains():
    """A trainer's own decoder adds gradients where they stay: no second table is made and added."""
    shape = replace(SHAPE, num_layers=1, hidden=16, ffn_dim=16, vocab=64, tied_embeddings=True)
    shape = replace(shape, num_heads=2, num_kv_heads=1, head_dim=8, rotary_dim=8)
    bench = ShardBenchmarks(shape, "float32", 1, None, torch.device("cpu"))
    train = bench.training_pass((5, 3), 6)
    (gradients,) = bench.trainer.state_buffers["gradients"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        train()
    operators = {event.key for event in found.key_averages()}
    assert "aten::index_add_" in operators
    assert not operators & {"aten::embedding_dense_backward", "aten::embedding_backward"}
    once = gradients.clone()
    assert once.any()
    train()
    assert not torch.equal(gradients, once)


def test_a_neighbour_of_an_optimizer_step_makes_steps_alone(monkeypatch: pytest.MonkeyPatch):
    shape = replace(SHAPE, num_layers=1, hidden=16, ffn_dim=16, vocab=64)
    shape = replace(shape, num_heads=2, num_kv_heads=1, head_dim=8, rotary_dim=8)
    bench = ShardBenchmarks(shape, "float32", 1, None, torch.device("cpu"))
    passes, asked = [0], [0]

    def training_pass(*_: object) -> Callable[[], None]:
        def once() -> None:
            passes[0] += 1

        return once

    def stopped() -> bool:
        asked[0] += 1
        return asked[0] > 3

    monkeypatch.setattr(bench, "training_pass", training_pass)
    bench.optimizer(Effort(1, 0.0, stopped=stopped))
    assert bench.trainer.num_steps == 6  # the first two do not count, one before it is asked
    assert passes == [0]
    bench.optimizer(Effort(2, 0.0))
    assert passes[0] == bench.trainer.num_steps - 6 >= 4  # more where it waits for calm moments


def test_packs_are_as_ragged_as_those_of_the_experiment(tmp_path: Path):
    models = write_models(tmp_path, hidden=16, layers=1, heads=2, kv_heads=1, ffn=16)
    prompts = {"histogram": [[tokens, 1] for tokens in range(8, 13)], "max": 12}
    workload = {"sequences": 8, "prompt_tokens": prompts, "response_tokens": 10}
    content = ppo_content(tmp_path, models, workload=workload, hyperparameters={"mini_batches": 1})
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({"realloc": "experiment/1", **content}), encoding="utf-8")
    spec = TableSpec((), (str(path),), ("float32",), 1, True, "unused")
    points = [point for subject in wanted(spec, gpu=False) for point in subject.points]
    ragged = {work: {point.ragged for point in points if point.work is work} for work in Work}
    # prompts of 8 to 12 tokens: a quarter around their mean; half of that with ten tokens of response
    assert ragged[Work.PREFILL] == {0.25}
    assert ragged[Work.TRAINING] == ragged[Work.INFERENCE] == {0.1}
    assert ragged[Work.DECODE] == {0.5}  # which says no more than that contexts differ
    both = [p for s in wanted(replace(spec, quick=False), gpu=False) for p in s.points]
    assert {point.ragged for point in both if point.work is Work.TRAINING} == {0.0, 0.1}


def test_models_that_do_not_run_are_refused():
    spec = TableSpec(("mixtral-8x7b",), (), ("float32",), 1, True, "unused")
    with pytest.raises(InputError, match="8 experts"):
        wanted(spec, gpu=False)
    with pytest.raises(InputError, match="neither a folder nor a named model shape"):
        wanted(replace(spec, models=("no-such-model",)), gpu=False)


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    models = write_models(tmp_path, hidden=16, layers=1, heads=2, kv_heads=1, ffn=16)
    workload = {"sequences": 2, "prompt_tokens": 4, "response_tokens": 4}
    content = ppo_content(tmp_path, models, workload=workload, hyperparameters={"mini_batches": 1})
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({"realloc": "experiment/1", **content}), encoding="utf-8")
    kept = tmp_path / "kept.json"
    spec = TableSpec((), (str(path),), ("float32",), 1, True, str(kept))
    cpu = torch.device("cpu")
    ran: list[object] = []
    run = PointRunner.run

    def interrupted(self, point):
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append(point)
        return run(self, point)

    monkeypatch.setattr(PointRunner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_tables(spec, cpu, "here", {})
    points = json.loads(kept.read_text(encoding="utf-8"))["points"]
    assert len(points) == 4

    def counted(self, point):
        ran.append(point)
        return run(self, point)

    monkeypatch.setattr(PointRunner, "run", counted)
    first = measure_tables(spec, cpu, "here", {})
    total = ROUNDS * sum(len(subject.points) for subject in wanted(spec, gpu=False))
    assert len(ran) == total  # those of before the interruption were not run again
    assert measure_tables(spec, cpu, "here", {}) == first
    assert len(ran) == total
    assert Kept(kept, "another machine").get(next(iter(json.loads(kept.read_text())["points"]))) is None
    quantities = {table["quantity"] for table in first["tables"]}
    assert {"inference", "forward", "backward", "decode", "sample", "optimizer", "call"} <= quantities
    assert table_rows([]) == []


def test_what_is_mixed_in_is_measured_at_its_own_lengths_as_training_alone() -> None:
    """Of the role that learns it; texts are spread over the optimizer steps of all passes."""
    experiment = read_experiment(Path(experiments.__file__).parent / "recipes" / "ppo_ptx.yaml")
    assert experiment.pretrain is not None
    models = [(shape, sizes) for shape, sizes in experiment_sizes(experiment) if shape.head == "lm"]
    ((shape, sizes),) = [(shape, sizes) for shape, sizes in models if sizes.trains and not sizes.generates]
    assert (sizes.sequences, sizes.longest) == (64 // (4 * 2), experiment.pretrain.tokens.maximum)
    whole = sizes.prompt + sizes.response
    assert whole == pytest.approx(experiment.pretrain.tokens.mean, abs=1)
    (made,) = subjects([(shape, "float32", sizes)], 1, quick=True)
    lengths = {point.length for point in made.points if point.work is Work.TRAINING}
    assert lengths == {whole, sizes.longest}
    assert Work.DECODE not in {point.work for point in made.points}
