"""Chat templates: a conversation as the text that a model was trained to read.

Decides what a template may see: plain values, in jinja2's sandbox, because templates come with models of
other people. Templates, their variables and their functions are those of transformers'
apply_chat_template; only the date is a fixed one, so that all ranks, and a run that is resumed on another
day, have the same prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from realloc.errors import InputError

DATE = datetime(2024, 7, 26)
"""What `strftime_now` says: the day that Llama 3's templates name where there is no clock."""

Message = Mapping[str, Any]


class TemplateError(InputError):
    """A template refuses a conversation."""


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A template, ready to use: `special_tokens` are its variables `bos_token`, `eos_token` and such."""

    name: str
    special_tokens: Mapping[str, str]
    template: Any

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The text of a conversation. With `add_generation_prompt` it ends where the assistant's turn begins.

        Raises TemplateError with what the template says.
        """
        from jinja2.exceptions import TemplateError as JinjaError

        try:
            text: str = self.template.render(
                messages=plain(messages),
                tools=plain(tools),
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        # whatever Python raises inside a template: it adds text to None, asks for an item that is not there
        except (JinjaError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise TemplateError(f"the chat template of {self.name} refuses it: {error}") from None
        return text


def read_chat_template(folder: str | Path, file: str | None = None) -> ChatTemplate | None:
    """The template of a model's folder, or of a file of its own; None when the folder has none.

    Raises InputError for a template that is no template.
    """
    folder = Path(folder)
    settings = _settings(folder / "tokenizer_config.json")
    text: Any = None
    path = folder / "chat_template.jinja" if file is None else Path(file)
    if file is not None or path.exists():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as a chat template: {error}.") from None
    else:
        path, text = folder / "tokenizer_config.json", settings.get("chat_template")
    if isinstance(text, list):  # several of them, by name
        text = next((t.get("template") for t in text if t.get("name") == "default"), None)
    if not isinstance(text, str):
        return None
    tokens = {
        name: _token(settings[name])
        for name in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")
        if settings.get(name) is not None
    }
    return ChatTemplate(str(path), tokens, _compiled(str(path), text))


def plain(value: Any) -> Any:
    """Only what JSON has, so that a template meets no object with methods; the rest as text."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)


def _compiled(name: str, text: str) -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = DATE.strftime
    environment.globals["namespace"] = _namespace()
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{name}: the chat template, line {error.lineno}: {error.message}.") from None


def _generation_tag() -> type[Any]:
    """`{% generation %}` around what the assistant says: read, and without effect on the text."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2 reads it so)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def _namespace() -> type[Any]:
    """jinja2's own, without names that Python gives a meaning."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class PlainNamespace(Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"{name!r} is no name for a variable")
            super().__setitem__(name, value)

    return PlainNamespace


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    from jinja2.exceptions import TemplateError as JinjaError

    raise JinjaError(message)


def _token(value: Any) -> str:
    """A special token, which is written as text or as a mapping with `content`."""
    return str(value.get("content", "")) if isinstance(value, Mapping) else str(value)


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}.") from None
    return value if isinstance(value, Mapping) else {}
