"""What others do wrong is counted, and written a few times only."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from aegis_cluster.broker.complaints import EVERY_MS, LINES_MAX, Complaints

if TYPE_CHECKING:
    import pytest


def test_a_flood_is_a_few_lines_and_then_a_number(caplog: pytest.LogCaptureFixture) -> None:
    now = [0]
    complaints = Complaints(logging.getLogger("test"), lambda: now[0])
    for number in range(10_000):
        complaints.say("garbage %s", number)
    assert len(caplog.messages) == LINES_MAX
    now[0] += EVERY_MS
    complaints.tick()
    assert (
        caplog.messages[-1]
        == f"{10_000 - LINES_MAX} more messages broke the protocol in 10 s; 10000 since the start."
    )
    complaints.say("later")
    assert caplog.messages[-1] == "later"
    assert complaints.count == 10_001


def test_a_few_are_written_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    now = [0]
    complaints = Complaints(logging.getLogger("test"), lambda: now[0])
    for _ in range(3):
        complaints.say("odd")
        now[0] += EVERY_MS
        complaints.tick()
    assert caplog.messages == ["odd"] * 3
