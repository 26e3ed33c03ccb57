"""One partition of `__groups` while this shard leads it: heartbeats, commits, and time.

The shell around `coordinator`: it appends what is decided, and answers once that is committed.
The rule it protects: no answer leaves that rests on something uncommitted.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.broker.coordinators import answer, refuse
from aegis_cluster.broker.groups import coordinator
from aegis_cluster.broker.groups.commands import (
    CommitOffsets,
    DropGroup,
    PendOffsets,
    encode_command,
    places_to_fields,
)
from aegis_cluster.broker.groups.sessions import Session, Sessions, deadline_of
from aegis_cluster.errors import (
    GroupNotEmpty,
    GroupNotFound,
    NotReady,
    ProducerFenced,
    Refused,
)
from aegis_cluster.limits import REBALANCE_TIMEOUT_MS
from aegis_cluster.wire.batch import batch_header, encode_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aegis_cluster.broker.coordinators import Exchange
    from aegis_cluster.broker.groups.commands import GroupCommand, GroupMember
    from aegis_cluster.broker.groups.coordinator import Beat, Decision
    from aegis_cluster.broker.groups.group_stm import GroupFold
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.ids import LogIndex

EXPIRE_EVERY_MS: Final = 100
WAIT_SHARE: Final = 3
"""A heartbeat waits for news for a third of the session time-out at most."""


class GroupCoordinator:
    """Groups of one partition, for one term of our leadership."""

    def __init__(
        self,
        partition: Partition,
        fold: GroupFold,
        *,
        wall_ms: Callable[[], int],
        now_ms: int,
    ) -> None:
        self.partition = partition
        self.fold = fold
        self.term = partition.replica.term
        self._wall_ms = wall_ms
        self._now_ms = now_ms
        self._expire_at_ms = now_ms
        self._sessions = Sessions()
        self._topics: Mapping[str, int] = {}
        for name in sorted(fold.table.groups):
            for _, member in sorted(fold.table.groups[name].members.items()):
                self._sessions.begin(name, member, now_ms)

    # ---- requests

    def beat(
        self, exchange: Exchange, beat: Beat, *, origin: object, wait_ms: int, now_ms: int
    ) -> None:
        """A heartbeat: answered at once if there is news, else when there is or after `wait_ms`.

        Refused with `MemberFenced`, `MemberInUse`, `Throttled`. Raises `NotLeader`.
        """
        self._now_ms = now_ms
        try:
            decision = coordinator.beat(
                self.fold.group(beat.group),
                beat,
                self._topics,
                self._is_alive(beat.group),
                self._sessions.waiting(beat.group),
            )
        except Refused as refusal:
            self._refuse(beat.group, exchange, refusal)
            return
        self._carry_out(decision)
        before = self._sessions.get(beat.group, beat.name)
        session = Session(
            beat.session,
            beat.session_timeout_ms,
            deadline_of(now_ms, beat.session_timeout_ms),
            seen=beat.seen,
            origin=origin,
            exchange=exchange,
            wait_ms=now_ms + min(wait_ms, beat.session_timeout_ms // WAIT_SHARE),
        )
        if before is not None:
            session.revoking_since_ms = before.revoking_since_ms
            if before.exchange is not None:
                before.exchange.refuse(NotReady("A newer heartbeat has taken this one's place."))
        self._sessions.put(beat.group, beat.name, session)
        self._tell(beat.group)

    def leave(self, exchange: Exchange, group: str, name: str, session: str) -> None:
        """A member goes, or a static member's process ends: others may have its name at once.

        Raises `NotLeader`, `Throttled`.
        """
        member = self.fold.group(group).members.get(name)
        if member is None or member.session != session:
            self._answer(group, exchange, [])
            return
        if member.static:
            known = self._sessions.get(group, name)
            if known is not None:
                known.connected = False
        else:
            self._remove(group, [name])
        self._answer(group, exchange, [])

    def commit(
        self,
        exchange: Exchange,
        command: CommitOffsets | PendOffsets,
        *,
        name: str,
        epoch: int,
    ) -> None:
        """Positions of a member, or, without a name, of an administrator while nobody is there; at
        once, or with a transaction.

        Refused with `MemberFenced`, `GroupNotEmpty`, `ProducerFenced`. Raises `NotLeader`.
        """
        group = self.fold.group(command.group)
        if isinstance(command, PendOffsets):
            known, index = self.partition.state.producers.epoch_of(command.producer)
            if known > command.epoch:
                refuse(self.partition, index, exchange, _ended(command, known))
                return
        try:
            if name:
                places = [place for place, _, _ in command.positions]
                coordinator.check_commit(group, name, command.session, epoch, places)
            elif group.members:
                raise _not_empty(group.name, len(group.members))
        except Refused as refusal:
            self._refuse(command.group, exchange, refusal)
            return
        index = self._append(command.group, [command])
        answer(self.partition, index, exchange, [], own=True)

    def delete(self, exchange: Exchange, group: str) -> None:
        """Forget a group without members. Raises `GroupNotFound`, `GroupNotEmpty`."""
        found = self.fold.group(group)
        known = group in self.fold.table.groups or self.fold.index_of(group)
        if not known:
            raise GroupNotFound(f"There is no group {group!r}.", group=group)
        if found.members:
            self._refuse(group, exchange, _not_empty(group, len(found.members)))
            return
        index = self._append(group, [DropGroup(group)])
        answer(self.partition, index, exchange, [], own=True)

    # ---- news

    def topics_are(self, topics: Mapping[str, int]) -> None:
        """Topics were made, deleted or widened: groups that follow them look again."""
        self._topics = topics
        for name in [name for name, group in self.fold.table.groups.items() if group.members]:
            waiting = self._sessions.waiting(name)
            decision = coordinator.topics_changed(self.fold.group(name), topics, waiting)
            with suppress(Refused):  # the group's next heartbeat decides again
                self._carry_out(decision)
                self._tell(name)

    def client_gone(self, origin: object, now_ms: int) -> None:
        self._sessions.gone(origin, now_ms)

    def tick(self, now_ms: int) -> None:
        """Let sessions end, and answer heartbeats that have waited long enough."""
        self._now_ms = now_ms
        if now_ms < self._expire_at_ms:
            return
        self._sessions.forgive(now_ms, EXPIRE_EVERY_MS * 2)
        self._expire_at_ms = now_ms + EXPIRE_EVERY_MS
        dead: dict[str, list[str]] = {}
        for group, name, session in self._sessions:
            if session.exchange is not None and session.wait_ms <= now_ms:
                self._reply_state(group, name, session)
            if session.deadline_ms <= now_ms or self._clings(group, name, session):
                dead.setdefault(group, []).append(name)
        for group, names in dead.items():
            with suppress(Refused):  # a later tick decides again
                self._remove(group, names)

    def close(self) -> None:
        """Leadership is lost: those who wait are sent to the next coordinator."""
        for _, _, session in self._sessions:
            if session.exchange is not None:
                session.exchange.refuse(self.partition.not_leader())

    def session_of(self, group: str, name: str) -> Session | None:
        return self._sessions.get(group, name)

    # ---- inside

    def _is_alive(self, group: str) -> Callable[[GroupMember], bool]:
        return lambda member: self._sessions.is_alive(group, member.name, self._now_ms)

    def _clings(self, group: str, name: str, session: Session) -> bool:
        """The member has not given up for too long what it was told to."""
        member = self.fold.group(group).members.get(name)
        if member is None or not member.revoking:
            session.revoking_since_ms = None
            return False
        if session.revoking_since_ms is None:
            session.revoking_since_ms = self._now_ms
        return self._now_ms - session.revoking_since_ms >= REBALANCE_TIMEOUT_MS

    def _remove(self, group: str, names: list[str]) -> None:
        """Members go. Raises `NotLeader`, `Throttled`: nothing has changed then."""
        waiting = self._sessions.waiting(group)
        self._carry_out(coordinator.leave(self.fold.group(group), names, self._topics, waiting))
        for name in names:
            session = self._sessions.drop(group, name)
            if session is not None and session.exchange is not None:
                self._refuse(group, session.exchange, coordinator.fenced(group, name))
        self._tell(group)

    def _carry_out(self, decision: Decision) -> None:
        if decision.commands:
            self._append(decision.group.name, list(decision.commands))

    def _append(self, group: str, commands: list[GroupCommand]) -> LogIndex:
        now_ms = self._wall_ms()
        batch = encode_batch([(now_ms, None, encode_command(command), []) for command in commands])
        placed = self.partition.append(batch, batch_header(batch))
        self.fold.appended(placed.index, group, commands)
        return placed.index

    def _tell(self, group: str) -> None:
        """Answer those who wait and have not seen the present state of theirs."""
        members = self.fold.group(group).members
        for name, session in self._sessions.of(group).items():
            if session.exchange is None or session.seen is None:
                continue
            member = members.get(name)
            if member is None or member.version != session.seen.version:
                self._reply_state(group, name, session)

    def _reply_state(self, group: str, name: str, session: Session) -> None:
        exchange, session.exchange = session.exchange, None
        member = self.fold.group(group).members.get(name)
        if exchange is None:
            return
        if member is None:
            self._refuse(group, exchange, coordinator.fenced(group, name))
            return
        fields = [member.epoch, member.version, places_to_fields(member.assigned)]
        self._answer(group, exchange, fields)

    def _answer(self, group: str, exchange: Exchange, fields: list[Any]) -> None:
        answer(self.partition, self.fold.index_of(group), exchange, fields, own=False)

    def _refuse(self, group: str, exchange: Exchange, error: Refused) -> None:
        refuse(self.partition, self.fold.index_of(group), exchange, error)


def _ended(command: PendOffsets, known: int) -> ProducerFenced:
    return ProducerFenced(
        f"The transaction of epoch {command.epoch} has ended in group {command.group}, so it moves"
        " no position any more.",
        have=known,
        got=command.epoch,
    )


def _not_empty(group: str, members: int) -> GroupNotEmpty:
    return GroupNotEmpty(
        f"Group {group} has {members} members, and only those may move its positions. Stop them"
        " first.",
        group=group,
        members=members,
    )
