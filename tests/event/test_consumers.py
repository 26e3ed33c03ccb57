"""Durable subscriptions: shared, acknowledged one by one, in the order of versions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aegis_cluster.event import Event, EventStore
from aegis_cluster.persistent import PersistentConfig

if TYPE_CHECKING:
    import pytest

    from tests.event.conftest import Run

PATIENCE_S = 20.0
STREAMS = ("account-1", "account-2", "account-3", "order-1")


async def fill(store: EventStore, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        for stream in STREAMS:
            kind = "Odd" if number % 2 else "Even"
            await store.append(stream, [Event(kind, {"n": number}), Event("Noise")])


def test_what_is_acknowledged_comes_once_whoever_goes_on(store_run: Run) -> None:
    seen: dict[str, list[int]] = {}

    async def take(store: EventStore, count: int) -> None:
        # What a consumer held when its node ended stays locked for one `ack_timeout`.
        config = PersistentConfig(ordered=True, ack_timeout="1s")
        chosen = store.persistent_subscription(
            "billing", "account-*", event_types=["Odd", "Even"], config=config
        )
        async with asyncio.timeout(PATIENCE_S), chosen as consumer:
            async for event in consumer:
                assert event.data == {"n": (event.version or 0) // 2}
                seen.setdefault(event.aggregate_id or "", []).append(event.version or 0)
                await event.ack()
                count -= 1
                if not count:
                    return

    async def first(store: EventStore) -> None:
        await fill(store, 2)
        await store.delete("order-1")  # the store's own streams are not handed out
        await take(store, 4)

    async def again(store: EventStore) -> None:
        await fill(store, 1, first=2)
        await take(store, 5)

    store_run(first)
    store_run(again)
    assert seen == {stream: [0, 2, 4] for stream in STREAMS[:3]}


def test_two_consumers_share_and_what_was_not_handled_comes_again(store_run: Run) -> None:
    async def work(store: EventStore) -> None:
        await fill(store, 4)
        config = PersistentConfig(max_in_flight=4, ordered=True, ack_timeout="10s")
        handled: dict[str, list[int]] = {}
        missed = 0

        async def consume() -> None:
            nonlocal missed
            shared = store.persistent_subscription("shared", event_types=["Even"], config=config)
            async with shared as consumer:
                while sum(map(len, handled.values())) < 2 * len(STREAMS):
                    for event in await consumer.poll(4, timeout=0.2):
                        if event.delivery_count == 1 and event.aggregate_id == STREAMS[0]:
                            missed += 1
                            await event.nack()
                            continue
                        handled.setdefault(event.aggregate_id or "", []).append(event.version or 0)
                        await consumer.ack([event])

        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(consume(), consume())
        assert handled == {stream: [0, 4] for stream in STREAMS}
        assert missed == 2

    store_run(work)


def test_an_event_that_leaves_the_log_while_it_is_held_is_settled(
    store_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message was leased, and its event was hidden and scavenged before it was read."""

    async def work(store: EventStore) -> None:
        await store.append("account-1", [Event("Paid", {"n": n}) for n in range(4)])
        right = store.scan

        async def scan(partition: int, offset: int, count: int) -> list[Event]:
            found = await right(partition, offset, count)
            return [event for event in found if event.version not in (1, 2)]

        monkeypatch.setattr(store, "scan", scan)
        versions: list[int | None] = []
        async with asyncio.timeout(PATIENCE_S), store.persistent_subscription("all") as consumer:
            while len(versions) < 2:
                for event in await consumer.poll(10):
                    versions.append(event.version)
                    await event.ack()
            assert versions == [0, 3]
            while any((await consumer.subscription.lag()).values()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    store_run(work)
