"""A file that holds some of the disk back, so that a full disk can still be worked on.

The idea: free space alone is no reserve, for other programs use it up as well. So each shard keeps
a file of zeros. When hardly anything is left it is cut to nothing, and what must go on (deletes,
membership, the cluster's metadata, the start of the process itself) goes on with its space. As
long as it is gone the disk counts as full, however much space was won by cutting it; it is made
again when there is room for it and for as much besides (C9).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aegis_cluster.storage.disk import Disk

RESERVE_NAME: Final = "reserve"


class Reserve:
    """The reserve of one shard."""

    def __init__(self, disk: Disk, directory: str, size: int) -> None:
        self._disk = disk
        self._path = f"{directory}/{RESERVE_NAME}"
        self._size = size
        self.held = False
        """The file is there, in full."""

    def open(self, free_bytes: int) -> None:
        """Look at what an earlier run has left, and free it if even a start needs its space."""
        if self._disk.exists(self._path):
            self.held = self._disk.open(self._path).size() >= self._size
            self.update(free_bytes, may_take=False)

    def update(self, free_bytes: int, *, may_take: bool = True) -> bool:
        """Take or give back the space, as there is; return whether anything changed."""
        if self.held and free_bytes < self._size // 2:
            self._disk.open(self._path).truncate(0)
            self.held = False
            return True
        if may_take and not self.held and free_bytes >= 2 * self._size:
            return self._take()
        return False

    def _take(self) -> bool:
        file = self._disk.open(self._path, create=True)
        try:
            file.allocate(self._size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            file.truncate(0)
            return False
        self.held = True
        return True
