"""A disk in memory that forgets what was not synced, from a seed.

The idea: every file keeps two contents, what readers see and what a power loss leaves. Writes,
truncations and changes of names are *pending* until `fdatasync` or `sync_dir` of their file or
directory. `crash` lets any subset of the pending ones survive: whole, lost, or torn at sector
borders, in no particular order. A process that ends without a power loss (`kill -9`) keeps all of
them: `restart`.

Faults are planted by hand: `fail_next` makes the next fitting operation raise, `before` is called
ahead of each one (and may raise `SimulatedCrash`), `flip_bit` rots a stored byte, `capacity` fills
the disk. A failed sync behaves as Linux does (PITFALLS: fsyncgate): its pages count as clean from
then on, readable until the next crash, and no later sync writes them.

The rule it protects: the same seed and the same calls give the same disk.
"""

from __future__ import annotations

import errno
import os
import posixpath
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from aegis_cluster.errors import NotReady

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from aegis_cluster.storage.disk import Buffer

SECTOR_BYTES: Final = 512


class SimulatedCrash(BaseException):
    """The process ends here. Not an `Exception`, so no code under test handles it by accident."""


@dataclass(slots=True)
class _Write:
    position: int
    data: bytes


@dataclass(slots=True)
class _Truncate:
    size: int


_Change: TypeAlias = _Write | _Truncate


@dataclass(slots=True, eq=False)
class _Inode:
    """One file: as it is read, as it is stored, and what lies between."""

    content: bytearray = field(default_factory=bytearray)
    stored: bytearray = field(default_factory=bytearray)
    pending: list[_Change] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Directory:
    """Names, as they are seen and as they are stored."""

    names: dict[str, _Node] = field(default_factory=dict)
    stored: dict[str, _Node] = field(default_factory=dict)


_Node: TypeAlias = _Inode | _Directory
_Place: TypeAlias = tuple[_Directory, str]


@dataclass(slots=True)
class _NameChange:
    """A link, an unlink or a rename that waits for one of its directories to be synced."""

    old: _Place | None
    new: _Place | None
    node: _Node

    def touches(self, directory: _Directory) -> bool:
        return any(place is not None and place[0] is directory for place in (self.old, self.new))

    def store(self) -> None:
        """Apply it to what is stored, where it still makes sense: some before it may be lost."""
        if self.old is not None:
            names, name = self.old[0].stored, self.old[1]
            if names.get(name) is self.node:
                del names[name]
            elif self.new is None:
                return
        if self.new is not None:
            self.new[0].stored[self.new[1]] = self.node


@dataclass(slots=True)
class _Fault:
    operation: str
    part: str
    error: int


class SimulatedFile:
    """A handle; of no use after a crash."""

    def __init__(self, disk: SimulatedDisk, path: str, inode: _Inode) -> None:
        self._disk = disk
        self._path = path
        self._inode = inode
        self._boot = disk.boot
        self._closed = False

    def _operate(self, operation: str) -> None:
        if self._closed or self._boot != self._disk.boot:
            raise OSError(errno.EBADF, "the handle is closed", self._path)
        self._disk.operate(operation, self._path)

    def pwrite(self, data: Buffer, position: int) -> None:
        self.pwritev([data], position)

    def pwritev(self, buffers: Sequence[Buffer], position: int) -> None:
        data = b"".join(buffers)
        try:
            self._operate("write")
            self._disk.require_room(position + len(data) - len(self._inode.content))
        except OSError:
            self._disk.write_part(self._inode, data, position)
            raise
        self._disk.write(self._inode, data, position)

    def pread(self, size: int, position: int) -> bytes:
        self._operate("read")
        return bytes(self._inode.content[position : position + size])

    def fdatasync(self) -> None:
        try:
            self._operate("sync")
        except OSError:
            self._disk.lose_pages(self._inode)
            raise
        for change in self._inode.pending:
            _apply(self._inode.stored, change)
        self._inode.pending.clear()

    def truncate(self, size: int) -> None:
        self._operate("truncate")
        _truncate(self._inode.content, size)
        self._inode.pending.append(_Truncate(size))

    def allocate(self, size: int) -> None:
        missing = size - len(self._inode.content)
        if missing > 0:
            self.pwrite(bytes(missing), len(self._inode.content))

    def forget(self, start: int, end: int) -> None:
        """There is no cache here."""

    def size(self) -> int:
        self._operate("size")
        return len(self._inode.content)

    def close(self) -> None:
        self._closed = True


class _SimulatedLock:
    def __init__(self, disk: SimulatedDisk, path: str) -> None:
        self._disk = disk
        self._path = path

    def release(self) -> None:
        self._disk.locks.discard(self._path)


class SimulatedDisk:
    """Files and directories of one node."""

    def __init__(self, *, capacity: int | None = None) -> None:
        self.capacity = capacity
        """Bytes of all files together; None for no limit."""
        self.before: Callable[[str, str], None] | None = None
        """Called with (operation, path) ahead of each operation."""
        self.operations = 0
        self.inspected = False
        """Somebody looks from outside: nothing counts, nothing fails."""
        self.boot = 0
        self.locks: set[str] = set()
        self._faults: list[_Fault] = []
        self._root = _Directory()
        self._pending_names: list[_NameChange] = []

    # Faults

    def operate(self, operation: str, path: str) -> None:
        """Every operation passes here: count it, and let a planted fault happen."""
        if self.inspected:
            return
        self.operations += 1
        if self.before is not None:
            self.before(operation, path)
        for fault in self._faults:
            if fault.operation == operation and fault.part in path:
                self._faults.remove(fault)
                raise OSError(fault.error, os.strerror(fault.error), path)

    def fail_next(self, operation: str, part: str = "", error: int = errno.EIO) -> None:
        """The next such operation on a path that contains `part` raises `error`.

        Operations: open, read, write, sync, truncate, size, make_dir, list_dir, rename, remove,
        remove_dir, sync_dir.
        """
        self._faults.append(_Fault(operation, part, error))

    def forget_faults(self) -> None:
        """What was planted and has not happened yet will not happen."""
        self._faults.clear()
        self.before = None

    def flip_bit(self, path: str, position: int, bit: int = 0) -> None:
        """Rot one bit of a file, where it is stored and where it is read."""
        inode = self._inode(path)
        for content in (inode.content, inode.stored):
            if position < len(content):
                content[position] ^= 1 << bit

    def stored(self, ending: str) -> dict[str, bytes]:
        """What a power loss would leave of the files whose names end so."""
        return {path: bytes(inode.stored) for path, inode in self._walk() if path.endswith(ending)}

    def roll_back(self, path: str, position: int, older: bytes) -> None:
        """A block is as it was once: the disk said it had written it, and had not."""
        inode = self._inode(path)
        for content in (inode.content, inode.stored):
            if position + len(older) <= len(content):
                content[position : position + len(older)] = older

    def cut(self, path: str, size: int) -> None:
        """The end of a file is gone."""
        inode = self._inode(path)
        for content in (inode.content, inode.stored):
            del content[size:]

    def require_room(self, more: int) -> None:
        """ENOSPC if the disk has no room for so many more bytes."""
        if more > 0 and self.capacity is not None and self.used() + more > self.capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def used(self) -> int:
        """Bytes in all files."""
        return sum(len(inode.content) for _, inode in self._walk())

    def write(self, inode: _Inode, data: bytes, position: int) -> None:
        """A whole write, pending."""
        _write(inode.content, data, position)
        inode.pending.append(_Write(position, data))

    def write_part(self, inode: _Inode, data: bytes, position: int) -> None:
        """What a failed write may leave behind: its first half."""
        half = data[: len(data) // 2]
        if half and position <= len(inode.content):
            self.write(inode, half, position)

    def lose_pages(self, inode: _Inode) -> None:
        """A failed sync: pages count as clean, and no later sync will write them."""
        inode.pending = [one for one in inode.pending if isinstance(one, _Truncate)]

    # The end of a process

    def restart(self) -> None:
        """The process ends and starts again; the machine does not, so no write is lost."""
        self._end_process()

    def crash(self, rng: random.Random) -> None:
        """The power goes: any subset of what was not synced survives."""
        self._end_process()
        mood = rng.choice(("all", "none", "some", "some"))
        for change in self._pending_names:
            if _survives(rng, mood):
                change.store()
        self._pending_names.clear()
        _forget_names(self._root)
        for _, inode in self._walk():
            _crash_inode(inode, rng, mood)

    def _end_process(self) -> None:
        self.boot += 1
        self.locks.clear()
        self.before = None
        self._faults.clear()

    # Disk

    def _walk(self) -> list[tuple[str, _Inode]]:
        """Every file with its path, in the order of paths."""
        found: list[tuple[str, _Inode]] = []
        rest: list[tuple[str, _Node]] = [("", self._root)]
        while rest:
            path, node = rest.pop()
            if isinstance(node, _Inode):
                found.append((path, node))
            else:
                rest += [(f"{path}/{name}", child) for name, child in node.names.items()]
        return sorted(found, key=lambda one: one[0])

    def _find(self, path: str) -> _Node | None:
        node: _Node = self._root
        for name in path.strip("/").split("/"):
            if not isinstance(node, _Directory) or name not in node.names:
                return None
            node = node.names[name]
        return node

    def _require(self, path: str) -> _Node:
        node = self._find(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return node

    def _inode(self, path: str) -> _Inode:
        node = self._require(path)
        if not isinstance(node, _Inode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return node

    def _directory(self, path: str) -> _Directory:
        node = self._require(path) if path.strip("/") else self._root
        if not isinstance(node, _Directory):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return node

    def _place(self, path: str) -> _Place:
        parent, name = posixpath.split(path)
        return self._directory(parent), name

    def _change(self, old: _Place | None, new: _Place | None, node: _Node) -> None:
        if old is not None:
            del old[0].names[old[1]]
        if new is not None:
            new[0].names[new[1]] = node
        self._pending_names.append(_NameChange(old, new, node))

    def open(self, path: str, *, create: bool = False) -> SimulatedFile:
        self.operate("open", path)
        if create and self._find(path) is None:
            self._change(None, self._place(path), _Inode())
        return SimulatedFile(self, path, self._inode(path))

    def make_dir(self, path: str) -> None:
        self.operate("make_dir", path)
        if self._find(path) is None:
            self._change(None, self._place(path), _Directory())

    def list_dir(self, path: str) -> list[str]:
        self.operate("list_dir", path)
        return sorted(self._directory(path).names)

    def exists(self, path: str) -> bool:
        return self._find(path) is not None

    def rename(self, old: str, new: str) -> None:
        self.operate("rename", old)
        node = self._require(old)
        there = self._find(new)
        if isinstance(there, _Directory) and there.names:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), new)
        self._change(self._place(old), self._place(new), node)

    def remove(self, path: str) -> None:
        self.operate("remove", path)
        self._change(self._place(path), None, self._inode(path))

    def remove_dir(self, path: str) -> None:
        self.operate("remove_dir", path)
        node = self._directory(path)
        if node.names:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        self._change(self._place(path), None, node)

    def sync_dir(self, path: str) -> None:
        directory = self._directory(path)
        self.operate("sync_dir", path)
        for change in self._pending_names:
            if change.touches(directory):
                change.store()
        self._pending_names = [
            change for change in self._pending_names if not change.touches(directory)
        ]

    def free_bytes(self, path: str) -> int:
        self.operate("free_bytes", path)
        return 1 << 40 if self.capacity is None else max(0, self.capacity - self.used())

    def lock(self, path: str) -> _SimulatedLock:
        if path in self.locks:
            raise NotReady(f"{path} is held by another process; stop it first", path=path)
        self.locks.add(path)
        return _SimulatedLock(self, path)

    def files(self) -> dict[str, bytes]:
        """Every file as it is read now."""
        return {path: bytes(inode.content) for path, inode in self._walk()}


def _forget_names(directory: _Directory) -> None:
    """After a power loss only stored names are seen, in every directory that is still reached."""
    rest = [directory]
    while rest:
        one = rest.pop()
        one.names = dict(one.stored)
        rest += [node for node in one.names.values() if isinstance(node, _Directory)]


def _write(content: bytearray, data: bytes, position: int) -> None:
    if position > len(content):
        content.extend(bytes(position - len(content)))
    content[position : position + len(data)] = data


def _truncate(content: bytearray, size: int) -> None:
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


def _survives(rng: random.Random, mood: str) -> bool:
    return mood == "all" or (mood == "some" and rng.random() < 0.5)


def _crash_inode(inode: _Inode, rng: random.Random, mood: str) -> None:
    for change in inode.pending:
        for piece in _sectors(change) if isinstance(change, _Write) else [change]:
            if _survives(rng, mood):
                _apply(inode.stored, piece)
    inode.pending.clear()
    inode.content = bytearray(inode.stored)


def _apply(content: bytearray, change: _Change) -> None:
    if isinstance(change, _Write):
        _write(content, change.data, change.position)
    else:
        _truncate(content, change.size)


def _sectors(write: _Write) -> list[_Write]:
    """The parts of a write that reach the disk one by one."""
    pieces: list[_Write] = []
    start = 0
    while start < len(write.data):
        end = start + SECTOR_BYTES - (write.position + start) % SECTOR_BYTES
        pieces.append(_Write(write.position + start, write.data[start:end]))
        start = end
    return pieces
