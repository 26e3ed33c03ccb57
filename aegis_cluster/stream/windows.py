"""Kinds of windows over event time, as plain values.

Tumbling(size): one after the other, from 1970 on. A bare `timedelta` means this.
Hopping(size, every): of that size, a new one begins each `every`; they overlap.
Sliding(size): one for each distinct time of a key's records: that record, and those of the
    time `size` before it (`size` excluded).
Session(gap): records that lie no further apart than `gap`; its end is the last one's time plus
    `gap`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

from aegis_cluster.errors import ConfigError
from aegis_cluster.message import from_ms

if TYPE_CHECKING:
    from datetime import datetime


def span_ms(value: timedelta, name: str, *, least: int = 1) -> int:
    """A duration in whole milliseconds. Raises `ConfigError`."""
    if not isinstance(value, timedelta):
        raise ConfigError(
            f"{name} = {value!r}; write a timedelta such as timedelta(minutes=5).", key=name
        )
    found, rest = divmod(value, timedelta(milliseconds=1))
    if rest or found < least:
        raise ConfigError(
            f"{name} = {value}; allowed: whole milliseconds, {least} or more.", key=name
        )
    return found


@dataclass(frozen=True, slots=True)
class Tumbling:
    """Windows of one size, one after the other."""

    size: timedelta

    def __post_init__(self) -> None:
        span_ms(self.size, "window size")

    def __str__(self) -> str:
        return f"tumbling {self.size}"


@dataclass(frozen=True, slots=True)
class Hopping:
    """Windows of one size that overlap: a new one begins each `every`."""

    size: timedelta
    every: timedelta

    def __post_init__(self) -> None:
        if span_ms(self.every, "every") > span_ms(self.size, "window size"):
            raise ConfigError(
                f"every = {self.every} is longer than the window ({self.size}): records between"
                " two windows would belong to none.",
                key="every",
            )

    def __str__(self) -> str:
        return f"hopping {self.size} every {self.every}"


@dataclass(frozen=True, slots=True)
class Sliding:
    """For each distinct time of a key's records: the records of the last `size`."""

    size: timedelta

    def __post_init__(self) -> None:
        span_ms(self.size, "window size")

    def __str__(self) -> str:
        return f"sliding {self.size}"


@dataclass(frozen=True, slots=True)
class Session:
    """Records of a key that lie no further apart than `gap`."""

    gap: timedelta

    def __post_init__(self) -> None:
        span_ms(self.gap, "gap")

    def __str__(self) -> str:
        return f"session, gap {self.gap}"


WindowKind: TypeAlias = Tumbling | Hopping | Sliding | Session


def window_kind(value: object) -> WindowKind:
    """What `window()` was given. Raises `ConfigError`."""
    if isinstance(value, timedelta):
        return Tumbling(value)
    if isinstance(value, Tumbling | Hopping | Sliding | Session):
        return value
    raise ConfigError(
        f"window({value!r}): give a timedelta, or Tumbling, Hopping, Sliding or Session.",
        key="window",
    )


class Window(list[Any]):
    """The values of one window of one key, in event-time order; of equal times, as they came.

    start: first moment of it, end: first moment after it (UTC). key: whose it is.
    """

    __slots__ = ("_end_ms", "_start_ms", "key")

    def __init__(self, values: list[Any], key: Any, start_ms: int, end_ms: int) -> None:
        super().__init__(values)
        self.key = key
        self._start_ms = start_ms
        self._end_ms = end_ms

    @property
    def start(self) -> datetime:
        """Its first moment, UTC."""
        return from_ms(self._start_ms)

    @property
    def end(self) -> datetime:
        """The first moment after it, UTC."""
        return from_ms(self._end_ms)
