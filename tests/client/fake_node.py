"""One node as a client sees it, in the test's own event loop: real sockets, and no cluster behind.

What it answers can be replaced api by api: a function gets the request and gives the fields of the
reply, or fields and raw parts; it may raise an `AegisError` to refuse, or return None to stay mute.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import zmq
import zmq.asyncio

from aegis_cluster.errors import AegisError, NotLeader
from aegis_cluster.ids import GroupId, LogIndex, Member, NodeId, Term
from aegis_cluster.wire.batch import decode_batch
from aegis_cluster.wire.codes import error_to_reply
from aegis_cluster.wire.descriptions import (
    NodeInfo,
    PartitionInfo,
    TopicInfo,
    TopicSettings,
    node_to_fields,
    topic_to_fields,
)
from aegis_cluster.wire.frame import decode_header, encode_data_frame, frame_payload
from aegis_cluster.wire.layout import batch_header
from aegis_cluster.wire.protocol import (
    PROTOCOL_VERSION,
    Api,
    Hello,
    Part,
    Request,
    decode_request,
    encode_reply,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    Answer = Callable[[Request], Any]

CLUSTER_ID = "fake"
MEMBER = Member(NodeId(1), "one")
TIME_MS = 1_700_000_000_000


def topic_info(
    name: str = "t", *, partitions: int = 1, first_group: int = 1, max_message_bytes: int = 1_000
) -> TopicInfo:
    placed = tuple(
        PartitionInfo(number, GroupId(first_group + number), (MEMBER,))
        for number in range(partitions)
    )
    return TopicInfo(name, TopicSettings(max_message_bytes=max_message_bytes), placed)


class FakeNode:
    """Control and data listener; leads everything, and keeps what is produced."""

    def __init__(self, *topics: TopicInfo, base_port: int | None = None) -> None:
        self._context: zmq.asyncio.Context = zmq.asyncio.Context()
        self.base_port = self._bind(base_port)
        self.topics = {topic.name: topic for topic in topics}
        self.frames: dict[int, list[bytes]] = {}
        self.produced: list[list[tuple[int, list[bytes | None]]]] = []
        """Of each produce request: group and values of each batch."""
        self.requests: list[Request] = []
        self.answers: dict[Api, Answer] = {
            Api.HELLO: self.hello,
            Api.METADATA: self.metadata,
            Api.INIT_PRODUCER: lambda _: [7, 0],
            Api.PRODUCE: self.produce,
            Api.FETCH: self.fetch,
            Api.LIST_OFFSETS: self.list_offsets,
            Api.CREATE_TOPIC: lambda _: [1],
            Api.DELETE_TOPIC: lambda _: [1],
        }
        loop = asyncio.get_running_loop()
        self._tasks = {loop.create_task(self._serve(socket)) for socket in self._sockets}
        self._waiting: set[asyncio.Task[None]] = set()

    def _bind(self, base_port: int | None) -> int:
        """Control at base + 1, data at base + 2, as everywhere."""
        while True:
            control, data = (self._context.socket(zmq.ROUTER) for _ in range(2))
            self._sockets = [control, data]
            for socket in self._sockets:
                socket.setsockopt(zmq.LINGER, 0)
            try:
                if base_port is None:
                    port = control.bind_to_random_port("tcp://127.0.0.1")
                else:
                    port = base_port + 1
                    control.bind(f"tcp://127.0.0.1:{port}")
                data.bind(f"tcp://127.0.0.1:{port + 1}")
            except zmq.ZMQError:
                for socket in self._sockets:
                    socket.close(0)
                if base_port is not None:
                    raise
                continue
            return port - 1

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.base_port + 1}"

    async def close(self) -> None:
        """The process is gone: its sockets close, nobody answers any more."""
        for task in (*self._tasks, *self._waiting):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._waiting, return_exceptions=True)
        self._context.destroy(linger=0)

    async def _serve(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            origin, *message = await socket.recv_multipart()
            request = decode_request(message)
            self.requests.append(request)
            task = asyncio.get_running_loop().create_task(self._answer(socket, origin, request))
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)

    async def _answer(self, socket: zmq.asyncio.Socket, origin: bytes, request: Request) -> None:
        code, parts = 0, []
        try:
            result = self.answers[Api(request.api)](request)
            if asyncio.iscoroutine(result):
                result = await result
            if result is None:
                return
            if isinstance(result, bytes):
                await socket.send_multipart([origin, result])
                return
            fields, parts = result if isinstance(result, tuple) else (result, [])
        except AegisError as error:
            code, fields = error_to_reply(error)
        reply = encode_reply(request.api, fields, parts, correlation=request.correlation, code=code)
        await socket.send_multipart([origin, *reply])

    def count(self, api: Api) -> int:
        return sum(request.api == api for request in self.requests)

    # ---- what an honest node says

    def hello(self, _: Request) -> list[Any]:
        return Hello(PROTOCOL_VERSION, "peer", CLUSTER_ID, 1, "one", "boot", 0).to_fields()

    def metadata(self, request: Request) -> list[Any]:
        info = NodeInfo(NodeId(1), "one", "node-1", "127.0.0.1", self.base_port, 1, "boot")
        names = sorted(self.topics) if request.fields[1] is None else request.fields[1]
        topics = [
            [topic_to_fields(topic), [1] * len(topic.partitions)]
            for name in names
            if (topic := self.topics.get(name))
        ]
        return [CLUSTER_ID, 1, 1, [node_to_fields(info)], topics]

    def produce(self, request: Request) -> list[Any]:
        items = request.fields[0]
        groups = [item[0] for item in items]
        results = [self.append(g, bytes(p)) for g, p in zip(groups, request.parts, strict=True)]
        values = [[r.value for r in decode_batch(part)] for part in request.parts]
        self.produced.append(list(zip(groups, values, strict=True)))
        return [[[0, offset, TIME_MS] for offset in results]]

    def append(self, group: int, batch: bytes) -> int:
        """Put a batch into a log; its first offset."""
        frames = self.frames.setdefault(group, [])
        offset = self.end(group)
        frames.append(
            encode_data_frame(
                group=GroupId(group),
                index=LogIndex(len(frames) + 1),
                term=Term(1),
                time_ms=TIME_MS,
                previous_chain=decode_header(frames[-1]).chain if frames else bytes(8),
                batch=batch,
                base_offset=offset,  # type: ignore[arg-type]
            )
        )
        return offset

    def end(self, group: int) -> int:
        frames = self.frames.get(group)
        return _offsets(frames[-1])[1] if frames else 0

    async def fetch(self, request: Request) -> tuple[list[Any], list[Part]]:
        """Waits, as a leader does, though only for as long as a test has patience."""
        wait_ms, items = request.fields[:2]
        if not any(offset < self.end(group) for group, offset, _ in items):
            await asyncio.sleep(min(wait_ms, 20) / 1000)
        parts: list[Part] = []
        for group, offset, _ in items:
            frames = self.frames.get(group, [])
            parts.append(b"".join(frame for frame in frames if _offsets(frame)[1] > offset))
        return [[[0, self.end(group), 0] for group, _, _ in items]], parts

    def list_offsets(self, request: Request) -> list[Any]:
        return [[[0, 0, self.end(group), self.end(group)] for group in request.fields[0]]]


def _offsets(frame: bytes) -> tuple[int, int]:
    """First offset of a frame, and the one after its last."""
    header = batch_header(memoryview(frame)[decode_header(frame).size - _payload_size(frame) :])
    return header.base_offset, header.base_offset + header.last_offset_delta + 1


def _payload_size(frame: bytes) -> int:
    return len(frame_payload(frame, decode_header(frame)))


def mute(_: Request) -> None:
    """Hear and say nothing."""


def no_leader(_: Request) -> None:
    raise NotLeader("nobody leads")


async def until(condition: Callable[[], bool], seconds: float = 2.0) -> None:
    """Wait in the event loop for something that has no event of its own."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@asynccontextmanager
async def fake_node(*topics: TopicInfo) -> AsyncIterator[FakeNode]:
    node = FakeNode(*topics)
    try:
        yield node
    finally:
        await node.close()


def run(test: Coroutine[Any, Any, None]) -> None:
    """One test in an event loop of its own, which must end with nothing left to complain about."""
    complaints: list[str] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: complaints.append(str(context))
        )
        await asyncio.wait_for(test, 10)

    asyncio.run(watched())
    assert not complaints, "\n".join(complaints)
