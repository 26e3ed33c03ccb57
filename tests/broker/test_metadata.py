"""Topics, nodes and producer ids, on controllers that change and shards that only follow."""

from __future__ import annotations

import pytest

from aegis_cluster.errors import (
    InvalidTopic,
    MessageTooLarge,
    NotEnoughReplicas,
    NotLeader,
    NotReady,
    TopicExists,
    TopicNotFound,
)
from aegis_cluster.ids import NodeId
from aegis_cluster.limits import PRODUCER_ID_BLOCK
from aegis_cluster.wire.protocol import Api
from tests.broker.harness import Client, Cluster, Host, batch, topic_fields


@pytest.fixture
def cluster() -> Cluster:
    found = Cluster()
    found.registered()
    return found


@pytest.fixture
def controller(cluster: Cluster) -> Client:
    return Client(cluster, cluster.elect())


# ---- topics


def test_a_topic_is_opened_on_all_of_its_replicas(cluster: Cluster, controller: Client) -> None:
    info = cluster.topic(partitions=4)
    assert len({placed.group for placed in info.partitions}) == 4
    cluster.tick(2)
    for host in cluster.alive:
        for placed in info.partitions:
            assert placed.group in host.alive.manager.partitions


def test_a_repeat_of_the_same_call_succeeds_and_another_does_not(controller: Client) -> None:
    first = controller.ask(Api.CREATE_TOPIC, topic_fields("t", token="mine"))
    again = controller.ask(Api.CREATE_TOPIC, topic_fields("t", token="mine"))
    assert first.code == again.code == 0
    assert first.fields == again.fields
    refusal = controller.refusal(Api.CREATE_TOPIC, topic_fields("t", token="yours"))
    assert isinstance(refusal, TopicExists)
    assert isinstance(
        controller.refusal(Api.CREATE_TOPIC, topic_fields("t", token="")), TopicExists
    )


def test_a_repeat_is_known_to_the_next_controller(cluster: Cluster, controller: Client) -> None:
    assert controller.ask(Api.CREATE_TOPIC, topic_fields("t", token="mine")).code == 0
    cluster.kill(controller.host)
    cluster.until(lambda: cluster.leader() is not None, "another controller")
    other = Client(cluster, cluster.elect())
    assert other.ask(Api.CREATE_TOPIC, topic_fields("t", token="mine")).code == 0


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (topic_fields("no/slash"), InvalidTopic),
        (topic_fields("__groups"), InvalidTopic),
        (topic_fields("t", partitions=0), InvalidTopic),
        (topic_fields("t", partitions=100_000), InvalidTopic),
        (topic_fields("t", replicas=4), NotEnoughReplicas),
        (topic_fields("t", replicas=0), InvalidTopic),
    ],
)
def test_a_topic_that_cannot_be(
    controller: Client, fields: list[object], error: type[Exception]
) -> None:
    assert isinstance(controller.refusal(Api.CREATE_TOPIC, fields), error)
    assert controller.host.alive.table.topics == {}


def test_a_deleted_topic_is_gone_everywhere(cluster: Cluster, controller: Client) -> None:
    (placed,) = cluster.topic().partitions
    leader = Client(cluster, cluster.elect(placed.group))
    leader.stored(placed.group, batch(b"a"))
    poll = leader.send(Api.FETCH, [20_000, [[placed.group, 1, 1_000]]], ms_left=20_000)
    assert controller.ask(Api.DELETE_TOPIC, ["t"]).code == 0
    cluster.tick(4)
    assert all(placed.group not in host.alive.manager.partitions for host in cluster.alive)
    assert isinstance(controller.refusal(Api.DELETE_TOPIC, ["t"]), TopicNotFound)
    number = leader.produce(placed.group, batch(b"b"))
    assert isinstance(leader.outcome(number), NotLeader)
    cluster.tick(10)
    assert leader.reply(poll) is not None, "who reads it hears of it well before the deadline"


def test_a_write_under_way_in_a_deleted_topic_gets_an_answer(
    cluster: Cluster, controller: Client
) -> None:
    (placed,) = cluster.topic().partitions
    leader = Client(cluster, cluster.elect(placed.group))
    for host in cluster.followers(placed.group):
        host.hold_syncs = True
    number = leader.produce(placed.group, batch(b"a"))
    cluster.settle()
    assert leader.reply(number) is None
    leader.host.alive.manager.remove(placed.group)
    assert leader.outcome(number) is not None
    assert leader.host.alive.clients.in_flight_bytes == 0


def test_altered_settings_hold_on_leaders_at_once(cluster: Cluster, controller: Client) -> None:
    (placed,) = cluster.topic().partitions
    leader = Client(cluster, cluster.elect(placed.group))
    leader.stored(placed.group, batch(bytes(50_000)))
    assert controller.ask(Api.ALTER_TOPIC, ["t", None, {"max_message_bytes": 9_000}]).code == 0
    cluster.tick(2)
    refused = leader.outcome(leader.produce(placed.group, batch(bytes(50_000))))
    assert isinstance(refused, MessageTooLarge)
    assert controller.ask(Api.ALTER_TOPIC, ["t", None, {"max_message_bytes": 90_000}]).code == 0
    cluster.tick(2)
    leader.stored(placed.group, batch(bytes(50_000)))


def test_added_partitions_are_opened_and_lead(cluster: Cluster, controller: Client) -> None:
    cluster.topic(partitions=2)
    assert controller.ask(Api.ALTER_TOPIC, ["t", 5, {}]).code == 0
    assert controller.ask(Api.ALTER_TOPIC, ["t", 5, {}]).code == 0
    cluster.tick(4)
    info = controller.host.alive.table.topics["t"]
    assert len(info.partitions) == 5
    for placed in info.partitions:
        leader = Client(cluster, cluster.elect(placed.group))
        leader.stored(placed.group, batch(b"a"))
    assert isinstance(controller.refusal(Api.ALTER_TOPIC, ["t", 4, {}]), InvalidTopic)
    assert isinstance(controller.refusal(Api.ALTER_TOPIC, ["u", 4, {}]), TopicNotFound)


def test_a_topic_made_anew_is_another(cluster: Cluster, controller: Client) -> None:
    (old,) = cluster.topic().partitions
    Client(cluster, cluster.elect(old.group)).stored(old.group, batch(b"old"))
    controller.ask(Api.DELETE_TOPIC, ["t"])
    controller.ask(Api.CREATE_TOPIC, topic_fields("t", token="anew"))
    cluster.tick(4)
    (new,) = controller.host.alive.table.topics["t"].partitions
    assert new.group > old.group
    assert Client(cluster, cluster.elect(new.group)).read(new.group) == []


def test_a_replica_that_slept_through_a_deletion_removes_it_later(cluster: Cluster) -> None:
    (placed,) = cluster.topic().partitions
    sleeper = next(host for host in cluster.alive if host is not cluster.elect())
    cluster.kill(sleeper)
    cluster.until(lambda: cluster.leader() is not None, "a controller")
    Client(cluster, cluster.elect()).ask(Api.DELETE_TOPIC, ["t"])
    sleeper.start()
    assert placed.group in sleeper.alive.manager.partitions, "nothing is deleted by inference"
    cluster.until(lambda: placed.group not in sleeper.alive.manager.partitions, "it is removed")


def test_only_the_controller_takes_commands(cluster: Cluster) -> None:
    leader = cluster.elect()
    for host in cluster.alive:
        if host is leader:
            continue
        refusal = Client(cluster, host).refusal(Api.CREATE_TOPIC, topic_fields("t"))
        assert isinstance(refusal, NotLeader)
        assert refusal.details["leader"] == leader.key.node


def test_a_command_without_a_majority_is_not_answered(cluster: Cluster) -> None:
    old = Client(cluster, cluster.elect())
    cluster.isolate(old.host.key.node)
    number = old.send(Api.CREATE_TOPIC, topic_fields("t", token="a"))
    repeat = old.send(Api.CREATE_TOPIC, topic_fields("t", token="a"))
    other = old.send(Api.CREATE_TOPIC, topic_fields("t", token="b"))
    cluster.tick(2)
    assert [old.reply(n) for n in (number, repeat, other)] == [None] * 3
    cluster.until(lambda: cluster.leader() not in (None, old.host), "another controller")
    cluster.heal()
    cluster.until(lambda: old.reply(number) is not None, "an answer")
    codes = [reply.code for n in (number, repeat, other) if (reply := old.reply(n))]
    assert codes == [300, 150, 150], "unknown for the command itself, refused for what rests on it"
    assert "t" not in cluster.elect().alive.table.topics


# ---- producer ids


def _ids(cluster: Cluster, host: Host, count: int) -> list[int]:
    client = Client(cluster, host)
    return [client.ask(Api.INIT_PRODUCER).fields[0] for _ in range(count)]


def test_no_producer_id_is_given_twice(cluster: Cluster) -> None:
    seen: list[int] = []
    for _ in range(4):
        for host in cluster.alive:
            seen += _ids(cluster, host, 3)
        leader = cluster.elect()
        cluster.kill(leader)
        cluster.until(lambda: cluster.leader() is not None, "another controller")
        for host in cluster.alive:
            seen += _ids(cluster, host, 3)
        leader.start()
        cluster.tick(5)
    assert len(seen) == len(set(seen)) > 40


def test_a_block_that_is_used_up_is_followed_by_another(cluster: Cluster) -> None:
    host = cluster.host(2)
    first = _ids(cluster, host, 1)[0]
    host.alive.producer_ids._next += PRODUCER_ID_BLOCK - 2
    _ids(cluster, cluster.host(3), 1)
    after = _ids(cluster, host, 3)
    assert after[0] == first + PRODUCER_ID_BLOCK - 1
    assert after[1] >= first + PRODUCER_ID_BLOCK
    assert after[2] == after[1] + 1


def test_without_a_controller_no_id_is_had(cluster: Cluster) -> None:
    host = cluster.host(1)
    cluster.isolate(1)
    cluster.tick(40)
    assert isinstance(Client(cluster, host).refusal(Api.INIT_PRODUCER, ms_left=300), NotReady)


# ---- shards and nodes


def test_the_second_shard_follows_the_metadata_as_a_reader() -> None:
    cluster = Cluster(shards=2)
    cluster.registered()
    second = cluster.host(1, 1)
    assert second.alive.controller is None
    info = cluster.topic(partitions=4)
    cluster.until(lambda: "t" in second.alive.table.topics, "it has read of the topic")
    assert second.alive.table.to_body() == cluster.host(1).alive.table.to_body()
    for placed in info.partitions:
        leader = cluster.elect(placed.group)
        assert leader.key.shard == placed.group % 2
        assert Client(cluster, leader).stored(placed.group, batch(b"x")) == 0
    assert _ids(cluster, second, 1) != _ids(cluster, cluster.host(1), 1)
    refusal = Client(cluster, second).refusal(Api.CREATE_TOPIC, topic_fields("u"))
    assert isinstance(refusal, NotLeader)


def test_a_reader_asks_the_next_node_when_one_dies() -> None:
    cluster = Cluster(shards=2)
    cluster.registered()
    for node in (1, 2):
        cluster.kill(cluster.host(node))
        cluster.until(lambda: cluster.leader() is not None, "a controller")
        reply = Client(cluster, cluster.elect()).ask(
            Api.CREATE_TOPIC, topic_fields(f"t{node}", replicas=1)
        )
        assert reply.code == 0
        readers = [host for host in cluster.alive if host.key.shard == 1]
        cluster.until(
            lambda readers=readers, name=f"t{node}": all(  # type: ignore[misc]
                name in host.alive.table.topics for host in readers
            ),
            "all readers know of the topic",
        )
        cluster.host(node).start()
        cluster.tick(5)


def test_four_nodes_the_last_of_which_holds_no_metadata() -> None:
    cluster = Cluster(4)
    cluster.registered()
    last = cluster.host(4)
    assert last.alive.reader is not None
    info = cluster.topic(partitions=8)
    cluster.until(lambda: "t" in last.alive.table.topics, "it has read of the topic")
    held = [p for p in info.partitions if cluster.member(NodeId(4)) in p.replicas]
    assert len(held) == 6
