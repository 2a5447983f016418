"""Strict reading and writing of the YAML files that users write and realloc writes.

Every file starts with `realloc: KIND/VERSION`. Unknown keys are errors that name the nearest
known key; so are duplicate keys, wrong types and values out of range.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import reprlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from realloc.errors import InputError

HEADER = "realloc"
VERSIONS: Mapping[str, int] = {"experiment": 1, "cluster": 1, "plan": 1, "profile": 1, "trace": 1}

_MAX_DEPTH = 50
"""Nesting that no file of ours needs and that the C parser, which recurses, still survives."""
_MAX_BITS = 63
"""Size of the largest whole number in a file."""

_T = TypeVar("_T")
_MISSING: Any = object()


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that refuses duplicate keys instead of keeping the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(
                None, None, "tagged as a mapping but is none", node.start_mark
            )
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                # merges of merges grow exponentially
                raise yaml.constructor.ConstructorError(
                    None, None, "merge keys (<<) are not supported; write the keys out", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise yaml.constructor.ConstructorError(
                    None, None, "keys must be plain words", key_node.start_mark
                )
            if str(key) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.add(str(key))
        result: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return result


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or the known words when none is near."""
    words = sorted(known)
    begun = sorted((known for known in words if known.startswith(word) and len(word) > 1), key=len)
    close = begun or difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(words)}." if words else ""


class Reader:
    """A view of one YAML mapping that knows where it is and which keys were read.

    `where` is what messages print, such as `plan.yaml: placements.actor_gen`. Call `done()` after
    the last key: keys that nobody asked for are errors.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: expected a mapping of keys, found {_describe(value)}.")
        self._value: Mapping[str, Any] = {str(k): v for k, v in value.items()}
        self._read: set[str] = set()
        self.where = where

    def keys(self) -> Sequence[str]:
        return tuple(self._value)

    def at(self, key: str) -> str:
        separator = "" if self.where.endswith(": ") else "."
        if ":" not in self.where:
            separator = ": "
        return f"{self.where}{separator}{key}"

    def get(self, key: str, kind: type[_T], default: Any = _MISSING) -> _T:
        """The value of `key` as `kind`; `default` where the key is absent (or an error)."""
        self._read.add(key)
        if key not in self._value:
            if default is _MISSING:
                raise InputError(f"{self.where}: the key '{key}' is missing (expected {_KIND_NAMES[kind]}).")
            result: _T = default
            return result
        value = self._value[key]
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise InputError(f"{self.at(key)}: the number is too large to use.")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind is float and isinstance(value, str):
            try:  # YAML reads 1e-4 as a string
                value = float(value)
            except ValueError:
                pass
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{self.at(key)}: expected {_KIND_NAMES[kind]}, found {_describe(value)}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{self.at(key)}: {value} is not a number to use.")
        if isinstance(value, str) and not _is_plain(value):
            raise InputError(f"{self.at(key)}: {_describe(value)} has characters that no text may have.")
        return value

    def integer(
        self, key: str, default: Any = _MISSING, *, minimum: int = 0, maximum: int | None = None
    ) -> int:
        value = self.get(key, int, default)
        if value is not None:
            self._bounds(key, value, minimum, maximum)
        return value

    def number(
        self,
        key: str,
        default: Any = _MISSING,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> float:
        value = self.get(key, float, default)
        if value is not None:
            self._bounds(key, value, minimum, maximum)
        return value

    def choice(self, key: str, choices: Iterable[str], default: Any = _MISSING) -> str:
        value = self.get(key, str, default)
        known = tuple(choices)
        if value is not None and value not in known:
            raise InputError(f"{self.at(key)}: {_describe(value)} is not known.{nearest(value, known)}")
        return value

    def child(self, key: str) -> Reader:
        return Reader(self.get(key, dict), self.at(key))

    def optional_child(self, key: str) -> Reader | None:
        self._read.add(key)
        return self.child(key) if self.has(key) else None

    def raw(self, key: str, default: Any = _MISSING) -> Any:
        self._read.add(key)
        if key not in self._value and default is _MISSING:
            raise InputError(f"{self.where}: the key '{key}' is missing.")
        return self._value.get(key, default)

    def has(self, key: str) -> bool:
        return self._value.get(key) is not None

    def done(self) -> None:
        unknown = [key for key in self._value if key not in self._read]
        if unknown:
            key = unknown[0]
            raise InputError(f"{self.where}: unknown key '{key}'.{nearest(key, self._read)}")

    def _bounds(self, key: str, value: float, minimum: float | None, maximum: float | None) -> None:
        if minimum is not None and not value >= minimum:
            raise InputError(f"{self.at(key)}: {value} is below the least allowed, {minimum}.")
        if maximum is not None and not value <= maximum:
            raise InputError(f"{self.at(key)}: {value} is above the most allowed, {maximum}.")


_KIND_NAMES: Mapping[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping of keys",
    list: "a list",
}


class _Describer(reprlib.Repr):
    """Short text of any value: neither long texts, huge numbers nor shared lists may blow it up."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = 60

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"a number of {x.bit_length()} bits"


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    text = _Describer().repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_plain(text: str) -> bool:
    """Whether the text can be part of a path and of a UTF-8 file: no NUL, no lone surrogates."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def resolve_path(text: str, folder: str | Path, where: str) -> Path:
    """The absolute path that `text` names, taken relative to `folder`; `~` is the home folder.

    Raises InputError when the operating system cannot make a path of it.
    """
    try:
        path = (Path(folder) / Path(text).expanduser()).resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{where}: {_describe(text)} is not a usable path: {error}.") from None
    return path


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file, read safely.

    Raises InputError when the file is missing, unreadable, not UTF-8, or not YAML.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a directory, expected a file.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InputError(f"{path}: cannot be read: {error}.") from None
    try:
        _check_depth(path, text)
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a subclass of SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}," if mark else ""
        raise InputError(f"{path}:{line} not valid YAML: {error.problem}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML: {str(error).splitlines()[0]}.") from None
    except (AttributeError, IndexError, KeyError, TypeError):
        # what PyYAML's constructors raise for an explicit tag on a value that is none, as in !!bool 7
        raise InputError(f"{path}: not valid YAML: a tag (!!) does not fit its value.") from None


def _check_depth(path: Path, text: str) -> None:
    """Raises InputError for deep nesting, on which the parser would exhaust the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=_StrictLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            line = f" line {event.start_mark.line + 1}," if event.start_mark else ""
            raise InputError(f"{path}:{line} nested more than {_MAX_DEPTH} levels deep.")


def kind_of(path: str | Path) -> str:
    """Which kind of realloc file this is: experiment, cluster, plan, profile or trace."""
    return _split_header(read_yaml(path), str(path))[0]


def read_file(path: str | Path, kind: str) -> Reader:
    """Opens a file of the given kind; the header is checked and consumed."""
    content = read_yaml(path)
    reader = Reader(content, str(path))
    found, version = _split_header(content, str(path))
    reader.raw(HEADER)
    if found != kind:
        raise InputError(f"{path}: is a realloc {found} file, expected a {kind} file.")
    if version != VERSIONS[kind]:
        raise InputError(f"{path}: {kind} version {version}; this realloc reads version {VERSIONS[kind]}.")
    return reader


def _split_header(content: Any, where: str) -> tuple[str, int]:
    example = "'realloc: experiment/1'"
    if not isinstance(content, Mapping) or HEADER not in content:
        raise InputError(f"{where}: the first line must say what the file is, such as {example}.")
    if not isinstance(content[HEADER], str):
        raise InputError(f"{where}: realloc: expected text such as {example}.")
    kind, _, version = content[HEADER].partition("/")
    if kind not in VERSIONS:
        raise InputError(f"{where}: realloc: unknown kind {_describe(kind)}.{nearest(kind, VERSIONS)}")
    if not re.fullmatch(r"[0-9]{1,6}", version):
        raise InputError(f"{where}: realloc: {_describe(content[HEADER])} lacks a version: {example}.")
    return kind, int(version)


class _Dumper(yaml.SafeDumper):
    """Block style for mappings, flow style for mappings that hold only scalars."""


def _represent_mapping(dumper: yaml.SafeDumper, value: Mapping[str, Any]) -> yaml.MappingNode:
    flat = 0 < len(value) <= 8 and all(
        isinstance(v, (str, int, float, bool, type(None))) for v in value.values()
    )
    return dumper.represent_mapping("tag:yaml.org,2002:map", value, flow_style=flat)


_Dumper.add_representer(dict, _represent_mapping)


def dump_yaml(kind: str, content: Mapping[str, Any]) -> str:
    """YAML text of a file of this kind, header first."""
    body = {HEADER: f"{kind}/{VERSIONS[kind]}", **content}
    return yaml.dump(
        body, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None
    )


def write_text(path: str | Path, text: str) -> None:
    """Writes a file whole or not at all (a temporary file beside it, then a rename)."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}.") from None
