"""The blocking classes: the same calls, from plain code and from several threads."""

from __future__ import annotations

import inspect
import threading
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

import aegis_cluster
from aegis_cluster import (
    DeliveryMode,
    Message,
    Offset,
    ProducerConfig,
    SubscribeConfig,
    TopicConfig,
    TransactionOutcome,
    sync,
)
from aegis_cluster.errors import LockLost, Misuse, NoOpenTransaction, NotReady, TopicNotFound
from tests.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

TWINS = [
    "StreamingEngine",
    "Producer",
    "Transaction",
    "Subscriber",
    "Channel",
    "ConsumerGroup",
    "PersistentSubscription",
]
EARLIEST = SubscribeConfig(start=Offset.EARLIEST)
NOT_FOR_USERS = {
    *("cluster", "background", "deadline", "forget", "started", "buffered_bytes"),
    *("publish", "publish_many", "handled", "begin", "stop", "is_waiting"),
    *("go_back", "go_back_for", "is_committed_by", "positions_in_hand", "commit_within"),
    *(
        "committed_within",
        "group_id",
        "drop",
        "is_embedded",
        "is_closed",
        "send_encoded",
        "member_id",
    ),
}
"""Names that are public between our own modules only (of `Producer` and the engine)."""


@pytest.mark.parametrize("name", TWINS)
def test_every_public_call_has_its_blocking_twin(name: str) -> None:
    wanted = {n for n in vars(getattr(aegis_cluster, name)) if not n.startswith("_")}
    have = {n for n in dir(getattr(sync, name)) if not n.startswith("_")}
    assert wanted - have <= NOT_FOR_USERS | {"hand_out_again"}


@pytest.mark.parametrize("name", TWINS)
def test_signatures_are_the_same(name: str) -> None:
    inner, outer = getattr(aegis_cluster, name), getattr(sync, name)
    for call in vars(outer):
        if call.startswith("_") or not inspect.isfunction(getattr(outer, call)):
            continue
        if hasattr(inner, call):
            assert (
                str(inspect.signature(getattr(outer, call))).split("->")[0]
                == str(inspect.signature(getattr(inner, call))).split("->")[0]
            )


def test_a_persistent_subscription_without_asyncio(tmp_path: Path) -> None:
    with sync.StreamingEngine.open(tmp_path, request_timeout=10) as engine:
        engine.create_topic("t")
        engine.publish_many("t", [1, 2, 3])
        with engine.persistent_subscription("t", "work") as subscription:
            first = next(subscription)
            subscription.ack(first)
            second, third = subscription.poll(2)
            second.park("odd")
            third.extend()
            third.nack()
            again = next(subscription)
            assert (again.payload, again.delivery_count) == (3, 2)
            again.ack()
            with pytest.raises(LockLost):
                subscription.ack([again])
            assert [one.reason for one in subscription.parked()] == ["odd"]
            assert sum(subscription.lag().values()) == 0
        assert [one.name for one in engine.list_subscriptions("t")] == ["work"]


def test_a_group_without_asyncio(tmp_path: Path) -> None:
    told: list[str] = []
    with sync.StreamingEngine.open(tmp_path, request_timeout=10) as engine:
        engine.create_topic("t")
        engine.publish_many("t", [1, 2, 3])
        config = SubscribeConfig(group_id="g", start=Offset.EARLIEST)
        subscriber = engine.subscribe("t", config)
        # A callback may block, and ask its subscriber.
        subscriber.on_assigned = lambda places: told.append(f"got {len(subscriber.positions)}")
        subscriber.on_revoked = lambda places: told.append(f"lost {len(places)}")
        assert subscriber.on_assigned is not None
        with subscriber:
            for message in subscriber:
                message.ack()
                if message.payload == 3:
                    break
            subscriber.commit()
            assert sum(engine.group("g").lag().values()) == 0
    assert [what.split()[0] for what in told] == ["got", "lost"]


def test_from_the_first_message_to_the_last(tmp_path: Path) -> None:
    with sync.StreamingEngine.open(tmp_path, request_timeout=10) as engine:
        engine.create_topic("t", TopicConfig(partitions=1))
        assert engine.publish("t", Message(payload=0)).offset == 0
        engine.publish_many("t", [1, 2])
        with engine.producer() as producer:
            pending = producer.send("t", Message(payload=3))
            assert pending.result().offset == 3
            assert pending.done
            producer.flush()
        with engine.subscribe("t", EARLIEST) as subscriber:
            assert [next(subscriber).payload for _ in range(2)] == [0, 1]
            subscriber.poll(1)[0].nack()
            two = next(subscriber)
            two.ack()
            assert two.payload == 2
            assert set(subscriber.lag().values()) == {1}
            subscriber.seek(0, 1)
            values: list[int] = []
            for batch in subscriber.batches():  # how many there are depends on what left together
                values += batch.values
                if len(values) >= 3:
                    break
            assert values == [1, 2, 3]
            assert subscriber.positions == {0: 4}
            assert subscriber.position(0) == 4
            subscriber.pause()
            subscriber.resume(subscriber.assignment)
        channel = engine.channel("t")
        assert [m.payload for m in channel.history(2)] == [2, 3]
        assert channel.history_after(datetime.now(UTC)) == []
        assert len(engine.history("t", 10)) == 4
        assert engine.stats().messages == 4
        with pytest.raises(TopicNotFound):
            engine.describe_topic("u")
        with pytest.raises(NotReady), sync.StreamingEngine.open(tmp_path):
            pass
    with pytest.raises(Misuse, match="not open"):
        engine.list_topics()
    assert "aegis-sync" not in [thread.name for thread in threading.enumerate()]


def test_a_transaction_in_a_block(tmp_path: Path) -> None:
    once = SubscribeConfig(
        group_id="g", start=Offset.EARLIEST, delivery_mode=DeliveryMode.EXACTLY_ONCE
    )
    with sync.StreamingEngine.open(tmp_path, request_timeout=10) as engine:
        engine.create_topic("in")
        engine.create_topic("out")
        engine.publish_many("in", range(4))
        config = ProducerConfig(transactional_id="billing-1")
        with engine.producer(config) as producer, engine.subscribe("in", once) as subscriber:
            for fails in (True, False):
                messages = subscriber.poll(4)
                with suppress(ZeroDivisionError), producer.transaction(subscriber) as tx:
                    for message in messages:
                        tx.send("out", Message(payload=message.payload))
                    if fails:
                        raise ZeroDivisionError
                    tx.send_offsets(subscriber)
            assert tx.outcome() is TransactionOutcome.COMMITTED
        assert [m.payload for m in engine.history("out", 10)] == [0, 1, 2, 3]
        (listed,) = engine.list_transactions()
        assert (listed.transactional_id, listed.state) == ("billing-1", "idle")
        assert engine.describe_transaction("billing-1").outcomes[-1].committed
        with pytest.raises(NoOpenTransaction):
            engine.abort_transaction("billing-1")


def test_one_engine_from_several_threads(tmp_path: Path) -> None:
    with sync.StreamingEngine.open(tmp_path, request_timeout=10) as engine:
        engine.create_topic("t", TopicConfig(partitions=2))

        def publish(first: int) -> None:
            for number in range(first, first + 25):
                engine.publish("t", Message(key=str(number), payload=number))

        threads = [threading.Thread(target=publish, args=(25 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(m.payload for m in engine.history("t", 200)) == list(range(100))


def test_closing_ends_a_step_that_waits(tmp_path: Path) -> None:
    with sync.StreamingEngine.open(tmp_path, request_timeout=10) as engine:
        engine.create_topic("t")
        subscriber = engine.subscribe("t")
        found: list[object] = []
        thread = threading.Thread(target=lambda: found.extend(subscriber))
        thread.start()
        wait_until(lambda: bool(subscriber.assignment), "the subscriber starts")
        subscriber.close()
        thread.join(5)
        assert not thread.is_alive()
        assert found == []
