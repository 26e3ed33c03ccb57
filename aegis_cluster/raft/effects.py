"""What the shell owes the core after a step, in the order in which it must be done.

The idea: the core decides and remembers; whatever touches a disk or a socket leaves it as data.

The rule it protects: no promise leaves the process before what it promises is on disk
(Raft §5.1 "Persistent state ... updated on stable storage before responding").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aegis_cluster.ids import LogIndex, Member, Term
    from aegis_cluster.raft.membership import Membership
    from aegis_cluster.raft.messages import Entry, Envelope


class HardState(NamedTuple):
    """What a replica must remember whatever happens (Raft figure 2, persistent state)."""

    term: Term
    vote: Member | None


class SnapshotNeed(NamedTuple):
    """`to` needs entries that are no longer in the log: send it a snapshot.

    The shell answers with `Replica.snapshot_failed(to)` if it gives up; success shows by itself,
    as the follower acknowledges the snapshot's index.
    """

    to: Member
    first_index: LogIndex
    """The first index still in the log; the snapshot must reach at least the one before it."""


class SnapshotInstall(NamedTuple):
    """Replace the whole log and state by the received snapshot, durably, before `append`."""

    index: LogIndex  # type: ignore[assignment] # hides tuple.index
    index_term: Term
    membership: Membership


class Effects(NamedTuple):
    """One round of debts; several may be under way, and they are finished in order."""

    number: int
    """Counts up by one; `effects_done` checks it."""
    durable: HardState | None
    """Term and vote, to be on disk before any `reply` of this or a later round leaves."""
    install: SnapshotInstall | None
    """Comes before `truncate_from` and `append`."""
    truncate_from: LogIndex | None
    """Entries from here on are replaced; comes before `append`, on disk too."""
    append: tuple[Entry, ...]
    """Entries to be put on disk; may share the sync with `durable`."""
    send: tuple[Envelope, ...]
    """Leaves at once; needs no disk (thesis §10.2.1)."""
    reply: tuple[Envelope, ...]
    """Leaves when the disk work of this round and of all earlier ones is done."""
    commit_index: LogIndex
    """Apply up to here, inclusive; only rises."""
    read_ready: tuple[tuple[int, LogIndex], ...]
    """Reads (context, index) that may be served once that index is applied."""
    read_failed: tuple[int, ...]
    """Reads that this replica cannot answer: it no longer leads."""
    snapshots: tuple[SnapshotNeed, ...]

    @property
    def needs_disk(self) -> bool:
        """Whether anything here has to be written before `reply` may leave."""
        return bool(
            self.append
            or self.durable is not None
            or self.truncate_from is not None
            or self.install is not None
        )
