"""What the store promises, one case each. Seeds stand in the names of disks, nothing sleeps."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.errors import CorruptLog, CorruptRecord, InvariantBroken, Misuse, StorageFailed
from aegis_cluster.ids import GroupId, LogIndex, Member, NodeId, RecordOffset, Term
from aegis_cluster.storage.disk import RealDisk
from aegis_cluster.storage.recovery import prepare_node_dir
from aegis_cluster.storage.snapshot import decode_slices, read_snapshot, slices_of, write_snapshot
from aegis_cluster.storage.types import HardState, LogPoint, Snapshot, StoreLimits
from aegis_cluster.testing.disk import SimulatedDisk
from aegis_cluster.wire.frame import FrameKind
from tests.storage.support import (
    NODE,
    SMALL,
    VOTERS,
    commit_round,
    frames_after,
    install,
    joined,
    new_disk,
    open_store,
    plain_frame,
    read_all,
    run_checkpoint,
)

if TYPE_CHECKING:
    from pathlib import Path

    from aegis_cluster.storage.log import PartitionLog
    from aegis_cluster.storage.rounds import Round
    from aegis_cluster.storage.store import ShardStore

GROUP = GroupId(0)
OTHER = GroupId(1)
LOG_DIR = f"{NODE}/partitions/t-0-g0"


def a_store(disk: SimulatedDisk | None = None) -> tuple[SimulatedDisk, ShardStore, PartitionLog]:
    disk = disk or new_disk()
    store, _ = open_store(disk)
    return disk, store, store.create_group(GROUP, "t", 0, VOTERS)


def add(store: ShardStore, count: int, *, size: int = 20, term: int = 1) -> list[bytes]:
    frames = frames_after(store.log(GROUP), count, size=size, term=term)
    store.append(GROUP, frames)
    return frames


# Rounds


def test_staged_frames_are_read_at_once_and_durable_after_the_round() -> None:
    _, store, log = a_store()
    frames = add(store, 3)
    assert (log.last_index, log.durable_index, log.end_offset) == (3, 0, 3)
    assert log.read(LogIndex(1), LogIndex(3), 1 << 20).data == joined(frames)
    current = store.begin_round()
    assert current is not None
    store.sync(current)
    assert log.durable_index == 0
    assert store.end_round(current) == {GROUP: 3}
    assert log.durable_index == 3
    assert store.begin_round() is None


def test_a_round_does_not_end_before_its_sync() -> None:
    _, store, _ = a_store()
    add(store, 1)
    current = store.begin_round()
    assert current is not None
    with pytest.raises(InvariantBroken):
        store.end_round(current)


def test_one_sync_covers_the_rounds_before_it() -> None:
    _, store, log = a_store()
    for _ in range(3):
        add(store, 2)
        current = store.begin_round()
    assert current is not None
    assert len(current.covers) == 2
    store.sync(current)
    assert store.end_round(current) == {GROUP: 6}
    assert log.durable_index == 6


def test_a_round_written_during_a_sync_waits_for_its_own() -> None:
    _, store, log = a_store()
    add(store, 2)
    first = store.begin_round()
    assert first is not None
    store.sync(first)
    add(store, 2)
    second = store.begin_round()
    assert second is not None
    assert second.covers == ()
    assert store.end_round(first) == {GROUP: 2}
    assert log.durable_index == 2
    store.sync(second)
    assert store.end_round(second) == {GROUP: 4}


def test_many_bytes_of_few_groups_skip_the_journal() -> None:
    disk, store, _ = a_store()
    journals = {path: data for path, data in disk.files().items() if "journal" in path}
    add(store, 1, size=3_000)
    current = store.begin_round()
    assert current is not None
    assert (current.direct, current.journal_round) == ({GROUP}, 0)
    assert {path: disk.files()[path] for path in journals} == journals
    store.sync(current)
    store.end_round(current)
    disk.crash(random.Random(1))
    _, found = open_store(disk)
    assert found[GROUP].log.last_index == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_direct_round_covers_names_that_a_begun_checkpoint_took(seed: int) -> None:
    disk, store, _ = a_store()
    add(store, 3, size=2_500)
    checkpoint = store.begin_checkpoint()  # takes the new file and its directory, syncs nothing
    current = store.begin_round()
    assert current is not None
    assert current.direct == {GROUP}
    store.sync(current)
    store.end_round(current)
    assert not checkpoint.synced
    disk.crash(random.Random(seed))
    _, found = open_store(disk)
    assert found[GROUP].log.last_index == 3


def test_hard_state_shares_the_round_and_its_sync() -> None:
    disk, store, _ = a_store()
    state = HardState(Term(3), Member(NodeId(2), "two"))
    add(store, 1)
    store.set_hard_state(GROUP, state)
    before = disk.operations
    assert commit_round(store) == {GROUP: 1}
    assert disk.operations - before <= 4
    disk.crash(random.Random(0))
    _, found = open_store(disk)
    assert found[GROUP].hard_state == state


def test_hard_state_alone_is_a_round() -> None:
    _, store, _ = a_store()
    store.set_hard_state(GROUP, HardState(Term(1), None))
    assert store.hard_state(GROUP) == (1, None)
    assert commit_round(store) == {GROUP: 0}


def test_a_term_never_falls_and_a_vote_never_changes() -> None:
    _, store, _ = a_store()
    one, two = VOTERS
    store.set_hard_state(GROUP, HardState(Term(5), None))
    store.set_hard_state(GROUP, HardState(Term(5), one))
    with pytest.raises(InvariantBroken):
        store.set_hard_state(GROUP, HardState(Term(5), two))
    with pytest.raises(InvariantBroken):
        store.set_hard_state(GROUP, HardState(Term(4), one))


def test_a_log_raises_the_term_of_a_voter_that_lost_it() -> None:
    """Frames of term 7 survived, the term itself did not: the vote of 7 was never promised."""
    disk, store, _ = a_store()
    add(store, 1, term=7)
    commit_round(store)
    disk.restart()
    _, found = open_store(disk)
    assert found[GROUP].hard_state == (7, None)


def test_frames_that_do_not_follow_are_refused_and_change_nothing() -> None:
    _, store, log = a_store()
    frames = frames_after(log, 3)
    later = log.end._replace(index=LogIndex(1))
    with pytest.raises(InvariantBroken):
        store.append(GROUP, [plain_frame(GROUP, later, FrameKind.NOOP)])
    with pytest.raises(CorruptRecord):
        store.append(GROUP, [frames[0], frames[0]])
    assert log.last_index == 0
    store.append(GROUP, frames)
    assert log.last_index == 3


# Truncation


def test_a_truncation_reaches_the_segment_after_the_journal() -> None:
    disk, store, log = a_store()
    add(store, 5)
    commit_round(store)
    path = f"{LOG_DIR}/{1:020}.log"
    before = disk.files()[path]
    store.truncate(GROUP, LogIndex(3))
    added = add(store, 1, term=2)
    current = store.begin_round()
    assert current is not None
    assert disk.files()[path] == before
    assert log.read(LogIndex(3), LogIndex(3), 1 << 20).data == added[0]
    assert not store.checkpoint_due(1 << 40)
    store.sync(current)
    assert store.end_round(current) == {GROUP: 3}
    assert disk.files()[path] != before
    assert log.term_runs() == [(1, 1), (3, 2)]


def test_a_truncation_lowers_what_rounds_under_way_make_durable() -> None:
    _, store, log = a_store()
    add(store, 5)
    current = store.begin_round()
    assert current is not None
    store.truncate(GROUP, LogIndex(2))
    store.sync(current)
    assert store.end_round(current) == {GROUP: 1}
    assert (log.last_index, log.durable_index) == (1, 1)


def test_a_group_that_was_cut_stays_in_the_journal_until_a_checkpoint() -> None:
    _, store, _ = a_store()
    add(store, 2)
    store.truncate(GROUP, LogIndex(2))
    commit_round(store)
    for direct in (set(), {GROUP}):
        add(store, 1, size=3_000)
        current = store.begin_round()
        assert current is not None
        assert current.direct == direct
        store.sync(current)
        store.end_round(current)
        run_checkpoint(store)


# The journal fills up


def test_a_full_journal_waits_for_a_checkpoint() -> None:
    _, store, log = a_store()
    add(store, 1)
    store.truncate(GROUP, LogIndex(1))  # from here on the group must use the journal
    commit_round(store)
    while (current := _grow(store)) is not None:
        store.sync(current)
        store.end_round(current)
    assert store.staged_groups == {GROUP}
    assert store.checkpoint_due(0)
    checkpoint = store.begin_checkpoint()
    current = store.begin_round()
    assert current is not None
    store.sync_checkpoint(checkpoint)
    store.end_checkpoint(checkpoint)
    store.sync(current)
    store.end_round(current)
    assert log.durable_index == log.last_index


def _grow(store: ShardStore) -> Round | None:
    add(store, 3, size=900)
    return store.begin_round()


def test_more_than_the_journal_holds_takes_several_rounds() -> None:
    disk, store, log = a_store()
    add(store, 1)
    store.truncate(GROUP, LogIndex(1))
    frames = add(store, 60, size=900)
    while store.staged_groups:
        if (current := store.begin_round()) is not None:
            store.sync(current)
            store.end_round(current)
        if store.checkpoint_due(0):
            run_checkpoint(store)
    assert log.durable_index == 60
    disk.crash(random.Random(3))
    _, found = open_store(disk)
    assert read_all(found[GROUP].log) == frames


# Checkpoints


def test_a_checkpoint_is_due_by_time_and_only_if_something_changed() -> None:
    _, store, _ = a_store()
    assert not store.checkpoint_due(SMALL.checkpoint_interval_ms - 1)
    assert store.checkpoint_due(SMALL.checkpoint_interval_ms)
    run_checkpoint(store)
    assert not store.checkpoint_due(1 << 40)
    store.note_commit(GROUP, LogIndex(0))
    assert store.checkpoint_due(1 << 40)
    checkpoint = store.begin_checkpoint()
    assert not store.checkpoint_due(1 << 40)
    with pytest.raises(Misuse):
        store.begin_checkpoint()
    with pytest.raises(InvariantBroken):
        store.end_checkpoint(checkpoint)


def test_the_commit_hint_survives_in_a_checkpoint() -> None:
    disk, store, _ = a_store()
    add(store, 4)
    commit_round(store)
    store.note_commit(GROUP, LogIndex(3))
    run_checkpoint(store)
    disk.crash(random.Random(0))
    _, found = open_store(disk)
    assert found[GROUP].commit_index == 3


# Failure


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_a_failure_is_final(operation: str) -> None:
    disk, store, log = a_store()
    add(store, 2)
    commit_round(store)
    add(store, 1)
    disk.fail_next(operation)
    with pytest.raises(StorageFailed):
        commit_round(store)
    assert store.failed
    calls = (
        lambda: store.append(GROUP, []),
        store.begin_round,
        store.begin_checkpoint,
        lambda: store.set_hard_state(GROUP, HardState(Term(9), None)),
        lambda: store.create_group(OTHER, "t", 1, ()),
        lambda: store.note_commit(GROUP, LogIndex(1)),
    )
    for call in calls:
        with pytest.raises(StorageFailed):
            call()
    assert log.durable_index == 2
    assert f"{NODE}/shards/0/failed" in disk.files()


def test_after_a_failed_sync_nothing_above_the_watermark_is_believed() -> None:
    disk, store, _ = a_store()
    add(store, 2)
    commit_round(store)
    add(store, 3)
    disk.fail_next("sync")
    with pytest.raises(StorageFailed):
        commit_round(store)
    disk.restart()  # the page cache still shows all five
    store, found = open_store(disk)
    assert found[GROUP].log.last_index == 2
    assert found[GROUP].damage is None
    assert f"{NODE}/shards/0/failed" not in disk.files()
    store.append(GROUP, frames_after(found[GROUP].log, 1, term=2))
    commit_round(store)
    disk.crash(random.Random(0))
    _, found = open_store(disk)
    assert found[GROUP].log.term_runs() == [(1, 1), (3, 2)]


def test_a_failed_checkpoint_is_final_too() -> None:
    disk, store, _ = a_store()
    add(store, 1)
    commit_round(store)
    checkpoint = store.begin_checkpoint()
    disk.fail_next("sync")
    with pytest.raises(StorageFailed):
        store.sync_checkpoint(checkpoint)
    with pytest.raises(StorageFailed):
        store.end_checkpoint(checkpoint)


def test_a_disk_that_takes_not_even_the_marker() -> None:
    disk, store, _ = a_store()
    add(store, 2)
    commit_round(store)
    add(store, 1)
    current = store.begin_round()
    assert current is not None
    disk.fail_next("sync")
    disk.fail_next("open", "failed")
    with pytest.raises(StorageFailed):
        store.sync(current)
    disk.restart()
    _, found = open_store(disk)
    last = found[GROUP].log.last_index
    disk.crash(random.Random(0))
    _, found = open_store(disk)
    assert found[GROUP].log.last_index == last >= 2
    assert found[GROUP].damage is None


def test_a_full_disk_is_seen_and_goes_by_itself() -> None:
    disk, store, _ = a_store()
    assert not store.disk_full
    disk.capacity = disk.used() + 100
    store.checkpoint_due(10_000)
    assert store.disk_full
    disk.capacity = None
    store.checkpoint_due(20_000)
    assert not store.disk_full


# Groups


def test_groups_come_back_with_what_they_were_created_with() -> None:
    disk, store, _ = a_store()
    store.create_group(OTHER, "a-topic-with-dashes", 12, ())
    disk.crash(random.Random(0))
    _, found = open_store(disk)
    assert [(one.topic, one.partition, one.voters) for one in found.values()] == [
        ("t", 0, VOTERS),
        ("a-topic-with-dashes", 12, ()),
    ]


def test_a_group_is_created_once_and_in_its_shard() -> None:
    disk = new_disk(shards=2)
    store, _ = open_store(disk, shard=1)
    with pytest.raises(Misuse):
        store.create_group(GroupId(2), "t", 0, ())
    store.create_group(GroupId(3), "t", 0, ())
    with pytest.raises(Misuse):
        store.create_group(GroupId(3), "t", 0, ())
    with pytest.raises(Misuse):
        store.append(GroupId(5), [])


def test_a_removed_group_is_gone_for_good() -> None:
    disk, store, _ = a_store()
    add(store, 3)
    current = store.begin_round()
    assert current is not None
    store.remove_group(GROUP)
    store.sync(current)
    assert store.end_round(current) == {}
    disk.crash(random.Random(5))
    store, found = open_store(disk)
    assert found == {}
    assert [path for path in disk.files() if "g0" in path or "manifest" in path] == []


def test_a_removed_group_s_files_go_with_the_next_checkpoint() -> None:
    disk, store, _ = a_store()
    store.remove_group(GROUP)
    assert disk.list_dir(f"{NODE}/removed") == ["t-0-g0"]
    assert store.checkpoint_due(1 << 40)
    run_checkpoint(store)
    assert disk.list_dir(f"{NODE}/removed") == []
    assert disk.list_dir(f"{NODE}/manifest") == []


def test_what_an_interrupted_creation_left_is_put_aside() -> None:
    disk = new_disk()
    disk.make_dir(LOG_DIR)
    store, _ = open_store(disk)
    disk.make_dir(LOG_DIR)
    store.create_group(GROUP, "t", 0, ())
    assert len(disk.list_dir(f"{NODE}/quarantine")) == 2


# Snapshots and retention


def test_snapshots_are_kept_and_replaced() -> None:
    disk, store, _ = a_store()
    add(store, 5)
    commit_round(store)
    assert store.load_snapshot(GROUP) is None
    store.save_snapshot(GROUP, LogIndex(2), {"folded": [1, b"2"]})
    store.save_snapshot(GROUP, LogIndex(4), {"folded": [3]})
    loaded = store.load_snapshot(GROUP)
    assert loaded is not None
    assert (loaded.at, loaded.body, loaded.slices) == (4, {"folded": [3]}, ())
    disk.crash(random.Random(0))
    _, found = open_store(disk)
    assert found[GROUP].snapshot == (4, {"folded": [3]})
    assert found[GROUP].commit_index == 4


def test_a_snapshot_never_runs_ahead_of_the_log() -> None:
    _, store, _ = a_store()
    add(store, 3)
    commit_round(store)
    add(store, 2)
    with pytest.raises(InvariantBroken, match="ahead of its log"):
        store.save_snapshot(GROUP, LogIndex(5), "fold")


def test_a_log_that_lost_what_its_snapshot_covers_is_damaged() -> None:
    """It must not begin after the snapshot: what readers may still ask for would be gone."""
    disk, store, _ = a_store()
    add(store, 5)
    commit_round(store)
    store.save_snapshot(GROUP, LogIndex(5), "fold")
    disk.crash(random.Random(0))
    for path, size in [(path, len(data)) for path, data in disk.files().items()]:
        if path.endswith(".log"):
            disk.cut(path, size - 40)
        elif "journal" in path:
            disk.roll_back(path, 0, bytes(size))
    _, found = open_store(disk)
    log = found[GROUP].log
    assert log.damage is not None
    assert log.first_index == 1


@pytest.mark.parametrize("seed", range(10))
def test_an_install_replaces_the_log_whatever_survives(seed: int) -> None:
    disk, store, log = a_store()
    add(store, 5)
    commit_round(store)
    add(store, 4)
    install(store, GROUP, LogPoint(LogIndex(7), Term(2), b"abcdefgh", RecordOffset(70)), "fold")
    assert (log.first_index, log.last_index, log.durable_index) == (8, 7, 7)
    assert (log.last_term, log.end_offset, log.term_at(LogIndex(7))) == (2, 70, 2)
    frames = add(store, 2, term=2)
    assert log.read(LogIndex(8), LogIndex(9), 1 << 20).data == joined(frames)
    if seed % 2:
        commit_round(store)
    disk.crash(random.Random(seed))
    _, found = open_store(disk)
    log = found[GROUP].log
    assert found[GROUP].damage is None
    assert (log.first_index, log.begin.offset) == (8, 70)
    assert read_all(log) == frames[: log.last_index - 7]
    assert log.last_index == 9 or not seed % 2


def test_retention_drops_whole_segments_after_a_checkpoint() -> None:
    disk, store, log = a_store()
    frames = add(store, 40, size=900)
    commit_round(store)
    run_checkpoint(store)
    files = disk.list_dir(LOG_DIR)
    first = store.drop_before(GROUP, LogIndex(25))
    assert 1 < first <= 25
    assert log.begin.offset == first - 1
    assert disk.list_dir(LOG_DIR) == files
    run_checkpoint(store)
    assert len(disk.list_dir(LOG_DIR)) < len(files)
    disk.crash(random.Random(0))
    _, found = open_store(disk)
    log = found[GROUP].log
    assert log.first_index == first
    assert found[GROUP].damage is None
    assert read_all(log) == frames[first - 1 :]
    assert log.term_at(LogIndex(first - 1)) == 1


@pytest.mark.parametrize("captured", [False, True])
def test_a_checkpoint_unlinks_no_file_that_a_new_log_has_under_a_dropped_name(
    captured: bool,
) -> None:
    """Retention drops segments, and the replica is rebuilt from a leader that still has them: found
    by the simulator, seed 31737."""
    disk, store, log = a_store()
    add(store, 40, size=900)
    commit_round(store)
    run_checkpoint(store)
    second = log.segments[1].header.before
    assert store.drop_before(GROUP, LogIndex(25)) > second.index + 1
    checkpoint = store.begin_checkpoint() if captured else None
    ticket = store.begin_install(GROUP, second, "fold")
    assert store.write_snapshot(ticket, slices_of(GROUP, [b"a slice"]))
    store.install(ticket, rebuild=True)
    frames = add(store, 20, size=900)
    commit_round(store)
    if checkpoint is not None:
        store.sync_checkpoint(checkpoint)
        store.end_checkpoint(checkpoint)
    run_checkpoint(store)
    assert read_all(log) == frames
    disk.crash(random.Random(0))
    _, found = open_store(disk)
    assert found[GROUP].damage is None
    assert read_all(found[GROUP].log) == frames


# Threads


def test_syncs_in_a_helper_thread(tmp_path: Path) -> None:
    """The loop writes on while another thread syncs, reads included."""
    disk, root = RealDisk(), str(tmp_path)
    prepare_node_dir(disk, root, 1)
    limits = StoreLimits(segment_bytes=1 << 16, journal_bytes=1 << 20, open_segments=2)
    store, _ = open_store(disk, limits=limits, node_dir=root)
    log = store.create_group(GROUP, "t", 0, VOTERS)
    written: list[bytes] = []
    for _ in range(60):
        written += add(store, 5, size=300)
        current = store.begin_round()
        assert current is not None
        helper = threading.Thread(target=store.sync, args=(current,))
        helper.start()
        written += add(store, 2, size=300)
        middle = log.durable_index // 2 + 1
        assert log.read(LogIndex(middle), log.last_index, 5_000).first == middle
        helper.join()
        store.end_round(current)
        if store.checkpoint_due(1 << 40):
            checkpoint = store.begin_checkpoint()
            helper = threading.Thread(target=store.sync_checkpoint, args=(checkpoint,))
            helper.start()
            helper.join()
            store.end_checkpoint(checkpoint)
    commit_round(store)
    assert read_all(log) == written
    store.close()
    _, found = open_store(disk, limits=limits, node_dir=root)
    assert read_all(found[GROUP].log) == written


# Layout


def test_a_store_needs_a_layout() -> None:
    disk = SimulatedDisk()
    disk.make_dir(NODE)
    with pytest.raises(Misuse):
        open_store(disk)
    prepare_node_dir(disk, NODE, 1)
    with pytest.raises(Misuse):
        open_store(disk, shard=1)


def test_nothing_changed_is_cheap() -> None:
    disk, _, _ = a_store()
    before = disk.operations
    prepare_node_dir(disk, NODE, 1, limits=SMALL)
    assert disk.operations - before < 10


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_groups_move_with_the_number_of_shards(shards: int) -> None:
    disk = new_disk(shards=2)
    frames: dict[GroupId, list[bytes]] = {}
    for shard in range(2):
        store, _ = open_store(disk, shard)
        for number in range(shard, 6, 2):
            group = GroupId(number)
            log = store.create_group(group, "t", number, VOTERS)
            frames[group] = frames_after(log, number + 1)
            store.append(group, frames[group])
            store.set_hard_state(group, HardState(Term(number + 1), VOTERS[0]))
        commit_round(store)
    disk.crash(random.Random(shards))
    prepare_node_dir(disk, NODE, shards, limits=SMALL)
    seen: dict[GroupId, list[bytes]] = {}
    for shard in range(shards):
        _, found = open_store(disk, shard)
        for group, one in found.items():
            assert group % shards == shard
            assert one.hard_state == (group + 1, VOTERS[0])
            seen[group] = read_all(one.log)
    assert seen == frames


# Snapshots in slices


def test_a_snapshot_in_slices_is_written_aside_and_found_whole() -> None:
    disk, store, _ = a_store()
    add(store, 5)
    commit_round(store)
    slices = slices_of(GROUP, [b"first", b"", b"third" * 100])
    ticket = store.begin_snapshot(GROUP, LogIndex(4), ["head"])
    assert store.write_snapshot(ticket, slices)
    assert store.load_snapshot(GROUP) is None, "it has not got its name"
    assert store.put_snapshot(ticket)
    store.sync_snapshot(ticket)
    disk.crash(random.Random(0))
    _, found = open_store(disk)
    assert found[GROUP].snapshot == (4, ["head"])
    assert decode_slices(GROUP, found[GROUP].slices) == [b"first", b"", b"third" * 100]


def test_a_snapshot_of_a_log_that_was_replaced_meanwhile_is_dropped() -> None:
    _, store, _ = a_store()
    add(store, 5)
    commit_round(store)
    ticket = store.begin_snapshot(GROUP, LogIndex(4), "ours")
    assert store.write_snapshot(ticket, [])
    install(store, GROUP, LogPoint(LogIndex(9), Term(1), b"abcdefgh", RecordOffset(9)), "theirs")
    assert not store.put_snapshot(ticket)
    loaded = store.load_snapshot(GROUP)
    assert loaded is not None
    assert loaded.body == "theirs"


def test_a_snapshot_without_room_is_not_made_and_harms_nothing() -> None:
    disk, store, _ = a_store()
    add(store, 5)
    commit_round(store)
    store.save_snapshot(GROUP, LogIndex(2), "kept")
    ticket = store.begin_snapshot(GROUP, LogIndex(4), "large")
    disk.capacity = disk.used() + 100
    assert not store.write_snapshot(ticket, slices_of(GROUP, [bytes(5_000)]))
    assert not store.failed
    loaded = store.load_snapshot(GROUP)
    assert loaded is not None
    assert loaded.body == "kept"


def test_of_a_removed_group_no_snapshot_is_made() -> None:
    _, store, _ = a_store()
    add(store, 5)
    commit_round(store)
    ticket = store.begin_snapshot(GROUP, LogIndex(4), "ours")
    store.remove_group(GROUP)
    assert not store.write_snapshot(ticket, [])
    assert not store.put_snapshot(ticket)
    store.sync_snapshot(ticket)


@pytest.mark.parametrize("change", ["flip", "cut", "repeat", "swap"])
def test_a_slice_that_is_not_as_it_was_is_damage(change: str) -> None:
    disk = new_disk()
    group, blocks = GROUP, list(slices_of(GROUP, [b"one" * 20, b"two" * 20]))
    point = LogPoint(LogIndex(1), Term(1), b"abcdefgh", RecordOffset(1))
    if change == "flip":
        blocks[1] = blocks[1][:-1] + bytes([blocks[1][-1] ^ 1])
    elif change == "cut":
        blocks[1] = blocks[1][:-1]
    elif change == "repeat":
        blocks[1] = blocks[0]
    else:
        blocks.reverse()
    write_snapshot(
        disk, NODE, group, Snapshot(point, "head", installed=False, slices=tuple(blocks))
    )
    with pytest.raises(CorruptLog):
        read_snapshot(disk, NODE, group)
