"""Text from tokens that come one by one, given out as soon as it is certain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"
"""What decoding puts for bytes that are not a whole character yet."""


class TextPieces:
    """Decodes token by token and ends before the first stop string.

    Attributes:
        stopped: whether a stop string was met; later tokens add nothing.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop: Sequence[str] = (), *, strip: bool
    ) -> None:
        """Start a text.

        Args:
            decode: token ids to text.
            stop: strings that end the text and are no part of it.
            strip: leave white space at both ends out.
        """
        self.stopped = False
        self._decode = decode
        self._stop = tuple(stop)
        self._strip = strip
        self._ids: list[int] = []
        self._text = ""
        self._given = 0  # characters of the text that are out, or were skipped at its beginning

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; often none."""
        if self.stopped:
            return ""
        self._ids.append(token)
        self._text = self._decode(self._ids)
        where = [place for stop in self._stop if (place := self._text.find(stop)) >= 0]
        if where:
            self.stopped = True
            self._text = self._text[: min(where)]
            return self._up_to(len(self._text))
        return self._up_to(self._certain())

    def end(self) -> str:
        """What was held back; call once, after the last token."""
        return self._up_to(len(self._text))

    def _certain(self) -> int:
        """Length of the text without what a later token could still change."""
        text = self._text.rstrip(INCOMPLETE)
        begun = 0
        for stop in self._stop:
            lengths = range(min(len(stop) - 1, len(text)), 0, -1)
            begun = max(begun, next((n for n in lengths if text.endswith(stop[:n])), 0))
        return len(text) - begun

    def _up_to(self, end: int) -> str:
        text = self._text[:end]
        if self._strip:
            text = text.rstrip()
            if self._given == 0:
                self._given = len(text) - len(text.lstrip())
        piece = text[self._given :]
        self._given += len(piece)
        return piece
