"""What callers hand over by mistake: every public call refuses it with a typed error and a
sentence, sends nothing, and leaves the engine, its producers and subscribers as they were."""

from __future__ import annotations

import asyncio
import inspect
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import (
    EventFilter,
    Message,
    Offset,
    PersistentConfig,
    ProducerConfig,
    StreamingEngine,
    SubscribeConfig,
    TopicConfig,
)
from aegis_cluster.errors import AegisError, ConfigError, Misuse, UnsupportedPayload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from aegis_cluster import Producer, Subscriber

    Case = tuple[str, type[AegisError], Callable[[], Any]]

NAIVE = datetime(2020, 1, 1)  # noqa: DTZ001 - that it names no moment is the point
HALF = "\ud800"


def one(**fields: Any) -> Message:
    return Message(**{"payload": 1, **fields})


def always(_: object) -> bool:
    return True


def configured(
    call: Callable[..., Any], kind: type[Any], fields: dict[str, Any], *before: Any
) -> Any:
    """The call, with a configuration that is made only now."""
    return call(*before, kind(**fields))


def publishing(e: Any, p: Any) -> Iterator[Case]:
    wrong: Any
    for what, wrong in (("bytes", b"x"), ("None", None), ("a dict", {"a": 1})):
        yield f"publish {what}", Misuse, partial(e.publish, "t", wrong)
        yield f"send {what}", Misuse, partial(p.send, "t", wrong)
        yield f"publish_to_many {what}", Misuse, partial(e.publish_to_many, ["t"], wrong)
        yield f"channel.publish {what}", Misuse, partial(e.channel("t").publish, wrong)
    for wrong in (5, None, ["t"], b"t", HALF):
        yield f"publish to {wrong!r}", Misuse, partial(e.publish, wrong, one())
        yield f"publish_many to {wrong!r}", Misuse, partial(e.publish_many, wrong, [1])
        yield f"send to {wrong!r}", Misuse, partial(p.send, wrong, one())
        yield f"publish_to_many {wrong!r}", Misuse, partial(e.publish_to_many, [wrong], one())
    for kind, fields in (
        (UnsupportedPayload, {"key": 5}),
        (UnsupportedPayload, {"key": ["a"]}),
        (UnsupportedPayload, {"key": HALF}),
        (UnsupportedPayload, {"payload": object()}),
        (UnsupportedPayload, {"payload": (1, 2)}),
        (UnsupportedPayload, {"payload": {1: 2}}),
        (UnsupportedPayload, {"payload": float("nan")}),
        (UnsupportedPayload, {"payload": HALF}),
        (Misuse, {"headers": ["a"]}),
        (Misuse, {"headers": "a"}),
        (Misuse, {"headers": {"a": 1}}),
        (Misuse, {"headers": {1: "a"}}),
        (Misuse, {"headers": {HALF: "a"}}),
        (Misuse, {"headers": {"a": HALF}}),
        (Misuse, {"headers": {"aegis": "a"}}),
        (Misuse, {"timestamp": NAIVE}),
        (Misuse, {"timestamp": 5}),
        (Misuse, {"timestamp": datetime(1, 1, 1, tzinfo=UTC)}),
    ):
        yield f"publish {fields}", kind, partial(e.publish, "t", one(**fields))
        yield f"send {fields}", kind, partial(p.send, "t", one(**fields))
        yield f"publish_many {fields}", kind, partial(e.publish_many, "t", [one(**fields)])
    for wrong in (5, None, "abc", b"abc", {"a": 1}, one()):
        yield f"publish_many {wrong!r}", Misuse, partial(e.publish_many, "t", wrong)
    for keys in (5, "abc", ["a", "b"]):
        yield f"publish_many keys={keys}", Misuse, partial(e.publish_many, "t", [1], keys=keys)
    yield "publish_many keys=[5]", UnsupportedPayload, partial(e.publish_many, "t", [1], keys=[5])
    for topics in ("t", 5):
        yield f"publish_to_many {topics}", Misuse, partial(e.publish_to_many, topics, one())
    for timeout in ("5s", float("nan"), True):
        yield f"publish in {timeout}", Misuse, partial(e.publish, "t", one(), timeout=timeout)
        yield f"send in {timeout}", Misuse, partial(p.send, "t", one(), timeout=timeout)
        yield f"flush in {timeout}", Misuse, partial(p.flush, timeout=timeout)
        yield f"stats in {timeout}", Misuse, partial(e.stats, timeout=timeout)
    for wrong in ({"acks": "leader"}, "leader", SubscribeConfig()):
        yield f"producer({wrong!r})", Misuse, partial(e.producer, wrong)
    for fields in (
        {"acks": "all"}, {"acks": 1}, {"linger": 5}, {"linger": "x"}, {"batch_size": -1},
        {"batch_size": 1.5}, {"buffer_size": "1B"}, {"compression": "x"}, {"compression": 5},
        {"idempotent": "yes"}, {"request_timeout": 30}, {"request_timeout": "soon"},
        {"transactional_id": 5}, {"transactional_id": ""},
    ):  # fmt: skip
        yield (
            f"producer {fields}",
            ConfigError,
            partial(configured, e.producer, ProducerConfig, fields),
        )


def topics(e: Any) -> Iterator[Case]:
    wrong: Any
    for wrong in (5, None, ["t"], HALF):
        for call in ("create_topic", "delete_topic", "describe_topic", "offsets", "channel"):
            yield f"{call}({wrong!r})", Misuse, partial(getattr(e, call), wrong)
        yield f"alter {wrong!r}", Misuse, partial(e.alter_topic, wrong, partitions=2)
        yield f"history of {wrong!r}", Misuse, partial(e.history, wrong, 3)
        yield (
            f"history after {wrong!r}",
            Misuse,
            partial(e.history_after, wrong, NAIVE),
        )
    for wrong in ({"partitions": 3}, 3, SubscribeConfig()):
        yield f"create with {wrong!r}", Misuse, partial(e.create_topic, "n", wrong)
        yield f"alter with {wrong!r}", Misuse, partial(e.alter_topic, "t", wrong)
    yield "alter nothing", Misuse, partial(e.alter_topic, "t")
    yield "alter what is unknown", Misuse, partial(e.alter_topic, "t", colour=3)
    for fields in (
        {"partitions": "4"}, {"partitions": 0}, {"partitions": -1}, {"partitions": 1.5},
        {"partitions": True}, {"replication_factor": "3"}, {"replication_factor": 0},
        {"retention": 7}, {"retention": "soon"}, {"retention_bytes": -1}, {"cleanup": 5},
        {"compression": 5}, {"max_message_size": [1]}, {"kind": 5},
    ):  # fmt: skip
        yield (
            f"create {fields}",
            ConfigError,
            partial(configured, e.create_topic, TopicConfig, fields, "n"),
        )
        yield (
            f"alter {fields}",
            ConfigError,
            partial(configured, e.alter_topic, TopicConfig, fields, "t"),
        )
    for count in (-1, 0, "3", 1.5, None):
        yield f"history of {count}", Misuse, partial(e.history, "t", count)
    for time in (NAIVE, 5, None):
        yield f"history after {time}", Misuse, partial(e.history_after, "t", time)
    yield "list_topics in", Misuse, partial(e.list_topics, timeout="x")


def reading(e: Any, s: Any) -> Iterator[Case]:
    wrong: Any
    for wrong in (5, None, [5], [], {"t": 1}, b"t", HALF):
        yield f"subscribe {wrong!r}", Misuse, partial(e.subscribe, wrong)
    for wrong in ("earliest", TopicConfig(), {"group_id": "g"}, Offset.EARLIEST):
        yield f"subscribe with {wrong!r}", Misuse, partial(e.subscribe, "t", wrong)
    yield "subscribe filter", Misuse, partial(e.subscribe, "t", filter=always)
    yield "subscribe in", Misuse, partial(e.subscribe, "t", timeout="x")
    for fields in (
        {"group_id": 5}, {"group_id": ""}, {"start": "earliest"}, {"start": 5},
        {"delivery_mode": "at_least_once"}, {"ack_mode": "auto"}, {"isolation": 5},
        {"max_poll_records": "5"}, {"max_poll_records": 0}, {"max_poll_records": True},
        {"session_timeout": 30, "group_id": "g"}, {"member_id": 5, "group_id": "g"},
        {"member_id": "m"},
    ):  # fmt: skip
        yield f"SubscribeConfig {fields}", ConfigError, partial(SubscribeConfig, **fields)
    for fields in (
        {"keys": "abc"}, {"keys": 5}, {"key_prefix": 5}, {"headers": 5}, {"where": 5},
    ):  # fmt: skip
        yield f"EventFilter {fields}", Misuse, partial(EventFilter, **fields)
    number: Any
    for number in (-1, "5", 1.5, None):
        yield f"Offset.at({number!r})", Misuse, partial(Offset.at, number)
        yield f"poll({number!r})", Misuse, partial(s.poll, number or 0)
        yield f"seek to {number!r}", Misuse, partial(s.seek, 0, number)
    time: Any
    for time in (NAIVE, 5, None):
        yield f"Offset.at_time({time!r})", Misuse, partial(Offset.at_time, time)
    for partition in ("0", 9, -1, 1.5, None):
        yield f"seek in {partition!r}", Misuse, partial(s.seek, partition, 5)
        yield f"position of {partition!r}", Misuse, partial(s.position, partition)
    for partitions in (0, "0", [9], ["0"]):
        yield f"pause {partitions!r}", Misuse, partial(s.pause, partitions)
        yield f"resume {partitions!r}", Misuse, partial(s.resume, partitions)
    yield "poll in", Misuse, partial(s.poll, 5, timeout="x")
    yield "lag in", Misuse, partial(s.lag, timeout="x")
    yield "commit without a group", Misuse, partial(s.commit)
    for wrong in (5, None, HALF):
        yield f"group {wrong!r}", Misuse, partial(e.group, wrong)
    for wrong in ({"max_in_flight": 5}, "x", SubscribeConfig()):
        subscribe = partial(e.persistent_subscription, "t", "b")
        yield f"persistent_subscription {wrong!r}", Misuse, partial(subscribe, wrong)
    for fields in (
        {"max_in_flight": "5"}, {"max_in_flight": 0}, {"max_deliveries": "5"}, {"dead_letter": 5},
        {"max_deliveries": -1}, {"ack_timeout": 5}, {"start": "earliest"}, {"lost": 5},
    ):  # fmt: skip
        yield f"PersistentConfig {fields}", ConfigError, partial(PersistentConfig, **fields)
    yield "reset to text", Misuse, partial(e.group("g").reset, "earliest")
    yield "reset of 5", Misuse, partial(e.group("g").reset, Offset.EARLIEST, 5)


def opening() -> Iterator[Case]:
    connect: Any = StreamingEngine.connect
    start: Any = StreamingEngine.open
    address = "tcp://127.0.0.1:7101"
    for path in (5, None, ""):
        yield f"open {path!r}", Misuse, partial(start, path)
    for timeout in ("5s", 0, -1, float("nan")):
        yield (
            f"open in {timeout}",
            Misuse,
            partial(start, "x", request_timeout=timeout),
        )
        yield f"connect in {timeout}", Misuse, partial(connect, address, request_timeout=timeout)
    yield "open durability", ConfigError, partial(start, "x", durability="x")
    yield "open config", Misuse, partial(start, "x", config={"a": 1})
    yield "connect keys", Misuse, partial(connect, address, keys="x")
    for text in (5, None, "", "localhost:7101", "tcp://h:99999", [address]):
        yield f"connect {text!r}", ConfigError, partial(connect, text)


def cases(engine: StreamingEngine, producer: Producer, subscriber: Subscriber) -> Iterator[Case]:
    yield from publishing(engine, producer)
    yield from topics(engine)
    yield from reading(engine, subscriber)
    yield from opening()


async def complaint(kind: type[AegisError], call: Callable[[], Any]) -> str | None:
    """What is wrong about how the call was refused; None: nothing."""
    try:
        async with asyncio.timeout(5):
            result = call()
            if inspect.isawaitable(result):
                result = await result
    except AegisError as error:
        text = str(error)
        if type(error) is not kind:
            return f"raised {type(error).__name__}: {text}"
        if not text.endswith((".", "…")) or not len(text.split()) > 2:
            return f"is no sentence: {text}"
        return None
    except Exception as error:  # noqa: BLE001 - what must not happen is told
        return f"raised a bare {type(error).__name__}: {error}"
    return f"was taken: {result!r}"


def test_every_public_call_refuses_what_it_does_not_take(tmp_path: Path) -> None:
    async def work() -> None:
        async with StreamingEngine.open(tmp_path / "data", request_timeout=5) as engine:
            await engine.create_topic("t")
            await engine.publish_many("t", [1, 2, 3])
            async with engine.producer() as producer, engine.subscribe("t") as subscriber:
                complaints = [
                    f"{name} {said}"
                    for name, kind, call in cases(engine, producer, subscriber)
                    if (said := await complaint(kind, call)) is not None
                ]
                assert complaints == []
                # Nothing has come through, and what is shared still works.
                assert await engine.list_topics() == ["t"]
                assert await (await producer.send("t", one(payload=4), timeout=float("inf")))
                assert [m.payload for m in await subscriber.poll(10, timeout=5)] == [4]
                assert [m.payload for m in await engine.history("t", 9)] == [1, 2, 3, 4]

    asyncio.run(work())


def test_nack_takes_seconds(tmp_path: Path) -> None:
    async def work() -> None:
        async with StreamingEngine.open(tmp_path / "data", request_timeout=5) as engine:
            await engine.create_topic("t")
            await engine.publish("t", one())
            (message,) = await engine.subscribe("t", SubscribeConfig(start=Offset.EARLIEST)).poll(1)
            with pytest.raises(Misuse, match="delay is '5'"):
                await message.nack("5")  # type: ignore[arg-type]

    asyncio.run(work())
