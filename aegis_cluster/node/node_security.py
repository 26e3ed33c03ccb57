"""What a node's file says about keys, as keys.

The idea: besides its own pair, a running node has an *operator* key, made anew at every start and
kept in its data directory. It lets the supervisor, and whoever else on this machine may read that
directory, ask this node's own shards: no other node accepts it, and no client of the list can be
mistaken for it.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from aegis_cluster.errors import ConfigError
from aegis_cluster.keys import (
    KeyPair,
    LinkKeys,
    PublicKey,
    load_node_keys,
    load_pair,
    new_pair,
    replace_pair,
)

if TYPE_CHECKING:
    from aegis_cluster.config import NodeConfig
    from aegis_cluster.keys import NodeKeys

OPERATOR_NAME: Final = "operator.key"


def node_keys(config: NodeConfig, operator: PublicKey | None = None) -> NodeKeys | None:
    """The keys that the file names, None where it names none. Raises `ConfigError`."""
    found = config.security
    if found.key is None or found.peers is None or found.clients is None:
        return None
    return load_node_keys(
        key=found.key, peers=found.peers, clients=found.clients, operator=operator
    )


def new_operator(config: NodeConfig) -> KeyPair | None:
    """Make and keep the operator key of one start; None for a node without keys.

    Raises `ConfigError` when the node's own keys are not in order: better now than in every shard.
    """
    if node_keys(config) is None:
        return None
    pair = new_pair("operator")
    replace_pair(pair, config.data / OPERATOR_NAME)
    return pair


def operator_links(config: NodeConfig, operator: KeyPair | None = None) -> LinkKeys | None:
    """How to reach this node's own shards; None without keys.

    operator: as made at this start; None: as the running node has left it in its directory.
    """
    if config.security.key is None:
        return None
    own = load_pair(config.security.key)
    pair = load_pair(config.data / OPERATOR_NAME) if operator is None else operator
    return LinkKeys(pair, None, (own.public,))


def listening_host(config: NodeConfig) -> str:
    """The address to bind: a name is looked up. Raises `ConfigError` for one that leads nowhere."""
    try:
        found = socket.getaddrinfo(config.listens_at, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"`node.host` is {config.listens_at!r}, a name that leads to no address here: {error}."
            " Name an address of this machine, or set `node.bind`.",
            host=config.listens_at,
        ) from error
    # Links to a name go to its IPv4 address; so does the listener, where there is one.
    found.sort(key=lambda item: item[0] != socket.AF_INET)
    return str(found[0][4][0])
