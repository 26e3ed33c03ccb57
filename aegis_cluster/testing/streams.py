"""Judges whether a history of conditional appends to a stream of an event store is linearizable.

The idea: what a stream is at any time is one number, how many of its events are there, since events
never change and the last read says which event has which version. So the order of all appends that
were done is known, and nothing has to be searched for: append by append, in the order of versions,
each is given the earliest moment that it can have happened at. That is not before it was sent, not
before the one before it, and not before anybody *began* to see the stream without it. If that is
later than it was answered, or than anybody *had* seen it, there is no order of single moments that
explains what clients saw; if none is later, these moments are one. (Wing and Gong's search, in
time n log n, for the one kind of object that versions make of a stream.)

The rule it protects: it reads the history alone and knows nothing of how a store works.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from aegis_cluster.testing.history import Outcome
from aegis_cluster.wire.event_frames import ANY, EXISTS, NO_STREAM

if TYPE_CHECKING:
    from collections.abc import Iterator


class Append(NamedTuple):
    """One call of one client; times are of one clock, in any unit.

    expected: a version, or NO_STREAM, EXISTS, ANY. version: of its first event where it was
    acknowledged, of the stream's last event where it was refused. A call that was sent again with
    the same ids until it was answered is one append.
    """

    ids: tuple[str, ...]
    expected: int
    invoked: float
    ended: float = inf
    outcome: Outcome = Outcome.UNKNOWN
    version: int = -1


class Look(NamedTuple):
    """All events of the stream as one read gave them."""

    ids: tuple[str, ...]
    invoked: float
    ended: float


@dataclass(slots=True)
class StreamHistory:
    """What clients did to one stream and saw of it; final: its events, read when all had ended."""

    appends: list[Append] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    final: tuple[str, ...] = ()


def check_stream(history: StreamHistory) -> list[str]:
    """Sentences, one a violation; none where the history can be explained."""
    told = [
        sentence
        for check in (lost_or_twice, wrong_answers, torn_appends)
        for sentence in check(history)
    ]
    return told or list(not_linearizable(history))


def lost_or_twice(history: StreamHistory) -> Iterator[str]:
    """Each acknowledged event stands once, where it was said to; of what was refused, or never
    written, nothing does."""
    places: dict[str, int] = {}
    for version, event in enumerate(history.final):
        if places.setdefault(event, version) != version:
            yield f"{event} stands at versions {places[event]} and {version}"
    written = {event for append in history.appends for event in append.ids}
    for event in places:
        if event not in written:
            yield f"{event} was never appended"
    for append in history.appends:
        for number, event in enumerate(append.ids):
            place = places.get(event)
            if append.outcome is Outcome.OK and place != append.version + number:
                yield f"{event} was acknowledged as {append.version + number}, stands at {place}"
            if append.outcome is Outcome.REFUSED and place is not None:
                yield f"{event} was refused and stands at {place}"


def wrong_answers(history: StreamHistory) -> Iterator[str]:
    """What is there had expected what was there before; who was refused had not."""
    places = {event: version for version, event in enumerate(history.final)}
    for append in history.appends:
        place = places.get(append.ids[0])
        if place is not None and not _is_met(append.expected, place - 1):
            yield f"{append.ids} expected {append.expected} and stands at {place}"
        if append.outcome is Outcome.REFUSED and _is_met(append.expected, append.version):
            yield f"{append.ids} expected {append.expected}, was refused at {append.version}"


def torn_appends(history: StreamHistory) -> Iterator[str]:
    """What was appended together stands together; and reads see a beginning of the last one."""
    known = {append.ids[0]: append for append in history.appends}
    position = 0
    while position < len(history.final):
        append = known.get(history.final[position])
        size = 1 if append is None else len(append.ids)
        if append is None or history.final[position : position + size] != append.ids:
            yield f"version {position} is not the beginning of a whole append"
        position += size
    for look in history.looks:
        if look.ids != history.final[: len(look.ids)]:
            yield f"a read of {len(look.ids)} events saw others than the last read"


def not_linearizable(history: StreamHistory) -> Iterator[str]:
    """There are moments, one for each append, that explain every answer; see above."""
    begun: dict[int, float] = {}
    """How many events somebody saw -> when the last of them *began* to look."""
    seen: dict[int, float] = {}
    """The same -> when the first of them had *ended*."""
    for count, start, end in _observations(history):
        begun[count] = max(begun.get(count, -inf), start)
        seen[count] = min(seen.get(count, inf), end)
    known = {append.ids[0]: append for append in history.appends}
    moment, count = -inf, 0
    latest = seen.pop(0, inf)
    while count < len(history.final):
        append = known[history.final[count]]
        moment = max(moment, append.invoked, begun.pop(count, -inf))
        count += len(append.ids)
        latest = min(append.ended, seen.pop(count, inf))
        if moment > latest:
            yield (
                f"the append of version {count - 1} was answered, or seen, at {latest}; it cannot"
                f" have happened before {moment}"
            )
    for torn in sorted(seen):
        if torn:
            yield f"somebody saw {torn} events, which no whole appends make"


def _observations(history: StreamHistory) -> Iterator[tuple[int, float, float]]:
    """Who saw how many events between when and when: reads, and refusals, which name a version."""
    for look in history.looks:
        yield len(look.ids), look.invoked, look.ended
    for append in history.appends:
        if append.outcome is Outcome.REFUSED:
            yield append.version + 1, append.invoked, append.ended


def _is_met(expected: int, version: int) -> bool:
    if expected == ANY:
        return True
    if expected == EXISTS:
        return version != NO_STREAM
    return version == expected
