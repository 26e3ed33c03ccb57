"""Links: greeting, refusals, broken connections, late and broken replies."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from aegis_cluster.client.link import Link
from aegis_cluster.errors import (
    NotReady,
    OutcomeUnknown,
    PeerViolation,
    Unavailable,
    UnsupportedVersion,
    WrongCluster,
)
from aegis_cluster.wire.protocol import Api, Hello, Request, encode_reply
from tests.client.fake_node import FakeNode, fake_node, mute, run, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def soon(seconds: float = 2.0) -> float:
    return asyncio.get_running_loop().time() + seconds


@asynccontextmanager
async def link_to(endpoint: str) -> AsyncIterator[Link]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = Link(context, endpoint, client_id="ab" * 16, cluster_id="")
    try:
        yield link
    finally:
        link.close()
        context.destroy(linger=0)


def test_a_link_greets_and_asks() -> None:
    async def test() -> None:
        async with fake_node() as node, link_to(node.endpoint) as link:
            await link.ready(soon())
            assert link.hello is not None
            assert link.hello.node == 1
            reply = await link.request(Api.METADATA, [0, None], deadline=soon())
            assert reply.fields[0] == "fake"

    run(test())


def test_nothing_listens() -> None:
    async def test() -> None:
        async with fake_node() as node:
            endpoint = node.endpoint
        async with link_to(endpoint) as link:
            with pytest.raises(Unavailable):
                await link.ready(soon(0.05))
            with pytest.raises(Unavailable):
                await link.request(Api.STATUS, [], deadline=soon())

    run(test())


@pytest.mark.parametrize("kind", [WrongCluster, UnsupportedVersion])
def test_a_refused_greeting_is_said_at_once(kind: type[WrongCluster]) -> None:
    async def test() -> None:
        def refuse(_: Request) -> None:
            raise kind("not you")

        async with fake_node() as node, link_to(node.endpoint) as link:
            node.answers[Api.HELLO] = refuse
            with pytest.raises(kind):
                await link.ready(soon())
            assert not link.is_ready
            with pytest.raises(Unavailable):
                await link.request(Api.STATUS, [], deadline=soon())

    run(test())


def test_a_server_of_another_protocol_is_a_refusal_too() -> None:
    async def test() -> None:
        async with fake_node() as node, link_to(node.endpoint) as link:
            node.answers[Api.HELLO] = lambda _: Hello(9, "peer", "fake", 1, "", "", 0).to_fields()
            with pytest.raises(UnsupportedVersion):
                await link.ready(soon())

    run(test())


def test_a_refusal_ends_with_the_process_that_refused() -> None:
    async def test() -> None:
        def refuse(_: Request) -> None:
            raise WrongCluster("not you")

        async with fake_node() as node, link_to(node.endpoint) as link:
            node.answers[Api.HELLO] = refuse
            with pytest.raises(WrongCluster):
                await link.ready(soon())
            await node.close()
            other = FakeNode(base_port=node.base_port)
            try:
                await until(lambda: bool(link.is_ready))
            finally:
                await other.close()

    run(test())


def test_a_link_comes_back_with_the_node_and_says_what_was_under_way() -> None:
    async def test() -> None:
        async with fake_node() as node, link_to(node.endpoint) as link:
            node.answers[Api.METADATA] = mute
            await link.ready(soon())
            request = asyncio.create_task(link.request(Api.METADATA, [0, None], deadline=soon()))
            await until(lambda: bool(node.count(Api.METADATA)))
            await node.close()
            with pytest.raises(OutcomeUnknown):
                await asyncio.wait_for(request, 2)
            other = FakeNode(base_port=node.base_port)
            try:
                await link.ready(soon())
                await link.request(Api.METADATA, [0, None], deadline=soon())
                assert other.count(Api.METADATA) == 1, "nothing old is sent again"
            finally:
                await other.close()

    run(test())


def test_a_late_reply_answers_nobody_else() -> None:
    async def test() -> None:
        release = asyncio.Event()

        async def slow(request: Request) -> list[Any]:
            await release.wait()
            return node.metadata(request)

        async with fake_node() as node, link_to(node.endpoint) as link:
            await link.ready(soon())
            node.answers[Api.METADATA] = slow
            with pytest.raises(OutcomeUnknown):
                await link.request(Api.METADATA, [0, None], deadline=soon(0.03))
            release.set()
            reply = await link.request(Api.INIT_PRODUCER, [], deadline=soon())
            assert (reply.api, reply.fields) == (Api.INIT_PRODUCER, [7, 0])
            assert not link._pending

    run(test())


def test_a_reply_that_is_none_costs_the_connection() -> None:
    async def test() -> None:
        async with fake_node() as node, link_to(node.endpoint) as link:
            await link.ready(soon())
            node.answers[Api.METADATA] = lambda _: b"junk"
            with pytest.raises(OutcomeUnknown):
                await link.request(Api.METADATA, [0, None], deadline=soon())
            await link.ready(soon())
            assert node.count(Api.HELLO) == 2

    run(test())


def test_a_refusal_that_is_none_ends_its_request_at_once() -> None:
    async def test() -> None:
        def broken(request: Request) -> bytes:
            (part,) = encode_reply(request.api, ["?"], correlation=request.correlation, code=150)
            return bytes(part)

        async with fake_node() as node, link_to(node.endpoint) as link:
            await link.ready(soon())
            node.answers[Api.METADATA] = broken
            with pytest.raises((PeerViolation, OutcomeUnknown)):
                async with asyncio.timeout(1):
                    await link.request(Api.METADATA, [0, None], deadline=soon(5))

    run(test())


def test_a_process_that_does_not_know_us_is_greeted_again() -> None:
    async def test() -> None:
        def unknown(_: Request) -> None:
            raise NotReady("hello first", hello=1)

        async with fake_node() as node, link_to(node.endpoint) as link:
            await link.ready(soon())
            node.answers[Api.STATUS] = unknown
            with pytest.raises(NotReady):
                await link.request(Api.STATUS, [], deadline=soon())
            await until(lambda: node.count(Api.HELLO) >= 2)

    run(test())
