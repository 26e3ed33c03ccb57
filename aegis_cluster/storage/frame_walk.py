"""Walk the frames of a file that may be damaged, past what cannot be read.

The idea: recovery stops at the first frame that fails its check, because it may believe nothing
above it. A person who looks at a log, or wants back what is left of one, needs to know what comes
after. A frame proves itself by its CRC, which covers group and index, so the next good one can be
found by its looks and then be proved.

The rule it protects: whatever comes out was once appended to this very log, byte for byte.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster.errors import CorruptRecord
from aegis_cluster.wire.frame import FrameHeader, check_frame, decode_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aegis_cluster.ids import GroupId

_LOOKS: Final = re.compile(rb"\x01[\x01-\x1f]..[\x00\x01]\x00{3}", re.DOTALL)
"""Version, kind, annotation size and flags of a frame's header."""
_LOOKS_AT: Final = 8
"""Where in the header these stand."""


class Good(NamedTuple):
    """A frame that proves itself. continues: its chain goes on from the frame before it."""

    position: int
    header: FrameHeader
    continues: bool


class Gap(NamedTuple):
    """Bytes from `position` up to `end` that are no frame of this log."""

    position: int
    end: int
    reason: str


def walk(
    group: GroupId, data: bytes, position: int, previous_chain: bytes | None
) -> Iterator[Good | Gap]:
    """Everything from `position` to the end of `data`, in order.

    previous_chain: of the frame before; None where it is not known.
    """
    chain = previous_chain
    while position < len(data):
        try:
            header, continues = _proved(group, data, position, chain)
        except CorruptRecord as error:
            end = _next_good(group, data, position)
            yield Gap(position, end, str(error))
            position, chain = end, None
            continue
        yield Good(position, header, continues)
        position += header.size
        chain = header.chain


def _proved(
    group: GroupId, data: bytes, position: int, chain: bytes | None
) -> tuple[FrameHeader, bool]:
    try:
        header = check_frame(group, data, position, previous_chain=chain)
    except CorruptRecord:
        if chain is None:
            raise
        return check_frame(group, data, position, previous_chain=None), False
    return header, chain is not None


def _next_good(group: GroupId, data: bytes, position: int) -> int:
    """Where the next frame stands that proves itself; the end of the data where none does.

    If the damaged frame's header still tells its size, the one behind it is tried first: what
    users have written is not searched for frames then.
    """
    behind = _behind(data, position)
    if behind is not None and _is_good(group, data, behind):
        return behind
    found = _LOOKS.search(data, position + 1 + _LOOKS_AT)
    while found is not None:
        candidate = found.start() - _LOOKS_AT
        if _is_good(group, data, candidate):
            return candidate
        found = _LOOKS.search(data, found.start() + 1)
    return len(data)


def _behind(data: bytes, position: int) -> int | None:
    try:
        return position + decode_header(data, position).size
    except CorruptRecord:
        return None


def _is_good(group: GroupId, data: bytes, position: int) -> bool:
    try:
        check_frame(group, data, position, previous_chain=None)
    except CorruptRecord:
        return False
    return True
