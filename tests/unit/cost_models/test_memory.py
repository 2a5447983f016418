"""Memory by cause, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cost_models.activations import IN_FLIGHT, Phase, StagePass, activation_bytes, training_phases
from cost_models.memory import optimizer_bytes
from cost_models.profile import Attention, load_profile
from tests.unit.cost_models.cases import cost_model, experiment, place, profile

CALLS = ("critic_inf", "ref_inf", "critic_train")
LLAMA_7B = 6_738_415_616
"""Parameters of LLaMA-7B, as its authors publish them (6.7B): 32 layers, 2 tables of 32000 x 4096."""


def test_llama_7b_in_training_by_hand():
    model = cost_model(experiment(), load_profile("h200"))
    memory = model.call_memory(model.graph.by_name["actor_train"], place("d1t1p1m64"))
    assert memory.parameters == 2 * LLAMA_7B
    assert memory.gradients == 4 * LLAMA_7B
    assert memory.optimizer == 12 * LLAMA_7B  # two moments and a master copy, all fp32


def test_fp32_weights_need_no_master_copy():
    assert optimizer_bytes(100, 4) == 800
    assert optimizer_bytes(100, 2) == 1200


def test_frozen_calls_hold_parameters_alone():
    model = cost_model(experiment(), profile())
    memory = model.call_memory(model.graph.by_name["ref_inf"], place("d1t1p1"))
    assert (memory.parameters, memory.gradients, memory.optimizer) == (2 * LLAMA_7B, 0, 0)


def test_sharding_divides_parameters_but_for_norms():
    model = cost_model(experiment(), profile())
    call = model.graph.by_name["actor_train"]
    norms = 65 * 4096
    sharded = model.call_memory(call, place("d1t8p1")).parameters
    assert sharded == 2 * ((LLAMA_7B - norms) // 8 + norms)
    assert model.call_memory(call, place("d8t1p1")).parameters == 2 * LLAMA_7B


def test_kv_cache_of_generation_by_hand():
    model = cost_model(experiment(sequences=64, prompt=100, response=29), profile())
    call = model.graph.by_name["actor_gen"]
    token = 2 * 32 * 4096 * 2  # k and v, layers, width, bytes
    whole = model.call_memory(call, place("d1t1p1")).working["kv_cache"]
    assert whole == 64 * 128 * token  # the last token is never an input
    assert model.call_memory(call, place("d1t8p1")).working["kv_cache"] == whole // 8
    assert model.call_memory(call, place("d8t1p1")).working["kv_cache"] == whole // 8
    # groups run one after the other on one stage, two at a time on two
    assert model.call_memory(call, place("d1t1p1m4")).working["kv_cache"] == whole // 4
    assert model.call_memory(call, place("d1t1p2m4")).working["kv_cache"] == whole // 4


def test_packed_weights_of_generation_on_a_cpu():
    cpu = profile(attention=Attention(1.0, 0.0, True))
    model = cost_model(experiment(sequences=8, dtype="float32"), cpu)
    call = model.graph.by_name["actor_gen"]
    shape = model.shape("actor")
    norms = (2 * shape.num_layers + 1) * shape.hidden
    # all but norms and embedding
    expected = 4 * (shape.num_params - norms - shape.vocab * shape.hidden)
    assert model.call_memory(call, place("d1t1p1")).working["packed_weights"] == expected
    assert "packed_weights" not in model.call_memory(model.graph.by_name["ref_inf"], place("d1t1p1")).working
    for other in (experiment(sequences=8), experiment(sequences=8, dtype="float32", response=8)):
        made = cost_model(other, cpu)
        assert "packed_weights" not in made.call_memory(call, place("d1t1p1")).working


def test_a_prompt_with_waiting_samples_is_kept():
    made = experiment(sequences=64, prompt=100, response=29)
    shared = replace(made, workload=replace(made.workload, samples_per_prompt=8))
    sizes = [
        cost_model(x, profile()).call_memory(x.graph().by_name["actor_gen"], place(s)).working["kv_cache"]
        for x, s in ((made, "d1t1p1m4"), (shared, "d1t1p1m4"), (shared, "d1t1p1"))
    ]
    assert sizes[1] - sizes[0] == 100 * 2 * 32 * 4096 * 2
    assert sizes[2] == 4 * sizes[0]


def test_activations_by_hand():
    model = cost_model(experiment(sequences=4, prompt=128, response=128), profile())
    call = model.graph.by_name["critic_train"]
    costs = model._costs("critic", 1)
    # bf16: 4 hidden, q, k, v and the output, 3 MLP widths; fp32 log-sum-exp of each head
    assert activation_bytes(costs, 1) == 2 * (4 * 4096 + 4 * 4096 + 3 * 11008) + 4 * 32
    tokens = 4 // call.mini_batches * 256
    memory = model.call_memory(call, place("d1t1p1"))
    kept = 32 * tokens * activation_bytes(costs, 1)
    # within the last layer: gradients of two MLP widths and of its output, and of all its parameters
    at_work = 2 * tokens * (2 * 11008 + 4096)
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert memory.working == {"activations": kept + at_work, IN_FLIGHT: 2 * layer}


def head_phase(strategy: str, rows: int, micro_batches: int = 1) -> Phase:
    """The moment of the head's backward pass on a last stage, of a 7B actor in bf16."""
    chosen = place(strategy).strategy
    costs = cost_model(experiment(sequences=4), profile())._costs("actor", 1)
    units = costs.stage_units(chosen.pp, chosen.pp - 1, 1)
    at = StagePass(costs, chosen, rows, rows, 32, chosen.pp == 1, True, units, 1.0, micro_batches)
    (phase,) = (phase for phase in training_phases(at) if "logits" in phase)
    return phase


def test_logits_and_the_gradient_of_the_head_by_hand():
    """Rows of a micro-batch times the vocabulary in fp32, kept; a chunk is narrowed for its products."""
    phase = head_phase("d1t1p1", 512)
    chunk = (1 << 23) // 32000
    assert phase["logits"] == 4 * 512 * 32000 + 2 * chunk * 32000
    # a product in bf16, added to the gradient; ZeRO 2 sums products in fp32 first
    assert phase[IN_FLIGHT] == 2 * 32000 * 4096
    assert head_phase("d2t1p1z2", 512)[IN_FLIGHT] == 6 * 32000 * 4096
    model = cost_model(experiment(sequences=4, prompt=8, response=128), profile())
    inference = model.call_memory(model.graph.by_name["ref_inf"], place("d1t1p1m4")).working
    assert inference["logits"] == (2 + 4) * 128 * 32000


def test_gpipe_keeps_the_logits_of_all_micro_batches():
    kept, one = (head_phase(f"d1t1p2m4{schedule}", 64, 4)["logits"] for schedule in ("+gpipe", ""))
    assert kept - one == 3 * 4 * 64 * 32000


def test_parameters_that_come_from_another_layout_are_staged():
    """In a bounded buffer that is gone when calls run: it counts where their working sets are smaller."""
    model = cost_model(experiment(sequences=1, prompt=1, response=1), profile())
    staged = {name: model.call_memory(model.graph.by_name[name], place("d1t1p1")).working for name in CALLS}
    assert staged["critic_inf"] == {"reallocation": 256 << 20}
    assert "reallocation" not in staged["ref_inf"]  # frozen
    assert "reallocation" not in staged["critic_train"]


def test_zero_3_holds_the_unit_at_work_and_a_buffer_for_its_exchange():
    model = cost_model(experiment(sequences=4, prompt=8, response=8), profile())
    working = model.call_memory(model.graph.by_name["critic_train"], place("d2t1p1z3")).working
    table = 32000 * 4096
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    # in a layer's backward pass: its parameters, its gradients, and the buffer (as large as the largest unit)
    assert layer > table
    assert working["staging"] == 4 * (layer + layer // 2) + 2 * layer
    assert working[IN_FLIGHT] == 2 * layer


def test_early_stages_keep_more_micro_batches():
    long = experiment(sequences=512, prompt=1024, response=1024)
    model = cost_model(long, profile())
    call = model.graph.by_name["critic_train"]
    one = model.call_memory(call, place("d1t1p4m1")).working["activations"]
    four = model.call_memory(call, place("d1t1p4m4")).working["activations"]
    many = model.call_memory(call, place("d1t1p4m32")).working["activations"]
    # what a layer's backward pass needs at work is that of one micro-batch
    assert four == pytest.approx(one, rel=0.05)  # four in flight of a quarter each
    assert many == pytest.approx(one / 8, rel=0.05)


def test_causes_sum_to_the_total():
    model = cost_model(experiment(), profile())
    for call in model.graph.calls:
        memory = model.call_memory(call, place("d2t2p2m2"))
        assert memory.total == sum(memory.by_cause.values()) > 0
