"""A short mix of faults on three real nodes, and the proof that such a run can fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chaos.processes.checks import Judgement, Verdict
from chaos.processes.recording import load
from chaos.processes.run import Run, describe
from chaos.processes.schedule import (
    CLIENTS,
    COORDINATOR,
    FROM_CLIENTS,
    LEADER,
    NODES,
    TRANSACTIONS,
    Fault,
    Plan,
    Step,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(400)]

ALL_WAYS = tuple((a, b) for a in NODES for b in NODES if a != b)
TO_CLIENTS = tuple((node, client) for node in NODES for client in CLIENTS)


def around(node: str) -> tuple[tuple[str, str], ...]:
    """Between one node and the other nodes: clients still see all of them."""
    return tuple(pair for pair in ALL_WAYS if node in pair)


def run(directory: Path, workload: str, *steps: Step, mistake: str = "") -> list[Judgement]:
    plan = Plan(5, workload, shards=1, partitions=3, pause_s=0.02, steps=(Step(1.0, ()), *steps))
    return Run(plan, directory / "run", print, mistake).run()


def test_a_short_mix_keeps_every_promise(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        "queue",
        Step(1.5, (Fault("kill", (LEADER,)), Fault("delay", pairs=FROM_CLIENTS, amount=20))),
        Step(2.0, (Fault("cut", pairs=around("node-1")), Fault("slow_disk", NODES, amount=20))),
        Step(0.5, (Fault("pause", (LEADER,)), Fault("kill_client", CLIENTS[:1]))),
        Step(1.0, ()),
        Step(0.5, (Fault("reset", pairs=(*TO_CLIENTS, *FROM_CLIENTS)), Fault("kill", NODES))),
        Step(
            1.5, (Fault("cut", pairs=FROM_CLIENTS[:2]), Fault("loss", pairs=ALL_WAYS, amount=0.05))
        ),
        Step(0.5, (Fault("stop", NODES[1:2]),)),
    )
    assert [one for one in found if one.verdict is not Verdict.VALID] == [], describe(found)


def test_transactions_keep_every_promise(tmp_path: Path) -> None:
    repeat = Fault("repeat", pairs=FROM_CLIENTS, amount=0.2)
    found = run(
        tmp_path,
        TRANSACTIONS,
        Step(2.0, (repeat, Fault("kill", (COORDINATOR,), number=1))),
        Step(2.0, (repeat, Fault("pause", (COORDINATOR,)), Fault("pause_client", CLIENTS[:1]))),
        Step(1.0, (repeat, Fault("kill", (LEADER,)), Fault("kill_client", CLIENTS[1:]))),
    )
    assert [one for one in found if one.verdict is not Verdict.VALID] == [], describe(found)
    assert load(tmp_path / "run").transactions.final


def test_a_planted_mistake_is_found(tmp_path: Path) -> None:
    """An acknowledgement before the commit: a leader that is cut off promises what is lost."""
    found = run(
        tmp_path,
        "unique-ids",
        *(Step(2.0, (Fault("cut", pairs=around(node)),)) for node in NODES),
        mistake="tests.chaos.mistakes:acknowledged_before_the_commit",
    )
    invalid = {one.check for one in found if one.verdict is Verdict.INVALID}
    assert "lost_write" in invalid, describe(found)
    assert "crash" not in invalid, describe(found)
