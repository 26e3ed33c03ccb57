"""Old segments go everywhere, by append time or bytes; what is earliest never moves back."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from aegis_cluster.errors import OffsetOutOfRange
from aegis_cluster.ids import LogIndex, Term
from aegis_cluster.raft.messages import AppendRequest, Envelope
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


def test_frames_that_went_since_they_were_named_are_not_sent() -> None:
    """The core names frames in one step and the log may be cut before the next one sends them."""
    cluster = Cluster()
    group = cluster.topic(settings=TopicSettings(retention_bytes=1_000)).partitions[0].group
    fill(cluster, group, 60)
    cluster.until(lambda: starts(cluster, group) not in ({0}, set()), "the start moves")
    leader = cluster.elect(group)
    replica = leader.partition(group).replica
    to = next(member for member in replica.membership.voters if member != replica.me)
    message = AppendRequest(
        term=replica.term,
        prev_index=LogIndex(0),
        prev_term=Term(0),
        commit_index=replica.commit_index,
        acknowledged=LogIndex(0),
        last_index=LogIndex(1),
    )
    leader.partition(group)._send_all((Envelope(to, message),))
    client = Client(cluster, leader)
    client.stored(group, batch(VALUE))
    cluster.until(lambda: all(holds_all(h, cluster, group) for h in cluster.alive), "all go on")


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
    assert start == 80, "the segment that grows included"
    assert all(len(segments(host, group)) == 1 for host in cluster.alive)
    fill(cluster, group, 1)
    client = Client(cluster, cluster.elect(group))
    assert client.ask(Api.LIST_OFFSETS, [[group]]).fields == [[[0, 80, 81, 81]]]


def test_a_partition_that_is_hardly_written_to_drops_what_is_old_too() -> None:
    """Its only segment would take years to fill."""
    cluster = Cluster()
    settings = TopicSettings(retention_ms=60_000)
    group = cluster.topic(settings=settings).partitions[0].group
    client = Client(cluster, cluster.elect(group))
    times = []
    for number in range(40):
        client = Client(cluster, cluster.elect(group))
        assert client.stored(group, batch(b"%d" % number, producer=(7, 0, number))) == number
        times.append(cluster.now_ms)
        cluster.now_ms += 5_000
        cluster.tick(6)
        (start,) = starts(cluster, group)
        if start:
            assert times[start - 1] < cluster.now_ms - 60_000, "what goes is older"
        oldest = cluster.now_ms - times[start]
        assert oldest <= 60_000 + 60_000 // 4 + 10_000, "and what is older goes soon"
    assert start > 20
    for host in cluster.alive:
        assert len(segments(host, group)) <= 8
    cluster.now_ms += 61_000
    cluster.until(lambda: starts(cluster, group) == {40}, "nobody writes: everything goes")
    cluster.until(
        lambda: all(len(segments(host, group)) == 1 for host in cluster.alive), "the files too"
    )
    ends = {host.partition(group).log.last_index for host in cluster.alive}
    cluster.now_ms += 200_000
    cluster.tick(60)
    assert {host.partition(group).log.last_index for host in cluster.alive} == ends, "once"
    for seed, host in enumerate(cluster.hosts.values()):
        cluster.power_off(host, random.Random(seed))
        host.start()
    client = Client(cluster, cluster.elect(group))
    number = client.produce(group, batch(b"39", producer=(7, 0, 39)))
    cluster.until(lambda: client.reply(number) is not None, "an answer")
    outcome = client.outcome(number)
    assert isinstance(outcome, tuple)
    assert outcome[0] == 39, "a repeat is known though its record is gone"
    assert client.stored(group, batch(b"40", producer=(7, 0, 40))) == 40
    assert starts(cluster, group) == {40}
