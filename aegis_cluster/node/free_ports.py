"""Ports for clusters that are started beside others: benchmarks, tests, chaos, the demo.

The idea: a port that is free now may be taken before a node has bound it, by whoever looked at the
same moment. So a process takes a whole *block* of ports, by binding the block's lowest port, which
no node uses; the kernel lets one process do that, and lets go when the process ends, however it
ends.

The rule it protects: two processes of one machine are never given the same block.
"""

from __future__ import annotations

import socket
from typing import Final

from aegis_cluster.config import port_span
from aegis_cluster.errors import Unavailable
from aegis_cluster.node.node_files import PORTS_PER_NODE

BLOCKS: Final = range(10_000, 32_000, 1_000)
"""Far from the defaults, and below the ports that the kernel hands out (from 32,768)."""

_taken: dict[int, int] = {}
"""The blocks of this process, each with the descriptor that holds it until the process ends."""


def free_base_port(nodes: int = 3, shards: int = 1) -> int:
    """A base port for a cluster of that many nodes (up to 9), which no other process is given.

    A block of this process is given again as soon as nothing listens in it.

    Raises:
        Unavailable: every block is taken, by other processes or by clusters of this one.
    """
    for base in [*_taken, *(base for base in BLOCKS if base not in _taken)]:
        if _is_ours(base) and all(can_bind(port) for port in _ports(base, nodes, shards)):
            return base
    raise Unavailable(
        f"No range of free ports was found between {BLOCKS.start} and {BLOCKS.stop}. Stop what "
        "listens there; `ss -ltnp` shows it."
    )


def can_bind(port: int) -> bool:
    """Whether a port of the loopback address is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return _bound(probe, port)


def _is_ours(base: int) -> bool:
    if base not in _taken:
        holder = socket.socket()
        if not _bound(holder, base):
            holder.close()
            return False
        _taken[base] = holder.detach()
    return True


def _bound(holder: socket.socket, port: int) -> bool:
    try:
        holder.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def _ports(base: int, nodes: int, shards: int) -> list[int]:
    return [
        base + PORTS_PER_NODE * node + port
        for node in range(1, nodes + 1)
        for port in range(port_span(shards))
    ]
