"""When it is worth a pass to free the room of what an event store's streams do not show any more.

The idea: a pass reads all that is closed, so it has to pay. The fold counts hidden events as it
goes; how many were hidden at the last pass says what is new. What a pass does is in
`storage/scavenging.py`, how it is run in `compaction.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from aegis_cluster.broker.events.event_stm import EventFold

SEGMENT_BYTES: Final = 32 * 1024 * 1024
"""Of an event store: only closed segments are scavenged."""
SEGMENT_MS: Final = 24 * 60 * 60_000
SHARE_AT_ONCE: Final = 10
SHARE_LATER: Final = 100
"""One event in so many is worth a pass: at once, and after `LATER_MS`."""
LATER_MS: Final = 60 * 60_000
RARELY_MS: Final = 24 * 60 * 60_000
"""After so long, anything is."""


class Closed(NamedTuple):
    """What a pass would read: bytes, those of them that no pass has read, and about how many
    events there are, whether closed or not."""

    total: int
    dirty: int
    events: int


def hides_events(events: EventFold) -> bool:
    """Whether anything may ever be freed."""
    return events.hidden_events > 0 or events.has_max_ages


def is_worth_a_pass(events: EventFold, closed: Closed, *, seen: int, waited_ms: int) -> bool:
    """seen: events that were hidden at the last pass. waited_ms: since then."""
    hidden = events.hidden_events
    new = hidden - seen
    if not closed.total or not (new > 0 or closed.dirty or events.has_max_ages):
        return False
    if new * SHARE_AT_ONCE >= closed.events or waited_ms >= RARELY_MS:
        return True
    much = max(new, hidden if closed.dirty * 2 >= closed.total else 0)
    return much * SHARE_LATER >= closed.events and waited_ms >= LATER_MS
