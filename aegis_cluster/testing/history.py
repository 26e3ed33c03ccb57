"""What clients of a simulated cluster did and saw: the only thing that client checkers look at.

The idea (Jepsen): an operation is invoked and ends as `ok`, `refused` (certainly not done) or
`unknown`; one that never ended is unknown too. Times are microseconds of virtual time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Outcome(Enum):
    OPEN = "open"
    OK = "ok"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(slots=True, eq=False)
class Write:
    """One batch: its values, in the order in which its producer sent them."""

    producer: int
    partition: int
    values: tuple[bytes, ...]
    invoked_us: int
    outcome: Outcome = Outcome.OPEN
    base_offset: int = -1
    ended_us: int = -1
    reason: str = ""


@dataclass(slots=True, frozen=True)
class Read:
    """One record as a reader got it."""

    reader: int
    partition: int
    offset: int
    value: bytes
    at_us: int


@dataclass(slots=True, frozen=True)
class Watermark:
    """A high watermark that a fetch brought, or that was asked for (`linearizable`)."""

    reader: int
    partition: int
    offset: int
    invoked_us: int
    at_us: int
    linearizable: bool
    start: int = 0
    """The log start that was named beside it."""


@dataclass(slots=True, frozen=True)
class Gone:
    """A reader was told that its offset lies before the log's start."""

    reader: int
    partition: int
    offset: int
    start: int


@dataclass(slots=True)
class History:
    """Everything, in the order in which it happened."""

    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    watermarks: list[Watermark] = field(default_factory=list)
    tokens: dict[int, int] = field(default_factory=dict)
    """Producer -> token of the lease under which it writes; others have none."""
    denied: list[str] = field(default_factory=list)
    """Reads of an existing place that were answered as if there were no such place."""
    expires: bool = False
    """Whether old records may go: the topic keeps them for a time, or so many bytes of them."""
    gone: list[Gone] = field(default_factory=list)
    starts: dict[int, int] = field(default_factory=dict)
    """Partition -> the log start that was named last; nothing before it needs to be there."""
    final: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)
    """Partition -> (offset, value) of everything, read after all was healed."""
