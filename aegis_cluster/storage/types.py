"""The small values that the files of this room share.

The idea: everything that crosses the room's border is a plain immutable value, so a test, a
simulator and the broker can compare it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster import limits
from aegis_cluster.errors import invariant
from aegis_cluster.ids import NO_INDEX, LogIndex, Member, RecordOffset, Term
from aegis_cluster.wire.frame import CHAIN_START

if TYPE_CHECKING:
    from aegis_cluster.ids import GroupId
    from aegis_cluster.storage.log import PartitionLog

NO_TIME: Final = -(2**63)
"""Before every time: the largest timestamp of no batch at all."""


class HardState(NamedTuple):
    """What a voter may never forget (Raft §5.2): its term and whom it voted for in it."""

    term: Term
    vote: Member | None


NO_HARD_STATE: Final = HardState(Term(0), None)


class LogPoint(NamedTuple):
    """The state of a log just after one of its frames."""

    index: LogIndex  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """Of that frame; 0 before the first."""
    term: Term
    chain: bytes
    offset: RecordOffset
    """The next offset, exclusive end of the frames up to here."""


LOG_BEGIN: Final = LogPoint(NO_INDEX, Term(0), CHAIN_START, RecordOffset(0))


class Damage(NamedTuple):
    """Bytes at or below the durable watermark that fail their check: to be repaired, never cut."""

    group: GroupId
    index: LogIndex  # type: ignore[assignment]
    """The first index that cannot be read."""
    file: str
    position: int
    reason: str


class ReadResult(NamedTuple):
    """Whole contiguous frames; both indexes inclusive."""

    data: bytes
    first: LogIndex
    last: LogIndex


class Snapshot(NamedTuple):
    """The folded state of a group just after the frame at `point.index`."""

    point: LogPoint
    body: Any
    installed: bool
    """It came from elsewhere and replaces the whole log."""
    slices: tuple[bytes, ...] = ()
    """The rest of the state, in blocks; see `storage.snapshot`."""

    @property
    def at(self) -> LogIndex:
        """The last index that is folded into the body."""
        return self.point.index


@dataclass(frozen=True, slots=True)
class RecoveredGroup:
    """One group as it was found after a restart."""

    group: GroupId
    topic: str
    partition: int
    voters: tuple[Member, ...]
    hard_state: HardState
    log: PartitionLog
    commit_index: LogIndex
    """A hint: everything up to here was committed, more may have been."""
    snapshot: tuple[LogIndex, Any] | None
    damage: Damage | None
    slices: tuple[bytes, ...] = ()
    """Of the snapshot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """The sizes of one shard's files; tests make them small."""

    segment_bytes: int = limits.SEGMENT_BYTES_MAX
    journal_bytes: int = limits.JOURNAL_BYTES
    """Of each of the two journal files."""
    index_interval_bytes: int = limits.INDEX_INTERVAL_BYTES
    tail_cache_bytes: int = limits.TAIL_CACHE_BYTES
    page_cache_bytes: int = limits.PAGE_CACHE_BYTES_DEFAULT
    """Of each log, behind its end, that stay in the page cache while it grows."""
    checkpoint_interval_ms: int = limits.CHECKPOINT_INTERVAL_MS
    reserve_bytes: int = limits.RESERVE_BYTES
    """Below this much free space the store calls the disk full."""
    direct_group_bytes: int = 128 * limits.KIB
    """A group with at least this many bytes in a round may skip the journal."""
    direct_groups: int = 8
    """As many groups at most skip the journal in one round."""
    open_segments: int = 256
    """Sealed segments whose handle and index are kept at hand."""

    def __post_init__(self) -> None:
        invariant(self.segment_bytes > 0 < self.index_interval_bytes, "sizes are positive")
        invariant(self.journal_bytes % 512 == 0, "a journal is whole sectors")
        invariant(self.direct_groups >= 0 < self.open_segments, "counts are possible")
