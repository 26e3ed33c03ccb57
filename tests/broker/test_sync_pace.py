"""When a loop waits for a sync itself, and that two are never under way."""

from __future__ import annotations

from aegis_cluster.broker.sync_pace import QUICK_IN_A_ROW, QUICK_MS, SyncPace


def test_a_disk_that_nothing_is_known_about_is_not_waited_for() -> None:
    pace = SyncPace()
    for _ in range(QUICK_IN_A_ROW - 1):
        pace.note(0.3)
        assert not pace.is_quick
    pace.note(0.3)
    assert pace.is_quick


def test_after_a_slow_sync_many_have_to_be_quick_in_a_row() -> None:
    pace = SyncPace()
    for _ in range(QUICK_IN_A_ROW):
        pace.note(QUICK_MS)
    pace.note(QUICK_MS + 1)
    assert not pace.is_quick
    for _ in range(QUICK_IN_A_ROW - 1):
        pace.note(1.0)
    pace.note(QUICK_MS + 1)
    for _ in range(QUICK_IN_A_ROW - 1):
        pace.note(1.0)
        assert not pace.is_quick
    pace.note(1.0)
    assert pace.is_quick
