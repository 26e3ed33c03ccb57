"""The numbers of one group, and the relations between them, checked when it is made.

The rule it protects: a leader that has lost its quorum stops leading before others may elect
another (PITFALLS of two leaders at once), so `quorum_ticks < election_ticks_min`.
"""

from __future__ import annotations

from dataclasses import dataclass

from aegis_cluster import limits
from aegis_cluster.errors import invariant


@dataclass(frozen=True, slots=True)
class RaftConfig:
    """Times are ticks (`limits.RAFT_TICK_MS` each); sizes are bytes."""

    heartbeat_ticks: int = limits.RAFT_HEARTBEAT_TICKS
    election_ticks_min: int = limits.RAFT_ELECTION_TICKS_MIN
    """Also how long a follower stays loyal to a leader that it hears no more."""
    election_ticks_max: int = limits.RAFT_ELECTION_TICKS_MAX
    campaign_ticks_min: int = limits.RAFT_ELECTION_TICKS_MIN // 2
    """How long a campaign waits for answers before it begins again; up to election_ticks_min."""
    patience_doublings_max: int = 3
    """After each term that brought no leader all wait twice as long, so many times at most."""
    quorum_ticks: int = limits.RAFT_ELECTION_TICKS_MIN - 1
    """A leader that heard no majority for so long steps down."""
    link_lost_ticks_max: int = 3
    """After the link to the leader is lost, ask for pre-votes within 1 to so many ticks."""
    transfer_ticks: int = limits.RAFT_ELECTION_TICKS_MIN
    """A leadership transfer that takes longer is given up."""
    resend_ticks: int = 2 * limits.RAFT_HEARTBEAT_TICKS + 1
    """A follower that owes an answer for so long is asked again."""
    quiet_ticks: int = 3 * limits.RAFT_ELECTION_TICKS_MIN
    """An idle group falls silent after so long; 0 = never."""
    append_bytes_max: int = limits.RAFT_APPEND_BYTES_MAX
    """Bytes in one append; a single larger entry still goes, alone."""
    probe_bytes_max: int = 64 * limits.KIB
    """Bytes risked in an append whose place in the follower's log is a guess."""
    in_flight_appends_max: int = limits.RAFT_IN_FLIGHT_APPENDS_MAX
    in_flight_bytes_max: int = limits.RAFT_IN_FLIGHT_BYTES_MAX
    """Unacknowledged per follower. Throughput per follower is at most this per round trip."""
    uncommitted_bytes_max: int = limits.SHARD_IN_FLIGHT_BYTES_MAX
    uncommitted_entries_max: int = 4096
    """Proposals beyond this are refused (`Throttled`): memory is bounded without a quorum."""
    promotion_lag_entries_max: int = limits.RAFT_IN_FLIGHT_APPENDS_MAX
    """A learner at most so far behind the commit index may be made a voter."""
    may_lose_tail: bool = False
    """What was acknowledged may be gone after a power cut (`durability = "memory"`), so a later
    leader may contradict what was committed here: then this replica is damaged, not the leader."""
    noop_bytes: int = 48
    """Size of a leader's no-op frame."""

    def __post_init__(self) -> None:
        invariant(self.heartbeat_ticks >= 1, "heartbeats take time")
        invariant(
            self.heartbeat_ticks * 2 <= self.quorum_ticks, "a lost heartbeat deposes no leader"
        )
        invariant(
            self.quorum_ticks < self.election_ticks_min,
            "a leader without quorum stops before another is elected",
        )
        invariant(self.election_ticks_min < self.election_ticks_max, "elections need spread")
        invariant(1 <= self.campaign_ticks_min < self.election_ticks_min, "campaigns need spread")
        invariant(self.link_lost_ticks_max >= 1, "a lost link is acted on at a tick")
        invariant(self.in_flight_appends_max >= 1, "one append must fit the pipeline")
        invariant(
            0 < self.append_bytes_max <= self.in_flight_bytes_max,
            "an append must fit the pipeline",
        )
