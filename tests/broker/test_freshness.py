"""A process that has just started does not deny what it may only have forgotten."""

from __future__ import annotations

import pytest

from aegis_cluster.errors import NotReady
from aegis_cluster.wire.descriptions import topic_from_fields
from aegis_cluster.wire.protocol import Api, Reply
from tests.broker.harness import Client, Cluster


def topics_in(reply: Reply) -> list[str]:
    return [topic_from_fields(item[0]).name for item in reply.fields[4]]


@pytest.mark.parametrize("shards", [1, 2])
def test_after_all_were_killed_nobody_denies_a_topic(shards: int) -> None:
    cluster = Cluster(3, shards=shards)
    cluster.topic("orders")
    hosts = list(cluster.hosts.values())
    for host in hosts:
        cluster.kill(host)
    for host in hosts:
        host.start()
    asked = [Client(cluster, host) for host in hosts]
    numbers = [client.send(Api.METADATA, [0, ["orders"]]) for client in asked]
    for client, number in zip(asked, numbers, strict=True):
        cluster.until(lambda c=client, n=number: c.reply(n) is not None, "metadata")  # type: ignore[misc]
        reply = client.reply(number)
        assert reply is not None
        assert topics_in(reply) == ["orders"]


def test_one_of_three_alone_says_that_it_is_not_ready() -> None:
    cluster = Cluster(3)
    cluster.topic("orders")
    for host in cluster.hosts.values():
        cluster.kill(host)
    alone = cluster.host(1)
    alone.start()
    client = Client(cluster, alone)
    assert isinstance(client.refusal(Api.METADATA, [0, None], ms_left=1_000), NotReady)
    assert client.ask(Api.METADATA, [0, None, True]).code == 0
