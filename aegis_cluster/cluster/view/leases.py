"""Leases with fencing tokens: who may do a job that one process at a time should do.

The idea: a pure table, changed only by commands of the replicated log, whose time is the log's own
clock (`table`). A lease is for efficiency: it keeps two processes from doing the same work. It does
not keep two from believing that they hold it, because one of them may be paused; so each grant has
a token that is higher than every one before it, and whoever acts under a lease writes its token
where the log can compare.

The rule it protects: on their own clocks, no two holders are valid at once. A holder counts from
before it asked and stops at `HOLDER_SHARE` of the time it asked for; the table counts from when it
granted, adds what its clock may run ahead (`TICK_MS_MAX`), and gives the job away only then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from aegis_cluster import limits

TICK_MS_MAX: Final = 1_500
"""The most that the table's clock moves at once: how far it may run ahead of a grant's own time."""
TOKEN_REIGN_BITS: Final = 24
"""A token is the reign of its grant, then a counter of so many bits."""

GRANTED: Final = "granted"
HELD: Final = "held"
LOST: Final = "lost"
RELEASED: Final = "released"
REFUSED: Final = "refused"


class Lease(NamedTuple):
    """Who holds a job, and until when on the table's clock."""

    holder: str
    token: int
    expires_ms: int


class Outcome(NamedTuple):
    """The answer to a request.

    holder, left_ms: who holds the job now and for how long at least; for `HELD` somebody else.
    """

    kind: str
    token: int = 0
    holder: str = ""
    left_ms: int = 0


@dataclass(slots=True)
class LeaseTable:
    """All leases; times are the table's clock in milliseconds."""

    held: dict[str, Lease] = field(default_factory=dict)
    last_token: int = 0

    def acquire(self, name: str, holder: str, ttl_ms: int, *, now_ms: int, reign: int) -> Outcome:
        """Give the job to `holder` unless another one has it; asked again, the same token."""
        self.expire(now_ms)
        lease = self.held.get(name)
        if lease is not None and lease.holder != holder:
            return Outcome(HELD, 0, lease.holder, lease.expires_ms - now_ms)
        if lease is None and len(self.held) >= limits.LEASES_MAX:
            return Outcome(REFUSED)
        return self._grant(
            name, holder, lease.token if lease else self._token(reign), now_ms, ttl_ms
        )

    def renew(self, name: str, holder: str, token: int, ttl_ms: int, *, now_ms: int) -> Outcome:
        """Extend a lease that still runs; `LOST` once it has ended, taken over or not."""
        self.expire(now_ms)
        lease = self.held.get(name)
        if lease is None or (lease.holder, lease.token) != (holder, token):
            return Outcome(LOST)
        return self._grant(name, holder, token, now_ms, ttl_ms)

    def release(self, name: str, holder: str, token: int) -> Outcome:
        """End a lease before its time; `LOST` where it was another's, or none, by then."""
        lease = self.held.get(name)
        if lease is None or (lease.holder, lease.token) != (holder, token):
            return Outcome(LOST)
        del self.held[name]
        return Outcome(RELEASED)

    def expire(self, now_ms: int) -> None:
        """Forget what has ended."""
        ended = [name for name, lease in self.held.items() if lease.expires_ms <= now_ms]
        for name in ended:
            del self.held[name]

    def _grant(self, name: str, holder: str, token: int, now_ms: int, ttl_ms: int) -> Outcome:
        # A repeat that was long under way must not shorten what was granted meanwhile.
        before = self.held.get(name)
        expires_ms = max(before.expires_ms if before else 0, now_ms + ttl_ms + TICK_MS_MAX)
        self.held[name] = Lease(holder, token, expires_ms)
        return Outcome(GRANTED, token, holder, expires_ms - now_ms)

    def _token(self, reign: int) -> int:
        """Higher than every one before; than those of an earlier life of the view too, because
        reigns start from the time of day when all has been lost (`replica`)."""
        self.last_token = max(self.last_token + 1, reign << TOKEN_REIGN_BITS)
        return self.last_token
