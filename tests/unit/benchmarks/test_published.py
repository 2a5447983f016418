"""Published measurements: what is read, fitted, predicted, and said of rows that cannot be predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.published import compare, main
from benchmarks.published_fit import Parameter, Target, fit, left_out
from benchmarks.published_real import PARAMETERS, Real, iteration_s, published_plan
from benchmarks.published_rows import Row, Unsupported
from benchmarks.published_training import Titan, model_flops, titan_strategy
from realloc.model_zoo import named_shapes
from realloc.strategy import Recompute

DEFAULTS = {p.name: p.default for p in PARAMETERS}
EXAMPLE = (
    "actor_gen GPUs 0-7 d4t1p2; rew_inf 4-7 d2t2; ref_inf 0-3 d2t2; critic_inf 0-7 t8; actor_train 0-3 t4; "
    "critic_train 4-7 t4; ref and reward offloaded"
)
FILE = """
real_v1:
  rows:
    - {actor: 7b, critic: 7b, gpus: 8, gen: 384, batch: 256, heuristic_s: 42.3, searched_s: 28}
    - {actor: 9b, critic: 7b, gpus: 8, gen: 384, heuristic_s: 42.3}
megatron_training_h100:
  source: Megatron-LM README (H100)
  rows:
    - {hidden: 2048, layers: 24, tp: 1, pp: 1, gpus: 48, tflops_per_gpu: 4.088e2, use: fit}
    - {hidden: 6144, layers: 32, tp: 4, pp: 1, gpus: 192, tflops_per_gpu: 489.1}
    - {hidden: 12288, layers: 96, tp: 8, pp: 8, gpus: 1536, batch: 1152}
torchtitan_training_h100:
  rows:
    - {model: llama-3.1-8b, gpus: 8, strategy: fsdp8 float8, tokens_per_s_per_gpu: 8000}
    - {model: llama-3.1-8b, gpus: 8, strategy: fsdp8, tokens_per_s_per_gpu: 5762}
decode_a100:
  rows: [{model: llama-7b, batch: 1, tokens_per_s: 102}]
collectives:
  - {what: H100 node of 8, NVLS all-reduce bus bandwidth peak, bytes_per_s: 480.0e9}
whatever: {a: 1}
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("published") / "file.yaml"
    path.write_text(FILE, encoding="utf-8")
    return compare([path], 1.0)


def rows_of(report: Any, section: str) -> list[Any]:
    return [row for row in report["rows"] if row["section"].startswith(section)]


def test_a_setting_of_real_is_met_and_its_best_plan_beats_the_heuristic(report: Any):
    row, unknown = rows_of(report, "real")
    assert row["predicted"] == pytest.approx(42.3, rel=0.15)
    assert row["gain_measured"] == pytest.approx(42.3 / 28.0)
    assert 1.2 < row["gain_predicted"] < 2.2
    assert unknown["predicted"] is None
    assert "'9b'" in unknown["reason"]


def test_throughputs_are_met_from_one_fitted_share(report: Any):
    fitted, predicted, open_ = rows_of(report, "megatron")
    assert fitted["measured"] == 408.8
    assert fitted["predicted"] == pytest.approx(408.8, rel=0.03)
    assert predicted["predicted"] == pytest.approx(489.1, rel=0.15)
    assert open_["measured"] is None
    assert 250 < open_["predicted"] < 700
    assert report["parameters"]["megatron_training_h100"]["share"]["is_fitted"]


def test_what_is_not_modelled_is_said(report: Any):
    float8, plain = rows_of(report, "torchtitan")
    assert float8["predicted"] is None
    assert "float8" in float8["reason"]
    assert plain["predicted"] == pytest.approx(5762, rel=0.15)
    assert not report["parameters"]["torchtitan_training_h100"]["share"]["is_fitted"]
    assert "whatever" in report["skipped"]


def test_a_comma_in_a_source_does_not_hide_its_words(report: Any):
    (row,) = rows_of(report, "collectives")
    assert row["use"] == "source"
    assert row["predicted"] == pytest.approx(480e9, rel=1e-3)


def test_the_error_counts_predicted_rows_alone(report: Any):
    counted = [abs(r["error"]) for r in report["rows"] if r["use"] == "predict" and "error" in r]
    assert report["error_predict"] == pytest.approx(sum(counted) / len(counted))
    assert len(counted) == 4


def test_the_last_line_is_json_and_a_missing_file_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file.yaml").write_text("odd: {rows: []}\n", encoding="utf-8")
    assert main([str(tmp_path / "file.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["rows"] == []
    assert "odd" in found["skipped"]
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err


def real(**content: Any) -> tuple[Real, Row]:
    row = {"actor": "7b", "critic": "7b", "gpus": 8, "gen": 896, "heuristic_s": 63.3, "searched_s": 37.4}
    system = Real("real", {"rows": [row], **content}, 1.0)
    return system, system.rows[0]


def test_decoding_in_eight_shards_is_mostly_messages_as_was_measured():
    """Figure 10 of ReaL: compute 0.40, communication (with waiting in it) 0.55, idle 0.05."""
    split = {"heuristic": {"compute": 0.40, "communication": 0.55, "idle": 0.05, "iteration_s": 63.3}}
    system, _ = real(split_at_gen_896_7b_7b_8gpus=split)
    (found,) = system.splits(DEFAULTS)
    predicted = found["predicted"]
    assert predicted["compute"] == pytest.approx(0.40, abs=0.08)
    assert predicted["communication"] + predicted["launch"] == pytest.approx(0.55, abs=0.08)
    assert predicted["idle"] == pytest.approx(0.05, abs=0.04)


def test_a_split_or_plan_that_cannot_be_read_leaves_the_rows_alone():
    split = {"heuristic": {"compute": 0.4}}
    system, row = real(
        split_at_gen_128_9b_7b_8gpus=split, split_at_gen_x=split, example_plan_7b_7b_8gpus="all GPUs d8"
    )
    assert [sorted(found)[-1] for found in system.splits(DEFAULTS)] == ["reason", "split"]
    assert len(system.targets(row, 0)) == 1


def test_a_published_plan_is_read_and_priced():
    system, row = real(example_plan_7b_7b_8gpus=EXAMPLE)
    costs = system.costs(row, DEFAULTS)
    placements = published_plan(EXAMPLE, costs)
    assert str(placements["critic_train"].mesh) == "node0:gpu[4-7]"
    assert placements["actor_train"].strategy.recompute is Recompute.FULL
    assert placements["ref_inf"].strategy.offload
    assert iteration_s(costs, placements) == pytest.approx(37.4, rel=0.15)
    assert len(system.targets(row, 0)) == 2
    with pytest.raises(Unsupported, match="lacks"):
        published_plan("actor_gen GPUs 0-7 d4t1p2", costs)


@pytest.mark.parametrize(
    ("text", "degrees", "recompute"),
    [
        ("fsdp8", (8, 1, 1), Recompute.SELECTIVE),
        ("fsdp2 tp4", (2, 4, 1), Recompute.SELECTIVE),
        ("pp, no recomputation", (1, 1, 8), Recompute.NONE),
        ("fsdp tp2, full recompute", (4, 2, 1), Recompute.FULL),
    ],
)
def test_strategies_are_read(text: str, degrees: tuple[int, int, int], recompute: Recompute):
    strategy, is_async = titan_strategy(Row("t", {"strategy": text, "gpus": 8}, "predict", 1.0))
    assert (strategy.dp, strategy.tp, strategy.pp) == degrees
    assert strategy.recompute is recompute
    assert not is_async


def test_a_strategy_that_leaves_gpus_over_is_not_guessed():
    with pytest.raises(Unsupported, match="does not say how 16 GPUs are used"):
        titan_strategy(Row("t", {"strategy": "fsdp8", "gpus": 16}, "predict", 1.0))
    for text, reason in (
        ("fsdp8 cp2", "context parallelism is not modelled"),
        ("fsdp16 + torch.compile", "compiler fuses"),
        ("hsdp", "HSDP"),
        ("fsdp16 quick", "'quick' is unknown"),
    ):
        row = Row("t", {"strategy": text, "gpus": 16}, "predict", 1.0)
        with pytest.raises(Unsupported, match=reason):
            Titan("t", {"rows": [row.fields]}, "h100-sxm").predict(row, {"share": 1.0})


def test_interleaved_stages_wait_less():
    def rate(text: str) -> float:
        row = Row("t", {"model": "llama-3-8b", "strategy": text, "gpus": 16}, "predict", 1.0)
        return Titan("t", {"rows": [row.fields]}, "h100-sxm").predict(row, {"share": 1.0})

    assert 1.05 < rate("fsdp4 pp4 interleaved 1f1b") / rate("fsdp4 pp4 1f1b") < 1.3


def test_model_flops_are_six_for_each_parameter_and_token_beside_attention():
    shape = named_shapes()["pythia-6.9b"]
    tokens = 4 * 2048
    weights = 12 * shape.num_layers * shape.hidden**2 + shape.hidden * shape.vocab
    attention = 12 * shape.num_layers * shape.hidden * 2048 * tokens
    assert model_flops(shape, 4, 2048) == pytest.approx(6 * weights * tokens + attention)


def test_a_fit_finds_the_values_and_leaves_settings_out():
    parameters = (Parameter("a", "rate", 1.0, 3.0, 1.0), Parameter("b", "latency", 1.0, 3.0, 1.0))
    targets = [
        Target(i, 2.0 * x + 5.0, lambda values, x=x: values["a"] * x + values["b"])  # type: ignore[misc]
        for i, x in enumerate((1.0, 4.0, 16.0))
    ]
    values = fit(parameters, targets)
    assert values["a"] == pytest.approx(2.0, rel=0.03)
    assert values["b"] == pytest.approx(5.0, rel=0.05)
    errors = left_out(parameters, targets)
    assert set(errors) == {0, 1, 2}
    assert max(map(abs, errors.values())) < 0.15
