"""Which sockets have something to read, at the price of one system call for all of them.

The idea: `zmq.Poller` asks every socket before and after it sleeps, and each question is two
system calls. Here the kernel watches the sockets' descriptors, and only those that may have
changed are asked. A descriptor is readable when something *about* its socket has changed, and any
use of the socket may take that sign away; so whoever uses one says so (`used`), and it is asked
again before the next sleep.

The rule it protects: nobody sleeps while a socket has a message that was not looked for.
"""

from __future__ import annotations

import select
from typing import Final, TypeAlias

import zmq

_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)

Source: TypeAlias = zmq.Socket[bytes] | int
"""A socket of ZeroMQ, or a plain descriptor."""


def has_input(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message can be received now."""
    return bool(int(socket.get(_EVENTS)) & _POLLIN)


class Readiness:
    """Of the sockets and descriptors of one thread."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._sources: dict[int, Source] = {}
        """By descriptor."""
        self._descriptors: dict[Source, int] = {}
        self._unsure: set[zmq.Socket[bytes]] = set()
        """Used since they were last asked, or found with something to read."""

    def register(self, source: Source) -> None:
        """Watch it for something to read."""
        descriptor = source if isinstance(source, int) else int(source.get(zmq.FD))
        self._sources[descriptor] = source
        self._descriptors[source] = descriptor
        self._poll.register(descriptor, select.POLLIN)
        if not isinstance(source, int):
            self._unsure.add(source)

    def unregister(self, source: Source) -> None:
        """Watch it no more; before it is closed."""
        descriptor = self._descriptors.pop(source)
        del self._sources[descriptor]
        self._poll.unregister(descriptor)
        if not isinstance(source, int):
            self._unsure.discard(source)

    def used(self, socket: zmq.Socket[bytes]) -> None:
        """Something was sent or received there: ask it again before sleeping."""
        self._unsure.add(socket)

    def emptied(self, socket: zmq.Socket[bytes]) -> None:
        """It was asked after its last use, and has nothing: what comes from now on wakes us."""
        self._unsure.discard(socket)

    def wait(self, timeout_ms: int) -> set[Source]:
        """Sleep until something has come, at most so long; return what can be read, and sockets
        about which something has changed: whether that is a message shows when one is received."""
        ready: set[Source] = {socket for socket in self._unsure if has_input(socket)}
        for descriptor, _ in self._poll.poll(0 if ready else timeout_ms):
            ready.add(self._sources[descriptor])
        self._unsure = {source for source in ready if not isinstance(source, int)}
        return ready
