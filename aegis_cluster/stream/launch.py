"""Starting a processor: topics, a directory of its own, and a worker in the application's group."""

from __future__ import annotations

import fcntl
import getpass
import os
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import StorageFailed
from aegis_cluster.stream.layout import laid_out
from aegis_cluster.stream.running import Running
from aegis_cluster.stream.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.engine import StreamingEngine
    from aegis_cluster.stream.changelog import Progress
    from aegis_cluster.stream.processor import StreamProcessor

_PLACES_MAX: Final = 1_000
"""Workers of one application in one state_dir."""


class Place:
    """A directory that one worker has for itself: the first that nobody holds, so that a worker
    that starts again finds the state that it has left."""

    def __init__(self, parent: Path) -> None:
        """Raises `StorageFailed`."""
        for number in range(_PLACES_MAX):
            self.path = parent / f"worker-{number}"
            self.path.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._file)
            else:
                self.identity = self._identity()
                return
        raise StorageFailed(f"{_PLACES_MAX} workers use {parent}; choose another state_dir.")

    def _identity(self) -> str:
        """A name for whoever works here, now and after a restart: of its transactions."""
        file = self.path / "identity"
        with suppress(OSError):
            found = file.read_text(encoding="ascii").strip()
            if found:
                return found
        name = uuid.uuid4().hex
        file.write_text(name, encoding="ascii")
        return name

    def close(self) -> None:
        """Let others have it."""
        os.close(self._file)


async def start(
    processor: StreamProcessor,
    engine: StreamingEngine,
    on_restore: Callable[[str, Progress], None] | None = None,
) -> Running:
    """Raises as `StreamProcessor.start` does."""
    layout = await laid_out(engine, processor)
    parent = processor.settings.state_dir
    state_dir = _default_dir() if parent is None else Path(parent)
    cluster_id = engine.cluster.metadata.cluster_id
    place = Place(state_dir / cluster_id / processor.application_id)
    worker = Worker(
        engine,
        processor.application_id,
        layout,
        processor.settings,
        place=place,
        dead_letter_topic=processor.dead_letter_topic,
        on_restore=on_restore,
    )
    await worker.start()
    return Running(worker)


def _default_dir() -> Path:
    return Path(tempfile.gettempdir()) / f"aegis-streams-{getpass.getuser()}"
