"""Which files somebody means who names a path or a partition, and whether a node uses them now."""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.errors import ConfigError, Corruption, CorruptLog, NotReady
from aegis_cluster.node.identity import IDENTITY_NAME, LOCK_NAME, read_identity
from aegis_cluster.node.node_files import NODES_DIRECTORY, load_nodes
from aegis_cluster.node.run_file import holder_of
from aegis_cluster.storage.manifest import PARTITIONS_DIR, SHARDS_DIR, entry_from_directory
from aegis_cluster.storage.replay import GroupReplay
from aegis_cluster.storage.replica_report import Replica, inspect_replica, replicas_of
from aegis_cluster.storage.salvage import Loss, SalvagedBatch, salvage
from aegis_cluster.storage.segment_report import DISK, inspect_segment
from aegis_cluster.storage.shard_report import read_shards

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Loss", "SalvagedBatch", "Target", "find", "inspect", "is_in_use", "salvage", "unused"]

_NAME: Final = re.compile(r"([A-Za-z0-9._-]+)/(\d{1,5})")


class Target(NamedTuple):
    """What was meant: a node's directory, one replica in it, or a single segment."""

    node_dir: Path | None
    replica: Replica | None = None
    segment: Path | None = None


def find(name: str, directories: list[Path]) -> list[Target]:
    """What `name` means: a path, or TOPIC/PARTITION in these nodes' directories.

    directories: empty means the nodes of the present directory. Raises `ConfigError`.
    """
    path = Path(name)
    if path.exists():
        return [_of_path(path)]
    named = _NAME.fullmatch(name)
    if named is None:
        raise ConfigError(f"There is no file or directory {name}, and it names no TOPIC/PARTITION.")
    topic, partition = named[1], int(named[2])
    places = directories or _local_directories(name)
    found = [
        Target(place, replica)
        for place in places
        for replica in _replicas(place)
        if (replica.entry.topic, replica.entry.partition) == (topic, partition)
    ]
    if not found:
        looked = ", ".join(map(str, places))
        raise ConfigError(
            f"No replica of {name} lies in {looked}; name other directories by --data."
        )
    return found


def _local_directories(name: str) -> list[Path]:
    if not Path(NODES_DIRECTORY).is_dir():
        raise ConfigError(
            f"There is no {name} here, and no ./{NODES_DIRECTORY} that says where nodes keep their"
            " data; name a node's directory by --data."
        )
    nodes = [node.config.data for node in load_nodes(Path.cwd())]
    return [directory for directory in nodes if directory.is_dir()]


def _of_path(path: Path) -> Target:
    path = Path(os.path.abspath(path))
    if path.is_file():
        if path.suffix != ".log":
            raise ConfigError(
                f"{path} is no segment (….log); name a segment, a partition's directory or a"
                " node's directory."
            )
        return Target(_node_dir_above(path), segment=path)
    if _is_node_dir(path):
        return Target(path)
    entry = entry_from_directory(re.sub(r"^\d{6}-", "", path.name))
    if entry is None:
        raise ConfigError(
            f"{path} is neither a node's directory nor that of a partition: it has no"
            f" `{IDENTITY_NAME}` file and is not called TOPIC-PARTITION-gGROUP."
        )
    node_dir = _node_dir_above(path)
    for replica in _replicas(node_dir) if node_dir is not None else ():
        if Path(replica.directory) == path:
            return Target(node_dir, replica)
    return Target(node_dir, Replica(entry, str(path), None, GroupReplay()))


def _is_node_dir(path: Path) -> bool:
    return (path / IDENTITY_NAME).exists() or (
        (path / PARTITIONS_DIR).is_dir() and (path / SHARDS_DIR).is_dir()
    )


def _node_dir_above(path: Path) -> Path | None:
    return next((parent for parent in path.parents if _is_node_dir(parent)), None)


def _replicas(node_dir: Path) -> list[Replica]:
    shards, _ = read_shards(str(node_dir))
    return replicas_of(str(node_dir), shards)


# ---- in use or not


def is_in_use(node_dir: Path | None) -> bool:
    """Whether a node or an engine holds the directory now."""
    if node_dir is None:
        return False
    try:
        with _shared(node_dir):
            return False
    except NotReady:
        return True


@contextmanager
def unused(node_dir: Path | None) -> Iterator[None]:
    """Keep the directory from being used for as long as this lasts. Raises `NotReady`."""
    if node_dir is None:
        yield
        return
    with _shared(node_dir):
        yield


@contextmanager
def _shared(node_dir: Path) -> Iterator[None]:
    """A shared lock: several may look, and nobody may write."""
    try:
        descriptor = os.open(node_dir / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield  # a copy, or never started
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = holder_of(str(node_dir)) or "another process"
            raise NotReady(
                f"{node_dir} is in use by {holder}. Stop it first (`aegis cluster down`), or work"
                " on a copy of the directory."
            ) from None
        yield
    finally:
        os.close(descriptor)


# ---- reports


def inspect(target: Target, *, frames: bool = False) -> dict[str, Any]:
    """A report in plain values. frames: list every frame too. Raises `CorruptLog`, `OSError`."""
    if target.segment is not None:
        entry = entry_from_directory(target.segment.parent.name)
        group = entry.group if entry is not None else None
        report = inspect_segment(str(target.segment), group, frames=frames)
        return {"segment": _plain(asdict(report))}
    told: dict[str, Any] = {}
    if target.node_dir is not None:
        told = {"directory": str(target.node_dir), "in_use": is_in_use(target.node_dir)}
    if target.replica is not None:
        return told | {"partitions": [_report(target.replica, frames=frames)]}
    assert target.node_dir is not None
    shards, problems = read_shards(str(target.node_dir))
    return told | {
        "identity": _identity(target.node_dir, problems),
        "problems": problems,
        "shards": [shard.describe() for shard in shards],
        "partitions": [
            _report(replica, frames=frames) for replica in replicas_of(str(target.node_dir), shards)
        ],
    }


def _report(replica: Replica, *, frames: bool) -> dict[str, Any]:
    found: dict[str, Any] = _plain(asdict(inspect_replica(replica, frames=frames)))
    return found


def _plain(report: dict[str, Any]) -> dict[str, Any]:
    """Problems by name; and no list of frames where none was asked for."""
    for segment in report.get("segments", [report]):
        segment["problems"] = [problem._asdict() for problem in segment["problems"]]
        if segment["listed"] is None:
            del segment["listed"]
        else:
            segment["frame_list"] = segment.pop("listed")
    return report


def _identity(node_dir: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        identity = read_identity(DISK, str(node_dir))
    except (Corruption, CorruptLog) as error:
        problems.append(f"identity: {error}")
        return None
    if identity is None:
        return None
    return {
        "cluster_id": identity.cluster_id,
        "node": identity.node,
        "incarnation": identity.incarnation,
        "founders": [founder.node for founder in identity.founders],
    }
