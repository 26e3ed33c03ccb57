"""What a run puts under the product's code in a process: detours, a bad disk, a planted mistake.

The idea: the product has no switches for tests. A process of a run starts in this room, reads the
run's settings, replaces a function here and there, and then calls the product's own entry point.

The rule it protects: without the environment variable nothing of this is ever loaded.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import zmq

from aegis_cluster.storage.disk import RealFile

if TYPE_CHECKING:
    from collections.abc import Mapping

SETTINGS: Final = "AEGIS_CHAOS"
"""The environment variable that names the settings' file."""
FAIL: Final = "fail"


class Patch:
    """What a planted mistake gets to change a class with; it has pytest's name for it."""

    setattr = staticmethod(setattr)


def write_settings(path: Path, detours: Mapping[str, Mapping[str, str]], mistake: str) -> None:
    """The settings of all parties of a run.

    detours: party -> endpoint that is meant -> endpoint to connect to.
    mistake: "module:function" to be planted in shards, or "".
    """
    content = {"detours": detours, "mistake": mistake}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def disk_order(settings: Path, party: str) -> Path:
    """The file by which a run tells a node's disk what to do: milliseconds of delay, or `FAIL`."""
    return settings.parent / f"{party}.disk"


def install(party: str, *, shard: bool = False) -> None:
    """Put into this process what the settings hold for this party."""
    path = Path(os.environ[SETTINGS])
    settings = json.loads(path.read_text(encoding="utf-8"))
    _redirect(settings["detours"].get(party, {}))
    if shard:
        _obey(disk_order(path, party))
        if settings["mistake"]:
            module, _, name = settings["mistake"].partition(":")
            getattr(importlib.import_module(module), name)(Patch())


def _redirect(detours: Mapping[str, str]) -> None:
    """Every connection goes where the run wants it, whoever makes it."""
    right = zmq.Socket.connect

    def connect(self: zmq.Socket[Any], address: str) -> Any:
        return right(self, detours.get(address, address))

    Patch.setattr(zmq.Socket, "connect", connect)


def _obey(order: Path) -> None:
    """Syncs take as long as the order says, or fail once."""
    right = RealFile.fdatasync

    def fdatasync(self: RealFile) -> None:
        try:
            wanted = order.read_text(encoding="utf-8")
        except FileNotFoundError:
            wanted = ""
        if wanted == FAIL:
            order.unlink(missing_ok=True)
            raise OSError(errno.EIO, "the run told this sync to fail")
        if wanted:
            time.sleep(int(wanted) / 1000)
        right(self)

    Patch.setattr(RealFile, "fdatasync", fdatasync)
