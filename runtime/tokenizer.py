"""The tokenizer of a Hugging Face model folder, also of one that has only the files of an older format.

Those are converted by transformers; everything else is `realloc.tokenizer`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from realloc import tokenizer
from realloc.errors import InputError
from realloc.tokenizer import TextStream, TextTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TextStream", "TextTokenizer", "read_tokenizer"]


def read_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer of a model folder. Raises InputError when it has none, or none that can be read."""
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        return tokenizer.read_tokenizer(folder)
    return tokenizer.read_tokenizer(folder, _converted(folder))


def _converted(folder: Path) -> Tokenizer:
    """The tokenizer of a folder that has only the files of an older format, converted by transformers."""
    advice = "save it once more with transformers' AutoTokenizer, which writes tokenizer.json"
    if not any(
        (folder / name).exists() for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise InputError(f"{folder}: has no tokenizer.json; copy the model's tokenizer files there.")
    try:
        from transformers import AutoTokenizer

        # code of the folder's own would run with the user's rights; None would ask on a terminal
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        backend: Tokenizer = loaded.backend_tokenizer
    except (ImportError, OSError, ValueError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder}: has no tokenizer.json ({reason}); {advice}.") from None
    return backend
