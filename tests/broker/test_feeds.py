"""Change feeds: positions only rise, over any number of leaders, and only for the newest fence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from aegis_cluster.broker.feed_stm import FeedPoint, FeedTable
from aegis_cluster.broker.folds import PartitionState
from aegis_cluster.errors import (
    AegisError,
    FeedFenced,
    InvalidTopic,
    NotLeader,
    OutcomeUnknown,
    PeerViolation,
    StalePosition,
)
from aegis_cluster.ids import LogIndex
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.descriptions import TopicSettings
from aegis_cluster.wire.protocol import Api
from tests.broker.harness import Client, Cluster, batch

if TYPE_CHECKING:
    from aegis_cluster.ids import GroupId
    from tests.broker.harness import Host

OLD, NEW = (7, "old"), (8, "new")


class Feed:
    """One partition of a feed, asked at whoever leads it now."""

    def __init__(self, nodes: int = 3, replicas: int = 3) -> None:
        self.cluster = Cluster(nodes=nodes)
        info = self.cluster.topic("feed", replicas=replicas, settings=TopicSettings(kind="cdc"))
        self.group: GroupId = info.partitions[0].group

    @property
    def leader(self) -> Host:
        return self.cluster.elect(self.group)

    def ask(self, api: Api, *fields: Any, data: bytes | None = None) -> list[Any] | AegisError:
        parts = [] if data is None else [data]
        reply = Client(self.cluster, self.leader).ask(api, [self.group, *fields], parts)
        return reply.fields if reply.code == 0 else error_from_reply(reply.code, reply.fields)

    def fence(self, holder: tuple[int, str]) -> list[Any] | AegisError:
        return self.ask(Api.FEED_FENCE, *holder)

    def append(
        self,
        holder: tuple[int, str],
        position: tuple[int, int],
        value: bytes | None = None,
        mark: bytes | None = None,
    ) -> list[Any] | AegisError:
        data = None if value is None else batch(value)
        return self.ask(Api.FEED_APPEND, *holder, *position, mark, data=data)

    def point(self) -> list[Any] | AegisError:
        return self.ask(Api.FEED_READ)

    def values(self) -> list[bytes | None]:
        return Client(self.cluster, self.leader).read(self.group)


def test_positions_rise_and_only_the_newest_fence_moves_them() -> None:
    feed = Feed()
    assert isinstance(feed.append(OLD, (1, 0), b"unfenced"), FeedFenced)
    assert feed.fence(OLD) == [*OLD, 0, 0, b""]
    assert feed.fence(OLD) == [*OLD, 0, 0, b""]
    assert isinstance(feed.append(OLD, (5, 1), b"a"), list)
    assert isinstance(feed.append(OLD, (5, 1), b"a again"), StalePosition)
    assert isinstance(feed.append(OLD, (4, 9), b"before"), StalePosition)
    assert isinstance(feed.append(OLD, (5, 2), b"b", b"mark"), list)
    assert isinstance(feed.append(OLD, (6, 0)), list)  # no record

    assert isinstance(feed.fence((OLD[0], "a twin")), FeedFenced)
    assert feed.fence(NEW) == [*NEW, 6, 0, b"mark"]
    assert isinstance(feed.append(OLD, (7, 0), b"too late"), FeedFenced)
    assert isinstance(feed.fence(OLD), FeedFenced)
    assert isinstance(feed.append(NEW, (7, 0), b"c"), list)
    assert feed.values() == [b"a", b"b", b"c"]


def test_a_new_leader_and_a_restarted_node_know_the_position() -> None:
    feed = Feed()
    feed.fence(OLD)
    feed.append(OLD, (3, 3), b"a", b"mark")
    first = feed.leader
    feed.cluster.kill(first)
    assert isinstance(feed.append(OLD, (3, 3), b"a"), StalePosition)
    assert isinstance(feed.append(OLD, (3, 4), b"b"), list)
    first.start()
    for host in [host for host in feed.cluster.alive if host is not first]:
        feed.cluster.kill(host)
        host.start()
    assert feed.point() == [*OLD, 3, 4, b"mark"]
    assert feed.values() == [b"a", b"b"]


def test_what_rests_on_a_frame_under_way_waits_for_it_or_is_certainly_not_done() -> None:
    feed = Feed()
    feed.fence(OLD)
    leader = feed.leader
    client = Client(feed.cluster, leader)
    feed.cluster.isolate(leader.key.node)
    fields = [feed.group, *OLD, 9, 0, None]
    own = client.send(Api.FEED_APPEND, fields, [batch(b"a")], ms_left=60_000)
    repeat = client.send(Api.FEED_APPEND, fields, [batch(b"a")], ms_left=60_000)
    assert client.reply(own) is None
    assert client.reply(repeat) is None
    feed.cluster.until(lambda: client.reply(repeat) is not None, "the old leader has given up")
    errors = []
    for number in (own, repeat):
        reply = client.reply(number)
        assert reply is not None
        errors.append(error_from_reply(reply.code, reply.fields))
    assert isinstance(errors[0], OutcomeUnknown)
    assert isinstance(errors[1], NotLeader)


def test_nobody_else_writes_to_a_feed_and_other_topics_are_none() -> None:
    feed = Feed(nodes=1, replicas=1)
    client = Client(feed.cluster, feed.leader)
    number = client.produce(feed.group, batch(b"x"))
    feed.cluster.until(lambda: client.reply(number) is not None, "an answer")
    assert isinstance(client.outcome(number), InvalidTopic)
    plain = feed.cluster.topic("plain", replicas=1).partitions[0].group
    assert isinstance(client.refusal(Api.FEED_FENCE, [plain, *OLD]), InvalidTopic)
    assert isinstance(client.refusal(Api.FEED_FENCE, [feed.group, -1, "w"]), PeerViolation)


@pytest.mark.parametrize("point", [FeedPoint(), FeedPoint(3, "w", (2, 1), b"m")])
def test_a_snapshot_holds_the_point(point: FeedPoint) -> None:
    state, copy = PartitionState(), PartitionState()
    if point.epoch:
        state.feed.apply(point.encode(), LogIndex(4))
    loader = copy.loader()
    for piece in state.slices():
        loader.add(piece)
    loader.finish()
    assert copy.feed.committed == point


def test_annotations_of_other_folds_say_nothing_to_a_feed() -> None:
    table = FeedTable()
    table.apply(b"\x81\xa1x\x01", LogIndex(1))  # {"x": 1}
    assert table.committed == FeedPoint()
