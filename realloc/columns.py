"""What the columns of a data set mean: prompts, responses, preferences, texts, conversations.

Decides which columns an algorithm's sequences are made of, and makes texts of a row. Columns that the data
section does not name are those that TRL's data sets have: `prompt`, `completion`, `chosen`, `rejected`,
`text`, `messages`. Knows nothing of files or of tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from realloc.chat import ChatTemplate, Message, TemplateError
from realloc.data_spec import DataSpec
from realloc.dataflow import DataflowGraph, Per
from realloc.errors import InputError
from realloc.files import nearest
from realloc.row_sources import BadRow, Row

CONVERSATIONS = ("messages", "conversations")
_KNOWN = frozenset((*CONVERSATIONS, "prompt", "completion", "chosen", "rejected", "text"))
_ROLES = {"human": "user", "gpt": "assistant"}
"""What ShareGPT's conversations call the roles."""


class NoColumns(InputError):
    """The data have no columns for what an algorithm takes."""


class Want(Enum):
    """What an algorithm takes from the data set, for each prompt. Of TEXTS the first token stands for it."""

    PROMPTS = "prompts"
    RESPONSES = "prompts with a response"
    PAIRS = "preferences"
    TEXTS = "whole texts"


def wanted(graph: DataflowGraph) -> Want:
    """Prompts alone where the graph generates its tokens; pairs where a call keeps two together."""
    if all(graph.key[key].per is Per.PROMPT_TOKEN for key in graph.source_keys):
        return Want.PROMPTS
    return Want.PAIRS if any(call.together == 2 for call in graph.calls) else Want.RESPONSES


@dataclass(frozen=True)
class Columns:
    """The columns that are read. `text` and `messages` have prompt and response in one.

    `prompt` None with `responses`: the prompt is what they begin with alike.
    """

    prompt: str | None = None
    responses: tuple[str, ...] = ()
    text: str | None = None
    messages: str | None = None

    def __str__(self) -> str:
        names = [name for name in (self.prompt, *self.responses, self.text, self.messages) if name]
        return ", ".join(names)


@dataclass(frozen=True)
class Texts:
    """A prompt and, for each response, the whole text, which begins with the prompt.

    `prompt` None: the first token stands for it. `is_chat`: special tokens are written out, and nothing
    follows the token that ends the assistant's turn, as nothing does when it is generated. `said`: the
    characters from-to of the only whole text that are learned, where not the whole response is.
    """

    prompt: str | None
    wholes: tuple[str, ...] = ()
    is_chat: bool = False
    said: tuple[tuple[int, int], ...] | None = None


def find_columns(data: DataSpec, want: Want, names: Collection[str], where: str) -> Columns:
    """The columns for what is wanted, of a data set that has these. Raises NoColumns where there are none.

    Names that the data section gives are taken as they are: rows that lack them are bad rows.
    """
    known = {name: name if name in names else None for name in ("prompt", "completion", "text")}
    prompt = data.prompt or known["prompt"]
    messages = data.messages or next((name for name in CONVERSATIONS if name in names), None)
    pair = (data.chosen or "chosen", data.rejected or "rejected")
    has_pair = data.chosen is not None or all(name in names for name in pair)
    response = data.response or known["completion"]
    text = data.text or known["text"]
    if want is Want.PAIRS and has_pair:
        return Columns(prompt, pair)
    if want is Want.PROMPTS:
        if prompt and not (data.messages and not data.prompt):
            return Columns(prompt)
        if messages:
            return Columns(messages=messages)
        if has_pair:
            return Columns(None, pair)
    if want in (Want.RESPONSES, Want.TEXTS):
        if data.text or data.messages:
            return Columns(text=data.text) if data.text else Columns(messages=data.messages)
        if want is Want.TEXTS and text and not (data.prompt or data.response):
            return Columns(text=text)
        if prompt and response:
            return Columns(prompt, (response,))
        if messages or text:
            return Columns(messages=messages) if messages else Columns(text=text)
    raise NoColumns(f"{where}: {_missing(want, names, data.section)}")


def _missing(want: Want, names: Collection[str], section: str) -> str:
    responses = (
        "'prompt' and 'completion', 'messages', or 'text'",
        "{0}.prompt and {0}.response, {0}.messages, or {0}.text",
    )
    known, keys = {
        Want.PROMPTS: ("'prompt', 'messages', or 'chosen' and 'rejected'", "{0}.prompt or {0}.messages"),
        Want.RESPONSES: responses,
        Want.PAIRS: ("'chosen' and 'rejected'", "{0}.chosen and {0}.rejected"),
        Want.TEXTS: responses,
    }[want]
    found = ", ".join(f"'{name}'" for name in names) or "none"
    return (
        f"the algorithm takes {want.value}, from the columns {known}; found {found}. Name the columns "
        f"with {keys.format(section)}."
    )


@dataclass(frozen=True)
class TextReader:
    """Makes texts of rows. `tokenizer_of` is the model's folder, for messages."""

    columns: Columns
    want: Want
    loss_on: str
    chat: bool
    template: ChatTemplate | None
    tokenizer_of: str
    section: str = "data"

    @property
    def _learns_all(self) -> bool:
        return self.want is Want.TEXTS or (self.want is Want.RESPONSES and self.loss_on == "all")

    def read(self, row: Row, where: str) -> Texts:
        """The texts of a row. Raises BadRow; InputError when a conversation meets no chat template."""
        columns = self.columns
        if columns.text is not None:
            return Texts(None, (_text(row, columns.text, where),))
        if columns.messages is not None:
            return self._conversation(row, columns.messages, where)
        values = [_value(row, name, where) for name in columns.responses]
        prompt = None if columns.prompt is None else _value(row, columns.prompt, where)
        if self.chat or any(isinstance(value, (list, tuple)) for value in (prompt, *values)):
            return self._chat(row, prompt, values, where)
        texts = [_text(row, name, where, may_be_empty=True) for name in columns.responses]
        if columns.prompt is None:
            start = _shared_text(texts)
            if not start.strip():
                raise BadRow(where, "the responses do not begin alike, so there is no prompt.", "no prompt")
            return Texts(start, tuple(texts) if self.want is not Want.PROMPTS else ())
        start = _text(row, columns.prompt, where)
        wholes = tuple(text if text.startswith(start) else start + text for text in texts)
        return self._learned(Texts(start, wholes))

    def _learned(self, texts: Texts) -> Texts:
        """All but the first token is the response where supervised training learns all."""
        if self._learns_all:
            return Texts(None, texts.wholes, texts.is_chat)
        return texts

    def _chat(self, row: Row, prompt: Any, values: Sequence[Any], where: str) -> Texts:
        """Prompt and responses are messages, or texts that are put into messages."""
        answers = [
            _messages(value, name, where, "assistant")
            for name, value in zip(self.columns.responses, values, strict=True)
        ]
        whole_answers = any(isinstance(value, (list, tuple)) for value in values)
        if prompt is None or (
            isinstance(prompt, str) and whole_answers and answers[0][0]["role"] != "assistant"
        ):
            start = _shared_messages(answers)
        else:
            start = _messages(prompt, str(self.columns.prompt), where, "user")
        if not start or start[-1]["role"] == "assistant":
            raise BadRow(where, "the prompt does not end with a message to the assistant.", "no prompt")
        rests = [answer[len(start) :] if answer[: len(start)] == start else answer for answer in answers]
        if not all(rests) and self.want is not Want.PROMPTS:
            raise BadRow(where, "a response has no message.", "empty response")
        first = self._render(row, start, where, begin=True)
        if self.want is Want.PROMPTS:
            return Texts(first, (), True)
        wholes = [self._render(row, [*start, *rest], where).rstrip() for rest in rests]
        return self._learned(Texts(shared_start([first, *wholes]), tuple(wholes), True))

    def _conversation(self, row: Row, column: str, where: str) -> Texts:
        messages = _messages(_value(row, column, where), column, where, "user")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.want is Want.PROMPTS:
            start = messages[: turns[-1]] if turns and turns[-1] == len(messages) - 1 else messages
            return Texts(self._render(row, start, where, begin=True), (), True)
        if not turns:
            raise BadRow(where, f"{column}: has no message of the assistant.", "no message of the assistant")
        whole = self._render(row, messages[: turns[-1] + 1], where).rstrip()
        if self._learns_all:
            return Texts(None, (whole,), True)
        learned = turns if self.loss_on == "assistant" else turns[-1:]
        said = [self._said(row, messages, turn, whole, where) for turn in learned]
        spans = tuple(said) if self.loss_on == "assistant" else None
        return Texts(whole[: said[0][0]], (whole,), True, spans)

    def _said(
        self, row: Row, messages: Sequence[Message], turn: int, whole: str, where: str
    ) -> tuple[int, int]:
        """From where to where a message of the assistant is in the text, its end token with it."""
        before = self._render(row, messages[:turn], where, begin=True)
        until = self._render(row, messages[: turn + 1], where).rstrip()
        if not whole.startswith(until):
            raise BadRow(
                where,
                "the chat template writes earlier messages anew when others follow; use loss_on: response.",
                "template rewrites earlier messages",
            )
        start = len(shared_start([before, until]))
        return start, len(until)

    def _render(self, row: Row, messages: Sequence[Message], where: str, *, begin: bool = False) -> str:
        if self.template is None:
            raise InputError(
                f"{where}: is a conversation, but {self.tokenizer_of} has no chat template; give one with "
                f"{self.section}.chat_template: FILE.jinja, or use a chat model's tokenizer."
            )
        try:
            text = self.template.render(messages, add_generation_prompt=begin, tools=_tools(row, where))
        except TemplateError as error:
            raise BadRow(where, str(error), "refused by the chat template") from None
        return _encodable(text, "the conversation", where)


def _tools(row: Row, where: str) -> list[Any] | None:
    """The functions that a conversation may call: a list, or one as JSON, as Arrow has it."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise BadRow(where, f"tools: not valid JSON: {error}.", "bad tools") from None
    return tools if isinstance(tools, list) else None


def _value(row: Row, column: str, where: str) -> Any:
    if column not in row:
        # of two columns that have meanings of their own, one is no misspelling of the other
        others = row.keys() - _KNOWN if column in _KNOWN else row
        raise BadRow(where, f"has no column '{column}'.{nearest(column, others)}", f"no column '{column}'")
    value = row[column]
    if not isinstance(value, (str, list, tuple)):
        reason = f"{column} is null" if value is None else f"{column} is not text"
        raise BadRow(where, f"{column}: expected text, found {type(value).__name__}.", reason)
    return value


def _text(row: Row, column: str, where: str, *, may_be_empty: bool = False) -> str:
    value = _value(row, column, where)
    if not isinstance(value, str):
        problem = f"{column}: expected text, found {type(value).__name__}."
        raise BadRow(where, problem, f"{column} is not text")
    if not value.strip() and not may_be_empty:
        raise BadRow(where, f"{column}: is empty.", f"{column} is empty")
    return _encodable(value, column, where)


def _encodable(text: str, what: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
        problem = f"{what}: has a character that is none (a lone surrogate)."
        raise BadRow(where, problem, "not UTF-8") from None
    return text


def _messages(value: Any, column: str, where: str, role: str) -> list[Message]:
    """A column's messages; a text is one message of `role`."""
    if isinstance(value, str):
        value = [{"role": role, "content": _text({column: value}, column, where)}]
    messages: list[Message] = []
    for number, item in enumerate(value, 1):
        if isinstance(item, Mapping) and "from" in item and "role" not in item:
            speaker = item["from"]
            said_by = _ROLES.get(speaker, speaker) if isinstance(speaker, str) else None
            item = {"role": said_by, "content": item.get("value")}
        if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
            problem = f"{column}: message {number} is no mapping with role and content."
            raise BadRow(where, problem, "bad message")
        content = _content(item.get("content"), f"{column}: message {number}", where)
        if content is None and not item.get("tool_calls"):
            raise BadRow(where, f"{column}: message {number} has no content.", "bad message")
        # Arrow gives every message all keys that any has
        given = {key: value for key, value in item.items() if value is not None}
        messages.append(given if content is None else given | {"content": content})
    if not messages:
        raise BadRow(where, f"{column}: has no messages.", f"{column} is empty")
    return messages


def _content(content: Any, what: str, where: str) -> str | None:
    """What a message says: text, or a list of parts that are texts."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, (list, tuple)) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if all(isinstance(text, str) for text in texts):
        return "".join(map(str, texts))
    raise BadRow(where, f"{what} has content that is not text.", "content is not text")


def shared_start(texts: Sequence[str]) -> str:
    """The characters that all texts begin with."""
    low, high = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[:length]


def _shared_text(texts: Sequence[str]) -> str:
    """What texts begin with alike, up to the end of a word; the space after it is the responses'."""
    start = shared_start(texts)
    if all(len(text) == len(start) or text[len(start)].isspace() for text in texts):
        return start
    return re.sub(r"\s*\S*$", "", start)


def _shared_messages(answers: Sequence[Sequence[Message]]) -> list[Message]:
    shared = []
    for messages in zip(*answers, strict=False):
        if any(message != messages[0] for message in messages[1:]):
            break
        shared.append(messages[0])
    while shared and shared[-1]["role"] == "assistant":
        shared.pop()
    return shared
