"""A PySyncObj replica that keeps nothing on disk, and what it takes for that to be bearable.

The library is Raft for nodes that remember. Ours forget everything when they restart, so:
- A restarted node is *blank*: it neither votes nor stands until it has the present leader's log, or
  until there has been no leader for so long that there can be none. Then it begins in a term taken
  from the time of day, above every term of a life it has forgotten, and waits once more; a node
  that was not restarted adopts that term, stands first and wins with its longer log.
- Entries that were applied here and then replaced by others are noticed (`diverged`): the library
  neither undoes nor reapplies them. Whoever drives the replica throws it away.
- A process that was paused hears the others out before it stands for election.

Read off version 0.3.17, whose private names are used here; it is pinned, and checked.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgpack
from pysyncobj import SyncObj, SyncObjConf, SyncObjConsumer, replicated
from pysyncobj.config import FAIL_REASON
from pysyncobj.node import Node
from pysyncobj.version import VERSION

from aegis_cluster import limits
from aegis_cluster.cluster.view import frames, no_pickle
from aegis_cluster.cluster.view.table import ViewTable
from aegis_cluster.cluster.view.transport import Place, ZmqTransport
from aegis_cluster.errors import (
    AegisError,
    MessageTooLarge,
    Misuse,
    NotReady,
    OutcomeUnknown,
    invariant,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import zmq

    from aegis_cluster.cluster.view.frames import Frame
    from aegis_cluster.cluster.view.leases import Outcome

    Answer = Callable[[Outcome | AegisError], None]

no_pickle.install()  # before anything of the library is constructed

LIBRARY_VERSION: Final = "0.3.17"
APPEND_S: Final = 0.15
ELECTION_S_MIN: Final = 0.6
ELECTION_S_MAX: Final = 1.2
LEADER_ALONE_S: Final = 1.2
"""A leader that a majority has not answered for so long steps down."""
_CONNECTION_S: Final = 3.5
"""Only checked by the library; links are the transport's."""
_COMMANDS_QUEUED_MAX: Final = 1_024
_FOLLOWER: Final = 0

# The library checks these with `assert`, which `python -O` leaves out.
invariant(ELECTION_S_MIN > 3 * APPEND_S, "a follower waits for more than three appends")
invariant(APPEND_S < LEADER_ALONE_S <= ELECTION_S_MAX <= _CONNECTION_S, "a leader alone steps down")


def library_settings() -> SyncObjConf:
    """In memory, without threads, each command sent at once."""
    return SyncObjConf(
        autoTick=False,
        appendEntriesUseBatch=False,
        appendEntriesPeriod=APPEND_S,
        raftMinTimeout=ELECTION_S_MIN,
        raftMaxTimeout=ELECTION_S_MAX,
        leaderFallbackTimeout=LEADER_ALONE_S,
        connectionTimeout=_CONNECTION_S,
        commandsQueueSize=_COMMANDS_QUEUED_MAX,
        commandsWaitLeader=False,
        dynamicMembershipChange=False,
        fullDumpFile=None,
        journalFile=None,
        useFork=False,
    )


class ReplicatedTable(SyncObjConsumer):  # type: ignore[misc]  # the library ships no types
    """The table as the library sees it: one replicated call, and snapshots."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ViewTable()
        self.unreadable = False
        """Whether a snapshot could not be read. The library would go on as if it had been."""

    @replicated  # type: ignore[untyped-decorator]
    def op(self, blob: bytes) -> Outcome:
        """Fold one command; never raises."""
        return self.table.apply(blob)

    def _serialize(self) -> Any:
        return self.table.to_fields()

    def _deserialize(self, data: Any) -> None:
        try:
            self.table.restore(data)
        except Exception:
            self.unreadable = True
            raise


class ViewReplica(SyncObj):  # type: ignore[misc]  # the library ships no types
    """One life of one node in the view; one thread owns it and calls `step`."""

    def __init__(self, place: Place, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Raises ConfigError when our address is taken."""
        if VERSION != LIBRARY_VERSION:
            raise Misuse(f"the cluster view needs pysyncobj {LIBRARY_VERSION}, not {VERSION}")
        # All of our attributes before `super().__init__`: later ones would go into snapshots.
        self._place = place
        self.replicated = ReplicatedTable()
        self.blank = True
        self.cut_back = False
        """Whether entries that were applied here have been replaced by others."""
        self.failures = 0
        """Turns in a row in which the library raised."""
        self.failure = ""
        self._cut: dict[int, tuple[bytes, int]] = {}
        self._snapshot_bytes = 0
        self._leaderless_since: float | None = None
        self._stepped_at = time.monotonic()
        super().__init__(
            Node(str(place.me)) if place.is_voter else None,
            [Node(str(node)) for node in place.voters if node != place.me],
            library_settings(),
            consumers=[self.replicated],
            nodeClass=Node,
            transportClass=partial(ZmqTransport, place=place, context=context),
        )

    # ---- what it knows

    @property
    def table(self) -> ViewTable:
        """As of the last command applied here."""
        return self.replicated.table

    @property
    def transport(self) -> ZmqTransport:
        transport: ZmqTransport = self._SyncObj__transport
        return transport

    @property
    def leads(self) -> bool:
        return bool(self._isLeader())

    @property
    def leader(self) -> int:
        """The leader's node id; 0 while none is known, or it is not heard any more."""
        leader = self._getLeader()
        if leader is None or not (leader == self.selfNode or self.isNodeConnected(leader)):
            return 0
        return int(leader.id)

    @property
    def has_diverged(self) -> bool:
        """Whether this copy may differ from the others for good."""
        return self.cut_back or self.table.diverged or self.replicated.unreadable

    # ---- driving it

    def step(self) -> None:
        """Hear what has arrived, look after the links, let the library do what is due.

        In this order: whoever was paused must hear the others before its own time-outs count.
        """
        now = time.monotonic()
        if now - self._stepped_at > ELECTION_S_MIN / 2:
            self._stand_after(now + random.uniform(ELECTION_S_MIN, ELECTION_S_MAX))
        self._stepped_at = now
        self.transport.receive()
        self.transport.keep_links()
        if self.blank:
            self._leave_blank(now)
        try:
            self.doTick(0.0)
        except Exception as error:  # noqa: BLE001 - whatever the library meets; see `failures`
            self.pysyncobj_raised(error)
        self._compare_cut()

    def propose(self, command: Sequence[Any], answer: Answer) -> None:
        """Have a command applied everywhere. The answer may never come: keep a time-out.

        Raises MessageTooLarge: bigger commands travel in pieces, which the library mishandles.
        """
        blob = msgpack.packb(command)
        if len(blob) > limits.VIEW_OP_BYTES_MAX:
            raise MessageTooLarge(
                f"a command of {len(blob)} bytes for the cluster view; at most"
                f" {limits.VIEW_OP_BYTES_MAX}",
            )

        def settle(result: Outcome | None, reason: int) -> None:
            answer(_answer(result, reason))

        self.replicated.op(blob, callback=settle)

    def hand_over(self) -> None:
        """Before an end that was planned: have the follower that is furthest lead."""
        self.transferLeadership()

    def end(self) -> None:
        """Close the sockets and what the library forgets to close."""
        self.destroy()
        notifier = self._SyncObj__pipeNotifier
        for descriptor in (notifier._PipeNotifier__pipeR, notifier._PipeNotifier__pipeW):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    # ---- elections of those who forget

    def _stand_after(self, at: float) -> None:
        self._SyncObj__raftElectionDeadline = at

    def _leave_blank(self, now: float) -> None:
        """Take part in elections as soon as a forgotten vote can do no harm."""
        self._stand_after(now + ELECTION_S_MAX)
        term = self.raftCurrentTerm
        if self.leader:
            self._leaderless_since = None
            self.blank = not (self.isReady() and self._SyncObj__getCurrentLogTerm() == term)
        elif not self.hasQuorum or self.selfNode is None:
            self._leaderless_since = None
        elif self._leaderless_since is None:
            self._leaderless_since = now
        elif now - self._leaderless_since >= ELECTION_S_MAX:
            self._SyncObj__setCurrentTerm(max(term, int(time.time())), None)
            # Whoever has not forgotten adopts the term meanwhile, and stands before us.
            self._stand_after(now + random.uniform(1, 2) * ELECTION_S_MAX)
            self.blank = False

    def hear_of_term(self, term: int) -> None:
        """Some voter is in this term; without a leader we follow it there."""
        if self.blank or self.selfNode is None or self._getLeader() is not None or self.leads:
            return
        if term > self.raftCurrentTerm:
            self._SyncObj__setCurrentTerm(term, None)
            self._SyncObj__setState(_FOLLOWER)

    def forget(self, node: Node) -> None:
        """A node has begun a new life: what its earlier one had in memory is gone."""
        matches = self._SyncObj__raftMatchIndex
        if node in matches:
            matches[node] = 0

    # ---- what is let through

    def bears(self, frame: Frame, *, from_voter: bool) -> bool:
        """Whether the library may see the message of a frame."""
        message = frame.message
        if message is None or not frames.admits(
            message,
            term=frame.term,
            our_term=self.raftCurrentTerm,
            from_voter=from_voter,
            blank=self.blank,
        ):
            return False
        return self._has_room(message.get("serialized"))

    def _has_room(self, chunk: tuple[bytes, bool, bool] | None) -> bool:
        """Pieces of a snapshot gather in memory, which the library does not limit."""
        if chunk is not None:
            data, is_first, _is_last = chunk
            self._snapshot_bytes = len(data) + (0 if is_first else self._snapshot_bytes)
        return self._snapshot_bytes <= limits.VIEW_SNAPSHOT_BYTES_MAX

    def pysyncobj_raised(self, error: Exception) -> None:
        """Count it; whoever drives us gives up on this object after some in a row."""
        self.failures += 1
        self.failure = f"{type(error).__name__}: {error}"

    # ---- divergence

    def _SyncObj__deleteEntriesFrom(self, first: int) -> None:
        """Remember what is cut although it was applied."""
        for command, index, term in self._SyncObj__getEntries(first):
            if index <= self.raftLastApplied:
                self._cut[index] = (command, term)
        super()._SyncObj__deleteEntriesFrom(first)

    def _compare_cut(self) -> None:
        """The same entries again are a leader's repetition; others mean that we have diverged."""
        for index, cut in list(self._cut.items()):
            if index < self._SyncObj__raftLog[0][1]:
                del self._cut[index]  # a snapshot has replaced the table
                continue
            for command, _, term in self._SyncObj__getEntries(index, 1):
                del self._cut[index]
                self.cut_back = self.cut_back or (command, term) != cut


def _answer(result: Outcome | None, reason: int) -> Outcome | AegisError:
    if reason == FAIL_REASON.SUCCESS and result is not None:
        return result
    if reason in (FAIL_REASON.MISSING_LEADER, FAIL_REASON.QUEUE_FULL, FAIL_REASON.REQUEST_DENIED):
        return NotReady("the cluster view has no leader just now")
    return OutcomeUnknown("the cluster view has changed leaders meanwhile")
