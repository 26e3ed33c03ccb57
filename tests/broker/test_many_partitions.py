"""More partitions than are opened, elected or removed in one turn; idle ones cost no ticks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.broker.campaigns import CAMPAIGNS_PER_TICK
from aegis_cluster.broker.replica_backend import OPENED_AT_ONCE
from aegis_cluster.broker.replica_manager import LOOK_AT_ALL_TICKS
from aegis_cluster.wire.protocol import Api
from tests.broker.harness import Client, Cluster, Host

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MANY = 2 * OPENED_AT_ONCE + 10


def awake(host: Host) -> int:
    return len(host.alive.manager._awake)


def all_led(cluster: Cluster, groups: Sequence[int]) -> bool:
    return all(cluster.leader(group) is not None for group in groups)


@pytest.mark.slow
def test_many_are_opened_led_left_alone_led_again_and_removed() -> None:
    assert MANY > CAMPAIGNS_PER_TICK
    cluster = Cluster()
    groups = [placed.group for placed in cluster.topic("many", partitions=MANY).partitions]
    cluster.until(lambda: all_led(cluster, groups), "every partition has a leader")
    hosts = cluster.alive
    cluster.tick(2 * LOOK_AT_ALL_TICKS)
    cluster.until(lambda: max(map(awake, hosts)) < 10, "idle replicas fall silent")
    lost = cluster.elect(groups[0])
    cluster.kill(lost)
    cluster.until(lambda: all_led(cluster, groups), "others lead what it led", 60)
    lost.start()
    client = Client(cluster, cluster.elect())
    assert client.ask(Api.DELETE_TOPIC, ["many"]).code == 0
    cluster.until(
        lambda: all(len(host.alive.manager.partitions) == 1 for host in hosts),
        "all replicas are gone",
    )


def test_a_topic_that_is_deleted_while_it_is_opened_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster()
    cluster.registered()
    controller = cluster.elect()
    slow = next(host for host in cluster.alive if host is not controller)
    assert slow.transport is not None
    held: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
    monkeypatch.setattr(slow.transport, "read_later", lambda job, done: held.append((job, done)))
    cluster.topic("short", partitions=3)
    assert Client(cluster, controller).ask(Api.DELETE_TOPIC, ["short"]).code == 0
    cluster.tick(5)
    assert held
    assert len(slow.alive.manager.partitions) == 1, "its helper thread is not done yet"
    monkeypatch.undo()
    for job, done in held:
        done(job())
    cluster.tick(5)
    assert all(len(host.alive.manager.partitions) == 1 for host in cluster.alive)
