"""How far a group has come in one partition: the first message that is not handled yet.

The idea: messages are handed out in order and may be handled in any order; the position moves over
handled neighbours only, so whatever is committed, nothing unhandled lies below it.
"""

from __future__ import annotations


class Handled:
    """One partition. position: where a successor would go on."""

    def __init__(self, position: int) -> None:
        self._next = position
        self._open: dict[int, bool] = {}
        """Offsets that were handed out, in order, up to the first unhandled one from below; True:
        handled, but not all before it are."""

    def restart(self, position: int) -> None:
        """Go on from another place; whatever was handed out does not count."""
        self._next = position
        self._open.clear()

    @property
    def position(self) -> int:
        return next(iter(self._open), self._next)

    @property
    def end(self) -> int:
        """Behind everything that was handed out."""
        return self._next

    @property
    def is_idle(self) -> bool:
        """Everything that was handed out is handled."""
        return not self._open

    def handed_out(self, offset: int) -> None:
        """A message went to its handler; one that is handed out again keeps its place."""
        if offset >= self._next:
            self._next = offset + 1
            self._open[offset] = False

    def passed(self, offset: int) -> None:
        """A message that no handler wants."""
        self._next = max(self._next, offset + 1)

    def handled(self, offset: int) -> None:
        """A handler is done with a message; once more, or of another time, changes nothing."""
        if offset not in self._open:
            return
        self._open[offset] = True
        self._settle()

    def _settle(self) -> None:
        """Move over handled neighbours."""
        done = []
        for first, is_handled in self._open.items():
            if not is_handled:
                break
            done.append(first)
        for first in done:
            del self._open[first]

    def all_before(self, offset: int) -> None:
        """Everything below this offset is handled."""
        for one in [one for one in self._open if one < offset]:
            self._open[one] = True
        self._settle()
        self._next = max(self._next, offset)

    def all_handled(self) -> None:
        self._open.clear()
