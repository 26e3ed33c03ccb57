"""Links from this shard to shards of other nodes: greeting, Raft traffic, calls.

The idea: one link goes one way. We send on links that we opened and receive on those that others
opened to us, so both ends always know who speaks first. A link is *up* once the other side has
answered our hello with its identity; a message for a member leaves only on a link to that very
incarnation. All Raft messages of one turn of the loop travel in one ZeroMQ message, whatever
number of groups they belong to.

The rule it protects: nothing old is replayed on a new connection. When a link is lost its queue
and its calls are gone, and whoever needs them asks again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import AegisError, PeerViolation, Unavailable, WrongCluster
from aegis_cluster.ids import GroupId, Member, NodeId
from aegis_cluster.limits import LINK_QUEUE_BYTES_MAX, REQUEST_PARTS_MAX
from aegis_cluster.wire.codes import error_from_reply
from aegis_cluster.wire.protocol import (
    Api,
    Hello,
    Part,
    Reply,
    check_protocol,
    decode_reply,
    encode_request,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aegis_cluster.broker.transport import PeerKey, Transport

RAFT_MS_LEFT: Final = 5_000
GREET_AGAIN_MS: Final = 1_000
RAFT_MESSAGES_MAX: Final = 8_192
"""Per ZeroMQ message; more go into the next one."""


class LinkState(Enum):
    DOWN = "down"
    GREETING = "greeting"
    UP = "up"


@dataclass(slots=True)
class Call:
    """A request under way; `done` gets the reply or the reason why there is none."""

    deadline_ms: int
    done: Callable[[Reply | AegisError], None]


@dataclass(slots=True)
class Link:
    key: PeerKey
    endpoint: str
    state: LinkState = LinkState.DOWN
    member: Member | None = None
    raft: list[list[Any]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    parts_bytes: int = 0
    calls: dict[int, Call] = field(default_factory=dict)
    greet_again_ms: int = 0


class Links:
    """All outgoing links of one shard; pure but for the transport it is given."""

    def __init__(
        self,
        *,
        me: Hello,
        transport: Transport,
        on_up: Callable[[PeerKey, Member], None],
        on_lost: Callable[[PeerKey, Member], None],
        on_refused: Callable[[PeerKey, AegisError], None],
    ) -> None:
        self._me = me
        self._transport = transport
        self._on_up = on_up
        self._on_lost = on_lost
        self._on_refused = on_refused
        self._links: dict[PeerKey, Link] = {}
        self._correlation = 0

    def ensure(self, key: PeerKey, endpoint: str) -> None:
        """Have a link there; one to another address is replaced."""
        link = self._links.get(key)
        if link is not None and link.endpoint == endpoint:
            return
        if link is not None:
            self.disconnected(key)
            self._transport.close_peer(key)
        self._links[key] = Link(key, endpoint)
        self._transport.open_peer(key, endpoint)

    def __contains__(self, key: PeerKey) -> bool:
        """There is a link there, up or not."""
        return key in self._links

    def keys(self) -> list[PeerKey]:
        return sorted(self._links)

    def is_up(self, key: PeerKey) -> bool:
        link = self._links.get(key)
        return link is not None and link.state is LinkState.UP

    def incarnations(self, node: NodeId) -> set[str]:
        """As which members the shards of a node answer us now."""
        return {
            link.member.incarnation
            for key, link in self._links.items()
            if key.node == node and link.state is LinkState.UP and link.member is not None
        }

    def ups(self) -> list[PeerKey]:
        """Links that can carry a call now."""
        return [key for key in self.keys() if self.is_up(key)]

    # ---- inputs

    def connected(self, key: PeerKey) -> None:
        """The transport has a fresh connection: say who we are."""
        link = self._links.get(key)
        if link is None:
            return
        self._greet(link)

    def _greet(self, link: Link) -> None:
        link.state = LinkState.GREETING
        link.greet_again_ms = 0
        self._transport.send_peer(link.key, self._request(Api.HELLO, self._me.to_fields()))

    def disconnected(self, key: PeerKey) -> None:
        """The connection is gone, and with it everything that was queued or under way."""
        link = self._links.get(key)
        if link is None:
            return
        was_up, link.state = link.state is LinkState.UP, LinkState.DOWN
        self._drop_queue(link)
        calls, link.calls = link.calls, {}
        for call in calls.values():
            call.done(Unavailable(f"The link to node {key.node} was lost."))
        if was_up and link.member is not None:
            self._on_lost(key, link.member)

    def received(self, key: PeerKey, message: Sequence[Part]) -> None:
        """A reply on one of our links. Raises `PeerViolation` when it is none."""
        link = self._links.get(key)
        if link is None:
            return
        reply = decode_reply(message)
        if reply.api == Api.HELLO:
            self._greeted(link, reply)
            return
        call = link.calls.pop(reply.correlation, None)
        is_call = reply.correlation != 0  # one that was given up, if it is not among ours
        if not is_call and reply.code != 0 and link.state is LinkState.UP:
            # The other side has forgotten our hello, as after a message of ours that it disliked.
            self.disconnected(key)
            self._greet(link)
        elif call is not None:
            call.done(reply if reply.code == 0 else error_from_reply(reply.code, reply.fields))

    def expire(self, now_ms: int) -> None:
        """Give up calls whose deadline has passed; repeat a hello that nobody answers."""
        for link in self._links.values():
            if link.state is LinkState.GREETING and link.greet_again_ms <= now_ms:
                if link.greet_again_ms:
                    self._greet(link)
                link.greet_again_ms = now_ms + GREET_AGAIN_MS
            late = [number for number, call in link.calls.items() if call.deadline_ms <= now_ms]
            for number in late:
                error = Unavailable(f"Node {link.key.node} did not answer in time.")
                link.calls.pop(number).done(error)

    # ---- sending

    def call(
        self, key: PeerKey, api: Api, fields: Sequence[Any], *, now_ms: int, call: Call
    ) -> None:
        """Ask; the answer, or the reason why there is none, reaches `call.done`."""
        link = self._links.get(key)
        if link is None or link.state is not LinkState.UP:
            call.done(Unavailable(f"There is no link to node {key.node} now."))
            return
        self._correlation += 1
        link.calls[self._correlation] = call
        ms_left = max(0, call.deadline_ms - now_ms)
        message = encode_request(api, fields, correlation=self._correlation, ms_left=ms_left)
        if not self._transport.send_peer(key, message):
            del link.calls[self._correlation]
            call.done(Unavailable(f"The link to node {key.node} is full or gone."))

    def queue_raft(
        self,
        key: PeerKey,
        recipient: Member,
        *,
        group: GroupId,
        fields: list[Any],
        frames: bytes | None,
    ) -> None:
        """Put one Raft message on the turn's outbox; lost in silence where no link is up."""
        link = self._links.get(key)
        if link is None or link.state is not LinkState.UP or link.member != recipient:
            return
        if frames is None:
            link.raft.append([group, -1, fields])
            return
        queued = link.parts_bytes + self._transport.unsent_to(key)
        if queued and queued + len(frames) > LINK_QUEUE_BYTES_MAX:
            return
        link.raft.append([group, len(link.parts), fields])
        link.parts.append(frames)
        link.parts_bytes += len(frames)
        if len(link.parts) >= REQUEST_PARTS_MAX:
            self._flush(link)

    def flush(self) -> None:
        """Send what the turn has queued, one message a link."""
        for link in self._links.values():
            if link.raft:
                self._flush(link)

    def _flush(self, link: Link) -> None:
        if len(link.raft) >= RAFT_MESSAGES_MAX:
            self._flush_in_pieces(link)
            return
        message = encode_request(
            Api.RAFT, [link.raft], link.parts, correlation=0, ms_left=RAFT_MS_LEFT
        )
        self._transport.send_peer(link.key, message)
        self._drop_queue(link)

    def _flush_in_pieces(self, link: Link) -> None:
        """Messages with frames first, in order, then the small ones in several messages."""
        small = [item for item in link.raft if item[1] < 0]
        link.raft = [item for item in link.raft if item[1] >= 0]
        if link.raft:
            self._flush(link)
        for start in range(0, len(small), RAFT_MESSAGES_MAX - 1):
            link.raft = small[start : start + RAFT_MESSAGES_MAX - 1]
            self._flush(link)

    def _drop_queue(self, link: Link) -> None:
        link.raft, link.parts, link.parts_bytes = [], [], 0

    def _request(self, api: Api, fields: Sequence[Any]) -> list[Part]:
        return encode_request(api, fields, correlation=0, ms_left=RAFT_MS_LEFT)

    def _greeted(self, link: Link, reply: Reply) -> None:
        """The other side's answer to our hello: its identity, or why it wants nothing of us."""
        try:
            if reply.code != 0:
                raise error_from_reply(reply.code, reply.fields)
            hello = Hello.from_fields(reply.fields)
            check_protocol(hello)
            if hello.cluster_id != self._me.cluster_id:
                raise WrongCluster(f"Node at {link.endpoint} belongs to another cluster.")
            if hello.node != link.key.node or hello.shard != link.key.shard:
                raise PeerViolation(
                    f"At {link.endpoint}, where node {link.key.node} should be, node {hello.node}"
                    " answers. Check the peers in the node files."
                )
        except AegisError as error:
            self._on_refused(link.key, error)
            return
        member = Member(NodeId(hello.node), hello.incarnation)
        if link.state is LinkState.UP and link.member == member:
            return  # the answer to a hello that we repeated because it took long
        link.member, link.state = member, LinkState.UP
        self._on_up(link.key, member)
