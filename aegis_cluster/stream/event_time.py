"""When a record happened: its event time, read from a field or by a function."""

from __future__ import annotations

import math
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import ConfigError, Misuse
from aegis_cluster.message import to_ms

if TYPE_CHECKING:
    from collections.abc import Callable


class ProcessingTime:
    """Says that time is the moment at which a record is processed."""

    def __repr__(self) -> str:
        return "PROCESSING_TIME"


PROCESSING_TIME: Final = ProcessingTime()
"""`source(topic, timestamp=PROCESSING_TIME)`: windows go by the clock of whoever processes, so a
replay gives other windows."""
TIME_MS_MIN = -62_135_596_800_000
TIME_MS_MAX = 253_402_300_799_999
"""The years 1 to 9999, which a `datetime` can name."""


def time_reader(timestamp: object) -> Callable[[Any], int] | None:
    """Reads milliseconds since 1970 off a value; None: the message's own timestamp counts, or the
    clock.

    Raises `ConfigError`; the function raises `Misuse` with a sentence.
    """
    if timestamp is None or timestamp is PROCESSING_TIME:
        return None
    if isinstance(timestamp, str):
        return _field_reader(timestamp)
    if callable(timestamp):
        function: Callable[[Any], Any] = timestamp
        return lambda value: milliseconds(function(value), "what timestamp() returned")
    raise ConfigError(
        f"timestamp = {timestamp!r}; give the name of a field, or a function of the value.",
        key="timestamp",
    )


def _field_reader(name: str) -> Callable[[Any], int]:
    what = f"field {name!r}"

    def read(value: Any) -> int:
        moment = _field(value, name)
        if type(moment) is float or type(moment) is int:  # seconds, as most have them
            found = moment * 1000
            if TIME_MS_MIN <= found <= TIME_MS_MAX:
                return round(found)
        return milliseconds(moment, what)

    return read


def _field(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        if name in value:
            return value[name]
        raise Misuse(f"The record has no time field {name!r}; it has {_names(value)}.")
    raise Misuse(f"The record is {type(value).__name__}, so it has no time field {name!r}.")


def _names(value: dict[Any, Any]) -> str:
    return ", ".join(map(repr, list(value)[:10])) or "no fields"


def milliseconds(moment: Any, what: str) -> int:
    """Of seconds since 1970, an aware `datetime`, or its ISO 8601 text. Raises `Misuse`."""
    if isinstance(moment, bool):
        raise Misuse(f"{what} is {moment!r}; a time is seconds since 1970 or a datetime.")
    if isinstance(moment, int | float):
        found = moment * 1000
        if not (math.isfinite(found) and TIME_MS_MIN <= found <= TIME_MS_MAX):
            raise Misuse(f"{what} is {moment!r}: no time of the years 1 to 9999, in seconds.")
        return round(found)
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError:
            raise Misuse(
                f"{what} is {moment!r:.80}; a text is a time in ISO 8601, with its zone."
            ) from None
    if isinstance(moment, datetime):
        if moment.tzinfo is None:
            raise Misuse(f"{what} is {moment.isoformat()} without a time zone: it names no moment.")
        return to_ms(moment)
    raise Misuse(
        f"{what} is {type(moment).__name__} {moment!r:.80}; a time is seconds since 1970 or a"
        " datetime."
    )
