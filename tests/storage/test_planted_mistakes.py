"""The property test can fail: each known mistake, switched on alone, is found by some seed.

A mistake that stays unfound means that the machine of `machine.py` does not look there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aegis_cluster.errors import InvariantBroken, StorageFailed
from aegis_cluster.storage import checkpoint, store
from aegis_cluster.storage.log import FramesOp, PartitionLog
from aegis_cluster.storage.log_recovery import LogRecovery
from aegis_cluster.storage.rounds import Checkpoint, Round
from aegis_cluster.storage.shard_recovery import ShardRecovery
from aegis_cluster.storage.store import ShardStore
from aegis_cluster.storage.sync_plan import GroupWork
from tests.storage.test_store_property import run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.ids import GroupId
    from aegis_cluster.storage.log import LogOp

SEEDS = 400
STEPS = 120
FIRST_SEEDS = {"writes_checkpoints_into_one_slot": 600}
"""Where to begin with a mistake that few runs show."""


def says_synced_without_syncing(patch: pytest.MonkeyPatch) -> None:
    def sync(self: ShardStore, ticket: Round) -> None:
        ticket.started = ticket.synced = True

    patch.setattr(ShardStore, "sync", sync)


def forgets_directories(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShardStore, "_sync_dirs", lambda self, directories: None)


def covers_no_earlier_round(patch: pytest.MonkeyPatch) -> None:
    """Earlier rounds count as covered, but their files are not synced."""

    def cover(self: Round, earlier: Sequence[Round]) -> None:
        self.covers = tuple(one for one in earlier if not one.started)

    patch.setattr(Round, "cover", cover)


def cuts_segments_before_the_journal_is_durable(patch: pytest.MonkeyPatch) -> None:
    def write(self: ShardStore, found: store._Group, ops: Sequence[LogOp], current: Round) -> None:
        for op in ops:
            found.log.write(op)
        if found.entry.group in current.direct:
            self._take_files(found.log, current)

    patch.setattr(ShardStore, "_write_segments", write)


def skips_the_journal_after_a_truncation(patch: pytest.MonkeyPatch) -> None:
    def work(self: ShardStore, found: store._Group) -> GroupWork:
        size = sum(op.size for op in found.staged if isinstance(op, FramesOp))
        cut = any(not isinstance(op, FramesOp) for op in found.staged)
        return GroupWork(found.entry.group, size, cut or bool(found.held))

    patch.setattr(ShardStore, "_work", work)


def writes_the_checkpoint_before_its_segments(patch: pytest.MonkeyPatch) -> None:
    right = ShardStore._sync_captured

    def sync(self: ShardStore, ticket: Checkpoint) -> None:
        ticket.slot.pwrite(ticket.data, 0)
        ticket.slot.fdatasync()
        right(self, ticket)

    patch.setattr(ShardStore, "_sync_captured", sync)


def writes_checkpoints_into_one_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "slot_of", lambda sequence: 0)


def lets_no_checkpoint_sync(patch: pytest.MonkeyPatch) -> None:
    def capture(self: ShardStore, log: PartitionLog, ticket: Checkpoint) -> None:
        ticket.taken[log.group] = log.take_everything()

    patch.setattr(ShardStore, "_capture_log", capture)


def recovers_without_syncing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShardRecovery, "_sync", lambda self, groups: None)


def believes_the_cache_after_a_failed_sync(patch: pytest.MonkeyPatch) -> None:
    """No marker, and what reads well is not written again."""
    patch.setattr(ShardStore, "_leave_marker", lambda self, reason: None)
    patch.setattr(LogRecovery, "_write_unsure", lambda self, log: None)
    patch.setattr(LogRecovery, "_write_patches", lambda self, log: None)


def goes_on_after_a_failed_sync(patch: pytest.MonkeyPatch) -> None:
    def fail(self: ShardStore, doing: str, error: OSError) -> StorageFailed:
        return StorageFailed(doing)

    patch.setattr(ShardStore, "_fail", fail)


def forgets_what_it_voted(patch: pytest.MonkeyPatch) -> None:
    def take(self: ShardStore, found: store._Group, builder: object, current: Round) -> None:
        state = found.staged_hard_state
        found.hard_state, found.staged_hard_state = state or found.hard_state, None
        current.hard_states.add(found.entry.group)

    patch.setattr(ShardStore, "_take_hard_state", take)


def ignores_truncations_in_rounds_under_way(patch: pytest.MonkeyPatch) -> None:
    def lower(self: ShardStore, group: GroupId, index: int) -> None:
        return None

    patch.setattr(ShardStore, "_lower", lower)


MISTAKES: list[Callable[[pytest.MonkeyPatch], None]] = [
    says_synced_without_syncing,
    forgets_directories,
    covers_no_earlier_round,
    cuts_segments_before_the_journal_is_durable,
    skips_the_journal_after_a_truncation,
    writes_the_checkpoint_before_its_segments,
    writes_checkpoints_into_one_slot,
    lets_no_checkpoint_sync,
    recovers_without_syncing,
    believes_the_cache_after_a_failed_sync,
    goes_on_after_a_failed_sync,
    forgets_what_it_voted,
    ignores_truncations_in_rounds_under_way,
]


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    first = FIRST_SEEDS.get(mistake.__name__, 0)
    for seed in range(first, first + SEEDS):
        try:
            run(seed, STEPS)
        except (Exception, InvariantBroken) as error:  # noqa: BLE001 - whatever shows it
            print(f"found by seed {seed}: {error}")  # noqa: T201 - shown when a test fails
            return
    pytest.fail(f"{SEEDS} seeds from {first} on did not find it")
