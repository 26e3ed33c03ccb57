"""What makes a link come up or break, as far as its other end says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from aegis_cluster.broker.links import Call, Links
from aegis_cluster.broker.transport import PeerKey
from aegis_cluster.errors import NotReady
from aegis_cluster.ids import NodeId, ShardId
from aegis_cluster.wire.codes import error_to_reply
from aegis_cluster.wire.protocol import Api, Part, encode_reply
from tests.broker.harness import hello

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aegis_cluster.broker.transport import Transport

KEY = PeerKey(NodeId(2), ShardId(0))
GREETING = encode_reply(
    Api.HELLO,
    hello(role="peer", node=2, incarnation="two").to_fields(),
    correlation=0,
)
CODE, FIELDS = error_to_reply(NotReady("not now"))


class Line:
    """A link to node 2, and what it told its owner."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.sent = 0
        self.links = Links(
            me=hello(role="peer", node=1, incarnation="one"),
            transport=cast("Transport", self),
            on_up=lambda *_: self.told.append("up"),
            on_lost=lambda *_: self.told.append("lost"),
            on_refused=lambda *_: self.told.append("refused"),
        )
        self.links.ensure(KEY, "tcp://there")
        self.links.connected(KEY)

    def open_peer(self, _key: PeerKey, _endpoint: str) -> None: ...

    def send_peer(self, _key: PeerKey, _message: Sequence[Part]) -> bool:
        self.sent += 1
        return True


def test_a_second_answer_to_a_repeated_hello_is_no_news() -> None:
    line = Line()
    line.links.received(KEY, GREETING)
    line.links.received(KEY, GREETING)
    assert line.told == ["up"]


def test_a_late_refusal_of_a_call_that_was_given_up_breaks_no_link() -> None:
    """A busy shard answers late; every link was then broken and every leader behind it missed."""
    line = Line()
    line.links.received(KEY, GREETING)
    heard: list[object] = []
    line.links.call(KEY, Api.FETCH, [], now_ms=0, call=Call(100, heard.append))
    line.links.expire(101)
    assert len(heard) == 1, "it was given up"
    line.links.received(KEY, encode_reply(Api.FETCH, FIELDS, correlation=1, code=CODE))
    assert line.told == ["up"]
    assert line.links.is_up(KEY)


def test_one_that_no_longer_knows_us_is_greeted_again() -> None:
    line = Line()
    line.links.received(KEY, GREETING)
    sent = line.sent
    line.links.received(KEY, encode_reply(Api.RAFT, FIELDS, correlation=0, code=CODE))
    assert line.told == ["up", "lost"]
    assert line.sent == sent + 1
    line.links.received(KEY, GREETING)
    assert line.told == ["up", "lost", "up"]
