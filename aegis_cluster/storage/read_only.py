"""A disk that cannot be written: for looking at files that belong to somebody else.

The idea: what reads checkpoints, manifests and journals takes a `Disk`; given this one, it cannot
change them, whatever it does, and needs no permission to.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

from aegis_cluster.errors import InvariantBroken
from aegis_cluster.storage.disk import RealDisk, RealFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.storage.disk import Buffer


class ReadOnlyFile(RealFile):
    """A file opened for reading."""

    def pwrite(self, data: Buffer, position: int) -> NoReturn:
        _refuse()

    def pwritev(self, buffers: Sequence[Buffer], position: int) -> NoReturn:
        _refuse()

    def truncate(self, size: int) -> NoReturn:
        _refuse()

    def allocate(self, size: int) -> NoReturn:
        _refuse()

    def fdatasync(self) -> None:
        """Nothing was written."""


class ReadOnlyDisk(RealDisk):
    """The file system, for reading."""

    def open(self, path: str, *, create: bool = False) -> RealFile:
        return ReadOnlyFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def make_dir(self, path: str) -> NoReturn:
        _refuse()

    def rename(self, old: str, new: str) -> NoReturn:
        _refuse()

    def remove(self, path: str) -> NoReturn:
        _refuse()

    def remove_dir(self, path: str) -> NoReturn:
        _refuse()

    def sync_dir(self, path: str) -> None:
        """Nothing was written."""


def _refuse() -> NoReturn:
    raise InvariantBroken("a disk for reading is written to")
