"""The view's table: nodes as they last announced themselves, leases, and a clock of its own.

The idea: a pure state machine folded over the log that PySyncObj replicates. No wall clock and no
chance in it, so equal logs make equal tables. Its time is the sum of the ticks that leaders write:
a leader measures from the moment its own *reign* was written, ticks of another reign are refused
and one tick is at most `TICK_MS_MAX`, so a change of leaders can only stretch time, never skip it.

Each tick carries the leader's digest of the table after the tick before. A replica that has another
one at that place has diverged: `diverged` is set, and its host throws it away.

The rule it protects: `apply` never raises and never stops half-way. An exception in there would be
met again by the library at every tick, for ever.
"""

from __future__ import annotations

import hashlib
import statistics
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack

from aegis_cluster import limits
from aegis_cluster.cluster.view.leases import (
    REFUSED,
    TICK_MS_MAX,
    Lease,
    LeaseTable,
    Outcome,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

UP_MS: Final = 7_000
"""A node that has announced nothing for so long is shown as not up."""
FORGET_MS: Final = 600_000
"""A node that has announced nothing for so long is shown no more."""
NAME_CHARS_MAX: Final = 128
RECORD_BYTES_MAX: Final = 16 * limits.KIB
_VERSION: Final = 1

REFUSAL: Final = Outcome(REFUSED)


class NodeRecord(NamedTuple):
    """What a node said of itself, and when, on the table's clock."""

    said: dict[str, Any]
    seen_ms: int


class ViewTable:
    """One copy; every replica of the view has an equal one."""

    def __init__(self) -> None:
        self.clock_ms = 0
        self.reign = 0
        """Term of the leader whose ticks move the clock; 0 before the first."""
        self.nodes: dict[int, NodeRecord] = {}
        self.leases = LeaseTable()
        self.ticks = 0
        self.digest = b""
        """Of the table after that many ticks."""
        self.diverged = False
        """Whether a leader's digest was not ours; not a part of the state."""

    def is_up(self, record: NodeRecord) -> bool:
        """Whether a node has announced itself lately."""
        return self.clock_ms - record.seen_ms <= UP_MS

    def clocks_ahead(self) -> dict[int, int]:
        """By node that is up and told its wall clock: by how many ms it is ahead of the median.

        As exact as announcements are prompt, some seconds; of two nodes the earlier one counts.
        """
        offsets = {
            node: record.said["wall_ms"] - record.seen_ms
            for node, record in self.nodes.items()
            if self.is_up(record) and isinstance(record.said.get("wall_ms"), int)
        }
        if not offsets:
            return {}
        median = statistics.median_low(offsets.values())
        return {node: offset - median for node, offset in offsets.items()}

    # ---- commands

    def apply(self, blob: bytes) -> Outcome:
        """Fold one command; one that is malformed changes nothing and is refused."""
        try:
            match msgpack.unpackb(blob, use_list=False):
                case ("node", int(node), dict(said)):
                    return self._node(node, said)
                case ("reign", int(term)):
                    return self._reign(term)
                case ("tick", int(term), int(delta_ms), int(ticks), bytes(digest)):
                    return self._tick(term, delta_ms, ticks, digest)
                case (("acquire" | "renew" | "release") as action, *fields):
                    return self._lease(action, fields)
        except Exception:  # noqa: BLE001 - see the module: whatever a stranger's command provokes
            return REFUSAL
        return REFUSAL

    def _node(self, node: int, said: Mapping[str, Any]) -> Outcome:
        known = node in self.nodes or len(self.nodes) < limits.VIEW_NODES_MAX
        if not known or len(msgpack.packb(said)) > RECORD_BYTES_MAX:
            return REFUSAL
        self.nodes[node] = NodeRecord(dict(said), self.clock_ms)
        return Outcome("announced")

    def _reign(self, term: int) -> Outcome:
        self.reign = max(self.reign, term)
        return Outcome("reigns")

    def _tick(self, term: int, delta_ms: int, ticks: int, digest: bytes) -> Outcome:
        if term != self.reign or delta_ms < 0:
            return REFUSAL
        if ticks == self.ticks and digest != self.digest:
            self.diverged = True
        self.clock_ms += min(delta_ms, TICK_MS_MAX)
        self.leases.expire(self.clock_ms)
        for node in [n for n, r in self.nodes.items() if self.clock_ms - r.seen_ms > FORGET_MS]:
            del self.nodes[node]
        self.ticks += 1
        self.digest = hashlib.blake2b(msgpack.packb(self._state()), digest_size=8).digest()
        return Outcome("ticked")

    def _lease(self, action: str, fields: Sequence[Any]) -> Outcome:
        name, holder, token, ttl_ms = check_lease(fields)
        if not self.reign:
            return REFUSAL  # the clock does not run yet
        now_ms, leases = self.clock_ms, self.leases
        if action == "acquire":
            return leases.acquire(name, holder, ttl_ms, now_ms=now_ms, reign=self.reign)
        if action == "renew":
            return leases.renew(name, holder, token, ttl_ms, now_ms=now_ms)
        return leases.release(name, holder, token)

    # ---- snapshots

    def to_fields(self) -> tuple[Any, ...]:
        """All of it, for a snapshot."""
        return (_VERSION, self._state(), self.digest)

    def restore(self, fields: Any) -> None:
        """Become what a snapshot says. Raises ValueError, TypeError or KeyError for another's."""
        version, state, digest = fields
        if version != _VERSION:
            raise ValueError(f"a view of version {version}")
        clock_ms, reign, ticks, last_token, nodes, leases = state
        self.clock_ms, self.reign, self.ticks = clock_ms, reign, ticks
        self.nodes = {node: NodeRecord(dict(said), seen_ms) for node, said, seen_ms in nodes}
        self.leases = LeaseTable({name: Lease(*lease) for name, *lease in leases}, last_token)
        self.digest = digest

    def _state(self) -> tuple[Any, ...]:
        nodes = tuple((node, r.said, r.seen_ms) for node, r in sorted(self.nodes.items()))
        leases = tuple((name, *lease) for name, lease in sorted(self.leases.held.items()))
        return (self.clock_ms, self.reign, self.ticks, self.leases.last_token, nodes, leases)


def check_lease(fields: Sequence[Any]) -> tuple[str, str, int, int]:
    """(name, holder, token, ttl_ms) of a lease request. Raises ValueError."""
    match fields:
        case [str(name), str(holder), int(token), int(ttl_ms)]:
            short = 0 < len(name) <= NAME_CHARS_MAX and 0 < len(holder) <= NAME_CHARS_MAX
            lasts = limits.LEASE_TTL_MS_MIN <= ttl_ms <= limits.LEASE_TTL_MS_MAX
            if short and lasts and token >= 0:
                return name, holder, token, ttl_ms
    raise ValueError(
        f"a lease has a name and a holder of 1 to {NAME_CHARS_MAX} characters and lasts"
        f" {limits.LEASE_TTL_MS_MIN} to {limits.LEASE_TTL_MS_MAX} ms"
    )
