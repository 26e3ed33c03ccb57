"""Log lines about what others did wrong: all are counted, a few are written.

The rule it protects: whoever sends garbage as fast as he can fills no disk and slows nobody down,
and who reads the log still learns that it happens, how often, and how it looks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

LINES_MAX: Final = 5
"""In each stretch of `EVERY_MS`."""
EVERY_MS: Final = 10_000


class Complaints:
    """Of one shard. Time is its owner's."""

    def __init__(self, log: logging.Logger, now_ms: Callable[[], int]) -> None:
        self.count = 0
        self._log = log
        self._now_ms = now_ms
        self._stretch_ends_ms = 0
        self._lines = 0

    def say(self, text: str, *values: object) -> None:
        """Count a violation, and write a line about it unless there were too many of late."""
        self.count += 1
        now_ms = self._now_ms()
        if now_ms >= self._stretch_ends_ms:
            self._tell_unwritten()
            self._stretch_ends_ms = now_ms + EVERY_MS
            self._lines = 0
        self._lines += 1
        if self._lines <= LINES_MAX:
            self._log.warning(text, *values)

    def tick(self) -> None:
        """Tell how many went unwritten, once their stretch is over."""
        if self._lines > LINES_MAX and self._now_ms() >= self._stretch_ends_ms:
            self._tell_unwritten()
            self._lines = 0

    def _tell_unwritten(self) -> None:
        if self._lines > LINES_MAX:
            self._log.warning(
                "%s more messages broke the protocol in %s s; %s since the start.",
                self._lines - LINES_MAX,
                EVERY_MS // 1000,
                self.count,
            )
