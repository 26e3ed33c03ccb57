"""The one door to the disk: two small interfaces, and the real one behind them.

The idea: all I/O of this room passes `Disk` and `File`, so a simulated disk can lose un-synced
writes, tear one, flip bits, fill up or fail an fsync, from a seed. Errors are plain `OSError`s;
what they mean is decided by the store.

The rules it protects: a write is whole or raises; nothing is durable before `fdatasync` (bytes of
a file) or `sync_dir` (names in a directory) came back; a file keeps one descriptor for its
writes, because the kernel reports a failed write-back to descriptors that were open then (C2).
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from aegis_cluster.errors import NotReady

if TYPE_CHECKING:
    from collections.abc import Sequence

Buffer: TypeAlias = bytes | bytearray | memoryview

_BUFFERS_PER_CALL: Final = 1_024
"""IOV_MAX of Linux and macOS."""
_FILE_MODE: Final = 0o640


class File(Protocol):
    """One open file. Closed by `close`, or when nobody refers to it any more.

    The second way matters: a read in a helper thread keeps the handle that its ticket captured,
    whatever the loop drops meanwhile, so a descriptor is never reused under a reader.
    """

    def pwrite(self, data: Buffer, position: int) -> None:
        """Write all of `data` at `position`, or raise."""

    def pwritev(self, buffers: Sequence[Buffer], position: int) -> None:
        """Write all buffers one after the other from `position` on, or raise."""

    def pread(self, size: int, position: int) -> bytes:
        """Up to `size` bytes; fewer only where the file ends."""

    def fdatasync(self) -> None:
        """Return once every byte written so far, and the size, survives a power loss."""

    def truncate(self, size: int) -> None:
        """Cut the file; durable with the next `fdatasync`."""

    def allocate(self, size: int) -> None:
        """Make the file at least `size` bytes long, new bytes zero, with their space reserved."""

    def forget(self, start: int, end: int) -> None:
        """Bytes of this range need not stay in the page cache: a hint, which changes nothing else
        and may do nothing."""

    def size(self) -> int:
        """Bytes in the file."""

    def close(self) -> None:
        """Give the handle back; a second time does nothing."""


class Lock(Protocol):
    """A directory held by this process."""

    def release(self) -> None:
        """Let the next process in."""


class Disk(Protocol):
    """Names of files and directories; paths are strings with `/`."""

    def open(self, path: str, *, create: bool = False) -> File:
        """Open for reading and writing; FileNotFoundError unless it exists or `create`."""

    def make_dir(self, path: str) -> None:
        """Make one directory; no error where it exists."""

    def list_dir(self, path: str) -> list[str]:
        """Sorted names; FileNotFoundError where there is no such directory."""

    def exists(self, path: str) -> bool:
        """A file or directory of this name exists."""

    def rename(self, old: str, new: str) -> None:
        """Move a file or directory; a file of the new name is replaced in one step."""

    def remove(self, path: str) -> None:
        """Remove one file."""

    def remove_dir(self, path: str) -> None:
        """Remove one empty directory."""

    def sync_dir(self, path: str) -> None:
        """Return once the names in this directory survive a power loss."""

    def free_bytes(self, path: str) -> int:
        """Bytes that an ordinary process may still write there."""

    def lock(self, path: str) -> Lock:
        """Hold `path` for this process; NotReady where another process does."""


class RealFile:
    """A file of the operating system."""

    __slots__ = ("_descriptor", "_shrunk")

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._shrunk = False

    def __del__(self) -> None:
        self.close()

    def pwrite(self, data: Buffer, position: int) -> None:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._descriptor, rest, position)
            _require_progress(written)
            rest = rest[written:]
            position += written

    def pwritev(self, buffers: Sequence[Buffer], position: int) -> None:
        for start in range(0, len(buffers), _BUFFERS_PER_CALL):
            part = buffers[start : start + _BUFFERS_PER_CALL]
            want = sum(map(len, part))
            written = os.pwritev(self._descriptor, part, position)
            if written < want:
                self.pwrite(b"".join(part)[written:], position + written)
            position += want

    def pread(self, size: int, position: int) -> bytes:
        data = os.pread(self._descriptor, size, position)
        if len(data) == size or not data:
            return data
        parts = [data]
        have = len(data)
        while have < size and (data := os.pread(self._descriptor, size - have, position + have)):
            parts.append(data)
            have += len(data)
        return b"".join(parts)

    def fdatasync(self) -> None:
        if self._shrunk:  # fdatasync need not write a size that only became smaller
            self._shrunk = False
            os.fsync(self._descriptor)
        else:
            _fdatasync(self._descriptor)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)
        self._shrunk = True

    def allocate(self, size: int) -> None:
        """Zeros are written, not only promised: the first write into an extent that was merely
        promised changes metadata, and that change would sit in every fdatasync of a fresh journal.
        """
        block = bytes(1 << 20)
        for position in range(self.size(), size, len(block)):
            self.pwrite(block[: size - position], position)

    def forget(self, start: int, end: int) -> None:
        if _fadvise is not None:
            _fadvise(self._descriptor, start, end - start, os.POSIX_FADV_DONTNEED)

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


_fdatasync: Final = getattr(os, "fdatasync", os.fsync)
_fadvise: Final = getattr(os, "posix_fadvise", None)


def _require_progress(written: int) -> None:
    if written <= 0:
        raise OSError(errno.EIO, "the disk took no byte of a write")


class RealLock:
    """An flock, which the kernel drops when the process ends, however it ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class RealDisk:
    """The file system."""

    def open(self, path: str, *, create: bool = False) -> RealFile:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        return RealFile(os.open(path, flags, _FILE_MODE))

    def make_dir(self, path: str) -> None:
        os.makedirs(path, exist_ok=True)

    def list_dir(self, path: str) -> list[str]:
        return sorted(os.listdir(path))

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def remove(self, path: str) -> None:
        os.unlink(path)

    def remove_dir(self, path: str) -> None:
        os.rmdir(path)

    def sync_dir(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def free_bytes(self, path: str) -> int:
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def lock(self, path: str) -> RealLock:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise NotReady(f"{path} is held by another process; stop it first", path=path) from None
        return RealLock(descriptor)


def make_dir_durable(disk: Disk, path: str) -> None:
    """Make a directory whose name survives a power loss; its parent must exist already."""
    if not disk.exists(path):
        disk.make_dir(path)
    disk.sync_dir(os.path.dirname(path))


def remove_tree(disk: Disk, path: str) -> None:
    """Remove a directory and what is in it."""
    for name in disk.list_dir(path):
        child = f"{path}/{name}"
        try:
            disk.list_dir(child)
        except NotADirectoryError:
            disk.remove(child)
        else:
            remove_tree(disk, child)
    disk.remove_dir(path)
