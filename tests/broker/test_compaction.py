"""Each replica keeps the latest record of each key; tombstones go only when nobody needs them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.broker import compaction
from aegis_cluster.ids import LogIndex
from aegis_cluster.wire.batch import decode_batch, encode_batch
from aegis_cluster.wire.descriptions import TopicSettings
from aegis_cluster.wire.frame import FrameKind, frame_payload, iter_frames
from aegis_cluster.wire.protocol import Api
from tests.broker.harness import SMALL, Client, Cluster, Host
from tests.broker.test_repair import holds_all, lead_with
from tests.broker.test_retention import holds_there

if TYPE_CHECKING:
    from collections.abc import Callable

COMPACTED = TopicSettings(cleanup="compact", tombstone_retention_ms=60_000)
VALUE = bytes(3_000)
KEYS = 5


class Feed:
    """One idempotent producer of keyed values, and what a reader should end with."""

    def __init__(self, cluster: Cluster, group: int) -> None:
        self.cluster = cluster
        self.group = group
        self.count = 0
        self.wanted: dict[bytes, bytes] = {}

    def put(self, key: bytes, value: bytes | None) -> None:
        data = encode_batch(
            [(1_000 + self.count, key, value, [])],
            producer_id=7,
            producer_epoch=0,
            base_sequence=self.count,
        )
        client = Client(self.cluster, self.cluster.elect(self.group))
        assert client.stored(self.group, data) == self.count
        self.count += 1
        if value is None:
            self.wanted.pop(key, None)
        else:
            self.wanted[key] = value

    def fill(self, count: int) -> None:
        for number in range(count):
            self.put(b"key-%d" % (number % KEYS), b"%d" % self.count + VALUE)


def stored(host: Host, group: int) -> dict[int, tuple[bytes | None, bytes | None]]:
    """Key and value by offset, from the files of one replica."""
    log = host.partition(group).log
    found: dict[int, tuple[bytes | None, bytes | None]] = {}
    index = log.first_index
    while index <= log.last_index:
        read = log.plan_read(index, log.last_index, 100_000).read()
        for position, header in iter_frames(read.data):
            if header.kind is FrameKind.DATA:
                for record in decode_batch(frame_payload(read.data, header, position)):
                    found[record.offset] = (record.key, record.value)
        index = LogIndex(read.last + 1)
    return found


def values(host: Host, group: int) -> dict[bytes | None, bytes]:
    ends = dict(stored(host, group).values())
    return {key: value for key, value in ends.items() if value is not None}


def has_compacted(host: Host, group: int) -> bool:
    """Everything that is closed."""
    partition = host.partition(group)
    report = host.alive.compaction.report(partition)
    closed = partition.log.segments[-1].header.before.offset
    return report is not None and report["compacted_to"] == closed


def all_have(
    cluster: Cluster, group: int, test: Callable[[Host, int], bool] = has_compacted
) -> Callable[[], bool]:
    return lambda: all(test(host, group) for host in cluster.alive)


def settled(cluster: Cluster, group: int) -> Callable[[], bool]:
    return lambda: all(holds_all(host, cluster, group) for host in cluster.alive)


def size(host: Host, group: int) -> int:
    return sum(segment.end for segment in host.partition(group).log.segments)


def test_every_replica_keeps_the_latest_of_each_key() -> None:
    cluster = Cluster()
    group = cluster.topic(settings=COMPACTED).partitions[0].group
    feed = Feed(cluster, group)
    feed.fill(120)
    before = stored(cluster.alive[0], group)
    cluster.until(all_have(cluster, group), "all replicas compact")
    for host in cluster.alive:
        now = stored(host, group)
        assert now.items() <= before.items(), "what stays is what it was, where it was"
        assert values(host, group) == feed.wanted
        closed = host.partition(group).log.segments[-1].header.before.offset
        assert len([at for at in now if at < closed]) == KEYS
        assert size(host, group) < 120 * len(VALUE) // 2
        report = host.alive.compaction.report(host.partition(group))
        assert report is not None
        assert report["saved_bytes"] > 60 * len(VALUE)
    client = Client(cluster, cluster.elect(group))
    (result,) = client.ask(Api.FETCH, [0, [[group, 3, 1_000_000]]]).fields[0]
    assert result[:3] == [0, 120, 0], "a fetch at an offset that is gone reads on"
    # Whoever restarts, is rebuilt from nothing, or leads next, says the same.
    for seed, host in enumerate(cluster.hosts.values()):
        cluster.power_off(host, random.Random(seed))
        host.start()
        cluster.until(lambda host=host: holds_all(host, cluster, group), "it is back")  # type: ignore[misc]
        lead_with(cluster, host, group)
        assert values(host, group) == feed.wanted
    feed.put(b"key-0", b"new")
    host = cluster.followers(group)[0]
    cluster.wipe(host.key.node)
    host.start()
    cluster.until(lambda: holds_there(host, cluster, group), "a new member gets the rest", 2_000)
    assert values(host, group) == feed.wanted


def test_a_tombstone_waits_for_the_last_replica() -> None:
    """One that was away has the old value, and would bring it back."""
    cluster = Cluster()
    group = cluster.topic(settings=COMPACTED).partitions[0].group
    feed = Feed(cluster, group)
    feed.put(b"gone", b"an old value")
    feed.fill(40)
    cluster.until(settled(cluster, group), "all have the old value")
    away = cluster.followers(group)[0]
    cluster.kill(away)
    feed.put(b"gone", None)
    tombstone = feed.count - 1
    feed.fill(60)
    cluster.until(all_have(cluster, group), "the others compact")
    cluster.now_ms += 61_000
    feed.fill(60)
    cluster.until(all_have(cluster, group), "and again, when its time has come")
    assert all(tombstone in stored(host, group) for host in cluster.alive)
    away.start()
    cluster.until(settled(cluster, group), "it is back", 2_000)
    assert b"gone" not in values(away, group)
    leader = cluster.elect(group)
    cluster.now_ms += 61_000
    cluster.until(
        lambda: tombstone not in stored(cluster.elect(group), group), "now it goes", 2_000
    )
    assert cluster.elect(group) is leader
    for host in list(cluster.hosts.values()):
        cluster.until(all_have(cluster, group), "all compact")
        lead_with(cluster, host, group)
        assert values(host, group) == feed.wanted


def test_nothing_old_is_deleted_unless_that_is_asked_for_too() -> None:
    cluster = Cluster(limits=replace(SMALL, segment_bytes=16_384))
    kept = cluster.topic("kept", settings=replace(COMPACTED, retention_ms=60_000))
    both = replace(COMPACTED, cleanup="compact,delete", retention_ms=60_000)
    deleted = cluster.topic("deleted", settings=both)
    feeds = [Feed(cluster, info.partitions[0].group) for info in (kept, deleted)]
    for feed in feeds:
        feed.fill(20)
    cluster.now_ms += 61_000
    cluster.tick(60)
    leader = cluster.elect(feeds[1].group)
    cluster.until(lambda: leader.partition(feeds[1].group).log_start_offset == 20, "all is old")
    assert all(host.partition(feeds[0].group).log_start_offset == 0 for host in cluster.alive)


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_lost_and_nothing_comes_back_in_any_trouble(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power cuts, nodes away for long, wiped disks and new leaders, while all of them compact."""
    monkeypatch.setattr(compaction, "WAITED_MS", 1_000)
    rng = random.Random(seed)
    cluster = Cluster(limits=replace(SMALL, segment_bytes=8_192), seed=seed)
    settings = replace(COMPACTED, tombstone_retention_ms=4_000)
    group = cluster.topic(settings=settings).partitions[0].group
    feed = Feed(cluster, group)
    away: Host | None = None
    for _ in range(18):
        for _ in range(rng.randrange(12)):
            key = b"key-%d" % rng.randrange(12)
            feed.put(key, None if rng.random() < 0.3 else b"%d" % feed.count + bytes(900))
        cluster.now_ms += rng.choice((0, 0, 5_000))
        cluster.tick(rng.randrange(60))
        trouble = rng.choice(("cut", "kill", "wipe", "lead", "calm"))
        if away is not None:
            away.start()
            cluster.until(lambda host=away: holds_there(host, cluster, group), "back", 2_000)  # type: ignore[misc]
            away = None
        elif trouble == "lead":
            lead_with(cluster, rng.choice(cluster.alive), group)
        elif trouble != "calm":
            away = rng.choice(cluster.followers(group)) if trouble == "wipe" else None
            away = away or rng.choice(cluster.alive)
            if trouble == "cut":
                cluster.power_off(away, rng)
            elif trouble == "kill":
                cluster.kill(away)
            else:
                cluster.wipe(away.key.node)
        for host in cluster.alive:
            if holds_there(host, cluster, group):
                assert values(host, group) == feed.wanted
    if away is not None:
        away.start()
    cluster.until(settled(cluster, group), "all are back", 2_000)
    for host in list(cluster.hosts.values()):
        lead_with(cluster, host, group)
        cluster.until(all_have(cluster, group), "all compact", 2_000)
        cluster.now_ms += 5_000
        cluster.tick(100)
        assert values(host, group) == feed.wanted
