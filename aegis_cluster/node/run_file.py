"""`node.run`: which process runs a node, for those who want to end it.

It is written by whoever starts the process, so that one which has not got far yet can be ended
too, and then by the process itself.

The idea: soft state. The lock on the directory decides who may run a node; this file only says
whom to signal, and is believed as far as the process itself agrees (`processes`).
"""

from __future__ import annotations

import contextlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from aegis_cluster.node.processes import ProcessMark, is_alive

RUN_NAME: Final = "node.run"


class RunFile(NamedTuple):
    """The content of `node.run`."""

    mark: ProcessMark
    boot_id: str
    """Of this start of the supervisor; empty until it has written the file itself."""
    started: str
    """ISO 8601, UTC."""


def write_run_file(directory: Path, mark: ProcessMark, *, boot_id: str) -> None:
    """Say which process runs the node; readers find the old file or the new one, whole."""
    content = {
        "pid": mark.pid,
        "created": mark.created,
        "group": mark.group,
        "config": mark.marker,
        "boot_id": boot_id,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    temporary = directory / f"{RUN_NAME}.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(directory / RUN_NAME)


def read_run_file(directory: Path) -> RunFile | None:
    """What the file says; None when there is none, or none that can be understood."""
    try:
        content = json.loads((directory / RUN_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    match content:
        case {
            "pid": int(pid),
            "created": float(created),
            "group": int(group),
            "config": str(marker),
            "boot_id": str(boot_id),
            "started": str(started),
        }:
            return RunFile(ProcessMark(pid, created, group, marker), boot_id, started)
    return None


def running_mark(directory: Path) -> ProcessMark | None:
    """The process that runs the node of this directory; None when none does."""
    found = read_run_file(directory)
    return found.mark if found is not None and is_alive(found.mark) else None


def remove_run_file(directory: Path) -> None:
    """After a clean end."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(directory / RUN_NAME)


def holder_of(directory: str) -> str | None:
    """In words, the process that runs the node of this directory."""
    found = read_run_file(Path(directory))
    if found is None or not is_alive(found.mark):
        return None
    return f"process {found.mark.pid} (`aegis node run`, since {found.started})"
