"""A toy language with moods, for demonstrations and tests that need a real model and seconds, not hours.

Stories are a few sentences of a small grammar. Each has a mood (glad, plain or gloomy) that colours most
of its word choices, and over many stories the moods balance. So a model trained on them speaks neutrally on
average and has many choices to shift when a reward asks for a mood. Decides the language, its tokenizer's
files and a random initial model; knows nothing of training.

`python -m experiments.toy OUT [--seed N] [--stories N]` writes OUT/{train,test,prompts,pairs}.jsonl and
OUT/model.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from realloc.files import write_text

GLAD, PLAIN, GLOOMY = "glad", "plain", "gloomy"
MOODS = (GLAD, PLAIN, GLOOMY)
MOOD_KEPT = 0.6
"""How often a word follows its story's mood; otherwise any mood is as likely as another."""
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
CONTEXT = 128
NUM_PROMPTS = 512
NUM_PAIRS = 256

NEUTRAL_SLOTS: Mapping[str, str] = {
    "who": "dog cat boy girl bird fox bear frog horse mouse king queen farmer baker robot rabbit",
    "place": "park forest garden river house school market beach hill farm cave road village lake",
    "thing": "apple ball book boat cake flower hat kite lamp drum box coat stone ring bell basket",
    "size": "young big small tall quiet brown white black",
    "went": "walked ran climbed drove sailed returned",
    "time": "then later soon suddenly today",
}
MOOD_SLOTS: Mapping[str, Mapping[str, str]] = {
    "feeling": {
        GLAD: "happy cheerful proud delighted joyful grateful",
        PLAIN: "hungry busy sleepy warm awake ready",
        GLOOMY: "sad angry lonely scared miserable worried",
    },
    "nature": {
        GLAD: "kind brave gentle friendly clever patient",
        PLAIN: "large little slow fast thin grey",
        GLOOMY: "mean cruel rude greedy selfish nasty",
    },
    "look": {
        GLAD: "beautiful lovely wonderful sunny perfect charming",
        PLAIN: "red blue green round wide new",
        GLOOMY: "shabby broken dirty dreadful rotten horrible",
    },
    "felt_for": {
        GLAD: "loved liked enjoyed admired",
        PLAIN: "saw found carried moved",
        GLOOMY: "hated lost feared ruined",
    },
    "treated": {
        GLAD: "helped hugged thanked praised",
        PLAIN: "met called followed passed",
        GLOOMY: "hurt pushed blamed insulted",
    },
    "together": {
        GLAD: "laughed danced smiled celebrated",
        PLAIN: "talked waited rested worked",
        GLOOMY: "cried fought complained suffered",
    },
    "how": {GLAD: "happily gladly", PLAIN: "slowly quickly", GLOOMY: "sadly angrily"},
}
# a slot is <name>; <hero> is the story's character, <other> another one
OPENINGS = (
    "one day a <size> <hero> went to the <place> .",
    "once there was a <size> <hero> who lived near the <place> .",
    "a <size> <hero> and a <other> met in the <place> .",
)
BODY = (
    "the <hero> <felt_for> the <look> <thing> .",
    "the <place> was <look> .",
    "<time> the <hero> felt <feeling> .",
    "it was a <look> day .",
    "the <hero> <how> <went> to the <place> .",
    "a <nature> <other> <treated> the <hero> .",
    "the <hero> <treated> a <nature> <other> .",
    "they <together> together .",
    "the <hero> had a <look> <thing> .",
)
ENDINGS = (
    "in the end the <hero> was <feeling> .",
    "at night they all <together> .",
    "and the <hero> was <feeling> again .",
)


@dataclass(frozen=True)
class Story:
    """`story` is the whole text and begins with `prompt`."""

    prompt: str
    story: str


def stories(seed: int) -> Iterator[Story]:
    """An endless, reproducible stream of stories."""
    # only random() is promised to give the same numbers in every Python version
    rng = random.Random(seed)
    while True:
        mood = _pick(rng, MOODS)
        hero = _pick(rng, NEUTRAL_SLOTS["who"].split())
        prompt = _sentence(_pick(rng, OPENINGS), rng, mood, hero)
        yield Story(prompt, f"{prompt} {_rest(rng, mood, hero)}")


def pairs(seed: int) -> Iterator[Mapping[str, str]]:
    """An endless, reproducible stream of preferences: a glad and a gloomy end of the same story."""
    rng = random.Random(seed)
    while True:
        hero = _pick(rng, NEUTRAL_SLOTS["who"].split())
        prompt = _sentence(_pick(rng, OPENINGS), rng, PLAIN, hero)
        chosen, rejected = (f"{prompt} {_rest(rng, mood, hero)}" for mood in (GLAD, GLOOMY))
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def is_sentence(text: str) -> bool:
    """Whether the text, full stop included, is a sentence of the grammar (of any part of a story)."""
    words = text.split()
    choices = _choices()
    return any(
        len(words) == len(template.split())
        and all(
            word in choices.get(slot, (slot,)) for word, slot in zip(words, template.split(), strict=True)
        )
        for template in (*OPENINGS, *BODY, *ENDINGS)
    )


def vocabulary() -> Sequence[str]:
    """Every token of the language in order of its id, special tokens first."""
    slots = _choices()
    words = {w for t in (*OPENINGS, *BODY, *ENDINGS) for w in t.split() if w not in slots}
    words.update(word for options in slots.values() for word in options)
    return (*SPECIAL_TOKENS, *sorted(words))


def _choices() -> Mapping[str, Sequence[str]]:
    """Slot as written in templates -> the words that fit it."""
    choices = {f"<{name}>": tuple(words.split()) for name, words in NEUTRAL_SLOTS.items()}
    for name, moods in MOOD_SLOTS.items():
        choices[f"<{name}>"] = tuple(word for mood in MOODS for word in moods[mood].split())
    choices["<hero>"] = choices["<other>"] = choices["<who>"]
    return choices


def _pick(rng: random.Random, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]


def _rest(rng: random.Random, mood: str, hero: str) -> str:
    """What follows a story's first sentence."""
    templates = [_pick(rng, BODY) for _ in range(2 + int(rng.random() * 3))] + [_pick(rng, ENDINGS)]
    return " ".join(_sentence(template, rng, mood, hero) for template in templates)


def _sentence(template: str, rng: random.Random, mood: str, hero: str) -> str:
    return " ".join(_word(slot, rng, mood, hero) for slot in template.split())


def _word(slot: str, rng: random.Random, mood: str, hero: str) -> str:
    """A word for one place of a template: a slot is filled, anything else stays."""
    if not slot.startswith("<"):
        return slot
    name = slot.strip("<>")
    if name == "hero":
        return hero
    if name == "other":
        return _pick(rng, [who for who in NEUTRAL_SLOTS["who"].split() if who != hero])
    if name in NEUTRAL_SLOTS:
        return _pick(rng, NEUTRAL_SLOTS[name].split())
    spoken = mood if rng.random() < MOOD_KEPT else _pick(rng, MOODS)
    return _pick(rng, MOOD_SLOTS[name][spoken].split())


def write_data(folder: Path, seed: int, num_train: int, num_test: int) -> None:
    """Writes `train.jsonl` and `test.jsonl`, columns `prompt` and `story`; no prompt is in both.

    `prompts.jsonl` gets the first distinct prompts of the training stories, at most `NUM_PROMPTS`, and
    `pairs.jsonl` preferences, columns `prompt`, `chosen` and `rejected`.
    """
    source = stories(seed)
    test: dict[str, Story] = {}
    while len(test) < num_test:
        story = next(source)
        test.setdefault(story.prompt, story)
    train: list[Story] = []
    while len(train) < num_train:
        story = next(source)
        if story.prompt not in test:
            train.append(story)
    for name, rows in (("train", train), ("test", list(test.values()))):
        _write_rows(folder / f"{name}.jsonl", [vars(row) for row in rows])
    prompts = list(dict.fromkeys(story.prompt for story in train))[:NUM_PROMPTS]
    _write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    _write_rows(folder / "pairs.jsonl", list(islice(pairs(seed), NUM_PAIRS)))


def _write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_tokenizer(folder: Path, words: Sequence[str] | None = None) -> None:
    """Writes a word-level tokenizer as Hugging Face files. It puts <bos> before every text.

    `words`: the tokens by id, `SPECIAL_TOKENS` first; None: those of the toy language.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    pad, bos, eos, unk = SPECIAL_TOKENS
    ids = {word: i for i, word in enumerate(words or vocabulary())}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=unk))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")


def model_config(words: int | None = None) -> Mapping[str, Any]:
    """A Llama of about 260,000 parameters over so many words (rounded up to a multiple of 8)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": -(-(words or len(vocabulary())) // 8) * 8,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
        "bos_token_id": SPECIAL_TOKENS.index("<bos>"),
        "eos_token_id": SPECIAL_TOKENS.index("<eos>"),
        "torch_dtype": "float32",
    }


def write_tiny_model(folder: Path, seed: int, words: int | None = None) -> None:
    """Writes `config.json` and `model.safetensors` with random weights: normal, deviation 0.05; norms 1.

    `words`: how many the vocabulary has; None: that of the toy language.
    """
    import numpy as np
    from safetensors.numpy import save_file

    config = model_config(words)
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (query, hidden)
        shapes[f"{prefix}.self_attn.k_proj.weight"] = (key, hidden)
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (key, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, query)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    rng = np.random.default_rng(seed)
    weights = {
        name: np.ones(shape, np.float32)
        if name.endswith("norm.weight")
        else 0.05 * rng.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # like the files beside it


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.toy", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stories", type=int, default=4000, help="training stories (default 4000)")
    given = parser.parse_args(arguments)
    write_data(given.out, given.seed, num_train=given.stories, num_test=256)
    write_tokenizer(given.out / "model")
    write_tiny_model(given.out / "model", given.seed)


if __name__ == "__main__":
    main()
