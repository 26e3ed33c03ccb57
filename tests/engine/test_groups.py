"""Consumer groups as programs use them, embedded and on a cluster."""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import (
    AckMode,
    DeliveryMode,
    EventFilter,
    Message,
    Offset,
    StreamingEngine,
    SubscribeConfig,
    Subscriber,
    TopicConfig,
    TopicPartition,
)
from aegis_cluster.errors import (
    ConfigError,
    GroupNotEmpty,
    GroupNotFound,
    MemberFenced,
    MemberInUse,
    Misuse,
    OffsetOutOfRange,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Run = Callable[[Callable[[StreamingEngine], Awaitable[Any]]], Any]

_GROUPS = itertools.count()
PATIENCE_S = 25.0


@pytest.fixture
def group() -> str:
    return f"group-{next(_GROUPS)}"


def member(group: str, **more: Any) -> SubscribeConfig:
    return SubscribeConfig(group_id=group, **{"start": Offset.EARLIEST, **more})


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - conditions of code that knows no event
            await asyncio.sleep(0.01)


async def read(subscriber: Subscriber, count: int, *, ack: bool = True) -> list[Any]:
    found: list[Any] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < count:
            for message in await subscriber.poll(count - len(found)):
                found.append(message.payload)
                if ack:
                    await message.ack()
    return found


async def fill(engine: StreamingEngine, topic: str, count: int, partitions: int = 1) -> None:
    await engine.create_topic(topic, TopicConfig(partitions=partitions))
    await engine.publish_many(topic, range(count), keys=map(str, range(count)))


def test_a_restarted_consumer_goes_on_where_it_was(engine_run: Run, topic: str, group: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 10)
        async with engine.subscribe(topic, member(group)) as one:
            assert await read(one, 4) == [0, 1, 2, 3]
        async with engine.subscribe(topic, member(group)) as two:
            assert await read(two, 6) == [4, 5, 6, 7, 8, 9]
        assert (await engine.group(group).lag()) == {TopicPartition(topic, 0): 0}

    engine_run(work)


def test_what_was_not_acknowledged_comes_again(engine_run: Run, topic: str, group: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 5)
        async with engine.subscribe(topic, member(group)) as one:
            messages = await one.poll(5)
            await messages[0].ack()
            await messages[2].ack()  # not a neighbour: the position stays before it
        async with engine.subscribe(topic, member(group)) as two:
            assert await read(two, 4) == [1, 2, 3, 4]

    engine_run(work)


def test_two_members_share_and_one_takes_over(engine_run: Run, topic: str, group: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 40, partitions=4)
        assigned: list[TopicPartition] = []
        revoked: list[TopicPartition] = []
        async with engine.subscribe(topic, member(group)) as one:
            one.on_assigned, one.on_revoked = assigned.extend, revoked.extend
            assert len(one.assignment) == 4
            two = engine.subscribe(topic, member(group))
            async with two:
                await until(lambda: len(one.assignment) == len(two.assignment) == 2)
                assert not set(one.assignment) & set(two.assignment)
                assert sorted(revoked) == two.assignment
                state = await engine.group(group).describe()
                assert state.state == "stable"
                assert len(state.members) == 2
                found = await asyncio.gather(*(_drain(subscriber) for subscriber in (one, two)))
                assert sorted(itertools.chain(*found)) == list(range(40))
            await until(lambda: len(one.assignment) == 4)
            assert sorted(assigned) == sorted(revoked)

    engine_run(work)


async def _drain(subscriber: Subscriber) -> list[Any]:
    found = []
    while polled := await subscriber.poll(timeout=0.5):
        for message in polled:
            found.append(message.payload)
            await message.ack()
    return found


def test_a_slow_handler_is_not_a_dead_member(engine_run: Run, topic: str, group: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 2)
        config = member(group, session_timeout="1s")
        async with engine.subscribe(topic, config) as one:
            message = await anext(one)
            time.sleep(2.5)  # noqa: ASYNC251 - that is what it is about: the loop is blocked
            await message.ack()
            await one.commit()
            assert (await engine.group(group).positions()) == {TopicPartition(topic, 0): 1}
            assert await read(one, 1) == [1]

    engine_run(work)


def test_a_member_that_was_silent_for_too_long_is_fenced_and_joins_anew(
    engine_run: Run, topic: str, group: str
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 3)
        async with engine.subscribe(topic, member(group, session_timeout="1s")) as one:
            message = await anext(one)
            engine.background().call(lambda: time.sleep(2.0))  # its heartbeats sleep
            await _until_empty(engine, group)
            await message.ack()
            with pytest.raises(MemberFenced):
                await one.commit()
            # It joins anew by itself, and what was not committed comes again.
            assert await read(one, 3) == [0, 1, 2]

    engine_run(work)


async def _until_empty(engine: StreamingEngine, group: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await engine.group(group).describe()).members:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)


def test_a_static_member_restarts_without_a_move(engine_run: Run, topic: str, group: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 8, partitions=4)
        moved: list[TopicPartition] = []
        async with engine.subscribe(topic, member(group, member_id="left")) as left:
            async with engine.subscribe(topic, member(group, member_id="right")) as right:
                await until(lambda: len(left.assignment) == len(right.assignment) == 2)
                mine, epoch = right.assignment, (await engine.group(group).describe()).epoch
            left.on_assigned = moved.extend
            async with engine.subscribe(topic, member(group, member_id="right")) as again:
                await until(lambda: again.assignment == mine)
            assert not moved
            assert (await engine.group(group).describe()).epoch == epoch

    engine_run(work)


def test_two_members_of_one_name(engine_run: Run, topic: str, group: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 1)
        async with engine.subscribe(topic, member(group, member_id="me")) as one:
            with pytest.raises(MemberInUse, match="me"):
                await engine.subscribe(topic, member(group, member_id="me")).__aenter__()
            assert await read(one, 1) == [0]

    engine_run(work)


def test_at_most_once_commits_before_the_handler_has_the_message(
    engine_run: Run, topic: str, group: str
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 6)
        config = member(group, delivery_mode=DeliveryMode.AT_MOST_ONCE, max_poll_records=2)
        async with engine.subscribe(topic, config) as one:
            assert (await anext(one)).payload == 0
            positions = await engine.group(group).positions()
            assert positions == {TopicPartition(topic, 0): 2}
        async with engine.subscribe(topic, config) as two:
            assert await read(two, 4, ack=False) == [2, 3, 4, 5]

    engine_run(work)


def test_auto_acknowledges_by_asking_for_the_next(engine_run: Run, topic: str, group: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 3)
        async with engine.subscribe(topic, member(group, ack_mode=AckMode.AUTO)) as one:
            assert [(await anext(one)).payload for _ in range(2)] == [0, 1]
        async with engine.subscribe(topic, member(group)) as two:
            assert await read(two, 2) == [1, 2]

    engine_run(work)


def test_batches_and_filters_move_the_position(engine_run: Run, topic: str, group: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 4)
        async with engine.subscribe(topic, member(group)) as one:
            batches = one.batches()
            assert (await anext(batches)).values == [0, 1, 2, 3]
            await engine.publish_many(topic, [4, 5])
            await anext(batches)
        assert (await engine.group(group).positions()) == {TopicPartition(topic, 0): 4}
        odd = EventFilter(where=lambda message: message.payload % 2 == 1)
        async with engine.subscribe(topic, member(group), filter=odd) as two:
            assert await read(two, 1) == [5]
        assert (await engine.group(group).positions()) == {TopicPartition(topic, 0): 6}

    engine_run(work)


def test_latest_is_kept_so_that_a_restart_skips_nothing(
    engine_run: Run, topic: str, group: str
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 3)
        async with engine.subscribe(topic, member(group, start=Offset.LATEST)):
            pass
        await engine.publish_many(topic, [3, 4])
        async with engine.subscribe(topic, member(group, start=Offset.LATEST)) as two:
            assert await read(two, 2) == [3, 4]

    engine_run(work)


def test_new_topics_of_a_pattern_and_new_partitions_are_read_from_their_beginning(
    engine_run: Run, topic: str, group: str
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, f"{topic}.a", 1)
        config = member(group, start=Offset.LATEST)
        async with engine.subscribe(f"{topic}.*", config) as one:
            await until(lambda: len(one.assignment) == 1)
            await engine.create_topic(f"{topic}.b", TopicConfig(partitions=1))
            await engine.publish(f"{topic}.b", _message("new topic"))
            assert await read(one, 1) == ["new topic"]
            await engine.alter_topic(f"{topic}.b", partitions=2)
            await _publish_to(engine, f"{topic}.b", 1, "new partition")
            assert await read(one, 1) == ["new partition"]

    engine_run(work)


def _message(payload: Any, key: str | None = None) -> Any:
    from aegis_cluster import Message

    return Message(key=key, payload=payload)


async def _publish_to(engine: StreamingEngine, topic: str, partition: int, payload: Any) -> None:
    from aegis_cluster.wire.partitioner import partition_for

    key = next(k for k in map(str, range(100)) if partition_for(k.encode(), 2) == partition)
    await engine.publish(topic, _message(payload, key))


def test_seek_moves_what_is_committed(engine_run: Run, topic: str, group: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 5)
        async with engine.subscribe(topic, member(group)) as one:
            await read(one, 5)
            await one.seek(0, 1)
            assert await read(one, 1) == [1]
        assert (await engine.group(group).positions()) == {TopicPartition(topic, 0): 2}

    engine_run(work)


def test_moving_a_group(engine_run: Run, topic: str, group: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 5)
        one = engine.group(group)
        place = TopicPartition(topic, 0)
        with pytest.raises(GroupNotFound):
            await one.describe()
        with pytest.raises(GroupNotFound):
            await one.reset(Offset.EARLIEST)
        with pytest.raises(GroupNotFound):
            await one.delete()
        async with engine.subscribe(topic, member(group)) as subscriber:
            await read(subscriber, 5)
            with pytest.raises(GroupNotEmpty):
                await one.reset(Offset.EARLIEST)
            with pytest.raises(GroupNotEmpty):
                await one.delete()
        assert await one.reset(Offset.at(2)) == {place: 2}
        with pytest.raises(OffsetOutOfRange):
            await one.reset(Offset.at(6))
        assert await one.positions() == {place: 2}
        assert await one.reset(Offset.LATEST) == {place: 5}
        assert group in [listed.name for listed in await engine.list_groups()]
        await one.delete()
        assert group not in [listed.name for listed in await engine.list_groups()]

    engine_run(work)


def test_a_callback_that_raises_is_told_to_the_reader(
    engine_run: Run, topic: str, group: str
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 1)
        subscriber = engine.subscribe(topic, member(group))

        def broken(places: Any) -> None:
            raise ValueError("mine")

        subscriber.on_assigned = broken
        with pytest.raises(Misuse, match="mine"):
            await read(subscriber, 1)

    engine_run(work)


def test_a_position_beyond_the_end_is_not_committed(
    engine_run: Run, topic: str, group: str
) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 5)
        async with engine.subscribe(topic, member(group)) as subscriber:
            await read(subscriber, 5)
            await subscriber.commit()
            await subscriber.seek(0, 1_000)
            with pytest.raises(OffsetOutOfRange, match="ends at 5"):
                await subscriber.commit()
        place = TopicPartition(topic, 0)
        assert await engine.group(group).positions() == {place: 5}, "nor when it leaves"

    engine_run(work)


def test_a_reset_by_time_begins_with_the_first_message_of_that_time(
    engine_run: Run, topic: str, group: str
) -> None:
    """Also where others of its batch are older."""
    begin = datetime(2026, 1, 1, tzinfo=UTC)

    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic)
        await engine.publish_many(
            topic, [Message(payload=n, timestamp=begin + timedelta(seconds=n)) for n in range(9)]
        )
        async with engine.subscribe(topic, member(group)) as subscriber:
            await read(subscriber, 9)
        place = TopicPartition(topic, 0)
        for seconds, offset in ((4, 4), (4.5, 5), (-1, 0), (9, 9)):
            moment = Offset.at_time(begin + timedelta(seconds=seconds))
            assert await engine.group(group).reset(moment) == {place: offset}

    engine_run(work)


def test_a_topic_made_anew_has_no_old_positions(engine_run: Run, topic: str, group: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 5)
        async with engine.subscribe(topic, member(group)) as one:
            await read(one, 5)
        await engine.delete_topic(topic)
        await fill(engine, topic, 2)
        async with engine.subscribe(topic, member(group)) as two:
            assert await read(two, 2) == [0, 1]

    engine_run(work)


def test_the_clusters_own_topics_are_nobodys(engine_run: Run, topic: str, group: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 1)
        async with engine.subscribe(topic, member(group)) as one:
            await read(one, 1)
        assert "__groups" not in await engine.list_topics()
        for attempt in (
            engine.publish("__groups", _message(1)),
            engine.delete_topic("__groups"),
            engine.create_topic("__groups"),
            engine.alter_topic("__groups", partitions=9),
        ):
            with pytest.raises(Exception, match=r"own|reserved"):
                await attempt

    engine_run(work)


def test_many_members_of_one_group_read_everything_once(
    engine_run: Run, topic: str, group: str
) -> None:
    """Members come and go while messages come: each message is handled by somebody, in order."""

    async def work(engine: StreamingEngine) -> None:
        await engine.create_topic(topic, TopicConfig(partitions=5))
        seen: list[int] = []

        async def consume(subscriber: Subscriber) -> None:
            with suppress(asyncio.CancelledError):
                async for message in subscriber:
                    seen.append(message.payload)
                    await message.ack()

        async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            readers = []
            for number in range(4):
                one = await stack.enter_async_context(engine.subscribe(topic, member(group)))
                readers.append((one, tasks.create_task(consume(one))))
                values = range(number * 50, number * 50 + 50)
                await engine.publish_many(topic, values, keys=map(str, values))
            for one, _ in readers[:2]:
                await one.close()
            values = range(200, 250)
            await engine.publish_many(topic, values, keys=map(str, values))
            await until(lambda: set(seen) == set(range(250)))
            for one, _ in readers[2:]:
                await one.close()

    engine_run(work)


@pytest.mark.parametrize(
    "wrong",
    [
        {"group_id": ""},
        {"group_id": "g" * 256},
        {"member_id": "m"},
        {"session_timeout": "30s"},
        {"group_id": "g", "session_timeout": "1ms"},
        {"group_id": "g", "session_timeout": "soon"},
        {"delivery_mode": DeliveryMode.AT_MOST_ONCE},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SubscribeConfig(**wrong)


def test_committing_without_a_group(engine_run: Run, topic: str) -> None:
    async def work(engine: StreamingEngine) -> None:
        await fill(engine, topic, 1)
        async with engine.subscribe(topic) as one:
            with pytest.raises(Misuse):
                await one.commit()

    engine_run(work)
