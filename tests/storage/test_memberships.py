"""MEMBERSHIP frames are remembered, so that a replica knows its members after a restart."""

from __future__ import annotations

from aegis_cluster.ids import GroupId, LogIndex
from aegis_cluster.wire.frame import FrameKind
from tests.storage.support import (
    VOTERS,
    commit_round,
    frames_after,
    new_disk,
    open_store,
    plain_frame,
    run_checkpoint,
)

GROUP = GroupId(0)
PAYLOAD = b"noop"


def test_they_survive_in_checkpoint_and_journal_and_go_with_a_truncation() -> None:
    disk = new_disk()
    store, _ = open_store(disk)
    log = store.create_group(GROUP, "t", 0, VOTERS)
    store.append(GROUP, [plain_frame(GROUP, log.end, FrameKind.MEMBERSHIP)])
    store.append(GROUP, frames_after(log, 2))
    commit_round(store)
    run_checkpoint(store)
    store.append(GROUP, [plain_frame(GROUP, log.end, FrameKind.MEMBERSHIP)])
    commit_round(store)
    assert log.memberships == ((LogIndex(1), PAYLOAD), (LogIndex(4), PAYLOAD))
    store, found = open_store(disk)
    assert found[GROUP].log.memberships == ((LogIndex(1), PAYLOAD), (LogIndex(4), PAYLOAD))
    store.truncate(GROUP, LogIndex(4))
    commit_round(store)
    _, found = open_store(disk)
    assert found[GROUP].log.memberships == ((LogIndex(1), PAYLOAD),)


def test_the_newest_one_below_the_start_of_the_log_stays() -> None:
    disk = new_disk()
    store, _ = open_store(disk)
    log = store.create_group(GROUP, "t", 0, VOTERS)
    for _ in range(2):
        store.append(GROUP, [plain_frame(GROUP, log.end, FrameKind.MEMBERSHIP)])
    store.append(GROUP, frames_after(log, 40, size=1_000))
    commit_round(store)
    assert store.drop_before(GROUP, LogIndex(30)) > 2
    assert log.memberships == ((LogIndex(2), PAYLOAD),)
    run_checkpoint(store)
    _, found = open_store(disk)
    assert found[GROUP].log.memberships == ((LogIndex(2), PAYLOAD),)
