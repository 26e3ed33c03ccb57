"""Bad bytes: above the durable watermark they are cut, at or below it they are reported (C3)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.errors import CorruptLog, InvariantBroken
from aegis_cluster.ids import GroupId, LogIndex, RecordOffset, Term
from aegis_cluster.storage.segment import HEADER_BYTES
from aegis_cluster.storage.types import Damage, HardState, LogPoint
from tests.storage.support import (
    NODE,
    VOTERS,
    commit_round,
    frames_after,
    install,
    new_disk,
    open_store,
    read_all,
    run_checkpoint,
)

if TYPE_CHECKING:
    from aegis_cluster.storage.store import ShardStore
    from aegis_cluster.testing.disk import SimulatedDisk

GROUP = GroupId(0)
LOG_DIR = f"{NODE}/partitions/t-0-g0"
FIRST = f"{LOG_DIR}/{1:020}.log"


def a_store(disk: SimulatedDisk) -> ShardStore:
    store, _ = open_store(disk)
    store.create_group(GROUP, "t", 0, VOTERS)
    return store


def append(store: ShardStore, count: int, *, size: int = 20) -> None:
    log = store.log(GROUP)
    store.append(GROUP, frames_after(log, count, size=size, term=max(1, log.last_term)))


def damage_of(disk: SimulatedDisk) -> Damage:
    """What a restart reports."""
    _, found = open_store(disk)
    damage = found[GROUP].damage
    assert damage is not None
    return damage


def synced_by_checkpoint(count: int = 10, *, size: int = 20) -> SimulatedDisk:
    """A log of which a checkpoint has seen everything."""
    disk = new_disk()
    store = a_store(disk)
    append(store, count, size=size)
    commit_round(store)
    run_checkpoint(store)
    disk.restart()
    return disk


def test_a_bad_frame_below_the_watermark_is_damage_and_stays() -> None:
    disk = synced_by_checkpoint()
    disk.flip_bit(FIRST, len(disk.files()[FIRST]) - 150)  # above the last index entry
    rotten = disk.files()[FIRST]
    for _ in range(2):  # it is reported again after every restart
        _, found = open_store(disk)
        damage = found[GROUP].damage
        assert damage is not None
        assert (damage.group, damage.file) == (GROUP, FIRST)
        assert 1 <= damage.index <= 10
        assert found[GROUP].log.last_index == damage.index - 1
        assert disk.files()[FIRST] == rotten
        disk.restart()


def test_a_damaged_log_reads_what_is_good_and_takes_nothing() -> None:
    disk = synced_by_checkpoint(4)
    disk.flip_bit(FIRST, len(disk.files()[FIRST]) - 1)
    store, found = open_store(disk)
    log = found[GROUP].log
    assert len(read_all(log)) == 3
    with pytest.raises(InvariantBroken):
        store.append(GROUP, frames_after(log, 1))
    store.set_hard_state(GROUP, HardState(Term(9), None))
    commit_round(store)
    run_checkpoint(store)
    disk.restart()
    _, found = open_store(disk)
    assert found[GROUP].damage is not None
    assert found[GROUP].hard_state.term == 9


def test_a_bad_frame_above_the_watermark_is_cut_whatever_follows() -> None:
    disk = synced_by_checkpoint()
    store, _ = open_store(disk)
    append(store, 5, size=3_000)  # skips the journal, is synced, and no one has been told
    current = store.begin_round()
    assert current is not None
    assert current.direct == {GROUP}
    disk.restart()
    disk.flip_bit(FIRST, len(disk.files()[FIRST]) - 5_000)
    _, found = open_store(disk)
    assert found[GROUP].damage is None
    assert 10 <= found[GROUP].log.last_index < 15
    assert found[GROUP].log.durable_index == found[GROUP].log.last_index


def test_a_claim_in_a_later_round_makes_it_damage() -> None:
    disk = synced_by_checkpoint()
    store, _ = open_store(disk)
    append(store, 2, size=3_000)
    commit_round(store)
    append(store, 1)
    commit_round(store)  # this round's record says that 12 is durable
    disk.restart()
    disk.flip_bit(FIRST, len(disk.files()[FIRST]) - 1_000)
    _, found = open_store(disk)
    damage = found[GROUP].damage
    assert damage is not None
    assert damage.index in (11, 12)
    salvaged = [path for path in disk.files() if "salvage" in path]
    assert salvaged == [f"{LOG_DIR}/salvage-{13:020}.frames"]


def test_a_frame_that_the_journal_holds_is_mended() -> None:
    disk = new_disk()
    store = a_store(disk)
    append(store, 5)
    commit_round(store)
    append(store, 1)
    commit_round(store)
    disk.restart()
    disk.flip_bit(FIRST, 64 + 60)
    _, found = open_store(disk)
    assert found[GROUP].damage is None
    assert len(read_all(found[GROUP].log)) == 6


@pytest.mark.parametrize("part", ["header", "missing", "short"])
def test_a_segment_that_is_not_what_it_was(part: str) -> None:
    disk = synced_by_checkpoint(30, size=900)
    names = [name for name in disk.list_dir(LOG_DIR) if name.endswith(".log")]
    assert len(names) > 3
    path = f"{LOG_DIR}/{names[1]}"
    if part == "header":
        disk.flip_bit(path, 20)
    elif part == "missing":
        disk.remove(path)
    else:
        file = disk.open(path)
        file.truncate(file.size() - 10)
    _, found = open_store(disk)
    damage = found[GROUP].damage
    assert damage is not None
    assert 1 < damage.index <= 30
    assert found[GROUP].log.last_index == damage.index - 1
    assert set(names) - set(disk.list_dir(LOG_DIR)) <= {names[1]}


@pytest.mark.parametrize("fill_first", [False, True])
@pytest.mark.parametrize("bad", [*range(0, 64, 9), "torn"])
def test_a_bad_header_above_the_checkpoint_costs_no_frame(bad: int | str, fill_first: bool) -> None:
    """Frames that went past the journal, and no checkpoint since: whether their segment's header
    is torn or rotten cannot be told, but what it said can."""
    disk = new_disk()
    store = a_store(disk)
    if fill_first:
        append(store, 10, size=900)
        commit_round(store)
    run_checkpoint(store)
    before = set(disk.list_dir(LOG_DIR))
    append(store, 40, size=900)
    commit_round(store)
    last = store.log(GROUP).last_index
    frames = read_all(store.log(GROUP))
    disk.restart()
    new = sorted(name for name in set(disk.list_dir(LOG_DIR)) - before if name.endswith(".log"))
    for name in new or [FIRST.rpartition("/")[2]]:
        path = f"{LOG_DIR}/{name}"
        if bad == "torn":
            disk.open(path).pwrite(bytes(64), 0)
        else:
            assert isinstance(bad, int)
            disk.flip_bit(path, bad)
    for _ in range(2):  # the second time there is nothing left to mend
        _, found = open_store(disk)
        assert found[GROUP].damage is None
        assert found[GROUP].log.last_index == last
        assert read_all(found[GROUP].log) == frames
        disk.restart()


def test_a_missing_directory_is_damage() -> None:
    disk = synced_by_checkpoint()
    disk.rename(LOG_DIR, f"{NODE}/elsewhere")
    _, found = open_store(disk)
    assert found[GROUP].damage is not None
    assert found[GROUP].log.last_index == 0


def test_older_content_of_a_whole_file_is_found_out() -> None:
    """C4: every frame of the restored file is good, but they are not what was synced last."""
    disk = new_disk()
    store = a_store(disk)
    append(store, 5)
    commit_round(store)
    run_checkpoint(store)
    old = disk.files()[FIRST]
    store.truncate(GROUP, LogIndex(4))
    store.append(GROUP, frames_after(store.log(GROUP), 2, term=2))
    commit_round(store)
    run_checkpoint(store)
    disk.restart()
    disk.open(FIRST).pwrite(old, 0)
    assert damage_of(disk).index <= 5


def test_a_rotten_index_costs_time_and_nothing_else() -> None:
    disk = synced_by_checkpoint(30, size=900)
    for name in disk.list_dir(LOG_DIR):
        if name.endswith(".index"):
            disk.flip_bit(f"{LOG_DIR}/{name}", 70)
    _, found = open_store(disk)
    assert found[GROUP].damage is None
    assert len(read_all(found[GROUP].log)) == 30
    assert found[GROUP].log.term_runs() == [(1, 1)]


def test_rot_in_a_sealed_segment_is_found_by_who_reads_it() -> None:
    disk = synced_by_checkpoint(30, size=900)
    disk.flip_bit(FIRST, 2_000)
    _, found = open_store(disk)
    log = found[GROUP].log
    assert found[GROUP].damage is None
    with pytest.raises(CorruptLog) as caught:
        read_all(log)
    assert caught.value.details["file"] == FIRST
    assert caught.value.details["group"] == GROUP


@pytest.mark.parametrize("index", [1, 2, 4])
def test_a_rotten_link_of_the_chain_is_found_by_who_reads_that_frame_alone(index: int) -> None:
    """A frame's own checksum does not cover it: found by the simulator, seed 54169."""
    disk = synced_by_checkpoint(30, size=900)
    _, found = open_store(disk)
    log = found[GROUP].log
    place = HEADER_BYTES
    for before in range(1, index):
        place += len(log.read(LogIndex(before), LogIndex(before), 1).data)
    disk.restart()
    disk.flip_bit(FIRST, place + 42)
    _, found = open_store(disk)
    with pytest.raises(CorruptLog):
        found[GROUP].log.read(LogIndex(index), LogIndex(index), 1)


def test_a_durable_journal_round_that_rots_is_damage() -> None:
    disk = new_disk()
    store = a_store(disk)
    append(store, 5)
    commit_round(store)
    append(store, 1)
    commit_round(store)
    append(store, 1)
    commit_round(store)
    journal = next(path for path in disk.files() if "journal" in path and any(disk.files()[path]))
    disk.restart()
    disk.flip_bit(journal, 100)
    assert damage_of(disk).file == journal
    assert any("damaged-journal" in path for path in disk.files())


def test_a_torn_last_round_is_no_damage() -> None:
    disk = new_disk()
    store = a_store(disk)
    append(store, 5)
    commit_round(store)
    append(store, 1)
    assert store.begin_round() is not None
    journal = next(path for path in disk.files() if "journal" in path and any(disk.files()[path]))
    disk.restart()
    end = len(disk.files()[journal].rstrip(b"\0"))
    disk.flip_bit(journal, end - 3)
    disk.flip_bit(FIRST, len(disk.files()[FIRST]) - 3)
    _, found = open_store(disk)
    assert found[GROUP].damage is None
    assert found[GROUP].log.last_index == 5


def test_one_rotten_checkpoint_slot_is_survived_and_both_are_damage() -> None:
    disk = synced_by_checkpoint()
    store, _ = open_store(disk)
    append(store, 3)
    commit_round(store)
    disk.restart()
    disk.flip_bit(f"{NODE}/shards/0/checkpoint-a", 40)
    disk.flip_bit(f"{NODE}/shards/0/checkpoint-b", 40)
    assert "checkpoint" in damage_of(disk).file
    assert "t-0-g0" in disk.list_dir(f"{NODE}/partitions")


def test_a_rotten_manifest_is_damage_of_that_group() -> None:
    disk = synced_by_checkpoint()
    disk.flip_bit(f"{NODE}/manifest/{0:020}", 45)
    _, found = open_store(disk)
    assert found[GROUP].damage is not None
    assert found[GROUP].topic == "t"


def test_an_unknown_directory_is_put_aside() -> None:
    disk = synced_by_checkpoint()
    disk.make_dir(f"{NODE}/partitions/ghost-0-g7")
    disk.make_dir(f"{NODE}/partitions/lost+found")
    _, found = open_store(disk)
    assert list(found) == [GROUP]
    assert disk.list_dir(f"{NODE}/quarantine") == ["000000-ghost-0-g7"]


def test_a_snapshot_install_heals() -> None:
    disk = synced_by_checkpoint()
    disk.flip_bit(FIRST, len(disk.files()[FIRST]) - 10)
    store, found = open_store(disk)
    assert found[GROUP].damage is not None
    install(store, GROUP, LogPoint(LogIndex(20), Term(3), b"12345678", RecordOffset(40)), {"a": 1})
    append(store, 2)
    commit_round(store)
    run_checkpoint(store)
    disk.crash(random.Random(0))
    _, found = open_store(disk)
    assert found[GROUP].damage is None
    assert found[GROUP].snapshot == (20, {"a": 1})
    log = found[GROUP].log
    assert (log.first_index, log.last_index, log.end_offset) == (21, 22, 42)


def test_a_rotten_snapshot_matters_only_where_the_log_starts_late() -> None:
    disk = new_disk()
    store = a_store(disk)
    append(store, 3)
    commit_round(store)
    store.save_snapshot(GROUP, LogIndex(2), "fold")
    disk.restart()
    disk.flip_bit(f"{LOG_DIR}/snapshot", 60)
    _, found = open_store(disk)
    assert found[GROUP].damage is None
    assert found[GROUP].snapshot is None
