"""Small files that are replaced as a whole: identity, manifest, layout, snapshots, markers.

The idea: a new version is written aside, synced and renamed over the old one, then the directory
is synced; so a reader finds the old or the new file, never half of one (C6, C7). Layout, little
endian:

    bytes  0..7   magic        b"AEGISCHK"
    bytes  8..9   format       1, of this frame around the body
    bytes 10..11  version      of the body, chosen by its owner
    bytes 12..15  crc          CRC-32C of the rest: size, kind and body, seeded with the version
    bytes 16..23  body size
    bytes 24..39  kind         ASCII, zero padded: a file in the wrong place is found out (C5)
    bytes 40..    body         msgpack
"""

from __future__ import annotations

import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import msgpack

from aegis_cluster.errors import CorruptLog, invariant
from aegis_cluster.wire.crc import crc32c

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aegis_cluster.storage.disk import Disk

_MAGIC: Final = b"AEGISCHK"
_FORMAT: Final = 1
_HEAD: Final = struct.Struct("<8sHHI")
_COVERED: Final = struct.Struct("<Q16s")
_KIND_BYTES: Final = 16
_VERSION: Final = struct.Struct("<HH")
TEMPORARY_SUFFIX: Final = ".tmp"


def pack_body(body: Any) -> bytes:
    """The one msgpack dialect of this room."""
    packed: bytes = msgpack.packb(body, use_bin_type=True)
    return packed


def unpack_body(data: bytes) -> Any:
    """CorruptLog on anything that `pack_body` would not have written."""
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise CorruptLog(f"the body is no msgpack: {error}") from error


def encode_checked(*, kind: str, version: int, body: Any) -> bytes:
    """The bytes of one checked file."""
    name = kind.encode("ascii")
    invariant(0 < len(name) <= _KIND_BYTES, "a kind fits its field", kind=kind)
    packed = pack_body(body)
    covered = _COVERED.pack(len(packed), name) + packed
    crc = crc32c(_VERSION.pack(_FORMAT, version) + covered)
    return _HEAD.pack(_MAGIC, _FORMAT, version, crc) + covered


def decode_checked(data: bytes, *, kind: str, path: str = "") -> tuple[int, Any]:
    """(version, body); CorruptLog where any byte is not as it was written."""
    version, body, end = decode_block(data, 0, kind=kind, path=path)
    if end != len(data):
        raise CorruptLog(f"{path}: something follows its end", path=path, have=len(data), want=end)
    return version, body


def decode_block(data: bytes, position: int, *, kind: str, path: str = "") -> tuple[int, Any, int]:
    """(version, body, where it ends) of one of several in a row; CorruptLog as above."""
    start = position + _HEAD.size
    if len(data) < start + _COVERED.size:
        raise CorruptLog(f"{path}: too short for a checked file", path=path, have=len(data))
    magic, format_version, version, crc = _HEAD.unpack_from(data, position)
    if magic != _MAGIC or format_version != _FORMAT:
        raise CorruptLog(f"{path}: not a checked file of format {_FORMAT}", path=path)
    size, name = _COVERED.unpack_from(data, start)
    end = start + _COVERED.size + size
    covered = data[start:end]
    if end > len(data) or crc32c(_VERSION.pack(format_version, version) + covered) != crc:
        raise CorruptLog(f"{path}: checksum", path=path)
    found = name.rstrip(b"\0").decode("ascii", "replace")
    if found != kind:
        raise CorruptLog(f"{path}: is a {found} file, want {kind}", path=path)
    return version, unpack_body(covered[_COVERED.size :]), end


@contextmanager
def shape_of(path: str) -> Iterator[None]:
    """Take a body apart in here: one of another shape than expected is CorruptLog.

    A right checksum says that somebody wrote it so, not who.
    """
    try:
        yield
    except (TypeError, ValueError, KeyError) as error:
        raise CorruptLog(
            f"{path}: its content is not what it should be: {error}", path=path
        ) from error


def write_checked(disk: Disk, path: str, *, kind: str, version: int, body: Any) -> None:
    """Replace the file; when this returns, the new one survives a power loss."""
    write_all_checked(disk, {path: body}, kind=kind, version=version)


def write_all_checked(disk: Disk, bodies: Mapping[str, Any], *, kind: str, version: int) -> None:
    """Replace files of one directory, each as a whole; all new ones are durable on return, and
    the directory is synced once. bodies: by path.
    """
    for path, body in bodies.items():
        file = disk.open(path + TEMPORARY_SUFFIX, create=True)
        file.truncate(0)
        file.pwrite(encode_checked(kind=kind, version=version, body=body), 0)
        file.fdatasync()
        file.close()
    for path in bodies:
        disk.rename(path + TEMPORARY_SUFFIX, path)
    for directory in sorted({os.path.dirname(path) for path in bodies}):
        disk.sync_dir(directory)


def read_checked(disk: Disk, path: str, *, kind: str) -> tuple[int, Any]:
    """(version, body); FileNotFoundError where there is none, CorruptLog on damage."""
    file = disk.open(path)
    data = file.pread(file.size(), 0)
    file.close()
    return decode_checked(data, kind=kind, path=path)
