"""Stop strings: when the text of a response first contains one.

Decides by the text that the tokens give together, as decoding the whole response would. It reads
each token once, so a long response costs no more per token than a short one.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.tokenizer import TextStream, TextTokenizer


class StopStrings:
    """The stop strings of an experiment and the texts of the responses under way."""

    def __init__(self, tokenizer: TextTokenizer, strings: Sequence[str]) -> None:
        assert strings
        assert all(strings)
        self._tokenizer = tokenizer
        self._strings = tuple(strings)
        self._reach = max(map(len, strings)) - 1
        self._streams: dict[int, TextStream] = {}
        self._tails: dict[int, str] = {}

    def stops(self, row: int, token: int, *, may_stop: bool = True) -> bool:
        """Whether the text of response `row` contains a stop string now that it has this token too.

        A string that was completed while the response might not yet stop does not count later.
        """
        if row not in self._streams:
            self._streams[row] = self._tokenizer.stream()
            self._tails[row] = ""
        tail, new = self._tails[row], self._streams[row].push(token)
        if self._reach:
            self._tails[row] = (tail + new)[-self._reach :]
        return may_stop and bool(new) and any(_ends_in(string, tail, new) for string in self._strings)

    def forget(self, row: int) -> None:
        """Frees what is kept of a response."""
        self._streams.pop(row, None)
        self._tails.pop(row, None)


def _ends_in(string: str, tail: str, new: str) -> bool:
    """Whether the string occurs in tail + new with its end in new."""
    before = tail[-(len(string) - 1) :] if len(string) > 1 else ""
    return string in before + new
