"""Rows of every kind as tokens, with the columns that TRL's data sets have; rows that are odd."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments import toy
from realloc.columns import Want
from realloc.data_spec import DataSpec
from realloc.errors import InputError
from realloc.examples import Examples, Limits, open_examples
from realloc.tokenizer import TextTokenizer, read_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + ' <eos> ' }}"
    "{% else %}{{ '<bos> ' + m.content + ' . ' }}{% endif %}{% endfor %}"
)
NO_LIMITS = Limits()


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("model")
    toy.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return read_tokenizer(folder)


def write(folder: Path, rows: Sequence[Any]) -> str:
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(
    folder: Path,
    tokenizer: TextTokenizer,
    rows: Sequence[Any],
    want: Want,
    limits: Limits = NO_LIMITS,
    **data: Any,
) -> Examples:
    return open_examples(DataSpec((write(folder, rows),), **data), want, tokenizer, limits)


def text(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.backend.decode(list(ids), skip_special_tokens=False))


DOG, CAT = "the dog was happy .", "the cat was sad ."
TURNS = [user("the dog"), assistant("was happy"), user("the cat"), assistant("was sad .")]
PARTS = ("the ", "dog")
PAIR = {"chosen": "the dog was happy .", "rejected": "the dog was sad ."}
CHAT_PAIR = {
    "chosen": [user("the dog"), assistant("was happy")],
    "rejected": [user("the dog"), assistant("was sad")],
}
KINDS: Mapping[str, tuple[Mapping[str, Any], Want, Mapping[str, Any], str, Sequence[str]]] = {
    "prompt": ({"prompt": "the dog"}, Want.PROMPTS, {}, "<bos> the dog", ()),
    "prompt of a preference": (PAIR | {"prompt": "the dog"}, Want.PROMPTS, {}, "<bos> the dog", ()),
    "chat prompt": ({"prompt": [user("the dog")]}, Want.PROMPTS, {}, "<bos> the dog .", ()),
    "prompt of a conversation": (
        {"messages": TURNS},
        Want.PROMPTS,
        {},
        "<bos> the dog . was happy <eos> <bos> the cat .",
        (),
    ),
    "conversation that waits": (
        {"messages": TURNS[:3]},
        Want.PROMPTS,
        {},
        "<bos> the dog . was happy <eos> <bos> the cat .",
        (),
    ),
    "implicit prompt": (PAIR, Want.PROMPTS, {}, "<bos> the dog was", ()),
    "plain prompt as a chat": ({"prompt": "the dog"}, Want.PROMPTS, {"chat": True}, "<bos> the dog .", ()),
    "completion": (
        {"prompt": "the dog", "completion": " was happy"},
        Want.RESPONSES,
        {},
        "<bos> the dog",
        ["was happy <eos>"],
    ),
    "chat completion": (
        {"prompt": [user("the dog")], "completion": [assistant("was happy")]},
        Want.RESPONSES,
        {},
        "<bos> the dog .",
        ["was happy <eos>"],
    ),
    "plain completion as a chat": (
        {"prompt": "the dog", "completion": "was happy"},
        Want.RESPONSES,
        {"chat": True},
        "<bos> the dog .",
        ["was happy <eos>"],
    ),
    "text": ({"text": DOG}, Want.RESPONSES, {}, "<bos>", ["the dog was happy . <eos>"]),
    "completion, all of it": (
        {"prompt": "the dog", "completion": " was happy"},
        Want.RESPONSES,
        {"loss_on": "all"},
        "<bos>",
        ["the dog was happy <eos>"],
    ),
    "last message": (
        {"messages": TURNS},
        Want.RESPONSES,
        {},
        "<bos> the dog . was happy <eos> <bos> the cat .",
        ["was sad . <eos>"],
    ),
    "whole conversation": (
        {"messages": [*TURNS, user("the fox")]},
        Want.RESPONSES,
        {"loss_on": "all"},
        "<bos>",
        ["the dog . was happy <eos> <bos> the cat . was sad . <eos>"],
    ),
    "all of the assistant's messages": (
        {"messages": TURNS},
        Want.RESPONSES,
        {"loss_on": "assistant"},
        "<bos> the dog .",
        ["was happy <eos> <bos> the cat . was sad . <eos>"],
    ),
    "ShareGPT's conversation": (
        {"conversations": [{"from": "human", "value": "the dog"}, {"from": "gpt", "value": "was happy"}]},
        Want.RESPONSES,
        {},
        "<bos> the dog .",
        ["was happy <eos>"],
    ),
    "preference": (
        {"prompt": "the dog", "chosen": " was happy", "rejected": " was sad"},
        Want.PAIRS,
        {},
        "<bos> the dog",
        ["was happy <eos>", "was sad <eos>"],
    ),
    "preference without prompt": (
        PAIR,
        Want.PAIRS,
        {},
        "<bos> the dog was",
        ["happy . <eos>", "sad . <eos>"],
    ),
    "chat preference": (
        {"prompt": [user("the dog")], "chosen": [assistant("was happy")], "rejected": [assistant("was sad")]},
        Want.PAIRS,
        {},
        "<bos> the dog .",
        ["was happy <eos>", "was sad <eos>"],
    ),
    "chat preference without prompt": (
        CHAT_PAIR,
        Want.PAIRS,
        {},
        "<bos> the dog .",
        ["was happy <eos>", "was sad <eos>"],
    ),
    "chat preference beside its prompt as text": (
        {"prompt": "the dog", **CHAT_PAIR},
        Want.PAIRS,
        {},
        "<bos> the dog .",
        ["was happy <eos>", "was sad <eos>"],
    ),
    "messages in parts": (
        {
            "messages": [
                user("the"),
                {"role": "user", "content": [{"type": "text", "text": w} for w in PARTS]},
            ]
        },
        Want.PROMPTS,
        {},
        "<bos> the . <bos> the dog .",
        (),
    ),
    "columns of one's own": (
        {"question": "the dog", "answer": " was happy"},
        Want.RESPONSES,
        {"prompt": "question", "response": "answer"},
        "<bos> the dog",
        ["was happy <eos>"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(tmp_path: Path, tokenizer: TextTokenizer, kind: str):
    row, want, data, prompt, responses = KINDS[kind]
    (example,) = opened(tmp_path, tokenizer, [row], want, **data).read([0])
    assert text(tokenizer, example.prompt) == prompt
    assert [text(tokenizer, ids) for ids in example.responses] == list(responses)
    assert example.row == row


def test_the_mask_has_what_the_assistant_says_and_where_it_ends(tmp_path: Path, tokenizer: TextTokenizer):
    (example,) = opened(tmp_path, tokenizer, [{"messages": TURNS}], Want.RESPONSES, loss_on="assistant").read(
        [0]
    )
    (ids,), (mask,) = example.responses, example.masks
    learned = [token for token, flag in zip(ids, mask, strict=True) if flag]
    assert text(tokenizer, learned) == "was happy <eos> was sad . <eos>"
    assert sum(mask) == len(ids) - 4  # <bos> the cat .


MISSING = (
    ({"question": "a", "answer": "b"}, Want.PROMPTS, "takes prompts, from the columns 'prompt', 'messages'"),
    ({"question": "a"}, Want.RESPONSES, "found 'question'. Name the columns with data.prompt and"),
    ({"prompt": "a", "completions": "b"}, Want.RESPONSES, "found 'prompt', 'completions'. Name"),
    ({"prompt": "a", "chosen": "b"}, Want.PAIRS, "takes preferences, from the columns 'chosen' and 'rej"),
)


@pytest.mark.parametrize(("row", "want", "message"), MISSING)
def test_columns_that_are_not_there_are_said(
    tmp_path: Path, tokenizer: TextTokenizer, row: Any, want: Want, message: str
):
    with pytest.raises(InputError) as error:
        opened(tmp_path, tokenizer, [row], want)
    assert "x.jsonl, line 1: the algorithm" in str(error.value)
    assert message in str(error.value)


GOOD = {"prompt": "the dog", "completion": "was happy"}
BAD: Sequence[tuple[Any, dict[str, Any], str, str]] = (
    ({"completion": "b"}, {}, "line 2: has no column 'prompt'.", "no column 'prompt'"),
    ({"prompt": None, "completion": "b"}, {}, "prompt: expected text, found NoneType", "prompt is null"),
    ({"prompt": " ", "completion": "b"}, {}, "prompt: is empty", "prompt is empty"),
    ({"prompt": 3, "completion": "b"}, {}, "prompt: expected text, found int", "prompt is not text"),
    ({"prompt": "the", "completion": None}, {}, "completion: expected text, found N", "completion is null"),
    ({"prompt": "\ud800", "completion": "b"}, {}, "a lone surrogate", "not UTF-8"),
    ({"prompt": [], "completion": "b"}, {}, "prompt: has no messages", "prompt is empty"),
    ({"prompt": [{"role": "user"}], "completion": "b"}, {}, "message 1 has no content", "bad message"),
    ({"prompt": [user("\ud800")], "completion": "b"}, {}, "a lone surrogate", "not UTF-8"),
    ({"prompt": [{"from": [], "value": "a"}], "completion": "b"}, {}, "message 1 is no map", "bad message"),
    ({"prompt": [user({"image": "a"})], "completion": "b"}, {}, "that is not text", "content is not text"),
    ({"prompt": [user("a")], "completion": "b", "tools": "[{"}, {}, "tools: not valid JSON", "bad tools"),
    ({"prompt": ["hello"], "completion": "b"}, {}, "message 1 is no mapping", "bad message"),
    ({"prompt": [assistant("a")], "completion": "b"}, {}, "does not end with a message to", "no prompt"),
    (
        {"prompt": [user("x" * 99)], "completion": "b"},
        {"chat_template": "{% if messages[0].content[50:] %}{{ raise_exception('long') }}{% endif %}a"},
        "refuses it: long",
        "refused by the chat template",
    ),
    (GOOD | {"prompt": "the dog " * 9}, {"long_prompts": "error"}, "the prompt has 19 tokens, more than", ""),
    (
        GOOD | {"completion": "happy " * 9},
        {"long_responses": "error"},
        "a response has 10 tokens, more than workload.response_tokens, 8",
        "",
    ),
)


@pytest.mark.parametrize(("row", "data", "message", "reason"), BAD)
def test_bad_rows_are_errors_with_their_line_or_counted(
    tmp_path: Path, tokenizer: TextTokenizer, row: Any, data: dict[str, Any], message: str, reason: str
):
    if "chat_template" in data:
        (tmp_path / "t.jinja").write_text(data["chat_template"])
        data = {"chat_template": str(tmp_path / "t.jinja")}
    limits = Limits(16, 8)
    with pytest.raises(InputError) as error:
        opened(tmp_path, tokenizer, [GOOD, row], Want.RESPONSES, limits, **data).scan()
    assert "x.jsonl, line 2: " in str(error.value)
    assert message in str(error.value)
    assert "Did you mean" not in str(error.value)
    if reason:
        rows = [GOOD, row, GOOD, row]
        kept, counts = opened(
            tmp_path, tokenizer, rows, Want.RESPONSES, limits, on_bad_row="skip", **data
        ).scan()
        assert (kept, counts.dropped) == ([0, 2], {reason: 2})
        assert str(counts) == f"2 of 4 rows; left out: 2 ({reason})"
        with pytest.raises(InputError, match=r"no row can be used: 0 of 1 rows"):
            opened(
                tmp_path,
                tokenizer,
                [row],
                Want.RESPONSES,
                limits,
                on_bad_row="skip",
                prompt="prompt",
                response="completion",
                **data,
            ).scan()


def test_tools_are_a_list_or_json(tmp_path: Path, tokenizer: TextTokenizer):
    path = tmp_path / "t.jinja"
    path.write_text("<bos> {{ tools[0].name if tools else 'cat' }} {{ messages[0].content }}")
    for tools, seen in ((None, "cat"), ([{"name": "fox"}], "fox"), ('[{"name": "fox"}]', "fox"), ("", "cat")):
        rows = [{"prompt": [user("dog")], "tools": tools}]
        (found,) = opened(tmp_path, tokenizer, rows, Want.PROMPTS, chat_template=str(path)).read([0])
        assert text(tokenizer, found.prompt) == f"<bos> {seen} dog"


def test_conversations_without_an_assistant_or_a_template(tmp_path: Path, tokenizer: TextTokenizer):
    rows = [{"messages": TURNS}, {"messages": TURNS[:1]}]
    with pytest.raises(InputError, match="line 2: messages: has no message of the assistant"):
        opened(tmp_path, tokenizer, rows, Want.RESPONSES).scan()
    toy.write_tokenizer(tmp_path / "plain")
    with pytest.raises(InputError, match=r"line 1: is a conversation, but .*plain has no chat template"):
        opened(tmp_path, read_tokenizer(tmp_path / "plain"), rows, Want.PROMPTS).scan()


def test_a_template_that_rewrites_the_past_cannot_be_masked(tmp_path: Path, tokenizer: TextTokenizer):
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}{{ 'a ' if loop.last else 'b ' }}{{ m.content }} {% endfor %}")
    with pytest.raises(InputError, match="writes earlier messages anew"):
        opened(
            tmp_path,
            tokenizer,
            [{"messages": TURNS}],
            Want.RESPONSES,
            chat_template=str(path),
            loss_on="assistant",
        ).scan()


def test_what_supervised_training_learns_is_its_own(tmp_path: Path, tokenizer: TextTokenizer):
    with pytest.raises(InputError, match="is for supervised training; the algorithm takes prompts"):
        opened(tmp_path, tokenizer, [GOOD], Want.PROMPTS, loss_on="all")
    with pytest.raises(InputError, match="takes conversations .*; the columns are prompt, completion"):
        opened(tmp_path, tokenizer, [GOOD], Want.RESPONSES, loss_on="assistant")


def test_long_prompts_are_cut_where_asked(tmp_path: Path, tokenizer: TextTokenizer):
    rows = [{"prompt": "the dog was happy and the cat"}]
    for way, expected in (("truncate_left", "<bos> and the cat"), ("truncate_right", "<bos> the dog was")):
        examples = opened(tmp_path, tokenizer, rows, Want.PROMPTS, Limits(prompt=4), long_prompts=way)
        kept, counts = examples.scan()
        assert (kept, counts.cut_prompts, counts.dropped) == ([0], 1, {})
        assert text(tokenizer, examples.read([0])[0].prompt) == expected
        assert str(counts) == "1 of 1 rows; cut: 1 prompts"


def test_long_responses_are_cut_or_dropped(tmp_path: Path, tokenizer: TextTokenizer):
    rows = [GOOD, GOOD | {"completion": "happy and sad and happy"}]
    kept, counts = opened(tmp_path, tokenizer, rows, Want.RESPONSES, Limits(16, 4)).scan()
    assert (kept, counts.cut_responses) == ([0, 1], 1)
    kept, counts = opened(
        tmp_path, tokenizer, rows, Want.RESPONSES, Limits(16, 4), long_responses="drop"
    ).scan()
    assert (kept, counts.dropped) == ([0], {"response over 4 tokens": 1})


def test_duplicates_are_dropped_where_asked(tmp_path: Path, tokenizer: TextTokenizer):
    rows = [GOOD, GOOD | {"id": 7}, GOOD | {"completion": "was sad"}]
    kept, counts = opened(tmp_path, tokenizer, rows, Want.RESPONSES, duplicates="drop").scan()
    assert (kept, counts.dropped) == ([0, 2], {"duplicate": 1})
    assert opened(tmp_path, tokenizer, rows, Want.RESPONSES).scan()[0] == [0, 1, 2]


def test_rows_that_change_during_a_run_are_said(tmp_path: Path, tokenizer: TextTokenizer):
    examples = opened(tmp_path, tokenizer, [GOOD, GOOD], Want.PROMPTS, on_bad_row="skip")
    path = Path(examples.data.paths[0])
    path.write_text(path.read_text().replace('"prompt"', '"pr0mpt"'))
    with pytest.raises(InputError, match=r"x\.jsonl, line 2: changed since the run began"):
        examples.read([1])
