"""Who a data directory is: which cluster, which node, which formatting of the disk.

The idea: an *incarnation* names one formatting of one directory, and votes are counted by (node,
incarnation), so a disk that was wiped comes back as a new member and cannot vote a second time in
a term it has forgotten. The *founders' list* (who the first voters are) is written only when the
directories of all nodes are empty at once; a node without one never founds a cluster, it joins.

Formatting several directories cannot be one step, so what is going to be written is first put
aside in a *plan*, durably. Whatever fails after that, the next attempt writes the rest of the same
plan. The plan is removed, durably, once every directory is formatted and before anything starts:
were it still there after a start, a directory wiped later would get its old incarnation back.

The rule it protects: two incarnations of one node are never taken for one voter, and one set of
nodes never founds two clusters.
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aegis_cluster.errors import ConfigError, CorruptLog, NotReady
from aegis_cluster.ids import Member, NodeId
from aegis_cluster.node.log import LOG_NAME, OLD_LOG_NAME
from aegis_cluster.node.run_file import RUN_NAME, holder_of
from aegis_cluster.storage.checked_file import TEMPORARY_SUFFIX, read_checked, write_checked
from aegis_cluster.storage.disk import make_dir_durable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.config import NodeConfig
    from aegis_cluster.storage.disk import Disk, Lock

IDENTITY_NAME: Final = "identity"
LOCK_NAME: Final = "lock"
PLAN_NAME: Final = "format-plan"
_VERSION: Final = 1
_NO_DATA: Final = {LOCK_NAME, LOG_NAME, OLD_LOG_NAME, RUN_NAME}
"""Files that say nothing about what the node has promised; a directory with only these is empty."""


class Founder(NamedTuple):
    """One of the first members of a cluster, and where it was at that time."""

    node: NodeId
    incarnation: str
    host: str
    base_port: int

    @property
    def member(self) -> Member:
        """As it is counted in votes."""
        return Member(self.node, self.incarnation)


class Identity(NamedTuple):
    """What the file `identity` of a data directory says."""

    cluster_id: str
    node: NodeId
    incarnation: str
    founders: tuple[Founder, ...]
    """Every founder, this node included; empty: this node joins and never founds."""

    @property
    def member(self) -> Member:
        """As it is counted in votes."""
        return Member(self.node, self.incarnation)


class FormatPlan(NamedTuple):
    """What is going to be written into the empty directories of a new cluster."""

    cluster_id: str
    founders: tuple[Founder, ...]

    def identity_of(self, founder: Founder) -> Identity:
        """What this founder's directory gets."""
        return Identity(self.cluster_id, founder.node, founder.incarnation, self.founders)


# One directory


def read_identity(disk: Disk, directory: str) -> Identity | None:
    """The identity of a data directory, None when it is empty.

    Raises CorruptLog where there is data without an identity: such a directory has lost a file,
    and must not be taken for a new one.
    """
    path = f"{directory}/{IDENTITY_NAME}"
    try:
        version, body = read_checked(disk, path, kind=IDENTITY_NAME)
    except FileNotFoundError:
        _require_empty(disk, directory)
        return None
    if version != _VERSION:
        raise CorruptLog(f"{path}: version {version} is newer than this program", path=path)
    return _identity_from_body(body, path)


def load_identity(disk: Disk, config: NodeConfig) -> Identity:
    """The identity of a formatted node; ConfigError when its directory is empty or another's."""
    identity = read_identity(disk, str(config.data))
    if identity is None:
        raise ConfigError(
            f"{config.data} is not formatted; `aegis cluster up` does it for all nodes of this "
            "machine, `aegis node format` for the nodes it is given",
            path=str(config.data),
        )
    check_identity(config, identity)
    return identity


def _require_empty(disk: Disk, directory: str) -> None:
    names = disk.list_dir(directory) if disk.exists(directory) else []
    data = [n for n in names if n not in _NO_DATA and not n.endswith(TEMPORARY_SUFFIX)]
    if data:
        raise CorruptLog(
            f"{directory} holds {', '.join(data[:5])} but no `{IDENTITY_NAME}` file; it is not a "
            "new directory, so it is left as it is. Restore the file, or move the directory away "
            "to start this node with an empty one",
            path=directory,
        )


def write_identity(disk: Disk, directory: str, identity: Identity) -> None:
    """Make the directory and its identity; both survive a power loss when this returns."""
    _make_dirs_durable(disk, directory)
    body = {
        "cluster": identity.cluster_id,
        "node": identity.node,
        "incarnation": identity.incarnation,
        "founders": [list(founder) for founder in identity.founders],
    }
    path = f"{directory}/{IDENTITY_NAME}"
    write_checked(disk, path, kind=IDENTITY_NAME, version=_VERSION, body=body)


def _identity_from_body(body: Any, path: str) -> Identity:
    match body:
        case {
            "cluster": str(cluster),
            "node": int(node),
            "incarnation": str(incarnation),
            "founders": list(founders),
        }:
            found = _founders_from_body(founders, path)
            return Identity(cluster, NodeId(node), incarnation, found)
    raise CorruptLog(f"{path}: its fields are not those of an identity", path=path)


def _founders_from_body(body: list[Any], path: str) -> tuple[Founder, ...]:
    found = []
    for item in body:
        match item:
            case [int(node), str(incarnation), str(host), int(base_port)]:
                found.append(Founder(NodeId(node), incarnation, host, base_port))
            case _:
                raise CorruptLog(f"{path}: {item!r} is no founder", path=path)
    return tuple(found)


def _make_dirs_durable(disk: Disk, directory: str) -> None:
    """Make a directory and those above it, each name synced in the one above."""
    if disk.exists(directory):
        return
    _make_dirs_durable(disk, os.path.dirname(directory))
    make_dir_durable(disk, directory)


def lock_directory(disk: Disk, directory: str) -> Lock:
    """Hold the data directory for this process; NotReady names the process that does."""
    try:
        return disk.lock(f"{directory}/{LOCK_NAME}")
    except NotReady as error:
        holder = holder_of(directory) or "another process"
        raise NotReady(
            f"{directory} is in use by {holder}; one process at a time may run a node",
            path=directory,
            holder=holder,
        ) from error


# All directories of a cluster


def format_nodes(disk: Disk, configs: Sequence[NodeConfig], plan_path: str) -> list[Identity]:
    """Give every data directory that is empty its identity; return all of them.

    configs: all nodes of the cluster, in the order of their ids.
    plan_path: where the plan of a half-done formatting lies, or will lie.
    """
    plan = _read_plan(disk, plan_path)
    found = [read_identity(disk, str(config.data)) for config in configs]
    if plan is None and not any(found):
        plan = _write_plan(disk, plan_path, _new_plan(configs))
    if plan is None:
        identities = _format_joining(disk, configs, found)
    else:
        identities = _carry_out(disk, configs, found, plan)
        disk.remove(plan_path)
    _sync_names(disk, configs, plan_path)
    return identities


def _sync_names(disk: Disk, configs: Sequence[NodeConfig], plan_path: str) -> None:
    """Sync once more what an attempt that failed may have left in the cache only.

    Else a power loss could bring back a removed plan, or take an identity that was in use.
    """
    directories = {os.path.dirname(plan_path)}
    for config in configs:
        directories |= {str(config.data), str(config.data.parent)}
    for directory in sorted(directories):
        disk.sync_dir(directory)


def _new_plan(configs: Sequence[NodeConfig]) -> FormatPlan:
    founders = tuple(
        Founder(config.node_id, _new_id(), config.host, config.base_port) for config in configs
    )
    return FormatPlan(_new_id(), founders)


def _carry_out(
    disk: Disk,
    configs: Sequence[NodeConfig],
    found: Sequence[Identity | None],
    plan: FormatPlan,
) -> list[Identity]:
    """Write what is missing of the plan."""
    places = [(config.node_id, config.host, config.base_port) for config in configs]
    if places != [(founder.node, founder.host, founder.base_port) for founder in plan.founders]:
        raise _plan_differs("names other nodes than the node files do")
    wanted = [plan.identity_of(founder) for founder in plan.founders]
    for config, have, want in zip(configs, found, wanted, strict=True):
        if have is None:
            write_identity(disk, str(config.data), want)
        elif have != want:
            raise _plan_differs(f"does not fit {config.data}, which has its own identity")
    return wanted


def _plan_differs(how: str) -> ConfigError:
    return ConfigError(
        f"the file `{PLAN_NAME}` beside the node files, left by a formatting that did not finish, "
        f"{how}. Undo the change of the node files; or, if nothing is to be kept, remove it and "
        "the data directories"
    )


def _format_joining(
    disk: Disk, configs: Sequence[NodeConfig], found: Sequence[Identity | None]
) -> list[Identity]:
    """Directories that are empty beside others that are not: new members, without founders."""
    cluster_id = _common_cluster_id(configs, found)
    return [
        have or format_joining(disk, config, cluster_id)
        for config, have in zip(configs, found, strict=True)
    ]


def _common_cluster_id(configs: Sequence[NodeConfig], found: Sequence[Identity | None]) -> str:
    places: dict[str, str] = {}
    for config, identity in zip(configs, found, strict=True):
        if identity is not None:
            check_identity(config, identity)
            places.setdefault(identity.cluster_id, str(config.data))
    if len(places) > 1:
        raise ConfigError(f"{' and '.join(places.values())} belong to different clusters")
    (cluster_id,) = places
    return cluster_id


def format_joining(disk: Disk, config: NodeConfig, cluster_id: str) -> Identity:
    """Give an empty directory the identity of a new member of a cluster that exists."""
    identity = Identity(cluster_id, config.node_id, _new_id(), ())
    write_identity(disk, str(config.data), identity)
    return identity


def check_identity(config: NodeConfig, identity: Identity) -> None:
    """A directory belongs to the node that its file names, or nothing may start."""
    if identity.node != config.node_id:
        raise ConfigError(
            f"{config.data} belongs to node {identity.node}, but {config.name} is node "
            f"{config.node_id}: its address, {config.address}, is number {config.node_id} of "
            "`node.peers`",
            have=identity.node,
            want=config.node_id,
        )


def _read_plan(disk: Disk, path: str) -> FormatPlan | None:
    try:
        _version, body = read_checked(disk, path, kind=PLAN_NAME)
    except FileNotFoundError:
        return None
    match body:
        case {"cluster": str(cluster), "founders": list(founders)}:
            return FormatPlan(cluster, _founders_from_body(founders, path))
    raise CorruptLog(f"{path}: its fields are not those of a plan", path=path)


def _write_plan(disk: Disk, path: str, plan: FormatPlan) -> FormatPlan:
    body = {"cluster": plan.cluster_id, "founders": [list(founder) for founder in plan.founders]}
    write_checked(disk, path, kind=PLAN_NAME, version=_VERSION, body=body)
    return plan


def _new_id() -> str:
    return uuid.uuid4().hex
