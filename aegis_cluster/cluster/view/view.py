"""One node's part of the cluster view: announces the node, leads when it leads, heals itself.

The idea: an object that one thread turns. Each turn steps the replica, writes the clock while this
node leads, announces the node now and then (one announcement under way at a time) and ends what has
waited too long. A replica that has diverged, or in which the library keeps raising, is thrown away;
the next one starts blank and is filled by the others.

The rule it protects: nothing in here raises towards its caller, and whatever is asked is answered.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import zmq

from aegis_cluster import limits
from aegis_cluster.cluster.view.leases import REFUSED, Outcome
from aegis_cluster.cluster.view.replica import ViewReplica
from aegis_cluster.cluster.view.table import check_lease
from aegis_cluster.doorkeeper import Door
from aegis_cluster.errors import AegisError, ConfigError, NotReady, OutcomeUnknown, Throttled
from aegis_cluster.wall_clock import clock_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.cluster.view.replica import Answer
    from aegis_cluster.cluster.view.transport import Place

ANNOUNCE_S: Final = 2.0
TICK_S: Final = 1.0
KEYS_READ_S: Final = 1.0
"""How often the list of the nodes' keys is looked at."""
ANSWER_S: Final = 2.0
"""How long a command may take; over several changes of leaders its answer never comes."""
FAILURES_MAX: Final = 20
"""Turns in a row in which the library raised, before its object is thrown away."""
REBUILD_S_MIN: Final = 0.2
REBUILD_S_MAX: Final = 5.0
CALM_S: Final = 30.0
"""A replica that lived this long starts the pauses between rebuilds anew."""

logging.getLogger("pysyncobj").addHandler(logging.NullHandler())
logging.getLogger("pysyncobj").propagate = False  # what matters of it is counted and told here


@dataclass(slots=True)
class _Waiting:
    """A command under way."""

    deadline: float
    answer: Answer | None
    """None once it has been answered."""

    def settle(self, result: Outcome | AegisError) -> None:
        answer, self.answer = self.answer, None
        if answer is not None:
            answer(result)


class View:
    """Owned by one thread, from its making to `close`."""

    def __init__(self, place: Place, *, tell: Callable[[str], None]) -> None:
        """tell: gets a sentence about everything that a person should find in the log."""
        self._place = place
        self._tell = tell
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._door = None if place.keys is None else Door(self._context, place.keys)
        self._keys_due = 0.0
        self._replica: ViewReplica | None = None
        self._why = "it is starting"
        """Why there is no replica; empty while there is one."""
        self._build_at = 0.0
        self._built_at = 0.0
        self._pause_s = REBUILD_S_MIN
        self._waiting: list[_Waiting] = []
        self._announcing: _Waiting | None = None
        self._announced_at = 0.0
        self._clock_is_wrong = False
        self._reigning: _Waiting | None = None
        self._measured_at: float | None = None
        """Up to when the table's clock was moved; None before our reign has begun."""
        self.said: dict[str, Any] = {}
        """What this node announces; replaced by whoever drives us."""
        self.rebuilds = 0

    # ---- driving it

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """To be watched between turns; they change when the replica is rebuilt."""
        doors = [] if self._door is None else [self._door.socket]
        return doors + ([] if self._replica is None else self._replica.transport.sockets)

    def turn(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        self._watch_door(now)
        if self._replica is None and now >= self._build_at:
            self._build(now)
        replica = self._replica
        if replica is not None:
            failures = replica.failures
            try:
                replica.step()
                self._write_clock(replica, now)
                self._announce(replica, now)
            except Exception as error:  # noqa: BLE001 - the library's; counted like its others
                replica.pysyncobj_raised(error)
            if replica.failures == failures:
                replica.failures = 0
            self._judge(replica, now)
        self._expire(now)

    def _watch_door(self, now: float) -> None:
        """Let nodes in by their keys; one whose key was withdrawn loses its link with ours."""
        keys = self._place.keys
        if self._door is None or keys is None:
            return
        self._door.let_in()
        if now < self._keys_due:
            return
        self._keys_due = now + KEYS_READ_S
        reading = keys.peers.read()
        if reading is not None:
            self._door.lists_changed()
            if keys.peers.take(reading):
                self._discard("a key was withdrawn, so its links are made anew", now)

    def close(self) -> None:
        """End; a leader hands over first."""
        replica = self._replica
        if replica is not None and replica.leads:
            try:
                replica.hand_over()
                replica.step()
            except Exception as error:  # noqa: BLE001 - the others elect one all the same
                self._tell(f"the cluster view could not hand over: {error}")
        self._discard("it has ended", time.monotonic())
        if self._door is not None:
            self._door.close()
        self._context.destroy(linger=0)

    # ---- the replica's life

    def _build(self, now: float) -> None:
        try:
            self._replica = ViewReplica(self._place, self._context)
        except Exception as error:  # noqa: BLE001 - a taken port, or whatever the library meets
            self._retry_later(f"it cannot start: {error}", now)
            return
        self._built_at = now
        self._why = ""

    def _judge(self, replica: ViewReplica, now: float) -> None:
        if replica.has_diverged:
            self._discard("its copy differed from the others' and is built anew", now)
        elif replica.failures >= FAILURES_MAX:
            self._discard(f"the library keeps failing ({replica.failure})", now)
        elif now - self._built_at > CALM_S:
            self._pause_s = REBUILD_S_MIN

    def _discard(self, why: str, now: float) -> None:
        replica, self._replica = self._replica, None
        if replica is not None:
            try:
                replica.end()
            except Exception as error:  # noqa: BLE001 - it is given up anyway
                why = f"{why}; then: {error}"
            self.rebuilds += 1
        for waiting in self._waiting:
            waiting.settle(OutcomeUnknown("the cluster view is built anew"))
        self._waiting.clear()
        self._announcing = self._reigning = self._measured_at = None
        self._retry_later(why, now)

    def _retry_later(self, why: str, now: float) -> None:
        if why != self._why:
            self._tell(f"the cluster view is down: {why}")
        self._why = why
        self._build_at = now + self._pause_s
        self._pause_s = min(self._pause_s * 2, REBUILD_S_MAX)

    # ---- commands

    def _propose(self, replica: ViewReplica, command: Sequence[Any], answer: Answer) -> _Waiting:
        waiting = _Waiting(time.monotonic() + ANSWER_S, answer)
        self._waiting.append(waiting)
        replica.propose(command, waiting.settle)
        return waiting

    def _expire(self, now: float) -> None:
        for waiting in self._waiting:
            if waiting.deadline <= now:
                waiting.settle(OutcomeUnknown("the cluster view did not answer in time"))
        self._waiting = [waiting for waiting in self._waiting if waiting.answer is not None]

    def _write_clock(self, replica: ViewReplica, now: float) -> None:
        """While we lead: begin our reign, then tell how much time has passed."""
        if not replica.leads:
            self._measured_at = None
            return
        term = replica.raftCurrentTerm
        if replica.table.reign != term:
            self._measured_at = None
            if not _under_way(self._reigning):
                self._reigning = self._propose(replica, ("reign", term), _ignore)
        elif self._measured_at is None:
            self._measured_at = now
        elif now - self._measured_at >= TICK_S:
            delta_ms = int((now - self._measured_at) * 1000)
            self._measured_at = now
            table = replica.table
            command = ("tick", term, delta_ms, table.ticks, table.digest)
            self._propose(replica, command, _ignore)

    def _look_at_clock(self, replica: ViewReplica) -> None:
        """Say once that our wall clock is wrong, and once that it is right again."""
        problem = clock_problem(replica.table.clocks_ahead().get(self._place.me))
        if problem is not None and not self._clock_is_wrong:
            self._tell(problem)
        elif problem is None and self._clock_is_wrong:
            self._tell("The clock agrees with the other nodes' again.")
        self._clock_is_wrong = problem is not None

    def _announce(self, replica: ViewReplica, now: float) -> None:
        if not self.said or not replica.leader or _under_way(self._announcing):
            return
        is_missing = self._place.me not in replica.table.nodes
        if is_missing or now - self._announced_at >= ANNOUNCE_S:
            self._announced_at = now
            self._look_at_clock(replica)
            command = ("node", self._place.me, self.said)
            self._announcing = self._propose(replica, command, _ignore)

    # ---- questions

    def lease(self, action: str, fields: Sequence[Any], answer: Answer) -> None:
        """Have a lease request decided: action and fields as in `table.check_lease`.

        The answer is an outcome, or NotReady (certainly not done) or OutcomeUnknown; a repeat
        with the same holder and token is harmless.
        """
        try:
            check_lease(fields)
        except ValueError as error:
            answer(ConfigError(f"{error}"))
            return
        replica = self._replica
        if replica is None or not replica.leader:
            answer(NotReady(f"The cluster view is down: {self.problem}."))
            return
        if len(self._waiting) >= limits.VIEW_REQUESTS_WAITING_MAX:
            answer(Throttled("Too many lease requests wait for the cluster view of this node."))
            return

        def checked(result: Outcome | AegisError) -> None:
            if isinstance(result, Outcome) and result.kind == REFUSED:
                result = NotReady("The cluster view has just begun, or has too many leases.")
            answer(result)

        self._propose(replica, (action, *fields), checked)

    @property
    def problem(self) -> str:
        """Why the view is of no use here now, in words; empty while it is well."""
        replica = self._replica
        if replica is None:
            return self._why
        if replica.failures:
            return f"the library fails ({replica.failure})"
        if not replica.leader:
            return "no leader is known" if replica.hasQuorum else "too few of its nodes are heard"
        if replica.blank or not replica.table.reign:
            return "it is starting"
        return ""

    def described(self) -> dict[str, Any]:
        """The whole view as plain values, for `aegis cluster status`."""
        replica = self._replica
        problem = self.problem
        found: dict[str, Any] = {
            "state": "down" if problem else "up",
            "why": problem or None,
            "role": self._role,
            "leader": replica.leader if replica else 0,
            "reign": replica.table.reign if replica else 0,
            "clock_ms": replica.table.clock_ms if replica else 0,
            "rebuilds": self.rebuilds,
            "nodes": [],
            "leases": [],
        }
        if replica is not None:
            table = replica.table
            ahead = table.clocks_ahead()
            found["nodes"] = [
                {
                    **record.said,
                    "node": node,
                    "up": table.is_up(record),
                    "clock_ahead_ms": ahead.get(node),
                }
                for node, record in sorted(table.nodes.items())
            ]
            found["leases"] = [
                [name, lease.holder, lease.token, lease.expires_ms - table.clock_ms]
                for name, lease in sorted(table.leases.held.items())
            ]
        return found

    @property
    def _role(self) -> str:
        if self._replica is None:
            return "none"
        if not self._place.is_voter:
            return "reader"
        return "leader" if self._replica.leads else "follower"


def _under_way(waiting: _Waiting | None) -> bool:
    return waiting is not None and waiting.answer is not None


def _ignore(_result: Outcome | AegisError) -> None:
    """It is said again soon, in any case."""
