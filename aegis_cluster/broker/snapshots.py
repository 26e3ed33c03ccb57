"""What a snapshot of a partition holds, on disk and on its way to another replica.

The idea: a snapshot says where the log starts (index, term, chain, next offset), what is in effect
there, and carries the folded state in slices (see `folds`). The state may be of a later index than
that start: frames in between are then copied into the log like all others, and only their folding
is skipped. So a replica that is brought up from nothing gets every record that is kept, and not
the folded state alone.

The rule it protects: everything a replica must remember beside its frames is in here (A13): the
producers' last sequences, the fold of its kind, the members in effect, the last append time, and
whether this replica is still being rebuilt, so that a restart in between does not let it vote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.errors import CorruptLog, PeerViolation
from aegis_cluster.ids import LogIndex, RecordOffset, Term
from aegis_cluster.raft.codec import membership_from_fields, membership_to_fields
from aegis_cluster.storage.checked_file import pack_body, unpack_body
from aegis_cluster.storage.types import LogPoint
from aegis_cluster.wire.frame import CHAIN_BYTES
from aegis_cluster.wire.protocol import decode_fields

if TYPE_CHECKING:
    from aegis_cluster.raft import Membership
    from aegis_cluster.storage.types import RecoveredGroup

BODY_VERSION: Final = 3
"""Up to 2 the body held the state, too."""


class Body(NamedTuple):
    """The body of a snapshot file; the state stands in its slices."""

    folded: LogIndex
    """The state is that after this index; at or above the snapshot's own."""
    time_ms: int
    """Append time of the last frame that is folded in."""
    membership: Membership
    """In effect at the snapshot's index."""
    rebuilding: bool
    """This replica had lost what it had acknowledged, and does not yet hold it again."""
    old_state: list[Any] | None = None
    """The state in a body of version 2; see `PartitionState.load_body`."""

    def to_values(self) -> list[Any]:
        """As storage keeps it."""
        members = membership_to_fields(self.membership)
        return [BODY_VERSION, self.folded, self.time_ms, members, self.rebuilding]


def body_from_values(values: Any) -> Body:
    """Raises `CorruptLog` for what no version of this program wrote."""
    try:
        version, folded, time_ms, members, rebuilding, *later = values
        membership = membership_from_fields(members)
        if version > BODY_VERSION:
            raise CorruptLog(
                f"A snapshot has version {version}; this program reads up to {BODY_VERSION}.",
                have=version,
            )
        old_state = later[0] if version == 2 else None
    except (TypeError, ValueError, IndexError, PeerViolation) as error:
        raise CorruptLog(f"A snapshot's body is malformed: {error}.") from error
    return Body(LogIndex(folded), time_ms, membership, bool(rebuilding), old_state)


class Package(NamedTuple):
    """The start of a log, and of which moment the state is that travels with it."""

    index: LogIndex  # type: ignore[assignment] # hides tuple.index
    term: Term
    chain: bytes
    next_offset: RecordOffset
    folded: LogIndex
    time_ms: int
    high_watermark: RecordOffset
    """The giver's; a reader that has the state goes on from there."""
    membership: Membership

    @property
    def point(self) -> LogPoint:
        """The state of the log before its first frame."""
        return LogPoint(self.index, self.term, self.chain, self.next_offset)

    def body(self, *, rebuilding: bool) -> Body:
        """As a replica keeps it on its disk."""
        return Body(self.folded, self.time_ms, self.membership, rebuilding)


def encode_package(package: Package) -> bytes:
    """The first piece of a transfer."""
    return pack_body([*package[:7], membership_to_fields(package.membership)])


def decode_package(data: bytes) -> Package:
    """Raises `PeerViolation`."""
    try:
        index, term, chain, offset, folded, time_ms, high_watermark, members = unpack_body(data)
        numbers = (index, term, offset, folded, time_ms, high_watermark)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise TypeError("its numbers are none")
        if type(chain) is not bytes or len(chain) != CHAIN_BYTES:
            raise TypeError("a chain value is bytes")
        return Package(
            LogIndex(index),
            Term(term),
            chain,
            RecordOffset(offset),
            LogIndex(folded),
            time_ms,
            RecordOffset(high_watermark),
            membership_from_fields(members),
        )
    except (TypeError, ValueError, CorruptLog) as error:
        raise PeerViolation(f"A snapshot came malformed: {error}.") from error


def recovered_membership(
    found: RecoveredGroup, first: Membership, body: Body | None
) -> tuple[Membership, list[tuple[LogIndex, Membership]]]:
    """The membership that a replica begins with, and the changes that its log holds after it.

    first: the one in effect before the log's first frame of all. With a snapshot, the one at its
    index counts instead: what lies below is committed and never cut.
    """
    start = found.log.begin.index
    if body is not None and found.snapshot is not None:
        first, start = body.membership, found.snapshot[0]
    changes: list[tuple[LogIndex, Membership]] = []
    for index, payload in found.log.memberships:
        membership = membership_from_fields(decode_fields(payload))
        if index > start:
            changes.append((index, membership))
        elif body is None:
            first = membership
    return first, changes
