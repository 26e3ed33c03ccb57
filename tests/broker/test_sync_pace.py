"""When a loop waits for a sync itself."""

from __future__ import annotations

from aegis_cluster.broker.sync_pace import QUICK_IN_A_ROW, QUICK_MS, SyncPace


def test_a_disk_that_nothing_is_known_about_is_not_waited_for() -> None:
    pace = SyncPace()
    for _ in range(QUICK_IN_A_ROW - 1):
        pace.note(0.3)
        assert not pace.is_quick
    pace.note(0.3)
    assert pace.is_quick


def quick(pace: SyncPace, syncs: int) -> None:
    """So many quick ones, after which the next may be waited for, and not sooner."""
    for _ in range(syncs):
        assert not pace.is_quick
        pace.note(QUICK_MS)
    assert pace.is_quick


def test_after_a_slow_sync_many_have_to_be_quick() -> None:
    pace = SyncPace()
    quick(pace, QUICK_IN_A_ROW)
    pace.note(QUICK_MS + 1)
    for _ in range(QUICK_IN_A_ROW - 1):
        pace.note(1.0)
    pace.note(QUICK_MS + 1)
    quick(pace, QUICK_IN_A_ROW)


def test_the_longer_it_took_the_more() -> None:
    pace = SyncPace()
    pace.note(700.0)
    for _ in range(300):
        pace.note(1.0)
    pace.note(QUICK_MS + 1)
    quick(pace, 400)
