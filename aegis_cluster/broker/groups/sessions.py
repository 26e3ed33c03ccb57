"""What a coordinator remembers of its members' processes, in memory alone.

A new coordinator knows none of it, so it gives everybody one session time-out from its election on:
its predecessor's death moves nothing (KIP-848's B16 of other systems' outages). Time that the
coordinator itself slept through is not held against its members.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import NotReady

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.broker.coordinators import Exchange
    from aegis_cluster.broker.groups.commands import GroupMember
    from aegis_cluster.broker.groups.membership import Seen

GONE_GRACE_MS: Final = 300
"""A member whose connection closed has so long to come back over another one."""
NOTICE_MS_MAX: Final = 500
"""For noticing that a session has ended, and for what follows from it to be durable and told."""


@dataclass(slots=True)
class Session:
    """One member's process as last heard of.

    deadline_ms: silent until then = dead. seen: what it said last; None until it was heard here.
    exchange: its heartbeat that waits for news until wait_ms. revoking_since_ms: since when it has
    been told to give something up.
    """

    session: str
    timeout_ms: int
    deadline_ms: int
    seen: Seen | None = None
    origin: object = None
    exchange: Exchange | None = None
    wait_ms: int = 0
    connected: bool = True
    revoking_since_ms: int | None = None


def deadline_of(now_ms: int, timeout_ms: int) -> int:
    """When a member that is heard now is taken for dead: a little before its session time-out, for
    its partitions to be others' within that."""
    return now_ms + timeout_ms - min(NOTICE_MS_MAX, timeout_ms // 5)


class Sessions:
    """By group and member."""

    def __init__(self) -> None:
        self._groups: defaultdict[str, dict[str, Session]] = defaultdict(dict)
        self._last_ms: int | None = None

    def begin(self, group: str, member: GroupMember, now_ms: int) -> None:
        """A member that an earlier coordinator has known."""
        timeout_ms = member.session_timeout_ms
        deadline_ms = deadline_of(now_ms, timeout_ms)
        self._groups[group][member.name] = Session(member.session, timeout_ms, deadline_ms)

    def get(self, group: str, name: str) -> Session | None:
        return self._groups[group].get(name) if group in self._groups else None

    def put(self, group: str, name: str, session: Session) -> None:
        self._groups[group][name] = session

    def drop(self, group: str, name: str) -> Session | None:
        found = self._groups.get(group)
        if found is None:
            return None
        session = found.pop(name, None)
        if not found:
            del self._groups[group]
        return session

    def of(self, group: str) -> dict[str, Session]:
        return self._groups.get(group, {})

    def is_alive(self, group: str, name: str, now_ms: int) -> bool:
        session = self.get(group, name)
        return session is not None and session.connected and session.deadline_ms > now_ms

    def waiting(self, group: str) -> dict[str, Seen]:
        """What those have said whose heartbeat waits for news."""
        return {
            name: session.seen
            for name, session in self.of(group).items()
            if session.exchange is not None and session.seen is not None
        }

    def gone(self, origin: object, now_ms: int) -> None:
        """A connection has closed: whoever spoke over it has a moment to come back."""
        for _, _, session in self:
            if session.origin == origin and session.connected:
                session.connected = False
                if session.exchange is not None:
                    session.exchange.refuse(NotReady("The connection has closed."))
                    session.exchange = None
                session.deadline_ms = min(session.deadline_ms, now_ms + GONE_GRACE_MS)

    def forgive(self, now_ms: int, stall_ms: int) -> None:
        """Move everything that is waited for by what this process has slept since the last call."""
        last_ms, self._last_ms = self._last_ms, now_ms
        slept_ms = 0 if last_ms is None else now_ms - last_ms - stall_ms
        if slept_ms > 0:
            for _, _, session in self:
                session.deadline_ms += slept_ms
                if session.revoking_since_ms is not None:
                    session.revoking_since_ms += slept_ms

    def __iter__(self) -> Iterator[tuple[str, str, Session]]:
        for group, members in self._groups.items():
            for name, session in members.items():
                yield group, name, session
