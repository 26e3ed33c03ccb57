"""What one replica's files hold, segments and the shard's word on them together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from aegis_cluster.errors import Corruption
from aegis_cluster.storage.manifest import (
    PARTITIONS_DIR,
    ManifestEntry,
    entry_from_directory,
    list_manifest,
)
from aegis_cluster.storage.replay import GroupReplay
from aegis_cluster.storage.segment import parse_segment_name
from aegis_cluster.storage.segment_report import DISK, SegmentReport, inspect_segment
from aegis_cluster.storage.snapshot import read_snapshot

if TYPE_CHECKING:
    from aegis_cluster.storage.checkpoint import GroupState
    from aegis_cluster.storage.shard_report import ShardFiles


@dataclass(slots=True)
class PartitionReport:
    """One replica. Offsets: start inclusive, end exclusive.

    state: `"ok"`; `"torn tail"`, which the next start cuts, because it was never acknowledged here;
    `"mendable"`, because the journal has what a segment lacks; or `"damaged"`.
    """

    topic: str
    partition: int
    group: int
    directory: str
    state: str
    frames: int
    records: int
    first_index: int | None
    last_index: int | None
    start_offset: int | None
    end_offset: int | None
    durable_index: int
    """Last index that was once synced here, as checkpoint and journal say."""
    checkpoint: dict[str, Any] | None
    journal: dict[str, Any]
    """Frames that stand in the shard's journal and may not be in the segments yet."""
    snapshot: dict[str, Any] | None
    problems: list[str]
    segments: list[SegmentReport]


class Replica(NamedTuple):
    """Where one replica's files are, and what its shard's files say of it."""

    entry: ManifestEntry
    directory: str
    state: GroupState | None
    journal: GroupReplay
    problems: tuple[str, ...] = ()

    def segment_paths(self) -> list[str]:
        """Of its segments, in order."""
        names = sorted(os.listdir(self.directory)) if os.path.isdir(self.directory) else []
        return [f"{self.directory}/{name}" for name in names if parse_segment_name(name)]


def replicas_of(node_dir: str, shards: list[ShardFiles]) -> list[Replica]:
    """Every replica that the directory holds or should hold, by topic and partition."""
    listed, bad = list_manifest(DISK, node_dir)
    entries = {entry.group: entry for entry in listed if not entry.removing}
    for name in DISK.list_dir(f"{node_dir}/{PARTITIONS_DIR}"):
        guessed = entry_from_directory(name)
        if guessed is not None:
            entries.setdefault(guessed.group, guessed)
    found = []
    for group, entry in entries.items():
        shard = shards[group % len(shards)] if shards else None
        state = shard.states.get(group) if shard else None
        journal = (shard.replays.get(group) if shard else None) or GroupReplay()
        problems = (f"manifest: {bad[group]}",) if group in bad else ()
        directory = f"{node_dir}/{PARTITIONS_DIR}/{entry.directory_name}"
        found.append(Replica(entry, directory, state, journal, problems))
    return sorted(found, key=lambda one: (one.entry.topic, one.entry.partition, one.entry.group))


def inspect_replica(replica: Replica, *, frames: bool = False) -> PartitionReport:
    """Read all segments of one replica, frame by frame."""
    entry, state = replica.entry, replica.state
    problems = list(replica.problems)
    if not os.path.isdir(replica.directory):
        problems.append("the directory of the log is missing")
    paths = replica.segment_paths()
    segments = [inspect_segment(path, entry.group, frames=frames) for path in paths]
    snapshot = _inspect_snapshot(replica, problems)
    problems += _gaps(segments, replica)
    used = [one for one in segments if one.frames]
    last = max([one.last_index or 0 for one in used], default=0)
    return PartitionReport(
        topic=entry.topic,
        partition=entry.partition,
        group=entry.group,
        directory=replica.directory,
        state=_state(problems, segments, replica),
        frames=sum(one.frames for one in segments),
        records=sum(one.records for one in segments),
        first_index=used[0].first_index if used else None,
        last_index=last if used else None,
        start_offset=segments[0].base_offset if segments else None,
        end_offset=max((one.end_offset or 0 for one in segments), default=None),
        durable_index=_durable_index(replica),
        checkpoint=_describe_state(state),
        journal=_describe_replay(replica.journal),
        snapshot=snapshot,
        problems=problems,
        segments=segments,
    )


def _durable_index(replica: Replica) -> int:
    state, journal = replica.state, replica.journal
    claims = [journal.durable]
    if state is not None and journal.reset is None:
        claims += [state.durable.index, state.watermark]
    return max(claims)


def _state(problems: list[str], segments: list[SegmentReport], replica: Replica) -> str:
    """What is bad above the durable watermark is a torn tail; below it the journal may still have
    what a segment lacks."""
    durable = _durable_index(replica)
    last = max((one.last_index or 0 for one in segments), default=0)
    reached = [problem.after_index for one in segments for problem in one.problems]
    if problems or any(_with_journal(index, replica) < durable for index in [*reached, last]):
        return "damaged"
    if any(index + 1 in replica.journal.frames for index in reached):
        return "mendable"
    return "torn tail" if reached else "ok"


def _with_journal(index: int, replica: Replica) -> int:
    """The last index up to which the journal goes on without a gap."""
    while index + 1 in replica.journal.frames:
        index += 1
    return index


def _gaps(segments: list[SegmentReport], replica: Replica) -> list[str]:
    """Indexes that should stand between the first segment and the last, and don't."""
    found = []
    first = replica.state.first_index if replica.state is not None else 1
    expected = replica.journal.reset.index + 1 if replica.journal.reset is not None else first
    for segment in segments:
        base = parse_segment_name(segment.file) or 0
        if base > expected:
            known = replica.journal.frames
            missing = next((n for n in range(expected, base) if n not in known), None)
            if missing is not None:
                found.append(f"indexes {missing} to {base - 1} are missing before {segment.file}")
        if segment.last_index is not None:
            expected = max(expected, segment.last_index + 1)
    return found


def _inspect_snapshot(replica: Replica, problems: list[str]) -> dict[str, Any] | None:
    try:
        found = read_snapshot(DISK, replica.directory, replica.entry.group)
    except Corruption as error:
        problems.append(f"snapshot: {error}")
        return None
    if found is None:
        return None
    return {"index": found.at, "offset": found.point.offset, "term": found.point.term}


def _describe_state(state: GroupState | None) -> dict[str, Any] | None:
    if state is None:
        return None
    vote = state.hard_state.vote
    return {
        "term": state.hard_state.term,
        "vote": None if vote is None else vote.node,
        "first_index": state.first_index,
        "durable_index": state.durable.index,
        "durable_offset": state.durable.offset,
        "commit_index": state.commit_index,
        "watermark": state.watermark,
        "log_starts": [list(one) for one in state.log_starts],
        "damage": None if state.damage is None else state.damage._asdict(),
    }


def _describe_replay(journal: GroupReplay) -> dict[str, Any]:
    return {
        "frames": len(journal.frames),
        "first_index": min(journal.frames, default=None),
        "last_index": max(journal.frames, default=None),
        "term": journal.hard_state.term,
        "durable_index": journal.durable,
    }
