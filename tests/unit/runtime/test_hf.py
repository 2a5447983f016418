"""Hugging Face folders: reading boxes, writing models that `transformers` loads, clear errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from realloc.errors import InputError
from realloc.layout import shard_boxes
from realloc.model_shape import ModelShape, read_config, resolve_shape
from runtime.attention import pack
from runtime.hf import INDEX, NEW_SCORES, load_boxes, save_hf
from tests.hf_models import CONFIGS, edit_config, load_oracle, write_model
from tests.unit.runtime.test_decoder import LENGTHS, decoder_of, oracle_logits, random_tokens

CPU = torch.device("cpu")
FAMILIES = ("llama", "qwen2", "qwen3", "gpt_neox")


def load(folder: Path, shape: ModelShape, tp: int = 1, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_boxes(folder, shape, shard_boxes(shape, tp, 1, rank, 0), torch.float32, CPU)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name: str, shard_bytes: int, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a", name)
    (folder / "tokenizer.json").write_text("{}")
    decoder = decoder_of(folder)
    config = read_config(folder)
    save_hf(
        tmp_path / "b",
        decoder.shape,
        config,
        decoder.params,
        tokenizer_from=folder,
        shard_bytes=shard_bytes,
    )
    assert (tmp_path / "b" / INDEX).exists() == (shard_bytes < 10**9)
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"
    again = decoder_of(tmp_path / "b")
    assert again.shape == decoder.shape
    for key, param in decoder.params.items():
        assert torch.equal(param, again.params[key]), key
    tokens = random_tokens(decoder.shape)
    with torch.no_grad():
        logits = decoder.logits(decoder.forward(tokens, pack(LENGTHS)))
        expected = oracle_logits(load_oracle(tmp_path / "b"), tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_critic_made_from_a_causal_lm_is_saved_as_a_classifier(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a", name)
    decoder = decoder_of(folder, head="scalar")
    save_hf(tmp_path / "b", decoder.shape, read_config(folder), decoder.params)
    tokens = random_tokens(decoder.shape)
    with torch.no_grad():
        values = decoder.scalar(decoder.forward(tokens, pack(LENGTHS)))
        assert 0.3 < values.square().mean().sqrt() / NEW_SCORES < 3.0
        oracle = load_oracle(tmp_path / "b", head="scalar")
        for part, value in zip(tokens.split(LENGTHS), values.split(LENGTHS), strict=True):
            score = oracle(part[None], use_cache=False).logits
            assert score.shape == (1, 1)
            torch.testing.assert_close(score[0], value[-1:], rtol=1e-4, atol=1e-4)


def test_bfloat16_is_recorded(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a", "llama")
    decoder = decoder_of(folder, dtype=torch.bfloat16)
    save_hf(tmp_path / "b", decoder.shape, read_config(folder), decoder.params)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = load_file(tmp_path / "b" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize("eos", [2, [1, 2]])
def test_the_classifier_scores_eos_where_it_pads_as_well(eos: int | list[int], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a", "llama")
    edit_config(folder, eos_token_id=eos, pad_token_id=2)
    decoder = decoder_of(folder, head="scalar")
    save_hf(tmp_path / "b", decoder.shape, read_config(folder), decoder.params)
    tokens = torch.tensor([5, 7, 11, 2])
    with torch.no_grad():
        values = decoder.scalar(decoder.forward(tokens, pack((4,))))
        score = load_oracle(tmp_path / "b", head="scalar")(tokens[None], use_cache=False).logits
    torch.testing.assert_close(score[0], values[-1:], rtol=1e-4, atol=1e-4)


def test_a_new_head_is_as_small_as_hidden_states_are_large(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    before = decoder_of(folder, head="scalar").params["head.weight"]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 30.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(decoder_of(folder, head="scalar").params["head.weight"], before / 30.0)


def test_a_model_that_is_not_trained_gets_no_new_head(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    shape = replace(resolve_shape(str(folder), "test"), head="scalar")
    with pytest.raises(InputError, match="lacks the tensor 'score.weight'.*not trained"):
        load_boxes(folder, shape, shard_boxes(shape, 1, 1, 0, 0), torch.float32, CPU, new_head=False)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tp", [2, 4])
def test_boxes_are_slices_of_the_whole(name: str, tp: int, tmp_path: Path) -> None:
    folder = write_model(tmp_path, name)
    shape = resolve_shape(str(folder), "test")
    for head in ("lm", "scalar"):
        shape = replace(shape, head=head)
        whole = load(folder, shape)
        for rank in range(tp):
            boxes = shard_boxes(shape, tp, 1, rank, 0)
            for key, piece in load(folder, shape, tp, rank).items():
                assert torch.equal(piece, whole[key][boxes[key].slices]), key
                assert piece.is_contiguous()


def _drop(folder: Path, key: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors")


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _bad_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: _drop(f, "model.norm.weight"), ["model.norm.weight", "lacks"]),
        (lambda f: edit_config(f, vocab_size=99), ["(61, 32)", "(99, 32)"]),
        (_truncate, ["model.safetensors", "truncated"]),
        (lambda f: (f / "model.safetensors").write_bytes(b""), ["model.safetensors", "0 bytes"]),
        (_pickle_only, ["pytorch_model.bin", "convert", "safetensors"]),
        (lambda f: (f / "model.safetensors").unlink(), ["no model.safetensors"]),
        (_bad_index, ["../model.safetensors", "not in the folder"]),
        (lambda f: (f / INDEX).write_text("[]"), [INDEX, "not a safetensors index"]),
        (lambda f: (f / INDEX).write_text('{"weight_map": []}'), [INDEX, "not a safetensors index"]),
        (
            lambda f: (f / INDEX).write_text(
                json.dumps(
                    {
                        "weight_map": {
                            "model.embed_tokens.weight": "model.safetensors",
                            "x": "model.safetensors",
                        }
                    }
                )
            ),
            ["lacks the tensor"],
        ),
    ],
)
def test_damaged_folders(damage, words: list[str], tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    damage(folder)
    with pytest.raises(InputError) as caught:
        load(folder, resolve_shape(str(folder), "test"))
    for word in (str(folder), *words):
        assert word in str(caught.value)


def test_a_classifier_of_many_labels_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama", head="scalar")
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = torch.zeros(3, 32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"\(3, 32\).*num_labels 1"):
        load(folder, replace(resolve_shape(str(folder), "test"), head="scalar"))
