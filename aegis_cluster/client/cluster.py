"""A client's view of one cluster: links, metadata, and calls that find who can answer them.

The rule it protects: every public call has one absolute deadline, which covers connecting, asking
again and waiting; and whatever is asked again is either harmless to repeat or carries something
by which a repeat is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

import zmq

from aegis_cluster import arguments
from aegis_cluster.client.link import Link, NotAccepted
from aegis_cluster.client.metadata import NO_NODE, Metadata, Routes, TcpRoutes
from aegis_cluster.config import PORT_MAX
from aegis_cluster.errors import (
    AegisError,
    ConfigError,
    Misuse,
    NotLeader,
    NotReady,
    OutcomeUnknown,
    PeerViolation,
    RequestTimeout,
    TopicNotFound,
    Unavailable,
)
from aegis_cluster.ids import LogIndex, NodeId
from aegis_cluster.wire.protocol import Api, Reply, take_int

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from aegis_cluster.keys import LinkKeys
    from aegis_cluster.wire.descriptions import TopicInfo

_ADDRESS: Final = re.compile(r"tcp://[^\s/,]+:\d{1,5}")
FIRST_PAUSE_S: Final = 0.02
PAUSE_S_MAX: Final = 0.5
CONNECT_S: Final = 0.5
"""How long one address may take before the next one is tried."""
ASK_S: Final = 2.0
"""How long one node may take to answer a question that another could answer too."""
RENEW_S: Final = 30.0
"""Metadata in use is asked for anew so often: settings and partitions may have changed."""


class Pause:
    """Growing pauses between tries, never beyond the deadline."""

    def __init__(
        self, deadline: float, *, first_s: float = FIRST_PAUSE_S, longest_s: float = PAUSE_S_MAX
    ) -> None:
        self._deadline = deadline
        self._next_s = first_s
        self._longest_s = longest_s

    async def wait(self) -> None:
        left = self._deadline - asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, min(self._next_s, left)))
        self._next_s = min(self._next_s * 1.5, self._longest_s)


class ClusterClient:
    """Shared by everything that one engine does; belongs to one event loop."""

    def __init__(
        self,
        bootstrap: Sequence[str],
        *,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        routes: Routes | None = None,
        stale_ok: bool = False,
        keys: LinkKeys | None = None,
        insecure: bool = False,
    ) -> None:
        """context: one that is shared with others, who end it; None: one of our own.

        keys: of all links; None: they go without. insecure: also beyond this machine.

        stale_ok: take metadata also from a node that has not caught up since it started; for
        looking at a cluster that is not well.
        """
        self._stale_ok = stale_ok
        self._keys = keys
        self._insecure = insecure
        self.metadata = Metadata(routes or TcpRoutes())
        self.failure: AegisError | None = None
        """Why no request can succeed any more; None as long as one might."""
        self.client_id = uuid.uuid4().hex
        self._bootstrap = list(bootstrap)
        self._own_context = context is None
        self._context: zmq.Context[zmq.Socket[bytes]] = (
            zmq.Context() if context is None else context
        )
        self._links: dict[str, Link] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._thread = get_ident()
        self._renew_at = self._loop.time() + RENEW_S

    def deadline(self, timeout: float) -> float:
        """In the loop's time, so many seconds from now. Raises `Misuse` on another event loop."""
        return self.deadline_in(arguments.seconds(timeout))

    def deadline_in(self, seconds: float) -> float:
        """As `deadline`, of seconds that were looked at before."""
        # A thread runs one loop at a time, so this mostly says what `get_running_loop` does, but
        # without its system call (0.07 us instead of 0.14 for each record of `send`).
        if get_ident() != self._thread or not self._loop.is_running():
            self._check_loop()
        return self._loop.time() + seconds

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise Misuse(
                "This engine belongs to another event loop. Open one for each loop, or use"
                " aegis_cluster.sync, whose engine may be called from any thread."
            )
        self._thread = get_ident()  # the loop goes on in another thread

    def now(self) -> float:
        return self._loop.time()

    def link(self, endpoint: str) -> Link:
        """The link to an address, opened on first use. Raises `Misuse` once closed."""
        if self._closed:
            raise Misuse("The engine is closed.")
        link = self._links.get(endpoint)
        if link is None:
            cluster_id = self.metadata.cluster_id
            link = Link(
                self._context,
                endpoint,
                client_id=self.client_id,
                cluster_id=cluster_id,
                keys=self._keys,
                insecure=self._insecure,
            )
            self._links[endpoint] = link
            if self.failure is not None:
                link.fail(self.failure)
        return link

    def fail(self, failure: AegisError) -> None:
        """The cluster is gone for good: whatever waits ends, and later calls are refused."""
        self.failure = failure
        for link in self._links.values():
            link.fail(failure)

    async def close(self) -> None:
        """End all links; nothing opens one again."""
        self._closed = True
        if self._renewing is not None:
            self._renewing.cancel()
        for link in self._links.values():
            link.close()
        self._links.clear()
        if self._own_context:
            self._context.destroy(linger=0)

    # ---- metadata

    async def connect(self, deadline: float) -> None:
        """Have metadata from some node. Raises `Unavailable` when none answers in time."""
        await self.refresh(None, deadline)

    async def refresh(
        self, topics: Sequence[str] | None, deadline: float, least_index: int = 0
    ) -> None:
        """Ask any node for metadata that is at least as new as `least_index`."""
        fields = [max(least_index, self.metadata.index), topics, self._stale_ok]
        reply = await self._ask_any(Api.METADATA, fields, deadline)
        with _understood(Unavailable):
            self.metadata.merge(reply.fields, topics)

    async def topic(self, name: str, deadline: float) -> TopicInfo:
        """A topic's description, asked for when it is not known. Raises `TopicNotFound`."""
        if type(name) is not str or name not in self.metadata.topics:
            await self.refresh([arguments.name(name)], deadline)
        elif self._loop.time() >= self._renew_at:
            self._renew_aside()
        return self.metadata.topic(name)

    def _renew_aside(self) -> None:
        """Others may have altered topics: ask anew, without holding up whoever uses them now."""
        self._renew_at = self._loop.time() + RENEW_S
        if self._renewing is None or self._renewing.done():
            self._renewing = self._loop.create_task(self._renew(self._renew_at))

    async def _renew(self, deadline: float) -> None:
        with contextlib.suppress(AegisError):  # whoever needs an answer asks for itself
            await self.refresh(None, deadline)

    async def _ask_any(self, api: Api, fields: Sequence[Any], deadline: float) -> Reply:
        """Ask one node after another a question that any of them can answer."""
        pause = Pause(deadline)
        failure: AegisError = Unavailable("No address of the cluster is known.")
        while self.now() < deadline:
            failures = []
            for endpoint in self._endpoints():
                try:
                    return await self._ask(endpoint, api, fields, deadline)
                except (Unavailable, OutcomeUnknown, NotReady) as error:
                    failure = error
                    failures.append(error)
            if failures and all(isinstance(error, NotAccepted) for error in failures):
                raise failures[0]  # every node has said so: waiting would not change their minds
            await pause.wait()
        raise Unavailable(
            f"No node of the cluster answered in time at {', '.join(self._endpoints())}:"
            f" {failure} Is it running?",
        )

    def _endpoints(self) -> list[str]:
        """Addresses of nodes, those with a connection first."""
        known = dict.fromkeys([*self.metadata.control_endpoints(), *self._bootstrap])
        return sorted(known, key=lambda e: not (e in self._links and self._links[e].is_ready))

    async def _ask(self, endpoint: str, api: Api, fields: Sequence[Any], deadline: float) -> Reply:
        link = self.link(endpoint)
        await link.ready(min(deadline, self.now() + CONNECT_S))
        return await link.request(api, fields, deadline=min(deadline, self.now() + ASK_S))

    # ---- the controller

    async def ask_controller(
        self, api: Api, fields: Sequence[Any], deadline: float
    ) -> tuple[Reply, bool]:
        """Have the controller carry out a change; also says whether an earlier try is unknown.

        Raises its refusal; `RequestTimeout` when nothing was sent in time; `OutcomeUnknown`.
        """
        pause = Pause(deadline)
        unanswered = False
        failure: AegisError = Unavailable("No controller is known.")
        while self.now() < deadline:
            try:
                endpoint = await self._controller_endpoint(deadline)
                return await self._ask(endpoint, api, fields, deadline), unanswered
            except NotLeader as error:
                self._note_controller(error)
                failure = error
            except OutcomeUnknown as error:
                unanswered = True
                failure = error
                self.metadata.controller = NO_NODE
            except (Unavailable, NotReady) as error:
                failure = error
                self.metadata.controller = NO_NODE
            except AegisError as error:
                if unanswered:
                    raise OutcomeUnknown(
                        f"An earlier try was not answered, and now: {error}", now=str(error)
                    ) from error
                raise
            await pause.wait()
        if unanswered:
            raise OutcomeUnknown(f"The controller did not answer in time: {failure}")
        raise RequestTimeout(f"No controller could be reached in time: {failure}")

    async def _controller_endpoint(self, deadline: float) -> str:
        info = self.metadata.nodes.get(self.metadata.controller)
        if info is None:
            await self.refresh([], deadline)
            info = self.metadata.nodes.get(self.metadata.controller)
        if info is None:
            raise Unavailable("The cluster has no controller at the moment.")
        return self.metadata.routes.control(info)

    def _note_controller(self, error: NotLeader) -> None:
        leader = error.details.get("leader")
        if isinstance(leader, int) and leader in self.metadata.nodes:
            self.metadata.controller = NodeId(leader)
        else:
            self.metadata.controller = NO_NODE

    async def create_topic(
        self,
        name: str,
        *,
        partitions: int | None,
        replicas: int | None,
        settings: Sequence[Any],
        deadline: float,
    ) -> None:
        """Create a topic and know of it. Raises `TopicExists`, `InvalidTopic`, `NotEnoughReplicas`.

        The token lets the controller recognise a repeat of this very call.
        """
        token = uuid.uuid4().hex
        fields = [name, partitions, replicas, list(settings), token]
        reply, _ = await self.ask_controller(Api.CREATE_TOPIC, fields, deadline)
        await self._know([name], deadline, index_of(reply))

    async def alter_topic(
        self,
        name: str,
        *,
        partitions: int | None,
        replicas: int | None,
        changes: Mapping[str, Any],
        deadline: float,
    ) -> None:
        """Change a topic and know of it. Raises `TopicNotFound`, `InvalidTopic`,
        `NotEnoughReplicas`. To do it twice changes nothing more."""
        fields: list[Any] = [name, partitions, dict(changes)]
        if replicas is not None:
            fields.append(replicas)
        reply, _ = await self.ask_controller(Api.ALTER_TOPIC, fields, deadline)
        index = index_of(reply)
        await self._know([name], deadline, index)
        await self._await_everybody(index, deadline)

    async def _await_everybody(self, index: int, deadline: float) -> None:
        """Have every shard that answers soon know of a change, so that it holds on leaders too; one
        that is down learns of it when it is back."""

        async def told(endpoint: str) -> None:
            with contextlib.suppress(AegisError):
                await self._ask(endpoint, Api.METADATA, [index, [], True], deadline)

        shards = [
            self.metadata.routes.data(node, shard)
            for node in self.metadata.nodes.values()
            for shard in range(node.shards)
        ]
        await asyncio.gather(*map(told, shards))

    async def _know(self, topics: Sequence[str], deadline: float, index: int) -> None:
        """Have metadata that shows a change of ours; if there is no time left, the next call has
        to, because the change itself was done."""
        try:
            await self.refresh(topics, deadline, index)
        except Unavailable:
            self.metadata.require(LogIndex(index), topics)

    async def delete_topic(self, name: str, deadline: float) -> None:
        """Delete a topic. Raises `TopicNotFound`, unless an earlier try of ours was unanswered."""
        try:
            reply, _ = await self.ask_controller(Api.DELETE_TOPIC, [name], deadline)
        except OutcomeUnknown as error:
            if not isinstance(error.__cause__, TopicNotFound):
                raise
            await self._know([name], deadline, self.metadata.index)
            return
        await self._know([name], deadline, index_of(reply))

    def topic_gone(self, name: str) -> TopicNotFound:
        """What to say of messages for a topic that was deleted meanwhile."""
        return TopicNotFound(f"Topic {name!r} was deleted.", topic=name)

    async def new_producer_id(self, deadline: float) -> int:
        """A producer id that nobody else has or had."""
        reply = await self._ask_any(Api.INIT_PRODUCER, [], deadline)
        with _understood(Unavailable):
            return take_int(reply.fields, 0, "producer_id")


def index_of(reply: Reply) -> int:
    """Of the change that was carried out. Raises `OutcomeUnknown`."""
    with _understood(OutcomeUnknown):
        return take_int(reply.fields, 0, "index")


@contextlib.contextmanager
def _understood(otherwise: type[AegisError]) -> Iterator[None]:
    """Take an answer apart in here; one that makes no sense is as good as none."""
    try:
        yield
    except PeerViolation as error:
        raise otherwise(f"A node answered with something that is no answer: {error}.") from error


def _is_address(text: str) -> bool:
    return bool(_ADDRESS.fullmatch(text)) and int(text.rpartition(":")[2]) <= PORT_MAX


def addresses_of(bootstrap: str) -> list[str]:
    """The addresses in a list with commas. Raises `ConfigError`."""
    listed = bootstrap.split(",") if isinstance(bootstrap, str) else []
    addresses = [address.strip() for address in listed if address.strip()]
    if not addresses or not all(map(_is_address, addresses)):
        raise ConfigError(
            f"{bootstrap!r} is no list of addresses; write"
            " 'tcp://127.0.0.1:7101,tcp://127.0.0.1:7201'."
        )
    return addresses
