"""The shard's journal: all frames and all hard state of a round, durable with one fdatasync.

The idea: two preallocated files are used in turn. A *generation* fills one of them from its start
with rounds; a checkpoint begins the next generation in the other file and frees this one when it
is durable. A round starts at a multiple of 512 bytes, so a torn round shares no sector with one
that was synced before. Generations and round numbers only rise, so what an older generation left
in a file is told from what this one wrote. Layout of a round, little endian:

    bytes  0..7   magic          b"AEGISJRN"
    bytes  8..9   version        1
    bytes 10..11  reserved       0
    bytes 12..15  header crc     CRC-32C of bytes 16..63, seeded with the version
    bytes 16..23  generation     even ones live in journal-a, odd ones in journal-b
    bytes 24..31  round number
    bytes 32..39  synced up to   every round up to this number was durable when this was written
    bytes 40..43  body size
    bytes 44..47  body crc
    bytes 48..51  claims         how many come first in the body
    bytes 52..55  items          how many follow
    bytes 56..63  reserved       0
    body          claims (group, durable index), then items: type, group, number, size, bytes

The rules it protects: a bad round at or below some later `synced up to` is damage; a bad round
above all of them is a torn tail, whatever follows it. Header and body have a CRC each, so a claim
counts even if the round that carries it is torn.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster.errors import CorruptLog, invariant
from aegis_cluster.ids import GroupId, LogIndex, Member, NodeId, RecordOffset, Term
from aegis_cluster.storage.checked_file import pack_body, unpack_body
from aegis_cluster.storage.types import HardState, LogPoint
from aegis_cluster.wire.crc import crc32c, crc32c_extend

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aegis_cluster.storage.disk import Buffer, File

JOURNAL_VERSION: Final = 1
SECTOR_BYTES: Final = 512
JOURNAL_NAMES: Final = ("journal-a", "journal-b")
_MAGIC: Final = b"AEGISJRN"
_VERSION: Final = struct.Struct("<8sHHI")
_NUMBERS: Final = struct.Struct("<QQQIIIIQ")
HEADER_BYTES: Final = _VERSION.size + _NUMBERS.size
_CLAIM: Final = struct.Struct("<QQ")
_ITEM: Final = struct.Struct("<B3xIQQ")
_ZEROS: Final = bytes(SECTOR_BYTES)


class ItemType(IntEnum):
    """What an item of a round is."""

    FRAMES = 1
    """Whole frames; number: index of the first."""
    TRUNCATE = 2
    """number: the first index that goes."""
    HARD_STATE = 3
    """number: term; bytes: msgpack of the vote, [node, incarnation] or nil."""
    RESET = 4
    """The log restarts; number: last index before; bytes: msgpack [term, chain, offset]."""


class Item(NamedTuple):
    """One item as it is read back."""

    type: ItemType
    group: GroupId
    number: int
    data: memoryview


class Claim(NamedTuple):
    """A segment that was synced directly, up to this index."""

    group: GroupId
    durable: LogIndex


class RoundHeader(NamedTuple):
    """The fixed part of a round."""

    generation: int
    number: int
    synced_up_to: int
    body_size: int
    body_crc: int
    claims: int
    items: int


@dataclass(slots=True)
class RoundBuilder:
    """The body of one round; frames are not copied."""

    claims: Sequence[Claim] = ()
    size: int = 0
    """Bytes of the items so far."""
    items: int = 0
    _parts: list[Buffer] = field(default_factory=list)
    _heads: int = 0

    def add_frames(self, group: GroupId, first: LogIndex, frames: Sequence[bytes]) -> None:
        """A run of frames without a gap."""
        size = sum(map(len, frames))
        self._head(ItemType.FRAMES, group, first, size)
        self._parts += frames

    def add_truncate(self, group: GroupId, from_index: LogIndex) -> None:
        """Frames at or above `from_index` go."""
        self._head(ItemType.TRUNCATE, group, from_index, 0)

    def add_hard_state(self, group: GroupId, state: HardState) -> None:
        """A group's term and vote."""
        self._with_data(ItemType.HARD_STATE, group, state.term, pack_body(state.vote))

    def add_reset(self, group: GroupId, begin: LogPoint) -> None:
        """The group's log restarts after `begin`."""
        body = pack_body([begin.term, begin.chain, begin.offset])
        self._with_data(ItemType.RESET, group, begin.index, body)

    def _with_data(self, kind: ItemType, group: GroupId, number: int, data: bytes) -> None:
        self._head(kind, group, number, len(data))
        self._parts.append(data)

    def _head(self, kind: ItemType, group: GroupId, number: int, size: int) -> None:
        self._parts.append(_ITEM.pack(kind, size, group, number))
        self.size += _ITEM.size + size
        self.items += 1

    def encode(self, *, generation: int, number: int, synced_up_to: int) -> list[Buffer]:
        """Everything to be written, padded to whole sectors."""
        claims = b"".join([_CLAIM.pack(*claim) for claim in self.claims])
        crc = crc32c(claims)
        for part in self._parts:
            crc = crc32c_extend(crc, part)  # type: ignore[arg-type]  # parts are bytes
        body = len(claims) + self.size
        header = encode_round_header(
            RoundHeader(generation, number, synced_up_to, body, crc, len(self.claims), self.items)
        )
        padding = _ZEROS[: -(HEADER_BYTES + body) % SECTOR_BYTES]
        return [header, claims, *self._parts, padding]


def round_bytes(body_size: int, claims: int) -> int:
    """Room that a round takes in the journal."""
    size = HEADER_BYTES + claims * _CLAIM.size + body_size
    return size + -size % SECTOR_BYTES


def item_bytes(data_size: int) -> int:
    """Room that an item takes in a round."""
    return _ITEM.size + data_size


def encode_round_header(header: RoundHeader) -> bytes:
    """The first 64 bytes of a round."""
    numbers = _NUMBERS.pack(*header, 0)
    crc = _header_crc(JOURNAL_VERSION, numbers)
    return _VERSION.pack(_MAGIC, JOURNAL_VERSION, 0, crc) + numbers


def _header_crc(version: int, numbers: bytes) -> int:
    return crc32c(version.to_bytes(4, "little") + numbers)


def decode_round_header(data: Buffer, position: int) -> RoundHeader | None:
    """None where no valid header stands."""
    if position + HEADER_BYTES > len(data):
        return None
    magic, version, reserved, crc = _VERSION.unpack_from(data, position)
    numbers = bytes(data[position + _VERSION.size : position + HEADER_BYTES])
    if magic != _MAGIC or version != JOURNAL_VERSION or reserved:
        return None
    if _header_crc(version, numbers) != crc:
        return None
    return RoundHeader._make(_NUMBERS.unpack(numbers)[:7])


class FoundRound(NamedTuple):
    """A round whose header holds, as it was found in a file."""

    header: RoundHeader
    file: str
    position: int
    body: memoryview | None
    """None where the body fails its check."""


def scan_journal(data: bytes, *, file: str, generation_min: int) -> list[FoundRound]:
    """Every round of these generations in a file, bad ones in between or not."""
    found: list[FoundRound] = []
    position = 0
    while position + HEADER_BYTES <= len(data):
        header = decode_round_header(data, position)
        if header is None or header.generation < generation_min:
            position = _next_magic(data, position + 1)
            continue
        body = _body(data, position, header)
        found.append(FoundRound(header, file, position, body))
        position += round_bytes(header.body_size, 0) if body is not None else SECTOR_BYTES
    return found


def _next_magic(data: bytes, start: int) -> int:
    """The next sector that begins like a round; the file's end where there is none."""
    place = data.find(_MAGIC, start)
    while place >= 0 and place % SECTOR_BYTES:
        place = data.find(_MAGIC, place + 1)
    return place if place >= 0 else len(data)


def _body(data: bytes, position: int, header: RoundHeader) -> memoryview | None:
    start = position + HEADER_BYTES
    body = data[start : start + header.body_size]
    if len(body) != header.body_size or crc32c(body) != header.body_crc:
        return None
    return memoryview(body)


def round_claims(found: FoundRound) -> list[Claim]:
    """The directly synced segments that a good round tells of."""
    body = found.body
    invariant(body is not None, "only a good round is read")
    end = found.header.claims * _CLAIM.size
    return [
        Claim(GroupId(group), LogIndex(durable))
        for group, durable in _CLAIM.iter_unpack((body or b"")[:end])
    ]


def round_items(found: FoundRound) -> Iterator[Item]:
    """The items of a good round in order. CorruptLog if it was written wrong, CRC and all."""
    body = found.body or memoryview(b"")
    position = found.header.claims * _CLAIM.size
    for _ in range(found.header.items):
        kind, size, group, number = _ITEM.unpack_from(body, position)
        position += _ITEM.size
        if position + size > len(body):
            raise CorruptLog("an item leaves its round", round=found.header.number)
        yield Item(ItemType(kind), GroupId(group), number, body[position : position + size])
        position += size


def item_hard_state(item: Item) -> HardState:
    """Read a HARD_STATE item."""
    vote = unpack_body(bytes(item.data))
    return HardState(Term(item.number), Member(NodeId(vote[0]), vote[1]) if vote else None)


def item_reset(item: Item) -> LogPoint:
    """Read a RESET item."""
    term, chain, offset = unpack_body(bytes(item.data))
    return LogPoint(LogIndex(item.number), Term(term), chain, RecordOffset(offset))


class Journal:
    """The two files, and where the next round goes."""

    def __init__(self, files: tuple[File, File], capacity: int) -> None:
        self._files = files
        self._capacity = capacity
        self._position = 0
        self.generation = 0
        self.last_round = 0
        """Number of the newest round written."""

    @property
    def file(self) -> File:
        """The file of this generation."""
        return self._files[self.generation % 2]

    @property
    def room(self) -> int:
        """Bytes left in this generation's file."""
        return self._capacity - self._position

    @property
    def used(self) -> int:
        """Bytes written in this generation."""
        return self._position

    def start_generation(self, generation: int) -> None:
        """Go on in the other file from its start; the caller knows that it is free."""
        invariant(generation > self.generation, "generations rise", have=self.generation)
        self.generation = generation
        self._position = 0

    def write(self, builder: RoundBuilder, *, synced_up_to: int) -> int:
        """Write one round, unsynced; return its number."""
        size = round_bytes(builder.size, len(builder.claims))
        number = self.last_round + 1
        if size > self.room or synced_up_to >= number:
            invariant(
                False,
                "a round fits the journal, and only earlier ones are synced",
                have=(size, synced_up_to),
                want=(self.room, number),
            )
        parts = builder.encode(generation=self.generation, number=number, synced_up_to=synced_up_to)
        self.file.pwritev(parts, self._position)
        self._position += size
        self.last_round = number
        return number
