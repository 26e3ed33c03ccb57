"""Old segments go everywhere, by append time or bytes; what is earliest never moves back."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from aegis_cluster.errors import OffsetOutOfRange
from aegis_cluster.wire.batch import encode_batch
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.descriptions import TopicSettings
from aegis_cluster.wire.protocol import Api
from tests.broker.harness import Client, Cluster, Host, batch
from tests.broker.test_repair import holds_all, lead_with

if TYPE_CHECKING:
    from aegis_cluster.storage.segment import Segment

VALUE = bytes(4_000)


def starts(cluster: Cluster, group: int) -> set[int]:
    return {host.partition(group).log_start_offset for host in cluster.alive}


def fill(cluster: Cluster, group: int, count: int, data: bytes | None = None) -> None:
    client = Client(cluster, cluster.elect(group))
    for _ in range(count):
        client.stored(group, data or batch(VALUE))


def segments(host: Host, group: int) -> tuple[Segment, ...]:
    return host.partition(group).log.segments


def test_by_bytes_whole_segments_go_on_every_replica() -> None:
    cluster = Cluster()
    info = cluster.topic(settings=TopicSettings(retention_bytes=150_000))
    group = info.partitions[0].group
    fill(cluster, group, 30)
    cluster.tick(40)
    assert starts(cluster, group) == {0}, "within the limit, give or take a segment"
    fill(cluster, group, 90)
    cluster.until(lambda: starts(cluster, group) not in ({0}, set()), "the start moves")
    cluster.tick(60)
    (start,) = starts(cluster, group)
    assert start > 0
    for host in cluster.alive:
        kept = sum(segment.end for segment in segments(host, group))
        assert 150_000 <= kept <= 150_000 + 2 * 64 * 1024
        directory = host.partition(group).log.directory
        files = [name for name in host.disk.list_dir(directory) if name.endswith(".log")]
        assert len(files) == len(segments(host, group))
        assert host.partition(group).replica.log.first_index == segments(host, group)[0].base_index
    client = Client(cluster, cluster.elect(group))
    (result,) = client.ask(Api.FETCH, [0, [[group, start - 1, 1_000]]]).fields[0]
    assert isinstance(error_from_reply(result[0], result[1:]), OffsetOutOfRange)
    (result,) = client.ask(Api.FETCH, [0, [[group, start, 1_000]]]).fields[0]
    assert result[:3] == [0, 120, start]
    for seed, host in enumerate(cluster.hosts.values()):  # power loss, one after the other
        cluster.power_off(host, random.Random(seed))
        host.start()
        cluster.until(lambda host=host: holds_all(host, cluster, group), "it is back")  # type: ignore[misc]
        lead_with(cluster, host, group)
        assert host.partition(group).log_start_offset == start
    host = cluster.followers(group)[0]
    cluster.wipe(host.key.node)
    host.start()
    cluster.until(lambda: holds_there(host, cluster, group), "a new member gets the rest", 2_000)
    assert host.partition(group).log_start_offset == start


def holds_there(host: Host, cluster: Cluster, group: int) -> bool:
    return group in host.alive.manager.partitions and holds_all(host, cluster, group)


def test_by_append_time_whatever_the_records_say() -> None:
    cluster = Cluster()
    settings = TopicSettings(retention_ms=60_000)
    group = cluster.topic(settings=settings).partitions[0].group
    far = 4_000_000_000_000
    for time_ms in (1, far):
        fill(cluster, group, 40, encode_batch([(time_ms, None, VALUE, [])]))
        cluster.tick(50)
    assert starts(cluster, group) == {0}, "appended just now"
    cluster.now_ms += 61_000
    cluster.tick(50)
    cluster.until(lambda: starts(cluster, group) != {0}, "they are old by now")
    cluster.tick(50)
    (start,) = starts(cluster, group)
    assert start >= 60, "all but the segment that grows"
    assert all(len(segments(host, group)) == 1 for host in cluster.alive)
    fill(cluster, group, 1)
