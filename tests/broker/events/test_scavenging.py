"""Deleted events free their room on every replica; versions, ids and what is shown stay."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from aegis_cluster.broker import compaction, scavenging
from aegis_cluster.errors import WrongExpectedVersion
from aegis_cluster.ids import LogIndex
from aegis_cluster.limits import RAFT_TICK_MS
from aegis_cluster.wire.batch import decode_batch
from aegis_cluster.wire.event_frames import ANY, DELETED, MAX_COUNT, SETTINGS_PREFIX
from aegis_cluster.wire.frame import FrameKind, frame_payload, iter_frames
from tests.broker.events.test_event_fold import ids
from tests.broker.events.test_requests import Store
from tests.broker.test_repair import holds_all, lead_with

if TYPE_CHECKING:
    import pytest

    from tests.broker.harness import Host

APPENDS = 700


def filled() -> Store:
    """Several closed segments of `old`, `kept` and `short`, one after the other."""
    store = Store()
    for number in range(APPENDS):
        stream = ("old", "kept", "short")[number % 3]
        first = number * 4 + 1
        assert store.append([stream, ANY, ids(*range(first, first + 4))]) is not None
    store.cluster.until(
        lambda: all(len(host.partition(store.group).log.segments) > 2 for host in hosts(store)),
        "segments close",
    )
    return store


def hosts(store: Store) -> list[Host]:
    return list(store.cluster.hosts.values())


def records(host: Host, group: int) -> int:
    """How many are in the files of a replica."""
    log = host.partition(group).log
    count, index = 0, log.first_index
    while index <= log.last_index:
        read = log.plan_read(index, log.last_index, 100_000).read()
        for position, header in iter_frames(read.data):
            if header.kind is FrameKind.DATA:
                count += len(decode_batch(frame_payload(read.data, header, position)))
        index = LogIndex(read.last + 1)
    return count


def has_scavenged(store: Store, host: Host) -> bool:
    partition = host.partition(store.group)
    report = host.alive.compaction.report(partition)
    return report is not None and bool(report["records_dropped"])


def test_every_replica_frees_what_is_deleted() -> None:
    store = filled()
    kept, short = store.read("kept"), store.read("short")
    all_of_them = records(store.client.host, store.group)
    store.append([SETTINGS_PREFIX + "old", ANY, ids(900_001), {DELETED: True}])
    store.append([SETTINGS_PREFIX + "short", ANY, ids(900_002), {MAX_COUNT: 8}])
    store.cluster.until(
        lambda: all(has_scavenged(store, host) for host in hosts(store)), "all replicas scavenge"
    )
    for host in hosts(store):
        assert records(host, store.group) < all_of_them * 2 // 3
    # What is shown is what was shown, from each replica, also after its restart.
    last = short[0]
    for seed, host in enumerate(hosts(store)):
        store.cluster.power_off(host, random.Random(seed))
        host.start()
        store.cluster.until(
            lambda host=host: holds_all(host, store.cluster, store.group),  # type: ignore[misc]
            "it is back",
        )
        lead_with(store.cluster, host, store.group)
        client = store.of(host)
        assert store.read("kept", client=client) == kept
        assert store.read("old", client=client)[1:] == ([], None)
        assert store.read("short", client=client)[1][-8:] == short[1][-8:]
        store.client = client
    # Versions go on, and an id that was used is known, though its event is gone.
    old = store.read("old")[0]
    known = store.append(["old", ANY, ids(*range(1, 5))])
    assert known == [[0, 3]]
    assert store.append(["old", old, ids(900_003)]) == [[old + 1, old + 1]]
    assert isinstance(store.append(["short", 5, ids(900_004)]), WrongExpectedVersion)
    assert store.append(["short", last, ids(900_005)]) == [[last + 1, last + 1]]


def test_nothing_hidden_means_no_pass_and_little_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled()

    def time_passes() -> bool:
        store.cluster.tick(4 * compaction.EVERY_MS // RAFT_TICK_MS)
        return any(
            host.alive.compaction.report(host.partition(store.group)) for host in hosts(store)
        )

    monkeypatch.setattr(scavenging, "RARELY_MS", 0)
    assert not time_passes(), "nothing is hidden"
    monkeypatch.undo()
    store.append([SETTINGS_PREFIX + "short", ANY, ids(900_002), {MAX_COUNT: APPENDS}])
    partition = store.client.host.partition(store.group)
    hidden = partition.state.events.hidden_events
    share = partition.log.end_offset // hidden
    assert scavenging.SHARE_AT_ONCE < share < scavenging.SHARE_LATER
    assert not time_passes(), "it is too little to begin at once"
    monkeypatch.setattr(scavenging, "LATER_MS", compaction.EVERY_MS)
    store.cluster.until(
        lambda: all(has_scavenged(store, host) for host in hosts(store)), "it is done later"
    )
