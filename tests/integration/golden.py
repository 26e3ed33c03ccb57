"""The golden data directory: how it is packed, and what is in it.

A later version must open what this one wrote. The archive holds `data/` of three nodes as a cluster
left it that was killed, so that its journals are in use. Preallocated files end in megabytes of
zeros; these are left out, and a file's full size stands in the archive beside it.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any, Final

ARCHIVE: Final = Path(__file__).parents[1] / "data" / "golden" / "data-dir-v1.tar.gz"
EXPECTED: Final = ARCHIVE.with_name("data-dir-v1.json")
SIZE_KEY: Final = "AEGIS.size"
"""Extended header of each file: its size with the zeros at its end."""
LEFT_OUT: Final = {"node.log", "node.log.1", "node.run", "lock"}
"""What tells of processes, not of data."""

Records = dict[str, list[list[Any]]]
"""By topic: [partition, offset, key, payload, headers, milliseconds], in order."""


def pack(data: Path, archive: Path) -> None:
    """Write every file below `data`, without the zeros at its end, the same way each time."""
    with tarfile.open(archive, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(data.rglob("*")):
            info = tarfile.TarInfo(str(path.relative_to(data)))
            if path.is_dir():
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(info)
            elif path.is_file() and path.name not in LEFT_OUT:
                content = path.read_bytes()
                kept = content.rstrip(b"\0")
                info.size, info.pax_headers = len(kept), {SIZE_KEY: str(len(content))}
                tar.addfile(info, io.BytesIO(kept))


def unpack(archive: Path, data: Path) -> None:
    """The directory as it was."""
    data.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for info in tar:
            path = data / info.name
            if info.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            content = tar.extractfile(info)
            assert content is not None
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
            with path.open("r+b") as file:
                file.truncate(int(info.pax_headers[SIZE_KEY]))


def expected_records() -> Records:
    found: Records = json.loads(EXPECTED.read_text())
    return found


def as_rows(messages: list[Any]) -> list[list[Any]]:
    """Messages in an order that does not depend on how partitions came in turn."""
    rows = [
        [
            message.partition,
            message.offset,
            _plain(message.key),
            _plain(message.payload),
            {name: _plain(content) for name, content in message.headers.items()},
            round(message.timestamp.timestamp() * 1000),
        ]
        for message in messages
    ]
    return sorted(rows, key=lambda row: (row[0], row[1]))


def _plain(value: Any) -> Any:
    """As JSON can carry it; bytes are told apart from text."""
    return {"bytes": value.hex()} if isinstance(value, bytes) else value
