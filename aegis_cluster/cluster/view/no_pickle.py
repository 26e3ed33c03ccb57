"""Msgpack in the place of PySyncObj's pickle, so that nothing that arrives can run.

The library unpickles commands, snapshots, membership changes and parts of big entries, each twice
when the first try fails. `install` puts this module's object where the library looks for pickle; it
must be called before anything of the library is constructed.
"""

from __future__ import annotations

from typing import IO, Any, Final

import msgpack
import pysyncobj.serializer
import pysyncobj.syncobj
from pysyncobj.node import Node

from aegis_cluster import limits

_NODE: Final = 1
_SET: Final = 2


class MsgpackForPickle:
    """Looks like the module `pysyncobj.pickle`; tuples stay tuples."""

    @staticmethod
    def dumps(value: Any, protocol: int | None = None) -> bytes:
        return bytes(msgpack.packb(value, default=_encode))

    @staticmethod
    def loads(data: bytes) -> Any:
        return msgpack.unpackb(data, use_list=False, strict_map_key=False, ext_hook=_decode)

    @classmethod
    def dump(cls, value: Any, file: IO[bytes], protocol: int | None = None) -> None:
        file.write(cls.dumps(value))

    @classmethod
    def load(cls, file: IO[bytes]) -> Any:
        """Read a snapshot, of bounded size however small it was compressed."""
        data = file.read(limits.VIEW_SNAPSHOT_BYTES_MAX + 1)
        if len(data) > limits.VIEW_SNAPSHOT_BYTES_MAX:
            raise ValueError(f"a snapshot of more than {limits.VIEW_SNAPSHOT_BYTES_MAX} bytes")
        return cls.loads(data)

    @staticmethod
    def to_bytes(data: bytes | str) -> bytes:
        return data if isinstance(data, bytes) else data.encode()


def install() -> None:
    """Take pickle out of the library."""
    pysyncobj.syncobj.pickle = MsgpackForPickle
    pysyncobj.serializer.pickle = MsgpackForPickle


def _encode(value: Any) -> msgpack.ExtType:
    if isinstance(value, Node):
        return msgpack.ExtType(_NODE, value.id.encode())
    if isinstance(value, (set, frozenset)):
        return msgpack.ExtType(_SET, msgpack.packb(list(value), default=_encode))
    raise TypeError(f"the view replicates no {type(value).__name__}")


def _decode(code: int, data: bytes) -> Any:
    if code == _SET:
        # One level: a set within a set within a set would recurse in C, and end the process.
        return set(msgpack.unpackb(data, use_list=False, ext_hook=_decode_node))
    return _decode_node(code, data)


def _decode_node(code: int, data: bytes) -> Any:
    if code != _NODE:
        raise ValueError(f"an extension of kind {code}")
    return Node(data.decode())
