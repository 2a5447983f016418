"""Text to token ids and back, with the tokenizer of a Hugging Face model folder.

Reads `tokenizer.json` with the `tokenizers` library alone, which takes milliseconds where transformers takes
seconds. Decides which ids end a text. Knows nothing of data sets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realloc.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CHUNK = 4096


@dataclass(frozen=True)
class TextTokenizer:
    """`eos_ids` end a response; training data get the first of them. `pad_id` may be None.

    `folder` is where it was read from.
    """

    backend: Tokenizer
    eos_ids: tuple[int, ...]
    pad_id: int | None
    folder: str = ""

    def encode(self, texts: Sequence[str], *, special_tokens: bool) -> Iterator[list[int]]:
        """Token ids of each text; with `special_tokens`, also the BOS and such that the tokenizer adds."""
        for start in range(0, len(texts), _CHUNK):  # an encoding holds far more than its ids
            chunk = list(texts[start : start + _CHUNK])
            with _damage_told(self.folder):
                encodings = self.backend.encode_batch_fast(chunk, add_special_tokens=special_tokens)
            for encoding in encodings:
                yield encoding.ids

    def places(
        self, texts: Sequence[str], *, special_tokens: bool
    ) -> Iterator[tuple[list[int], Sequence[tuple[int, int]]]]:
        """As `encode`, and for each token the characters from-to that it stands for."""
        with _damage_told(self.folder):
            encodings = self.backend.encode_batch(list(texts), add_special_tokens=special_tokens)
        for encoding in encodings:
            yield encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; special tokens give none."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        """A new text, to be decoded token by token."""
        return TextStream(self.backend)


@contextmanager
def _damage_told(folder: str) -> Iterator[None]:
    """Raises InputError where the library fails on a tokenizer that it has read, but that makes no sense.

    It raises plain exceptions then, or ends as Rust programs do: that is no Exception and has no public name.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"{folder}: the tokenizer fails on a text: {error}; its tokenizer.json is damaged, copy it again."
        ) from None


class TextStream:
    """The text of tokens that come one after the other; special tokens give none."""

    def __init__(self, backend: Tokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """What the token adds; an unfinished character comes with the token that finishes it."""
        return self._stream.step(self._backend, token) or ""


def read_tokenizer(folder: str | Path, backend: Tokenizer | None = None) -> TextTokenizer:
    """The tokenizer of a model folder, or this one with the folder's settings.

    Raises InputError when the folder has none, or none that can be read.
    """
    folder = Path(folder)
    if backend is None:
        backend = _backend(folder)
    backend.no_truncation()  # a tokenizer.json may carry the settings of someone's last call
    backend.no_padding()
    settings = _json_file(folder / "tokenizer_config.json")
    configs = [_json_file(folder / name) for name in ("generation_config.json", "config.json")]
    eos = [_token_id(backend, settings.get("eos_token"))]
    pad = [_token_id(backend, settings.get("pad_token"))]
    for config in configs:
        value = config.get("eos_token_id")
        eos += value if isinstance(value, list) else [value]
        pad.append(config.get("pad_token_id"))
    pads = [i for i in pad if isinstance(i, int)]
    return TextTokenizer(
        backend=backend,
        eos_ids=tuple(dict.fromkeys(i for i in eos if isinstance(i, int))),
        pad_id=pads[0] if pads else None,
        folder=str(folder),
    )


def _backend(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; copy the model's tokenizer files there.")
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises nothing narrower)
        raise InputError(f"{path}: cannot be read as a tokenizer: {error}.") from None


def _token_id(backend: Tokenizer, token: Any) -> int | None:
    """The id of a token that `tokenizer_config.json` names, as text or as a mapping with `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    if not isinstance(token, str):
        return None
    result: int | None = backend.token_to_id(token)
    return result


def _json_file(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file, empty when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}.") from None
    if not isinstance(value, Mapping):
        raise InputError(f"{path}: expected a JSON object.")
    return value
