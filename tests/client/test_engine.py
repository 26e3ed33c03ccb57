"""The engine against one fake node: deadlines, what became of each message, spreading, reading."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegis_cluster import SubscribeConfig
from aegis_cluster import message as message_module
from aegis_cluster.client.producer import Producer, ProducerOptions
from aegis_cluster.engine import StreamingEngine
from aegis_cluster.errors import (
    AegisError,
    MessageTooLarge,
    Misuse,
    NotReady,
    OffsetOutOfRange,
    OutcomeUnknown,
    PartlyPublished,
    Refused,
    RequestTimeout,
    TopicExists,
    TopicNotFound,
    Unavailable,
    UnsupportedPayload,
)
from aegis_cluster.message import Message, Offset
from aegis_cluster.wire.codes import Code
from aegis_cluster.wire.partitioner import partition_for
from aegis_cluster.wire.protocol import Api, Request
from tests.client.fake_node import FakeNode, fake_node, mute, no_leader, run, topic_info, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aegis_cluster import Subscriber
    from aegis_cluster.client.producer import Row

EARLIEST = SubscribeConfig(start=Offset.EARLIEST)
SLACK_S = 0.6
"""What a call may take beyond its deadline on a busy machine."""


@asynccontextmanager
async def engine_at(node: FakeNode, timeout: float = 5.0) -> AsyncIterator[StreamingEngine]:
    async with StreamingEngine.connect(node.endpoint, request_timeout=timeout) as engine:
        yield engine


async def read(engine: StreamingEngine, count: int, topic: str = "t") -> list[Any]:
    async with engine.subscribe(topic, EARLIEST) as subscriber:
        found: list[Any] = []
        async with asyncio.timeout(3):
            async for message in subscriber:
                found.append(message)
                if len(found) == count:
                    break
        return found


# ---- deadlines


async def _poll(engine: StreamingEngine, timeout: float) -> Any:
    async with engine.subscribe("t", EARLIEST, timeout=timeout) as subscriber:
        return await subscriber.poll(timeout=timeout)


async def _send(engine: StreamingEngine, timeout: float) -> Any:
    producer = engine.producer()
    await producer.send("t", Message(payload="x"), timeout=timeout)
    await producer.flush()


CALLS: dict[str, tuple[Any, tuple[type[AegisError], ...], tuple[type[AegisError], ...]]] = {
    # call, what it may raise with nobody there, what it may raise when nobody answers
    "publish": (
        lambda e, t: e.publish("t", Message(payload="x"), timeout=t),
        (RequestTimeout, Unavailable),
        (OutcomeUnknown,),
    ),
    "publish_many": (
        lambda e, t: e.publish_many("t", ["x", "y"], timeout=t),
        (RequestTimeout, Unavailable),
        (OutcomeUnknown,),
    ),
    "create_topic": (
        lambda e, t: e.create_topic("new", timeout=t),
        (RequestTimeout, Unavailable),
        (OutcomeUnknown,),
    ),
    "delete_topic": (
        lambda e, t: e.delete_topic("t", timeout=t),
        (RequestTimeout, Unavailable),
        (OutcomeUnknown,),
    ),
    "list_topics": (lambda e, t: e.list_topics(timeout=t), (Unavailable,), (Unavailable,)),
    "describe_topic": (
        lambda e, t: e.describe_topic("t", timeout=t),
        (Unavailable,),
        (Unavailable,),
    ),
    "offsets": (
        lambda e, t: e.offsets("t", timeout=t),
        (RequestTimeout, Unavailable),
        (RequestTimeout, Unavailable),
    ),
    "subscribe": (_poll, (RequestTimeout, Unavailable), (RequestTimeout, Unavailable)),
    "subscribe to a pattern": (
        lambda e, t: e.subscribe("t*", timeout=t).__aenter__(),
        (Unavailable,),
        (Unavailable,),
    ),
    "publish_to_many": (
        lambda e, t: e.publish_to_many(["t", "t"], Message(payload="x"), timeout=t),
        (RequestTimeout, Unavailable),
        (OutcomeUnknown,),
    ),
    "a producer": (_send, (RequestTimeout, Unavailable), (OutcomeUnknown, Unavailable)),
    "history": (
        lambda e, t: e.history("t", 5, timeout=t),
        (RequestTimeout, Unavailable),
        (RequestTimeout, Unavailable),
    ),
    "history_after": (
        lambda e, t: e.history_after("t", datetime.now(UTC), timeout=t),
        (RequestTimeout, Unavailable),
        (RequestTimeout, Unavailable),
    ),
    "stats": (lambda e, t: e.stats(timeout=t), (Unavailable,), (Unavailable,)),
    "unknown topic": (
        lambda e, t: e.publish("u", Message(payload="x"), timeout=t),
        (Unavailable,),
        (Unavailable,),
    ),
}


async def _times_out(
    engine: StreamingEngine,
    call: Callable[[StreamingEngine, float], Awaitable[Any]],
    expected: tuple[type[AegisError], ...],
) -> None:
    loop = asyncio.get_running_loop()
    start = loop.time()
    with pytest.raises(expected):
        await asyncio.wait_for(call(engine, 0.15), 3)
    assert loop.time() - start < 0.15 + SLACK_S


def test_connecting_to_nothing_ends_in_time() -> None:
    async def test() -> None:
        async with fake_node() as node:
            endpoint = node.endpoint
        start = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable):
            async with StreamingEngine.connect(endpoint, request_timeout=0.1):
                pass
        assert asyncio.get_running_loop().time() - start < 0.1 + SLACK_S

    run(test())


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("producing", [False, True], ids=["new", "with a producer"])
def test_with_nobody_there_every_call_ends_in_time_and_says_it_did_not_happen(
    name: str, producing: bool
) -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            if producing:
                await engine.publish("t", Message(payload="before"))
            await node.close()
            # Before a client has noticed, what it sends may have been heard for all it knows.
            links = engine.cluster._links.values()
            await until(lambda: not any(link.is_ready for link in links))
            call, expected, _ = CALLS[name]
            await _times_out(engine, call, expected)

    run(test())


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_with_no_answer_every_call_ends_in_time_and_says_what_is_known(name: str) -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            await engine.publish("t", Message(payload="before"))
            for api in Api:
                if api is not Api.HELLO:
                    node.answers[api] = mute
            call, _, expected = CALLS[name]
            await _times_out(engine, call, expected)

    run(test())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lag", "seek", "step", "batches"])
@pytest.mark.parametrize("dead", [False, True], ids=["no answer", "nobody there"])
def test_calls_of_a_subscriber_end_in_time(name: str, dead: bool) -> None:
    calls: dict[str, Callable[[Subscriber], Awaitable[Any]]] = {
        "lag": lambda s: s.lag(timeout=0.15),
        "seek": lambda s: s.seek(0, Offset.LATEST, timeout=0.15),
        "step": lambda s: s.poll(timeout=0.15),
    }

    async def test() -> None:
        async with (
            fake_node(topic_info()) as node,
            engine_at(node) as engine,
            engine.subscribe("t", EARLIEST) as subscriber,
        ):
            if dead:
                await node.close()
            for api in Api:
                if api is not Api.HELLO:
                    node.answers[api] = mute
            loop = asyncio.get_running_loop()
            start = loop.time()
            if name == "batches":
                waiting = asyncio.ensure_future(anext(subscriber.batches()))
                loop.call_later(0.15, lambda: loop.create_task(subscriber.close()))
                with pytest.raises(StopAsyncIteration):
                    await asyncio.wait_for(waiting, 3)
            elif name == "step":
                assert await calls[name](subscriber) == []
            else:
                with pytest.raises((RequestTimeout, Unavailable)):
                    await asyncio.wait_for(calls[name](subscriber), 3)
            assert loop.time() - start < 0.15 + SLACK_S

    run(test())


@pytest.mark.slow
def test_without_a_leader_a_write_certainly_did_not_happen() -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            node.answers[Api.PRODUCE] = lambda _: [[[int(Code.NOT_LEADER), "nobody", {}]]]
            call, _, _ = CALLS["publish"]
            await _times_out(engine, call, (RequestTimeout,))
            node.answers[Api.LIST_OFFSETS] = lambda _: [[[int(Code.NOT_LEADER), "nobody", {}]]]
            call, _, _ = CALLS["offsets"]
            await _times_out(engine, call, (RequestTimeout, Unavailable))
            node.answers[Api.CREATE_TOPIC] = no_leader
            call, _, _ = CALLS["create_topic"]
            await _times_out(engine, call, (RequestTimeout, Unavailable))

    run(test())


# ---- publishing


def test_what_is_published_is_acknowledged_where_it_stands() -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            first = await engine.publish("t", Message(key="k", payload={"a": 1}))
            second = await engine.publish("t", Message(payload=b"b"))
            assert (first.partition, first.offset, second.offset) == (0, 0, 1)
            messages = await read(engine, 2)
            assert [(m.key, m.payload) for m in messages] == [("k", {"a": 1}), (None, b"b")]

    run(test())


def test_a_topic_that_is_not_there() -> None:
    async def test() -> None:
        async with fake_node() as node, engine_at(node) as engine:
            with pytest.raises(TopicNotFound):
                await engine.publish("t", Message(payload="x"))
            with pytest.raises(TopicNotFound):
                await engine.publish_many("t", ["x"])
            with pytest.raises(TopicNotFound):
                await engine.offsets("t")
            with pytest.raises(TopicNotFound):
                await engine.describe_topic("t")
            with pytest.raises(TopicNotFound):
                await _poll(engine, 1.0)

    run(test())


def test_a_refused_batch_says_so_and_the_next_one_goes() -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            node.answers[Api.PRODUCE] = lambda _: [[[int(Code.MESSAGE_TOO_LARGE), "no", {}]]]
            with pytest.raises(MessageTooLarge):
                await engine.publish("t", Message(payload="x"))
            node.answers[Api.PRODUCE] = node.produce
            assert (await engine.publish("t", Message(payload="y"))).offset == 0

    run(test())


def test_an_unanswered_write_is_sent_again_with_the_same_sequence() -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            tries: list[Request] = []

            def second_time(request: Request) -> Any:
                tries.append(request)
                if len(tries) == 1:
                    raise NotReady("not now")
                return node.produce(request)

            node.answers[Api.PRODUCE] = second_time
            assert (await engine.publish("t", Message(payload="x"))).offset == 0
            assert len(tries) == 2
            assert tries[0].parts == tries[1].parts

    run(test())


def test_partly_published_names_what_went_what_did_not_and_what_is_unknown() -> None:
    async def test() -> None:
        info = topic_info(partitions=3)
        async with fake_node(info) as node, engine_at(node) as engine:

            def answer(request: Request) -> Any:
                groups = [item[0] for item in request.fields[0]]
                if 3 in groups:
                    return None  # its request is never answered
                results: list[Any] = []
                for group, part in zip(groups, request.parts, strict=True):
                    if group == 1:
                        results.append([0, node.append(1, bytes(part)), 1])
                    else:
                        results.append([int(Code.MESSAGE_TOO_LARGE), "no", {}])
                return [results]

            keys = _keys_for_partitions(3)
            node.answers[Api.PRODUCE] = answer
            with pytest.raises(PartlyPublished) as raised:
                # One partition alone, so that its request is its own.
                await engine.publish_many(
                    "t", ["a", "b", "c"], [keys[0], keys[0], keys[1]], timeout=2
                )
            assert [(r.partition, r.base_offset, r.count) for r in raised.value.receipts] == [
                (0, 0, 2)
            ]
            assert (raised.value.failed, raised.value.unknown) == ([2], [])
            with pytest.raises(PartlyPublished) as raised:
                await engine.publish_many("t", ["d"], [keys[2]], timeout=0.1)
            assert (raised.value.failed, raised.value.unknown) == ([], [0])

    run(test())


def _keys_for_partitions(count: int) -> list[str]:
    found: dict[int, str] = {}
    for number in range(1_000):
        found.setdefault(partition_for(str(number).encode(), count), str(number))
    return [found[partition] for partition in range(count)]


@pytest.mark.parametrize(
    ("bad", "error"),
    [("x" * 5_000, MessageTooLarge), ((1, 2), UnsupportedPayload)],
    ids=["too large", "not to be sent"],
)
def test_one_bad_message_among_good_ones(bad: Any, error: type[Refused]) -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            with pytest.raises(PartlyPublished) as raised:
                await engine.publish_many("t", ["a", bad, "b"])
            assert isinstance(raised.value.__cause__, error)
            assert (raised.value.failed, raised.value.unknown) == ([1], [])
            assert sum(receipt.count for receipt in raised.value.receipts) == 2
            assert [m.payload for m in await read(engine, 2)] == ["a", "b"]
            with pytest.raises(error):
                await engine.publish_many("t", [bad])

    run(test())


def test_as_many_keys_as_messages() -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            with pytest.raises(Misuse):
                await engine.publish_many("t", ["a", "b"], ["k"])
            assert node.count(Api.PRODUCE) == 0
            assert await engine.publish_many("t", []) == []

    run(test())


def test_a_full_buffer_makes_senders_wait_and_ends_their_wait_at_the_deadline() -> None:
    async def test() -> None:
        info = topic_info()
        async with fake_node(info) as node, engine_at(node) as engine:
            gate = asyncio.Event()

            async def slowly(request: Request) -> Any:
                await gate.wait()
                return node.produce(request)

            node.answers[Api.PRODUCE] = slowly
            cluster = engine.cluster
            producer = Producer(cluster, ProducerOptions(buffer_bytes=1_000))
            try:
                await producer.start(cluster.deadline(2))
                row: Row = (1, None, b"x" * 400, [])
                deadline = cluster.deadline(4)
                futures = [(await producer.add(info, 0, row, deadline))[0] for _ in range(2)]
                with pytest.raises(RequestTimeout):
                    await producer.add(info, 0, row, cluster.deadline(0.05))
                third = asyncio.create_task(producer.add(info, 0, row, deadline))
                await asyncio.sleep(0)
                assert not third.done()
                gate.set()
                futures.append((await third)[0])
                assert sorted(
                    stored.base_offset for stored in await asyncio.gather(*futures)
                ) == sorted(f.result().base_offset for f in futures)
                assert producer._buffered == 0
                assert node.end(1) == 3
            finally:
                await producer.close()

    run(test())


def test_messages_without_keys_are_spread_batch_by_batch() -> None:
    async def test() -> None:
        info = topic_info(partitions=4, max_message_bytes=200_000)
        async with fake_node(info) as node, engine_at(node) as engine:
            receipts = await engine.publish_many("t", [b"x" * 100_000 for _ in range(80)])
            counts = [sum(r.count for r in receipts if r.partition == p) for p in range(4)]
            assert counts == [20] * 4  # two batches of 1 MB each
            assert max(len(values) for batches in node.produced for _, values in batches) == 10

    run(test())


def test_messages_with_keys_keep_their_order_in_one_partition() -> None:
    async def test() -> None:
        async with fake_node(topic_info(partitions=4)) as node, engine_at(node) as engine:
            keys = [f"k{number % 7}" for number in range(200)]
            await engine.publish_many("t", list(range(200)), keys)
            messages = await read(engine, 200)
            for key in set(keys):
                mine = [m for m in messages if m.key == key]
                assert len({m.partition for m in mine}) == 1
                assert [m.payload for m in mine] == [n for n in range(200) if keys[n] == key]

    run(test())


def test_a_busy_producer_makes_larger_batches() -> None:
    async def test() -> None:
        info = topic_info()
        async with fake_node(info) as node, engine_at(node) as engine:
            gate = asyncio.Event()

            async def first_waits(request: Request) -> Any:
                if node.count(Api.PRODUCE) == 1:
                    await gate.wait()
                return node.produce(request)

            node.answers[Api.PRODUCE] = first_waits
            sends = [asyncio.create_task(engine.publish("t", Message(payload=0)))]
            await until(lambda: bool(node.count(Api.PRODUCE)))
            sends += [
                asyncio.create_task(engine.publish("t", Message(payload=n))) for n in range(1, 30)
            ]
            await until(lambda: node.count(Api.PRODUCE) >= 2)
            gate.set()
            await asyncio.gather(*sends)
            sizes = [len(values) for batches in node.produced for _, values in batches]
            assert sum(sizes) == 30
            assert max(sizes) == 29, "what comes while a request is under way goes together"

    run(test())


def test_a_hasty_message_does_not_take_patient_ones_along() -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            gate = asyncio.Event()

            async def first_waits(request: Request) -> Any:
                await gate.wait()
                return node.produce(request)

            node.answers[Api.PRODUCE] = first_waits
            patient = [asyncio.create_task(engine.publish("t", Message(payload=0)))]
            await until(lambda: node.count(Api.PRODUCE) == 1)
            patient.append(asyncio.create_task(engine.publish("t", Message(payload=1))))
            await asyncio.sleep(0)
            with pytest.raises((OutcomeUnknown, RequestTimeout)):
                await engine.publish("t", Message(payload=2), timeout=0.05)
            gate.set()
            assert [(await task).offset for task in patient] == [0, 1]

    run(test())


def test_closing_ends_what_is_under_way() -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node:
            async with engine_at(node) as engine:
                node.answers[Api.PRODUCE] = mute
                task = asyncio.create_task(engine.publish("t", Message(payload="x")))
                await until(lambda: bool(node.count(Api.PRODUCE)))
            with pytest.raises(OutcomeUnknown):
                await asyncio.wait_for(task, 1)

    run(test())


def test_an_engine_that_is_not_open() -> None:
    async def test() -> None:
        with pytest.raises(Misuse):
            await StreamingEngine.connect("tcp://127.0.0.1:1").list_topics()

    run(test())


# ---- topics


def test_creating_what_exists() -> None:
    async def test() -> None:
        def exists(_: Request) -> None:
            raise TopicExists("there")

        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            node.answers[Api.CREATE_TOPIC] = exists
            with pytest.raises(TopicExists):
                await engine.create_topic("t")
            await engine.create_topic("t", exist_ok=True)

    run(test())


@pytest.mark.slow
def test_creating_after_a_lost_answer_is_unknown_when_somebody_else_has_the_name() -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            tokens: list[str] = []

            def once_mute(request: Request) -> Any:
                tokens.append(request.fields[4])
                if len(tokens) == 1:
                    raise OutcomeUnknown("stepped down")
                return [1]

            node.answers[Api.CREATE_TOPIC] = once_mute
            await engine.create_topic("t")
            assert len(tokens) == 2
            assert tokens[0] == tokens[1], "by which the controller knows the repeat"

            def then_exists(_: Request) -> Any:
                if node.count(Api.CREATE_TOPIC) == 3:
                    raise OutcomeUnknown("stepped down")
                raise TopicExists("there")

            node.answers[Api.CREATE_TOPIC] = then_exists
            with pytest.raises(OutcomeUnknown):
                await engine.create_topic("t")

    run(test())


def test_a_created_topic_is_never_reported_as_refused() -> None:
    async def test() -> None:
        async with fake_node() as node, engine_at(node) as engine:
            original = node.answers[Api.METADATA]

            def created(_: Request) -> list[int]:
                node.topics["t"] = topic_info()
                node.answers[Api.METADATA] = mute
                return [5]

            node.answers[Api.CREATE_TOPIC] = created
            await engine.create_topic("t", timeout=0.1)
            node.answers[Api.METADATA] = lambda request: [CLUSTER, 5, *original(request)[2:]]
            assert (await engine.publish("t", Message(payload="x"))).offset == 0
            assert node.requests[-1].api == Api.PRODUCE
            asked = [r.fields[0] for r in node.requests if r.api == Api.METADATA]
            assert asked[-1] == 5, "only metadata that knows of the topic counts"

    run(test())


CLUSTER = "fake"

# ---- reading


def test_reading_goes_on_over_refusals_and_lost_answers() -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            await engine.publish_many("t", list(range(10)))
            turns = 0

            async def rocky(request: Request) -> Any:
                nonlocal turns
                turns += 1
                if turns == 1:
                    raise NotReady("starting")
                if turns == 2:
                    return [[[int(Code.NOT_LEADER), "moved", {"leader": 1}]]], [b""]
                return await node.fetch(request)

            node.answers[Api.FETCH] = rocky
            assert [m.payload for m in await read(engine, 10)] == list(range(10))

    run(test())


def test_reading_from_an_offset_in_the_middle_of_a_batch() -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            await engine.publish_many("t", list(range(10)))
            config = SubscribeConfig(start=Offset.at(6))
            async with engine.subscribe("t", config) as subscriber:
                messages = await subscriber.poll(2, timeout=2)
                assert [(m.offset, m.payload) for m in messages] == [(6, 6), (7, 7)]
                assert subscriber.positions == {0: 8}
                assert [m.offset for m in await subscriber.poll(timeout=2)] == [8, 9]
                assert await subscriber.poll(timeout=0.02) == []

    run(test())


def test_reading_the_latest_gets_only_what_comes() -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            await engine.publish("t", Message(payload="old"))
            async with engine.subscribe("t") as subscriber:
                await engine.publish("t", Message(payload="new"))
                assert [m.payload for m in await subscriber.poll(timeout=2)] == ["new"]

    run(test())


def test_an_offset_out_of_range_is_said() -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            node.answers[Api.FETCH] = lambda _: (
                [[[int(Code.OFFSET_OUT_OF_RANGE), "beyond", {}]]],
                [b""],
            )
            async with engine.subscribe("t", EARLIEST) as subscriber:
                with pytest.raises(OffsetOutOfRange):
                    await subscriber.poll(timeout=2)

    run(test())


def test_a_topic_deleted_while_it_is_read() -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            await engine.publish("t", Message(payload="x"))
            async with engine.subscribe("t", EARLIEST) as subscriber:
                assert len(await subscriber.poll(timeout=2)) == 1
                node.topics.clear()
                node.answers[Api.FETCH] = lambda _: ([[[int(Code.NOT_LEADER), "", {}]]], [b""])
                with pytest.raises(TopicNotFound):
                    await subscriber.poll(timeout=2)

    run(test())


def test_closing_a_subscriber_ends_a_step_that_waits() -> None:
    async def test() -> None:
        async with fake_node(topic_info()) as node, engine_at(node) as engine:
            subscriber = engine.subscribe("t", EARLIEST)

            async def step() -> list[Any]:
                return [message async for message in subscriber]

            task = asyncio.create_task(step())
            await until(lambda: bool(node.count(Api.FETCH)))
            await subscriber.close()
            assert await asyncio.wait_for(task, 1) == []

    run(test())


# ---- times


@given(st.integers(0, 4_000_000_000_000))
def test_times_come_back_equal(time_ms: int) -> None:
    assert message_module.to_ms(message_module.from_ms(time_ms)) == time_ms


@given(st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001 - the strategy adds the zone
def test_times_are_cut_to_the_millisecond(time: datetime) -> None:
    cut = time.replace(microsecond=time.microsecond // 1000 * 1000)
    assert message_module.from_ms(message_module.to_ms(time)) == cut
