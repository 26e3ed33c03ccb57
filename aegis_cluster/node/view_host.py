"""The cluster view in a supervisor: a thread of its own, and a line to each of the node's shards.

The idea: the supervisor's main thread only says which shards have started and ended. Everything of
the view belongs to one thread: its sockets, the library, the figures. Clients never reach the view
itself, whose socket is for nodes: they ask any shard, and the shard asks its supervisor over a pair
of local sockets that it inherited (`open_line`), in the words of the native protocol.

The rule it protects: a supervisor without a view starts, restarts and ends shards as one with it.
Whatever goes wrong in here is told in the log and in answers, and ends nothing.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import zmq

from aegis_cluster.config import view_endpoint
from aegis_cluster.errors import AegisError, NotReady, PeerViolation
from aegis_cluster.limits import VIEW_ANSWER_BYTES_MAX
from aegis_cluster.node.inbox import Inbox
from aegis_cluster.node.load import LoadProbe
from aegis_cluster.node.node_security import listening_host, node_keys
from aegis_cluster.wire.codes import error_to_reply
from aegis_cluster.wire.protocol import Api, check_version, decode_request, encode_reply, take_str

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.cluster.view.leases import Outcome
    from aegis_cluster.cluster.view.view import View
    from aegis_cluster.config import NodeConfig
    from aegis_cluster.ids import NodeId, ShardId
    from aegis_cluster.wire.protocol import Request

VOTERS_MAX: Final = 3
"""The first nodes of the list of peers; the others read along."""
LOOP_MS: Final = 75
"""The longest wait of the loop; what arrives ends it. Half of the time between two appends."""
PROBE_S: Final = 2.0
STOP_S: Final = 1.0
_TROUBLE_S: Final = 0.2
_REQUESTS_PER_TURN: Final = 32


@dataclass(slots=True)
class _Shard:
    """A shard's process as its supervisor knows it; `pid` 0 when it does not run."""

    line: socket.socket
    pid: int = 0
    boot_id: str = ""
    since_ms: int = 0


class ViewHost:
    """Started and stopped by the node; told of shards by the supervisor's main thread."""

    def __init__(
        self,
        config: NodeConfig,
        node: NodeId,
        cluster_id: str,
        *,
        boot_id: str,
        tell: Callable[[str], None],
    ) -> None:
        self._config = config
        self._node = node
        self._cluster_id = cluster_id
        self._tell = tell
        self._who: dict[str, Any] = {
            "name": config.name,
            "boot_id": boot_id,
            "since_ms": _wall_ms(),
            "host": config.host,
            "base_port": config.base_port,
        }
        self._inbox: Inbox[Callable[[], None]] = Inbox()
        """What the main thread has to say, done in ours."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="cluster-view")
        # Below: the thread's own
        self._view: View | None = None
        self._shards: dict[ShardId, _Shard] = {}
        self._load = LoadProbe(config.data)
        self._probed_at = 0.0
        self._trouble = "it is starting"
        self._poller = zmq.Poller()
        self._watched: list[object] = []

    # ---- for the main thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End; a leader hands over. Gives up on a thread that does not answer."""
        self._stopping = True
        self._inbox.put(lambda: None)
        self._thread.join(STOP_S)
        if not self._thread.is_alive():
            self._inbox.close()

    def open_line(self, shard: ShardId) -> socket.socket | None:
        """The end of a new line that the shard's process inherits; None where there are none."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self._tell(f"shard {shard} has no line to the cluster view: {error}")
            return None
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * VIEW_ANSWER_BYTES_MAX)
        self._inbox.put(lambda: self._opened(shard, ours))
        return theirs

    def started(self, shard: ShardId, pid: int, boot_id: str) -> None:
        """A shard's process runs."""
        since_ms = _wall_ms()
        self._inbox.put(lambda: self._started(shard, pid, boot_id, since_ms))

    def ended(self, shard: ShardId) -> None:
        """A shard's process has ended."""
        self._inbox.put(lambda: self._ended(shard))

    # ---- the thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - the top of this thread; the node goes on
                self._in_trouble(error)
        if self._view is not None:
            self._view.close()

    def _in_trouble(self, error: Exception) -> None:
        said = f"{type(error).__name__}: {error}"
        if said != self._trouble:
            self._trouble = said
            self._tell(f"the cluster view is in trouble: {said}")
        time.sleep(_TROUBLE_S)

    def _turn(self) -> None:
        if self._view is None:
            self._view = self._open_view()
        self._wait()
        while (event := self._inbox.get(0)) is not None:
            event()
        self._answer_shards()
        now = time.monotonic()
        if now - self._probed_at >= PROBE_S:
            self._probed_at = now
            self._view.said = self._said()
        self._view.turn()

    def _open_view(self) -> View:
        """Here and not at the top: a library that is missing or broken costs the view alone."""
        from aegis_cluster.cluster.view.transport import Place
        from aegis_cluster.cluster.view.view import View

        peers = self._config.peers[:VOTERS_MAX]
        voters = {
            number: view_endpoint(peer.host, peer.base_port)
            for number, peer in enumerate(peers, start=1)
        }
        listen = view_endpoint(listening_host(self._config), self._config.base_port)
        keys = node_keys(self._config)
        place = Place(self._cluster_id, self._node, voters, listen=listen, keys=keys)
        return View(place, tell=self._tell)

    def _wait(self) -> None:
        """Until something arrives, or for one step of the loop."""
        sockets = self._view.sockets if self._view is not None else []
        lines = [shard.line for shard in self._shards.values()]
        watched: list[object] = [self._inbox, *sockets, *lines]
        if watched != self._watched:
            self._watched = watched
            self._poller = zmq.Poller()
            for descriptor in (self._inbox.fileno(), *(line.fileno() for line in lines)):
                self._poller.register(descriptor, zmq.POLLIN)
            for each in sockets:
                self._poller.register(each, zmq.POLLIN)
        self._poller.poll(LOOP_MS)

    # ---- shards

    def _opened(self, shard: ShardId, line: socket.socket) -> None:
        self._ended(shard)
        self._shards[shard] = _Shard(line)

    def _started(self, shard: ShardId, pid: int, boot_id: str, since_ms: int) -> None:
        if shard in self._shards:
            known = self._shards[shard]
            known.pid, known.boot_id, known.since_ms = pid, boot_id, since_ms

    def _ended(self, shard: ShardId) -> None:
        known = self._shards.pop(shard, None)
        if known is not None:
            known.line.close()
            self._load.forget(known.pid)

    def _said(self) -> dict[str, Any]:
        """This node's announcement."""
        shards = [
            {
                "shard": number,
                "boot_id": shard.boot_id,
                "since_ms": shard.since_ms,
                **self._load.process(shard.pid),
            }
            for number, shard in sorted(self._shards.items())
            if shard.pid
        ]
        load = self._load.machine()
        return {**self._who, "wall_ms": _wall_ms(), "load": load, "shards": shards}

    # ---- requests of shards

    def _answer_shards(self) -> None:
        for number, shard in list(self._shards.items()):
            for _ in range(_REQUESTS_PER_TURN):
                try:
                    packet = shard.line.recv(VIEW_ANSWER_BYTES_MAX)
                except BlockingIOError:
                    break
                except OSError:
                    packet = b""
                if not packet:
                    self._ended(number)
                    break
                self._answer(shard.line, packet)

    def _answer(self, line: socket.socket, packet: bytes) -> None:
        try:
            request = decode_request([packet])
        except PeerViolation as error:
            self._tell(f"a shard asked what is no question: {error}")
            return
        try:
            self._dispatch(line, request)
        except AegisError as error:
            _refuse(line, request, error)

    def _dispatch(self, line: socket.socket, request: Request) -> None:
        if self._view is None:
            raise NotReady(f"The cluster view is down: {self._trouble}.")
        match check_version(request):
            case Api.CLUSTER_VIEW:
                _reply(line, request, [self._view.described()])
            case Api.LEASE:
                self._lease(self._view, line, request)
            case api:
                raise PeerViolation(f"Api {api.name} is not for supervisors.")

    def _lease(self, view: View, line: socket.socket, request: Request) -> None:
        """[action, name, holder, token, ttl_ms] -> [outcome, token, holder, left_ms]."""

        def answer(result: Outcome | AegisError) -> None:
            if isinstance(result, AegisError):
                _refuse(line, request, result)
            else:
                _reply(line, request, list(result))

        view.lease(take_str(request.fields, 0, "action"), request.fields[1:5], answer)


def _reply(line: socket.socket, request: Request, fields: Sequence[Any]) -> None:
    (part,) = encode_reply(request.api, fields, correlation=request.correlation)
    if len(part) > VIEW_ANSWER_BYTES_MAX:
        _refuse(line, request, NotReady("The cluster view is too large to be told at once."))
    else:
        _send(line, bytes(part))


def _refuse(line: socket.socket, request: Request, error: AegisError) -> None:
    code, fields = error_to_reply(error)
    (part,) = encode_reply(request.api, fields, correlation=request.correlation, code=code)
    _send(line, bytes(part))


def _send(line: socket.socket, part: bytes) -> None:
    # Gone or full: the shard's own time-out tells whoever asked.
    with contextlib.suppress(OSError):
        line.send(part)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
