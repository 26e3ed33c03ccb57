"""Leases: a client's way to do a job that one process at a time should do.

    async with await Leases(cluster).acquire("cdc/shop", ttl=10.0) as lease:
        while lease.is_valid: ...        # write lease.token with what you do

The idea: any node is asked; the cluster view decides (`cluster.view` in the nodes). A lease runs on
the holder's *own* monotonic clock, from before it asked, and ends there before anybody else can get
it. Inside `async with` it is renewed in time and given back at the end.

The rule it protects: a lease saves work, it does not protect data. A process may be paused between
a look at `is_valid` and what it does next; so what it writes carries the token, which is higher in
every later lease, and the log refuses the older one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.client.cluster import ASK_S, CONNECT_S, Pause
from aegis_cluster.errors import (
    AegisError,
    LeaseHeld,
    LeaseLost,
    Misuse,
    NotReady,
    OutcomeUnknown,
    PeerViolation,
    Throttled,
    Unavailable,
)
from aegis_cluster.limits import LEASE_HOLDER_SHARE, LEASE_TTL_MS_MAX, LEASE_TTL_MS_MIN
from aegis_cluster.wire.protocol import Api, take_int, take_str

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.wire.protocol import Reply

TTL_S_DEFAULT: Final = 10.0
RENEWALS_PER_TTL: Final = 4
RELEASE_S: Final = 2.0
_RETRY_S: Final = 0.25


class Lease:
    """What a holder holds; made by `Leases.acquire`. An async context manager that keeps it."""

    def __init__(
        self, leases: Leases, name: str, holder: str, token: int, *, ttl: float, until: float
    ) -> None:
        self.name = name
        self.holder = holder
        self.token = token
        """Higher than that of every lease that anybody held before; write it with what you do."""
        self.ttl = ttl
        self._leases = leases
        self._until = until
        self._ended = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    @property
    def is_valid(self) -> bool:
        """Whether we may act as the holder at this moment."""
        return not self._ended.is_set() and time.monotonic() < self._until

    def check(self) -> None:
        """Raise LeaseLost unless `is_valid`."""
        if not self.is_valid:
            raise LeaseLost(f"The lease of {self.name!r} has ended; acquire it anew.")

    async def lost(self) -> None:
        """Return when the lease has ended, for whatever reason."""
        while self.is_valid:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._until - time.monotonic())):
                    await self._ended.wait()

    async def renew(self, *, timeout: float) -> None:
        """Have it longer. Raises LeaseLost, and what `acquire` raises when no node can tell."""
        self.check()
        asked_at = time.monotonic()
        reply = await self._leases.ask("renew", self, timeout)
        if take_str(reply.fields, 0, "outcome") != "granted":
            self._ended.set()
            raise LeaseLost(f"The lease of {self.name!r} has ended, or another one has it now.")
        self._until = max(self._until, asked_at + LEASE_HOLDER_SHARE * self.ttl)

    async def release(self, *, timeout: float = RELEASE_S) -> None:
        """Give it back; from now on it is not valid, whether that was heard or not."""
        was_valid = self.is_valid
        self._ended.set()
        if was_valid:
            await self._leases.ask("release", self, timeout)

    async def __aenter__(self) -> Self:
        if self._keeping is not None:
            raise Misuse("This lease is kept already.")
        self._keeping = asyncio.create_task(self._keep(), name=f"lease {self.name}")
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        with contextlib.suppress(AegisError):  # it ends by itself when nobody hears us
            await self.release()

    async def _keep(self) -> None:
        pause_s = self.ttl / RENEWALS_PER_TTL
        while self.is_valid:
            await asyncio.sleep(min(pause_s, max(0.0, self._until - time.monotonic())))
            try:
                await self.renew(timeout=max(0.0, self._until - time.monotonic()))
            except LeaseLost:
                return
            except AegisError:
                pause_s = _RETRY_S
            else:
                pause_s = self.ttl / RENEWALS_PER_TTL


class Leases:
    """Asks the nodes of one cluster."""

    def __init__(self, cluster: ClusterClient) -> None:
        self._cluster = cluster

    async def acquire(
        self,
        name: str,
        *,
        ttl: float = TTL_S_DEFAULT,
        holder: str | None = None,
        wait: bool = False,
        timeout: float,
    ) -> Lease:
        """Become the one that does the job `name`.

        ttl: seconds that a holder which is heard no more stays the holder; 5 to 300. holder: in
        words, for `aegis cluster status`; a unique mark is added. wait: until another holder has
        given up or ended, as long as `timeout` allows.

        Raises LeaseHeld, which names the holder; OutcomeUnknown when it may have become ours (it
        then ends by itself); Unavailable or NotReady when no node could decide in time.
        """
        if not LEASE_TTL_MS_MIN <= ttl * 1000 <= LEASE_TTL_MS_MAX:
            allowed = f"{LEASE_TTL_MS_MIN / 1000:g} to {LEASE_TTL_MS_MAX / 1000:g} seconds"
            raise Misuse(f"A lease lasts {allowed}, not {ttl:g}.")
        mark = uuid.uuid4().hex
        who = f"{holder}#{mark[:12]}" if holder else mark
        deadline = self._cluster.deadline(timeout)
        pause = Pause(deadline)
        while True:
            lease = Lease(self, name, who, 0, ttl=ttl, until=0.0)
            asked_at = time.monotonic()
            reply = await self.ask("acquire", lease, deadline - self._cluster.now())
            if take_str(reply.fields, 0, "outcome") == "granted":
                token = take_int(reply.fields, 1, "token")
                until = asked_at + LEASE_HOLDER_SHARE * ttl
                return Lease(self, name, who, token, ttl=ttl, until=until)
            if not wait or self._cluster.now() >= deadline:
                raise _held(name, reply)
            await pause.wait()

    async def ask(self, action: str, lease: Lease, timeout: float) -> Reply:
        """Ask one node after another; a repeat is harmless, since it names holder and token."""
        fields = [action, lease.name, lease.holder, lease.token, int(lease.ttl * 1000)]
        deadline = self._cluster.deadline(timeout)
        pause = Pause(deadline)
        unknown = False
        failure: AegisError = Unavailable("No node of the cluster is known.")
        while self._cluster.now() < deadline:
            for endpoint in self._cluster.metadata.control_endpoints():
                if self._cluster.now() >= deadline:
                    break
                try:
                    return await self._ask(endpoint, fields, deadline)
                except OutcomeUnknown as error:
                    unknown, failure = True, error
                except (Unavailable, NotReady, Throttled) as error:
                    failure = error
            await pause.wait()
        if unknown:
            raise OutcomeUnknown(f"No node could tell what became of the lease: {failure}")
        raise failure

    async def _ask(self, endpoint: str, fields: list[Any], deadline: float) -> Reply:
        link = self._cluster.link(endpoint)
        await link.ready(min(deadline, self._cluster.now() + CONNECT_S))
        return await link.request(
            Api.LEASE, fields, deadline=min(deadline, self._cluster.now() + ASK_S)
        )


def _held(name: str, reply: Reply) -> AegisError:
    if take_str(reply.fields, 0, "outcome") != "held":
        return PeerViolation("An answer about a lease came that we do not know.")
    holder = take_str(reply.fields, 2, "holder")
    left_s = take_int(reply.fields, 3, "left_ms") / 1000
    return LeaseHeld(
        f"{holder} does {name!r}, for {left_s:.1f} s more unless it renews.",
        holder=holder,
        left_s=left_s,
    )
