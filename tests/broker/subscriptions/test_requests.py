"""Requests about subscriptions, as a shard takes them."""

from __future__ import annotations

from aegis_cluster.errors import SubscriptionNotFound
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.protocol import Api
from tests.broker.harness import Client, Cluster

RULES = [1_000, 3, "", "round_robin", False]


def test_one_that_is_being_deleted_can_be_asked_about() -> None:
    """What a shard does for one client must not end it for all others."""
    cluster = Cluster(1)
    (placed,) = cluster.topic(replicas=1).partitions
    client = Client(cluster, cluster.elect())
    assert client.ask(Api.INTERNAL_TOPIC, ["__subscriptions"]).code == 0
    fields = ["t", "s", "have", "token", RULES, [[placed.group, 0]], True]
    for one in cluster.elect().alive.table.topics["__subscriptions"].partitions:
        cluster.elect(one.group)
    assert client.ask(Api.SUBSCRIPTION_OPEN, fields).code == 0
    client.host.hold_syncs = True
    deleted = client.send(Api.SUBSCRIPTION_DELETE, ["t", "s"])
    described = client.send(Api.SUBSCRIPTION_DESCRIBE, ["t", "s"])
    cluster.settle()
    reply = client.reply(described)
    assert client.reply(deleted) is None
    client.host.hold_syncs = False
    cluster.until(lambda: client.reply(deleted) is not None, "the end of the subscription")
    assert reply is not None
    assert error_from_reply(reply.code, reply.fields).retriable
    assert isinstance(client.refusal(Api.SUBSCRIPTION_DESCRIBE, ["t", "s"]), SubscriptionNotFound)
