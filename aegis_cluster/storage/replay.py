"""What a shard's journal says after a restart: pure decisions over rounds that were found.

The idea: rounds continue the checkpoint's number without a gap. The first one that is missing or
bad ends the replay. It is a torn tail if no claim reaches it, whatever follows it on disk; it is
damage if some later round says that it was once synced. What remains is folded into one final
state per group: its hard state, its durable watermark, where its log was cut, and the frames that
the journal holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from aegis_cluster.ids import NO_INDEX, GroupId, LogIndex
from aegis_cluster.storage.journal import (
    FoundRound,
    Item,
    ItemType,
    item_hard_state,
    item_reset,
    round_claims,
    round_items,
)
from aegis_cluster.storage.types import NO_HARD_STATE, HardState, LogPoint
from aegis_cluster.wire.frame import iter_frames

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from aegis_cluster.storage.checkpoint import CheckpointState


class JournalDamage(NamedTuple):
    """A round that was durable once and cannot be read."""

    round: int
    file: str
    position: int


@dataclass(frozen=True, slots=True)
class JournalFindings:
    """Which rounds count."""

    rounds: tuple[FoundRound, ...]
    """To be replayed, in order."""
    synced_up_to: int
    """Rounds up to this number were durable."""
    damage: JournalDamage | None
    generation_max: int
    """The highest generation and round number seen anywhere, good or bad: never used again."""
    round_max: int


def choose_rounds(
    found: Iterable[FoundRound], checkpoint: CheckpointState, trusted: int | None = None
) -> JournalFindings:
    """Decide which rounds are replayed.

    trusted: after a failed sync, the last round that was known as durable; later ones are not
    believed even if they read well, because the page cache lies (C1).
    """
    newest = sorted(found, key=lambda one: (one.header.number, one.header.generation))
    by_number = {one.header.number: one for one in newest}
    claims = [one.header.synced_up_to for one in by_number.values()]
    synced = max([checkpoint.round, *claims, trusted or 0])
    chosen: list[FoundRound] = []
    number = checkpoint.round + 1
    while trusted is None or number <= trusted:
        one = by_number.get(number)
        if one is None or one.body is None:
            break
        chosen.append(one)
        number += 1
    return JournalFindings(
        tuple(chosen),
        synced,
        _damage(by_number, number) if number <= synced else None,
        max([checkpoint.generation, *(one.header.generation for one in newest)]),
        max([checkpoint.round, *by_number]),
    )


def _damage(by_number: Mapping[int, FoundRound], number: int) -> JournalDamage:
    bad = by_number.get(number)
    return JournalDamage(number, bad.file if bad else "", bad.position if bad else 0)


@dataclass(slots=True)
class GroupReplay:
    """What the journal says of one group since the checkpoint."""

    hard_state: HardState = NO_HARD_STATE
    durable: LogIndex = NO_INDEX
    """The group's last durable watermark."""
    reset: LogPoint | None = None
    """The log was replaced by one that starts after this."""
    lowest_cut: LogIndex | None = None
    """Frames from here on in the segments may be older than the journal's."""
    open_cut: LogIndex | None = None
    """A truncation that no frame followed: what the segments hold from here on was cut."""
    frames: dict[int, memoryview] = field(default_factory=dict)
    """By index: the final ones."""


def replay(findings: JournalFindings, checkpoint: CheckpointState) -> dict[GroupId, GroupReplay]:
    """Fold the checkpoint and the rounds that count into one state per group."""
    groups = {
        state.group: GroupReplay(state.hard_state, state.durable.index)
        for state in checkpoint.groups
    }
    for one in findings.rounds:
        for claim in round_claims(one):
            group = groups.setdefault(claim.group, GroupReplay())
            group.durable = max(group.durable, claim.durable)
        synced = one.header.number <= findings.synced_up_to
        for item in round_items(one):
            _apply(groups.setdefault(item.group, GroupReplay()), item, synced=synced)
    return groups


def _apply(group: GroupReplay, item: Item, *, synced: bool) -> None:
    match item.type:
        case ItemType.FRAMES:
            _apply_frames(group, item, synced=synced)
        case ItemType.TRUNCATE:
            _apply_truncate(group, LogIndex(item.number))
        case ItemType.HARD_STATE:
            state = item_hard_state(item)
            if state.term >= group.hard_state.term:
                group.hard_state = state
        case ItemType.RESET:
            group.reset = item_reset(item)
            group.durable = group.reset.index
            group.lowest_cut = group.open_cut = None
            group.frames.clear()


def _apply_frames(group: GroupReplay, item: Item, *, synced: bool) -> None:
    index = item.number
    if group.open_cut is not None and index <= group.open_cut:
        group.open_cut = None
    for position, header in iter_frames(item.data):
        group.frames[index] = item.data[position : position + header.size]
        index += 1
    if synced:
        group.durable = max(group.durable, LogIndex(index - 1))


def _apply_truncate(group: GroupReplay, from_index: LogIndex) -> None:
    for index in [index for index in group.frames if index >= from_index]:
        del group.frames[index]
    group.durable = min(group.durable, LogIndex(from_index - 1))
    group.lowest_cut = min(group.lowest_cut or from_index, from_index)
    group.open_cut = min(group.open_cut or from_index, from_index)


def contiguous(frames: Mapping[int, memoryview], first: int) -> Sequence[memoryview]:
    """The frames from `first` on up to the first gap."""
    run: list[memoryview] = []
    while (frame := frames.get(first + len(run))) is not None:
        run.append(frame)
    return run
