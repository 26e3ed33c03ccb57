"""What stands between every two parties: a proxy for each address that one dials at another.

The idea: a party (a node, a group of clients) is started with a table of detours, so each of its
connections passes a listener of its own here, and what flows between any two of them can be cut,
delayed or stalled, in one direction or both, without root or network namespaces. A cut holds bytes
back and lets them go on healing, as TCP's retransmission would; a loss is the stall that TCP makes
of it; a reset ends connections at once.

The rule it protects: bytes of one connection are neither lost nor reordered nor made up; ZeroMQ
over TCP never sees that, so a test that did it would find nothing real.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from chaos.processes.repeating import DELAY_S, GREETING_BYTES, Tape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

CHUNK_BYTES: Final = 64 * 1024
CHUNKS_HELD_MAX: Final = 64
"""Of one connection and direction; more stay with the sender, as in full socket buffers."""
STALL_S: Final = (0.2, 0.6)
"""What a lost segment costs: TCP's shortest retransmission time-out, and twice that."""

Pair: TypeAlias = tuple[str, str]
"""From whom, to whom."""


class Conditions(NamedTuple):
    """How it is on the way from one party to another."""

    cut: bool = False
    delay_ms: int = 0
    jitter_ms: int = 0
    loss: float = 0.0
    """Chance that a chunk is stalled, and all behind it."""


CLEAR: Final = Conditions()


@dataclass(slots=True)
class _Way:
    """One direction between two parties."""

    passable: asyncio.Event
    conditions: Conditions = CLEAR

    def delay_s(self, rng: random.Random) -> float:
        found = self.conditions
        delay = (found.delay_ms + rng.uniform(0, found.jitter_ms)) / 1000
        return delay + (rng.uniform(*STALL_S) if rng.random() < found.loss else 0.0)


class _Connection:
    """One accepted connection and the one that we made for it."""

    def __init__(
        self, near: asyncio.StreamWriter, far: asyncio.StreamWriter | None, rng: random.Random
    ) -> None:
        self.near = near
        self.far = far
        self._rng = rng

    def abort(self) -> None:
        for writer in (self.near, self.far):
            if writer is not None:
                writer.transport.abort()

    def reset(self) -> None:
        """End both with RST, as a router does that has forgotten them."""
        for writer in (self.near, self.far):
            if writer is not None and not writer.is_closing():
                at_once = struct.pack("ii", 1, 0)
                found: socket.socket = writer.get_extra_info("socket")
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.abort()

    async def pump(
        self,
        way: _Way,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        seen: Callable[[bytes], None] | None = None,
    ) -> None:
        """Carry bytes one way until their end, then tell the other side of it.

        seen: called with what has gone through.
        """
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_HELD_MAX)
        taking = asyncio.create_task(self._take(way, reader, queue))
        try:
            with contextlib.suppress(ConnectionError):
                await self._give(way, queue, writer, seen)
        finally:
            taking.cancel()
            self.abort()

    async def _take(
        self, way: _Way, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        loop = asyncio.get_running_loop()
        data = b"."
        while data:
            try:
                data = await reader.read(CHUNK_BYTES)
            except ConnectionError:
                data = b""
            await queue.put((loop.time() + way.delay_s(self._rng), data))

    async def _give(
        self,
        way: _Way,
        queue: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
        seen: Callable[[bytes], None] | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        while not writer.is_closing():
            due, data = await queue.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            await way.passable.wait()
            if not data:
                return
            writer.write(data)
            if seen is not None:
                seen(data)
            await writer.drain()


class Links:
    """All proxies, in a thread of their own; its methods are for other threads."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._ways: dict[Pair, _Way] = defaultdict(lambda: _Way(_set_event()))
        self._connections: dict[Pair, set[_Connection]] = defaultdict(set)
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._repeated: dict[Pair, float] = {}
        """Share of the requests on these ways that come once more."""
        self._at_once = asyncio.Event()
        """Whatever still waits to be repeated is sent now."""
        self.repeats_sent = 0
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="links")
        self._thread.start()

    def detours(
        self, source: str, targets: Mapping[str, Sequence[tuple[str, int]]]
    ) -> dict[str, str]:
        """Open a way for `source` to each address (host, port) of the others.

        Returns where to connect instead, by the endpoint that is meant.
        """
        wanted = [(name, host, port) for name, found in targets.items() for host, port in found]
        opened = asyncio.run_coroutine_threadsafe(self._open(source, wanted), self._loop).result()
        return {
            f"tcp://{host}:{port}": f"tcp://127.0.0.1:{there}"
            for (_, host, port), there in zip(wanted, opened, strict=True)
        }

    async def _open(self, source: str, wanted: list[tuple[str, str, int]]) -> list[int]:
        ports = []
        for target, host, port in wanted:
            server = await asyncio.start_server(
                self._handler((source, target), host, port), "127.0.0.1", 0
            )
            self._servers.append(server)
            ports.append(int(server.sockets[0].getsockname()[1]))
        return ports

    def _handler(
        self, pair: Pair, host: str, port: int
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = self._loop.create_task(self._carry(pair, (host, port), reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return accept

    async def _carry(
        self,
        pair: Pair,
        address: tuple[str, int],
        near: asyncio.StreamReader,
        near_writer: asyncio.StreamWriter,
    ) -> None:
        """One connection from its beginning to its end."""
        there, back = self._ways[pair], self._ways[pair[::-1]]
        connection = _Connection(near_writer, None, self._rng)
        self._connections[pair].add(connection)
        try:
            # As SYN and its answer: neither passes a cut.
            await there.passable.wait()
            await back.passable.wait()
            far, connection.far = await asyncio.open_connection(*address)
            async with asyncio.TaskGroup() as tasks:
                seen = self._recorder(pair, address)
                tasks.create_task(connection.pump(there, near, connection.far, seen))
                tasks.create_task(connection.pump(back, far, near_writer))
        except OSError:
            pass  # nobody listens there now: the one who dialled finds out by our hanging up
        finally:
            connection.abort()
            self._connections[pair].discard(connection)

    # ---- requests that come once more

    def repeat(self, pairs: Iterable[Pair], share: float) -> None:
        """From now on so many of the requests on these ways come again, 1 to 60 s later, over
        connections of their own; 0: no new ones do."""
        self._loop.call_soon_threadsafe(self._repeated.update, dict.fromkeys(pairs, share))

    def repeat_what_is_left(self) -> None:
        """All that still waits to be repeated comes now."""
        self._loop.call_soon_threadsafe(self._repeated.clear)
        self._loop.call_soon_threadsafe(self._at_once.set)

    def _recorder(self, pair: Pair, address: tuple[str, int]) -> Callable[[bytes], None]:
        tape = Tape()

        def seen(data: bytes) -> None:
            for request in tape.feed(data):
                if self._rng.random() < self._repeated.get(pair, 0.0):
                    work = self._send_again(address, tape, request)
                    task = self._loop.create_task(work)
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

        return seen

    async def _send_again(self, address: tuple[str, int], tape: Tape, request: bytes) -> None:
        """Step by step, as libzmq wants it. The connection stays until the run ends: its end would
        be news, too."""
        shortest_s, longest_s = DELAY_S
        delay_s = shortest_s + (longest_s - shortest_s) * self._rng.random() ** 4
        writer: asyncio.StreamWriter | None = None
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._at_once.wait()
            reader, writer = await asyncio.open_connection(*address)
            writer.write(tape.greeting)
            await reader.readexactly(GREETING_BYTES)
            writer.write(tape.handshake)
            await reader.read(CHUNK_BYTES)
            writer.write(tape.hello + request)
            self.repeats_sent += 1
            while await reader.read(CHUNK_BYTES):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # nobody listens there (any more)
        finally:
            if writer is not None:
                writer.transport.abort()

    # ---- what is done to them

    def set(self, pairs: Iterable[Pair], conditions: Conditions) -> None:
        """From now on it is so on these ways."""
        self._loop.call_soon_threadsafe(self._set, list(pairs), conditions)

    def _set(self, pairs: list[Pair], conditions: Conditions) -> None:
        for pair in pairs:
            way = self._ways[pair]
            way.conditions = conditions
            if conditions.cut:
                way.passable.clear()
            else:
                way.passable.set()

    def heal(self) -> None:
        """Everything flows again, what was held back first."""
        self._loop.call_soon_threadsafe(lambda: self._set(list(self._ways), CLEAR))

    def reset(self, pairs: Iterable[Pair]) -> None:
        """End all connections that were made on these ways, at once."""
        self._loop.call_soon_threadsafe(self._reset, list(pairs))

    def _reset(self, pairs: list[Pair]) -> None:
        for pair in pairs:
            for connection in list(self._connections[pair]):
                connection.reset()

    def close(self) -> None:
        """End the thread and all connections."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event
