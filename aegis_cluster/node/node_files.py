"""`nodes/*.toml`: the nodes of the local cluster, written once and then read.

The idea: the files are the truth. `cluster up` writes them only where there are none, so that a
person can read and change them; what is asked for later must agree with them.

The rule it protects: all files describe one cluster. Node ids follow from the list of peers, so
two files with different lists would give one node two ids.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

from aegis_cluster import limits
from aegis_cluster.config import BASE_PORT_MIN, NodeAddress, NodeConfig, load_node_config, port_span
from aegis_cluster.errors import ConfigError
from aegis_cluster.node.local_keys import NODE_LINES, write_keys

if TYPE_CHECKING:
    from pathlib import Path

NODES_DIRECTORY: Final = "nodes"
NODES_DEFAULT: Final = 3
BASE_PORT_DEFAULT: Final = 7000
PORTS_PER_NODE: Final = 100

_CONTENT: Final = """\
# {name} of the local cluster. Written by `aegis cluster up`; yours to change while it is down.
[node]
name = "{name}"
host = "127.0.0.1"
base_port = {base_port}            # shard s: + 10 s and + 1 (control), + 2 (data), + 3 (peers)
data = "../data/{name}"     # relative to this file
shards = {shards}                  # processes of this node; one per core is a good number
peers = [{peers}]
durability = "fsync"        # or "memory": acknowledged by a majority's memory, like most peers
insecure = false            # true: bind beyond loopback without keys
"""


class LocalNode(NamedTuple):
    """One node of this machine: its file, and what that says."""

    file: Path
    config: NodeConfig

    @property
    def name(self) -> str:
        """As its file names it."""
        return self.config.name


class Wanted(NamedTuple):
    """What a person asked for; None: whatever is there, or the default."""

    nodes: int | None = None
    shards: int | None = None
    base_port: int | None = None
    secure: bool = False
    """With keys; False: whatever is there, or without."""


def load_nodes(directory: Path) -> list[LocalNode]:
    """The nodes of `directory/nodes`, by id; ConfigError unless they are one whole cluster."""
    folder = directory / NODES_DIRECTORY
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise ConfigError(f"{folder} cannot be read: Permission denied", file=str(folder))
    files = sorted(folder.glob("*.toml"))
    if not files:
        raise ConfigError(
            f"{folder} holds no node files; `aegis cluster up` writes them, or name the cluster's "
            "address with --bootstrap",
            file=str(folder),
        )
    nodes = [LocalNode(file, load_node_config(file)) for file in files]
    _check_one_cluster(nodes)
    return sorted(nodes, key=lambda node: node.config.node_id)


def _check_one_cluster(nodes: list[LocalNode]) -> None:
    first = nodes[0]
    seen: dict[tuple[str, str], Path] = {}
    for node in nodes:
        if node.config.peers != first.config.peers:
            raise ConfigError(f"{node.file} and {first.file} list different `node.peers`")
        for key in _own(node.config):
            other = seen.setdefault(key, node.file)
            if other != node.file:
                raise ConfigError(f"{other} and {node.file} have the same `{key[0]}`: {key[1]}")
    missing = set(first.config.peers) - {node.config.address for node in nodes}
    if missing:
        raise ConfigError(
            f"{first.file.parent} has no file for {', '.join(map(str, sorted(missing)))}, which "
            "`node.peers` names",
        )


def _own(config: NodeConfig) -> list[tuple[str, str]]:
    """Keys and values that no two nodes may share."""
    return [
        ("node.name", config.name),
        ("node.data", str(config.data)),
        ("node.base_port", str(config.address)),
    ]


def write_nodes(directory: Path, wanted: Wanted) -> None:
    """Write `nodes/node-1.toml` and so on; nothing may be there yet."""
    count = NODES_DEFAULT if wanted.nodes is None else wanted.nodes
    shards = 1 if wanted.shards is None else wanted.shards
    base_port = BASE_PORT_DEFAULT if wanted.base_port is None else wanted.base_port
    _check_wanted(count, shards, base_port)
    addresses = [_address(base_port, number) for number in range(1, count + 1)]
    peers = ", ".join(f'"{address}"' for address in addresses)
    folder = directory / NODES_DIRECTORY
    folder.mkdir(parents=True, exist_ok=True)
    if wanted.secure:
        write_keys(directory, folder, [f"node-{number}" for number in range(1, count + 1)])
    written = []
    for number, address in enumerate(addresses, start=1):
        file = folder / f"node-{number}.toml"
        temporary = file.with_suffix(".tmp")
        content = _CONTENT.format(
            name=file.stem, base_port=address.base_port, shards=shards, peers=peers
        ) + (NODE_LINES.format(name=file.stem) if wanted.secure else "")
        temporary.write_text(content, encoding="utf-8")
        written.append((temporary, file))
    # All or none: a full disk shows above, before the first file has its name.
    for temporary, file in written:
        temporary.replace(file)


def _check_wanted(count: int, shards: int, base_port: int) -> None:
    if not 1 <= count <= limits.NODES_LOCAL_MAX:
        raise ConfigError(f"{count} nodes; allowed: 1 to {limits.NODES_LOCAL_MAX}")
    if port_span(shards) > PORTS_PER_NODE:
        raise ConfigError(f"{shards} shards take more than the {PORTS_PER_NODE} ports of a node")
    highest = base_port + PORTS_PER_NODE * (count + 1)
    if base_port + PORTS_PER_NODE < BASE_PORT_MIN or highest > 65_535:
        raise ConfigError(
            f"{count} nodes from base port {base_port} take the ports up to {highest}; "
            f"allowed are {BASE_PORT_MIN} to 65535"
        )


def _address(base_port: int, number: int) -> NodeAddress:
    return NodeAddress("127.0.0.1", base_port + PORTS_PER_NODE * number)


def ensure_nodes(directory: Path, wanted: Wanted) -> list[LocalNode]:
    """The nodes that are there, or new ones as wanted; ConfigError where the two disagree."""
    if not list((directory / NODES_DIRECTORY).glob("*.toml")):
        write_nodes(directory, wanted)
    nodes = load_nodes(directory)
    _check_agrees(nodes, wanted)
    return nodes


def _check_agrees(nodes: list[LocalNode], wanted: Wanted) -> None:
    folder = nodes[0].file.parent
    if wanted.nodes is not None and wanted.nodes != len(nodes):
        raise _disagrees("--nodes", wanted.nodes, f"{folder} has {len(nodes)} nodes")
    for node in nodes:
        config = node.config
        if wanted.secure and not config.has_keys:
            raise ConfigError(
                f"--secure does not agree with the node files: {node.file} names no keys. Leave the"
                " option out, or add `[node.security]` while the cluster is down; see"
                " docs/security.md",
                file=str(node.file),
            )
        if wanted.shards is not None and wanted.shards != config.shards:
            raise _disagrees("--shards", wanted.shards, f"{node.file} says {config.shards}")
        if wanted.base_port is not None:
            expected = _address(wanted.base_port, config.node_id).base_port
            if config.base_port != expected:
                there = f"{node.file} says {config.base_port}, not {expected}"
                raise _disagrees("--base-port", wanted.base_port, there)


def _disagrees(option: str, value: int, there: str) -> ConfigError:
    return ConfigError(
        f"{option} {value} does not agree with the node files: {there}. Leave the option out, or "
        "change the files while the cluster is down",
    )


def bootstrap_of(nodes: list[LocalNode]) -> str:
    """The address of the cluster, for `StreamingEngine.connect`."""
    return ",".join(node.config.endpoint for node in nodes)
