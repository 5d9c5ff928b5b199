"""The text that each token adds, for whoever shows tokens one by one."""

from collections.abc import Callable

_BYTES = 4  # the most that one character of UTF-8 has


class Pieces:
    """Decodes tokens as they come; a character that is split over several tokens comes with the last of them.

    Args:
        decode: the text of several token ids.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        # The tokens before `_pending`: on its own, a token may decode without its leading space.
        self._before: list[int] = []
        self._pending: list[int] = []

    def add(self, token: int, is_last: bool = False) -> str:
        """The text that `token` adds: none inside a character, unless it is the last token of all."""
        self._pending.append(token)
        text = self._decode(self._before + self._pending)
        if text.endswith("\ufffd") and len(self._pending) < _BYTES and not is_last:
            return ""
        shown = len(self._decode(self._before)) if self._before else 0
        self._before, self._pending = self._pending, []
        return text[shown:]
