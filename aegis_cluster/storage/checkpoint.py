"""Checkpoints of a shard: per group, what its segments held durably at one moment.

The idea: a checkpoint names the last journal round that it covers and the next generation, so
recovery replays only what came later. Two slots are written in turn, each with a sequence number
and a CRC, so a torn one leaves the other (C7). Layout of a slot, little endian:

    bytes  0..7   magic      b"AEGISCKP"
    bytes  8..9   version    1
    bytes 10..11  reserved   0
    bytes 12..15  crc        CRC-32C of the rest, seeded with the version
    bytes 16..23  sequence   the higher of the two good slots counts
    bytes 24..31  body size
    bytes 32..    body       msgpack

The rule it protects: a slot is written only after everything it claims was synced.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgpack

from aegis_cluster.errors import CorruptLog
from aegis_cluster.ids import NO_INDEX, GroupId, LogIndex, Member, NodeId, RecordOffset, Term
from aegis_cluster.storage.checked_file import pack_body, shape_of, unpack_body
from aegis_cluster.storage.types import Damage, HardState, LogPoint
from aegis_cluster.wire.crc import crc32c

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.storage.disk import Disk, File

CHECKPOINT_VERSION: Final = 1
SLOT_NAMES: Final = ("checkpoint-a", "checkpoint-b")
_MAGIC: Final = b"AEGISCKP"
_HEAD: Final = struct.Struct("<8sHHI")
_NUMBERS: Final = struct.Struct("<QQ")
_BODY_AT: Final = _HEAD.size + _NUMBERS.size


@dataclass(frozen=True, slots=True)
class GroupState:
    """One group in a checkpoint."""

    group: GroupId
    hard_state: HardState
    durable: LogPoint
    """End of the frames that are durable in the segments: index, term, chain, next offset."""
    first_index: LogIndex
    """The log starts here; segments below were dropped on purpose."""
    commit_index: LogIndex
    """A hint."""
    log_starts: tuple[tuple[LogIndex, RecordOffset], ...] = ()
    watermark: LogIndex = NO_INDEX
    """The last durable watermark: `durable.index`, or more in a damaged log."""
    segment: LogIndex = NO_INDEX
    """Base index of the last segment, and its length: for people and tools."""
    position: int = 0
    damage: Damage | None = None
    memberships: tuple[tuple[LogIndex, bytes], ...] = ()
    """MEMBERSHIP frames that matter: index and payload, whose meaning is not this room's."""


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """One slot."""

    sequence: int
    shard: int
    shards: int
    generation: int
    """The first journal generation that is not covered."""
    round: int
    """The last journal round that is covered."""
    groups: tuple[GroupState, ...]


def pack_group(state: GroupState) -> bytes:
    """One group's part of the body; a store keeps it until the group changes."""
    fields: list[Any] = [
        state.group,
        [state.hard_state.term, state.hard_state.vote],
        list(state.durable),
        state.first_index,
        state.commit_index,
        [list(start) for start in state.log_starts],
        [state.watermark, state.segment, state.position],
        list(state.damage) if state.damage else None,
    ]
    if state.memberships:
        fields.append([list(one) for one in state.memberships])
    return pack_body(fields)


def _unpack_group(fields: list[Any]) -> GroupState:
    group, hard_state, durable, first, commit, log_starts, place, damage, *later = fields
    vote = hard_state[1]
    return GroupState(
        GroupId(group),
        HardState(Term(hard_state[0]), Member(NodeId(vote[0]), vote[1]) if vote else None),
        LogPoint._make(durable),
        LogIndex(first),
        LogIndex(commit),
        tuple((LogIndex(at), RecordOffset(start)) for at, start in log_starts),
        LogIndex(place[0]),
        LogIndex(place[1]),
        place[2],
        Damage._make(damage) if damage else None,
        tuple((LogIndex(at), payload) for at, payload in later[0]) if later else (),
    )


def encode_checkpoint(state: CheckpointState) -> bytes:
    """The bytes of a slot."""
    return join_checkpoint(state, [pack_group(one) for one in state.groups])


def join_checkpoint(head: CheckpointState, groups: Sequence[bytes]) -> bytes:
    """The bytes of a slot from groups that are packed already; `head.groups` is not looked at."""
    packer = msgpack.Packer()
    numbers = [head.shard, head.shards, head.generation, head.round]
    parts = [packer.pack_array_header(len(numbers) + 1), *map(packer.pack, numbers)]
    body = b"".join([*parts, packer.pack_array_header(len(groups)), *groups])
    rest = _NUMBERS.pack(head.sequence, len(body)) + body
    return _HEAD.pack(_MAGIC, CHECKPOINT_VERSION, 0, _crc(CHECKPOINT_VERSION, rest)) + rest


def _crc(version: int, rest: bytes) -> int:
    return crc32c(version.to_bytes(4, "little") + rest)


def decode_checkpoint(data: bytes) -> CheckpointState:
    """CorruptLog on anything but the bytes of one slot; what follows them is left over."""
    if len(data) < _BODY_AT:
        raise CorruptLog("too short for a checkpoint", have=len(data))
    magic, version, reserved, crc = _HEAD.unpack_from(data)
    if magic != _MAGIC or version != CHECKPOINT_VERSION or reserved:
        raise CorruptLog("unknown checkpoint format", version=version)
    sequence, size = _NUMBERS.unpack_from(data, _HEAD.size)
    rest = data[_HEAD.size : _BODY_AT + size]
    if _crc(version, rest) != crc:
        raise CorruptLog("checkpoint checksum", sequence=sequence)
    body = unpack_body(data[_BODY_AT : _BODY_AT + size])
    with shape_of("checkpoint"):
        shard, shards, generation, last_round, groups = body
        states = tuple(_unpack_group(fields) for fields in groups)
    return CheckpointState(sequence, shard, shards, generation, last_round, states)


def slot_of(sequence: int) -> int:
    """The slot that a checkpoint goes to: never the one of its predecessor."""
    return sequence % 2


class CheckpointSlots:
    """The two files of a shard."""

    def __init__(self, disk: Disk, directory: str) -> None:
        self._disk = disk
        self._directory = directory
        self._files: list[File | None] = [None, None]

    def _path(self, slot: int) -> str:
        return f"{self._directory}/{SLOT_NAMES[slot]}"

    def load(self) -> tuple[CheckpointState | None, list[str]]:
        """The newest good slot, and what is wrong with others that hold anything."""
        good: list[CheckpointState] = []
        bad: list[str] = []
        for slot, name in enumerate(SLOT_NAMES):
            data = self._read(slot)
            if not data.strip(b"\0"):
                continue  # never written, or its first write was lost as a whole
            try:
                good.append(decode_checkpoint(data))
            except CorruptLog as error:
                bad.append(f"{name}: {error}")
        return max(good, key=lambda state: state.sequence, default=None), bad

    def _read(self, slot: int) -> bytes:
        if not self._disk.exists(self._path(slot)):
            return b""
        file = self._disk.open(self._path(slot))
        self._files[slot] = file
        return file.pread(file.size(), 0)

    def prepare(self) -> None:
        """Make both files, so that a checkpoint needs no new name in the directory."""
        for slot in range(len(SLOT_NAMES)):
            if self._files[slot] is None:
                self._files[slot] = self._disk.open(self._path(slot), create=True)
        self._disk.sync_dir(self._directory)

    def file(self, sequence: int) -> File:
        """Where the checkpoint of this sequence number goes."""
        found = self._files[slot_of(sequence)]
        if found is None:
            raise CorruptLog("checkpoint slots are prepared first", path=self._directory)
        return found
