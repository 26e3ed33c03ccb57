"""Records on their way through a task, as columns.

The idea: an operator handles a whole batch at a time, so a record costs one call of the user's
function and no object of ours.
"""

from __future__ import annotations

from itertools import compress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    WindowBounds = tuple[int, int]


class Columns:
    """Records of one task, all lists of equal length.

    times: event time, milliseconds since 1970. marks: the task's event-time watermark when the
    record was read, its own time included. origins: offset in the task's source of the record
    that it was made from, not falling. windows: (start, end) of the window of which it is the
    result; None where none is.
    """

    __slots__ = ("keys", "marks", "origins", "times", "values", "windows")

    def __init__(
        self,
        keys: list[Any],
        values: list[Any],
        times: list[int],
        marks: list[int],
        origins: list[int],
        windows: list[WindowBounds | None] | None = None,
    ) -> None:
        self.keys = keys
        self.values = values
        self.times = times
        self.marks = marks
        self.origins = origins
        self.windows = windows

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def empty(cls) -> Columns:
        return cls([], [], [], [], [])

    def add(
        self,
        key: Any,
        value: Any,
        time: int,
        mark: int,
        origin: int,
        window: WindowBounds | None = None,
    ) -> None:
        """One record more at the end."""
        if self.windows is None and window is not None:
            self.windows = [None] * len(self.values)
        self.keys.append(key)
        self.values.append(value)
        self.times.append(time)
        self.marks.append(mark)
        self.origins.append(origin)
        if self.windows is not None:
            self.windows.append(window)

    def with_values(self, values: list[Any]) -> Columns:
        """The same records with other values."""
        return Columns(self.keys, values, self.times, self.marks, self.origins, self.windows)

    def with_keys(self, keys: list[Any]) -> Columns:
        """The same records under other keys."""
        return Columns(keys, self.values, self.times, self.marks, self.origins, self.windows)

    def chosen(self, wanted: Iterable[Any]) -> Columns:
        """Those whose place in `wanted` holds something true."""
        mask = list(wanted)
        return Columns(
            list(compress(self.keys, mask)),
            list(compress(self.values, mask)),
            list(compress(self.times, mask)),
            list(compress(self.marks, mask)),
            list(compress(self.origins, mask)),
            None if self.windows is None else list(compress(self.windows, mask)),
        )

    def taken(self, places: Sequence[int]) -> Columns:
        """Those at these places, which may repeat."""
        return Columns(
            [self.keys[place] for place in places],
            [self.values[place] for place in places],
            [self.times[place] for place in places],
            [self.marks[place] for place in places],
            [self.origins[place] for place in places],
            None if self.windows is None else [self.windows[place] for place in places],
        )


def joined(parts: Sequence[Columns]) -> Columns:
    """All records in the order in which their origins were read; of one origin, part by part."""
    if len(parts) == 1:
        return parts[0]
    has_windows = any(part.windows is not None for part in parts)
    whole = Columns([], [], [], [], [], [] if has_windows else None)
    for part in parts:
        whole.keys += part.keys
        whole.values += part.values
        whole.times += part.times
        whole.marks += part.marks
        whole.origins += part.origins
        if whole.windows is not None:
            whole.windows += part.windows or [None] * len(part)
    order = sorted(range(len(whole)), key=whole.origins.__getitem__)
    return whole.taken(order)
