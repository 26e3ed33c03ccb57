"""What a shard's journal and checkpoints say, read as recovery would, and changed by nobody."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.errors import Corruption, CorruptLog
from aegis_cluster.storage.checkpoint import (
    SLOT_NAMES,
    CheckpointState,
    GroupState,
    decode_checkpoint,
)
from aegis_cluster.storage.journal import JOURNAL_NAMES, FoundRound, scan_journal
from aegis_cluster.storage.layout import read_layout, shard_dir
from aegis_cluster.storage.marker import read_marker
from aegis_cluster.storage.replay import GroupReplay, JournalFindings, choose_rounds, replay
from aegis_cluster.storage.segment_report import DISK

if TYPE_CHECKING:
    from aegis_cluster.ids import GroupId

DAMAGED_JOURNALS: Final = tuple(f"damaged-{name}" for name in JOURNAL_NAMES)
"""What recovery of a damaged shard has put aside."""


class ShardFiles(NamedTuple):
    """A shard's journal and checkpoints, read; `replays` is what the journal says of each group."""

    shard: int
    checkpoints: list[dict[str, Any]]
    journals: list[dict[str, Any]]
    problems: list[str]
    states: dict[GroupId, GroupState]
    replays: dict[GroupId, GroupReplay]

    def describe(self) -> dict[str, Any]:
        """For people and scripts."""
        return {
            "shard": self.shard,
            "checkpoints": self.checkpoints,
            "journals": self.journals,
            "problems": self.problems,
        }


def read_shard(node_dir: str, shard: int, shards: int) -> ShardFiles:
    """Read a shard's files as recovery would. What fails its check is in `problems`."""
    directory = shard_dir(node_dir, shard)
    problems: list[str] = []
    checkpoints, newest = _read_checkpoints(directory, problems)
    checkpoint = newest or CheckpointState(0, shard, shards, 0, 0, ())
    rounds: list[FoundRound] = []
    journals: list[dict[str, Any]] = []
    for name in (*JOURNAL_NAMES, *DAMAGED_JOURNALS):
        found = _read_journal(f"{directory}/{name}")
        if found is None:
            continue
        journals.append(_describe_journal(name, *found, checkpoint))
        rounds += [one for one in found[1] if one.header.generation >= checkpoint.generation]
    trusted = _trusted_round(directory, problems)
    findings = choose_rounds(rounds, checkpoint, trusted)
    if findings.damage is not None:
        problems.append(f"journal round {findings.damage.round} was durable and cannot be read")
    states = {state.group: state for state in checkpoint.groups}
    return ShardFiles(
        shard, checkpoints, journals, problems, states, _replays(findings, checkpoint)
    )


def _replays(findings: JournalFindings, checkpoint: CheckpointState) -> dict[GroupId, GroupReplay]:
    try:
        return replay(findings, checkpoint)
    except Corruption:
        return {}


def _read_checkpoints(
    directory: str, problems: list[str]
) -> tuple[list[dict[str, Any]], CheckpointState | None]:
    told: list[dict[str, Any]] = []
    newest: CheckpointState | None = None
    for name in SLOT_NAMES:
        path = f"{directory}/{name}"
        if not os.path.exists(path):
            continue
        file = DISK.open(path)
        data = file.pread(file.size(), 0)
        if not data.strip(b"\0"):
            told.append({"file": name, "state": "empty"})
            continue
        try:
            state = decode_checkpoint(data)
        except CorruptLog as error:
            problems.append(f"{name}: {error}")
            told.append({"file": name, "state": "damaged", "reason": str(error)})
            continue
        told.append(
            {
                "file": name,
                "state": "ok",
                "sequence": state.sequence,
                "generation": state.generation,
                "round": state.round,
                "groups": len(state.groups),
            }
        )
        if newest is None or state.sequence > newest.sequence:
            newest = state
    if newest is None:
        problems.append("no checkpoint can be read")
    return told, newest


def _read_journal(path: str) -> tuple[int, list[FoundRound]] | None:
    if not os.path.exists(path):
        return None
    file = DISK.open(path)
    data = file.pread(file.size(), 0)
    return len(data), scan_journal(data, file=path, generation_min=0)


def _describe_journal(
    name: str, size: int, rounds: list[FoundRound], checkpoint: CheckpointState
) -> dict[str, Any]:
    newest = max((one.header.generation for one in rounds), default=None)
    mine = [one for one in rounds if one.header.generation == newest]
    return {
        "file": name,
        "bytes": size,
        "generation": newest,
        "first_round": min((one.header.number for one in mine), default=None),
        "last_round": max((one.header.number for one in mine), default=None),
        "rounds": len(mine),
        "rounds_to_replay": sum(one.header.number > checkpoint.round for one in mine),
        "unreadable_rounds": sum(one.body is None for one in mine),
        "synced_up_to": max((one.header.synced_up_to for one in mine), default=None),
    }


def _trusted_round(directory: str, problems: list[str]) -> int | None:
    try:
        marker = read_marker(DISK, directory)
    except Corruption as error:
        problems.append(str(error))
        return None
    if marker is None:
        return None
    problems.append(f"the disk failed: {marker.reason}; nothing after round {marker.synced_round}")
    return marker.synced_round


def read_shards(node_dir: str) -> tuple[list[ShardFiles], list[str]]:
    """Journals and checkpoints of all shards, and what is wrong with the layout."""
    try:
        count = read_layout(DISK, node_dir) or 0
    except Corruption as error:
        return [], [str(error)]
    return [read_shard(node_dir, shard, count) for shard in range(count)], []
