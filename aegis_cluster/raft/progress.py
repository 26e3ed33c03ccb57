"""What a leader knows about one other member, and what it may send it next.

    PROBE ──accepted──> REPLICATE   several appends in flight, each starting where the last ended
      ^ │                   │
      │ └──accepted──> CATCH_UP     far behind: sizes are not in memory, one append in flight
      │                     │
      └──refused, link lost─┘   SNAPSHOT   needs entries that are gone; waits for a snapshot

The rule it protects: `matched` only rises, and only by what the member itself acknowledged.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import TYPE_CHECKING

from aegis_cluster.errors import invariant
from aegis_cluster.ids import NO_INDEX, LogIndex

if TYPE_CHECKING:
    from aegis_cluster.ids import Member


class Following(Enum):
    """How the leader replicates to a member."""

    PROBE = "probe"
    REPLICATE = "replicate"
    CATCH_UP = "catch-up"
    SNAPSHOT = "snapshot"


class Progress:
    """One member as its leader sees it; always `matched < next_index`."""

    __slots__ = (
        "commit_known",
        "heard_at",
        "held",
        "in_flight",
        "is_quiet",
        "link_lost",
        "matched",
        "member",
        "next_index",
        "probed_at",
        "read_round",
        "sent_at",
        "state",
        "waiting",
    )

    def __init__(self, member: Member, *, next_index: LogIndex, now: int) -> None:
        self.member = member
        self.state = Following.PROBE
        self.matched: LogIndex = NO_INDEX
        """Highest index that the member acknowledged to this leader in this term."""
        self.next_index: LogIndex = next_index
        """First index of the next append; a guess in PROBE."""
        self.in_flight: deque[LogIndex] = deque()
        """Last index of each unacknowledged append, in REPLICATE."""
        self.waiting = False
        """PROBE and CATCH_UP: the one append is out; SNAPSHOT: the shell knows of the need."""
        self.sent_at = now
        """Tick of the last append sent or answered; tells when to ask again."""
        self.heard_at = now
        """Tick of the last message from this member in this term (check-quorum)."""
        self.probed_at = -1
        """Tick in which a refusal last ended REPLICATE."""
        self.commit_known: LogIndex = NO_INDEX
        self.read_round = 0
        self.is_quiet = False
        self.link_lost = False
        self.held = False
        """The member takes no entries for now, so it is sent none; see `Replica.hold`."""

    def become(self, state: Following) -> None:
        """Enter a state with nothing in flight."""
        self.state = state
        self.in_flight.clear()
        self.waiting = False

    def probe(self, next_index: LogIndex) -> None:
        """Look for the place where the logs agree, starting before `next_index`."""
        self.become(Following.PROBE)
        self.next_index = LogIndex(max(next_index, self.matched + 1))

    def acknowledge(self, matched: LogIndex) -> bool:
        """The member holds everything up to `matched`; return whether that is news."""
        in_flight = self.in_flight
        while in_flight and in_flight[0] <= matched:
            in_flight.popleft()
        if matched <= self.matched:
            return False
        self.matched = matched
        if self.next_index <= matched or self.state is not Following.REPLICATE:
            self.next_index = LogIndex(matched + 1)
        return True

    def sent(self, last_index: LogIndex, now: int) -> None:
        """An append up to `last_index` has left."""
        self.sent_at = now
        if self.state is not Following.REPLICATE:
            self.waiting = True
            return
        invariant(last_index >= self.next_index - 1, "appends follow each other", last=last_index)
        self.in_flight.append(last_index)
        self.next_index = LogIndex(last_index + 1)

    def is_stale_refusal(self, prev_index: LogIndex) -> bool:
        """Whether a refusal answers an append that has been overtaken."""
        if self.state is Following.REPLICATE:
            return prev_index <= self.matched
        return self.state is not Following.PROBE or prev_index != self.next_index - 1

    def owes_answer(self) -> bool:
        """Whether an append is out that has not been answered."""
        return self.waiting or bool(self.in_flight)
