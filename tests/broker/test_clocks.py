"""Clocks two days off, clocks that disagree, clocks that jump: nothing but stamps goes by them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from aegis_cluster.wire.batch import encode_batch
from aegis_cluster.wire.descriptions import TopicSettings
from aegis_cluster.wire.frame import FrameKind, iter_frames
from aegis_cluster.wire.protocol import Api
from tests.broker.harness import WALL_MS, Client, Cluster
from tests.broker.test_repair import lead_with

if TYPE_CHECKING:
    from tests.broker.harness import Host

DAY_MS = 86_400_000
WEEK_MS = 7 * DAY_MS
OFFSETS = (2 * DAY_MS, -2 * DAY_MS, 0)
VALUE = bytes(4_000)


def record(number: int) -> bytes:
    """Dated by its writer, whose clock is right: one second after the other."""
    rows: list[Any] = [(WALL_MS + 1_000 * number, None, b"%d" % number + VALUE, [])]
    return encode_batch(rows)


def append_times(host: Host, group: int) -> list[int]:
    log = host.partition(group).log
    frames = log.read(log.first_index, log.last_index, 1 << 30).data
    return [header.time_ms for _, header in iter_frames(frames) if header.kind is FrameKind.DATA]


def at_time(client: Client, group: int, time_ms: int) -> int | None:
    (result,) = client.ask(Api.LIST_OFFSETS, [[group], time_ms]).fields[0]
    assert result[0] == 0
    found: int | None = result[4]
    return found


def test_nodes_two_days_apart_lose_nothing_and_keep_time_in_order() -> None:
    """Leaderships move between clocks that disagree and jump, with the default retention."""
    cluster = Cluster(3)
    for host, offset in zip(cluster.hosts.values(), OFFSETS, strict=True):
        host.wall_offset_ms = offset
    (placed,) = cluster.topic(settings=TopicSettings(retention_ms=WEEK_MS)).partitions
    group = placed.group
    rng = random.Random(1)
    written = 0
    terms = 0
    for turn in range(9):
        leader = list(cluster.hosts.values())[turn % 3]
        lead_with(cluster, leader, group)
        client = Client(cluster, leader)
        for _ in range(5):
            leader.wall_offset_ms = rng.choice(OFFSETS)
            assert client.stored(group, record(written)) == written
            written += 1
        before = leader.partition(group).replica.term
        for host in cluster.alive:  # back and forth, and time goes on
            host.wall_offset_ms = rng.choice(OFFSETS)
        cluster.tick(40)
        assert leader.partition(group).replica.term == before, "a clock that jumps elects nobody"
        assert before >= terms
        terms = before
    for host in cluster.alive:
        assert host.partition(group).log_start_offset == 0, "nothing is a week old"
        times = append_times(host, group)
        assert len(times) == written
        assert times == sorted(times), "append time never goes back, whoever leads"
    client = Client(cluster, cluster.elect(group))
    values = client.read(group)
    assert values == [b"%d" % number + VALUE for number in range(written)]
    for number in (0, 7, written - 1):
        assert at_time(client, group, WALL_MS + 1_000 * number) == number, "by the writers' dates"
    assert at_time(client, group, WALL_MS + 1_000 * written) is None


def test_a_clock_that_is_put_right_again_does_not_hold_up_writes() -> None:
    """After two days ahead, stamps stand still until the real time has caught up."""
    cluster = Cluster(1)
    (placed,) = cluster.topic(replicas=1).partitions
    leader = cluster.elect(placed.group)
    client = Client(cluster, leader)
    leader.wall_offset_ms = 2 * DAY_MS
    client.stored(placed.group, record(0))
    leader.wall_offset_ms = 0
    assert client.stored(placed.group, record(1)) == 1
    first, second = append_times(leader, placed.group)
    assert second >= first > WALL_MS + DAY_MS
