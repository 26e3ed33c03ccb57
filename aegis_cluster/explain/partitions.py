"""Why a partition takes no writes, or fewer than it could: pure, from what its nodes say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aegis_cluster.explain.findings import Finding, counted, listed

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """One copy. damage: why it takes no part, in its node's words. disk: what its node says of its
    disk, where that is full or gone."""

    node: str
    alive: bool
    in_sync: bool = False
    damage: str | None = None
    disk: str | None = None


@dataclass(frozen=True, slots=True)
class PartitionFacts:
    """The numbers are the leader's; None where nobody leads."""

    topic: str
    partition: int
    replicas: tuple[ReplicaFacts, ...]
    leader: str | None = None
    log_start: int | None = None
    high_watermark: int | None = None
    last_stable: int | None = None

    @property
    def name(self) -> str:
        return f"{self.topic}/{self.partition}"

    @property
    def majority(self) -> int:
        return len(self.replicas) // 2 + 1


def explain_partition(facts: PartitionFacts) -> list[Finding]:
    """What stands in the way of writes and reads, and what would with one failure more."""
    found = list(_without_leader(facts) if facts.leader is None else _with_leader(facts))
    found += _open_transaction(facts)
    if not any(finding.blocks for finding in found):
        found.insert(0, _serves(facts))
    return found


def _serves(facts: PartitionFacts) -> Finding:
    held = sum(one.in_sync for one in facts.replicas)
    return Finding(
        "serves",
        f"{facts.name} takes writes and reads: {facts.leader} leads, {held} of"
        f" {counted(len(facts.replicas), 'replica')} hold all that is committed, offsets"
        f" {facts.log_start} to {facts.high_watermark}.",
        who=(facts.leader or "",),
    )


def _without_leader(facts: PartitionFacts) -> Iterator[Finding]:
    dead = [one for one in facts.replicas if not one.alive]
    damaged = [one for one in facts.replicas if one.alive and one.damage is not None]
    able = len(facts.replicas) - len(dead) - len(damaged)
    if len(facts.replicas) == 1 and damaged:
        yield Finding(
            "damaged",
            f"{facts.name} is stopped: its only replica, on {damaged[0].node}, is damaged:"
            f" {damaged[0].damage}",
            "Restore that node's files from a backup, take out what is readable with `aegis log"
            " salvage`, or delete the topic.",
            blocks=True,
            who=(damaged[0].node,),
        )
    elif able < facts.majority:
        yield _no_quorum(facts, dead, damaged)
    else:
        yield Finding(
            "electing",
            f"{facts.name} has no leader at this moment, and {able} of"
            f" {counted(len(facts.replicas), 'replica')} could elect one.",
            "An election takes about a second; ask again. If it stays so, look at the logs of"
            f" {listed(one.node for one in facts.replicas if one.alive)}.",
            blocks=True,
            who=tuple(one.node for one in facts.replicas if one.alive),
        )


def _no_quorum(
    facts: PartitionFacts, dead: list[ReplicaFacts], damaged: list[ReplicaFacts]
) -> Finding:
    reasons = []
    if dead:
        verb = "does" if len(dead) == 1 else "do"
        reasons.append(f"{listed(one.node for one in dead)} {verb} not answer")
    if damaged:
        verb = "is" if len(damaged) == 1 else "are"
        reasons.append(f"the copy on {listed(one.node for one in damaged)} {verb} damaged")
    able = len(facts.replicas) - len(dead) - len(damaged)
    if dead:
        do = f"Start {listed(one.node for one in dead)} (`aegis cluster up` starts what is dead)."
    else:
        do = "Damaged copies are rebuilt from whole ones; see `aegis cluster status`."
    return Finding(
        "no_quorum",
        f"{facts.name} has no leader and cannot elect one: it needs {facts.majority} of"
        f" {counted(len(facts.replicas), 'replica')} and has {able}, because"
        f" {' and '.join(reasons)}. Nothing is written or read until then; nothing is lost.",
        do,
        blocks=True,
        who=tuple(one.node for one in (*dead, *damaged)),
    )


def _with_leader(facts: PartitionFacts) -> Iterator[Finding]:
    leader = next((one for one in facts.replicas if one.node == facts.leader), None)
    if leader is not None and leader.disk is not None:
        yield Finding("disk_full", leader.disk, blocks=True, who=(leader.node,))
    held = [one for one in facts.replicas if one.in_sync]
    if len(held) < facts.majority:
        missing = [one for one in facts.replicas if not one.in_sync]
        yield Finding(
            "catching_up",
            f"{facts.name} is led by {facts.leader}, but only {len(held)} of"
            f" {counted(len(facts.replicas), 'replica')} hold all that is committed, so new"
            f" writes wait for {listed(one.node for one in missing)}.",
            _about(missing),
            blocks=True,
            who=tuple(one.node for one in missing),
        )
        return
    for one in facts.replicas:
        if one.node == facts.leader:
            continue
        finding = _weak(facts, one, spare=len(held) - facts.majority)
        if finding is not None:
            yield finding


def _about(missing: list[ReplicaFacts]) -> str:
    dead = [one.node for one in missing if not one.alive]
    if dead:
        return f"Start {listed(dead)} (`aegis cluster up` starts what is dead)."
    return "They are alive and catch up by themselves; if they do not, look at their logs."


def _weak(facts: PartitionFacts, one: ReplicaFacts, *, spare: int) -> Finding | None:
    """A follower that is no help; spare: how many more may go before writes stop."""
    risk = (
        f"{counted(spare, 'more loss')} would leave writes possible"
        if spare == 1
        else ("one more loss would stop writes" if spare == 0 else "writes go on")
    )
    if not one.alive:
        return Finding(
            "replica_missing",
            f"{one.node} does not answer, so its copy of {facts.name} falls behind; {risk}.",
            f"Start {one.node} (`aegis cluster up` starts what is dead).",
            who=(one.node,),
        )
    if one.damage is not None:
        return Finding(
            "replica_damaged",
            f"The copy of {facts.name} on {one.node} is damaged and takes no part: {one.damage}",
            "It is rebuilt from the leader by itself; see `aegis cluster status`.",
            who=(one.node,),
        )
    if one.disk is not None:
        return Finding("replica_disk_full", one.disk, who=(one.node,))
    if not one.in_sync:
        return Finding(
            "replica_behind",
            f"{one.node} does not hold all that is committed in {facts.name} yet; {risk}.",
            who=(one.node,),
        )
    return None


def _open_transaction(facts: PartitionFacts) -> Iterator[Finding]:
    stable, end = facts.last_stable, facts.high_watermark
    if stable is not None and end is not None and stable < end:
        yield Finding(
            "open_transaction",
            f"A transaction that begins at offset {stable} of {facts.name} is still open:"
            f" {counted(end - stable, 'offset')} behind it must wait, and readers of committed"
            f" records stop at {stable}.",
            "It ends with its producer, or by its time-out; `aegis txn list` names it.",
        )
