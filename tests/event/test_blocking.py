"""The blocking twins of durable consumers and projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster import sync
from aegis_cluster.errors import LockLost
from aegis_cluster.event import Event, StateProjection
from aegis_cluster.persistent import PersistentConfig

if TYPE_CHECKING:
    from pathlib import Path

WAIT_S = 20.0


class Totals(StateProjection):
    """How much each account has."""

    name, streams = "totals", "account-*"

    def fold(self, state: Any, event: Event) -> Any:
        return {"total": state.get("total", 0) + event.data["amount"]}


def test_events_are_taken_settled_and_handed_out_again(tmp_path: Path) -> None:
    with sync.StreamingEngine.open(tmp_path) as engine:
        store = sync.EventStore(engine, partitions=1)
        store.append("account-1", [Event("Deposited", {"amount": n}) for n in range(4)])
        store.append("order-1", Event("Placed", {}))
        config = PersistentConfig(ordered=True, ack_timeout="30s")
        with store.persistent_subscription("billing", "account-*", config=config) as consumer:
            first = next(consumer)
            assert (first.data, first.version, first.delivery_count) == ({"amount": 0}, 0, 1)
            first.extend()
            first.nack()
            (again,) = consumer.poll(1, WAIT_S)
            assert (again.version, again.delivery_count) == (0, 2)
            again.ack()
            with pytest.raises(LockLost):
                again.ack()
            next(consumer).park("not now")
            for version in (2, 3):  # those of one stream come one after the other
                (event,) = consumer.poll(timeout=WAIT_S)
                assert event.version == version
                consumer.ack([event])
            assert [parked.reason for parked in consumer.subscription.parked()] == ["not now"]


def test_a_projection_catches_up_and_is_built_anew(tmp_path: Path) -> None:
    with sync.StreamingEngine.open(tmp_path / "data") as engine:
        store = sync.EventStore(engine, partitions=1)
        store.append("account-1", [Event("Deposited", {"amount": n}) for n in range(4)])
        with sync.ProjectionRunner(store, Totals(), tmp_path / "totals.db") as totals:
            assert totals.catch_up() == 4
            store.append("account-2", Event("Deposited", {"amount": 7}))
            assert totals.catch_up() == 1
            assert totals.states() == {"account-1": {"total": 6}, "account-2": {"total": 7}}
            assert totals.rebuild() == totals.applied == 5
            assert totals.state("account-2") == {"total": 7}
            assert totals.query(f"SELECT count(*) FROM {Totals().table}") == [(2,)]
            assert totals.position.as_dict() == {0: 5}
