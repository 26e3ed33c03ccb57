"""Leases as a client holds them: on its own clock, renewed in time, ended when lost."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.client.cluster import ClusterClient
from aegis_cluster.client.leases import Leases
from aegis_cluster.errors import (
    LeaseHeld,
    LeaseLost,
    Misuse,
    NotReady,
    OutcomeUnknown,
)
from aegis_cluster.limits import LEASE_HOLDER_SHARE
from aegis_cluster.wire.protocol import Api
from tests.client.fake_node import FakeNode, fake_node

if TYPE_CHECKING:
    from aegis_cluster.wire.protocol import Request

TTL = 5.0

pytestmark = pytest.mark.slow


class Asked:
    """What the fake node was asked, and what it answers next."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.requests: list[list[Any]] = []

    def __call__(self, request: Request) -> Any:
        self.requests.append(request.fields)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def run(test: Any) -> None:
    async def whole() -> None:
        async with fake_node() as node:
            cluster = ClusterClient([node.endpoint])
            try:
                await cluster.connect(cluster.deadline(5))
                await test(node, Leases(cluster))
            finally:
                await cluster.close()

    asyncio.run(asyncio.wait_for(whole(), 15))


GRANTED = ["granted", 7, "me", 6_000]
HELD = ["held", 0, "somebody", 1_500]
LOST = ["lost", 0, "", 0]
RELEASED = ["released", 0, "", 0]


def test_a_lease_runs_on_our_clock_from_before_we_asked() -> None:
    async def test(node: FakeNode, leases: Leases) -> None:
        node.answers[Api.LEASE] = asked = Asked(GRANTED)
        before = time.monotonic()
        lease = await leases.acquire("job", ttl=TTL, holder="me", timeout=5)
        assert lease.is_valid
        assert lease.token == 7
        assert before + LEASE_HOLDER_SHARE * TTL <= lease._until <= time.monotonic() + TTL
        action, name, holder, token, ttl_ms = asked.requests[0]
        assert (action, name, token, ttl_ms) == ("acquire", "job", 0, 5_000)
        assert holder.startswith("me#")
        lease._until = time.monotonic() - 0.001
        assert not lease.is_valid
        with pytest.raises(LeaseLost):
            lease.check()
        await lease.lost()

    run(test)


def test_held_by_another_it_says_by_whom() -> None:
    async def test(node: FakeNode, leases: Leases) -> None:
        node.answers[Api.LEASE] = Asked(HELD)
        with pytest.raises(LeaseHeld, match="somebody") as caught:
            await leases.acquire("job", ttl=TTL, timeout=5)
        assert caught.value.details["left_s"] == 1.5

    run(test)


def test_it_waits_until_the_other_one_has_ended() -> None:
    async def test(node: FakeNode, leases: Leases) -> None:
        node.answers[Api.LEASE] = asked = Asked(HELD, HELD, GRANTED)
        lease = await leases.acquire("job", ttl=TTL, wait=True, timeout=10)
        assert lease.is_valid
        assert len({request[2] for request in asked.requests}) == 1  # one holder, however often

    run(test)


def test_a_view_that_is_down_is_asked_again_and_then_told() -> None:
    async def test(node: FakeNode, leases: Leases) -> None:
        node.answers[Api.LEASE] = Asked(NotReady("down"), GRANTED)
        assert (await leases.acquire("job", ttl=TTL, timeout=5)).is_valid
        node.answers[Api.LEASE] = Asked(NotReady("The cluster view is down."))
        # The last question may be cut short by the deadline, and then nobody knows.
        with pytest.raises((NotReady, OutcomeUnknown)):
            await leases.acquire("job", ttl=TTL, timeout=0.3)
        node.answers[Api.LEASE] = lambda _request: None
        with pytest.raises(OutcomeUnknown):
            await leases.acquire("job", ttl=TTL, timeout=0.5)

    run(test)


def test_it_is_renewed_in_time_and_given_back() -> None:
    async def test(node: FakeNode, leases: Leases) -> None:
        node.answers[Api.LEASE] = asked = Asked(GRANTED)
        async with await leases.acquire("job", ttl=TTL, timeout=5) as lease:
            first = lease._until
            async with asyncio.timeout(TTL):
                while lease._until == first:  # noqa: ASYNC110 - no event tells of a renewal
                    await asyncio.sleep(0.02)
            assert lease.is_valid
            with pytest.raises(Misuse):
                await lease.__aenter__()
        assert not lease.is_valid
        assert [request[0] for request in asked.requests] == ["acquire", "renew", "release"]
        assert {request[3] for request in asked.requests[1:]} == {7}

    run(test)


def test_a_lease_that_another_one_has_now_ends_at_once() -> None:
    async def test(node: FakeNode, leases: Leases) -> None:
        node.answers[Api.LEASE] = asked = Asked(GRANTED, LOST)
        async with await leases.acquire("job", ttl=TTL, timeout=5) as lease:
            async with asyncio.timeout(TTL):
                await lease.lost()
            assert not lease.is_valid
        assert "release" not in [request[0] for request in asked.requests]

    run(test)


def test_a_lease_that_nobody_renews_ends_by_itself() -> None:
    async def test(node: FakeNode, leases: Leases) -> None:
        node.answers[Api.LEASE] = Asked(GRANTED, NotReady("down"))
        started = time.monotonic()
        async with await leases.acquire("job", ttl=TTL, timeout=5) as lease:
            await lease.lost()
            assert time.monotonic() - started >= LEASE_HOLDER_SHARE * TTL - 0.1

    run(test)


@pytest.mark.parametrize("ttl", [4.9, 301.0])
def test_a_lease_lasts_neither_too_short_nor_too_long(ttl: float) -> None:
    async def test(_node: FakeNode, leases: Leases) -> None:
        with pytest.raises(Misuse, match="5 to 300 seconds"):
            await leases.acquire("job", ttl=ttl, timeout=1)

    run(test)
