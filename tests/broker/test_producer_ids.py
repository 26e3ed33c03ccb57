"""A shard finds who grants producer ids, wherever the controller is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aegis_cluster.broker.producer_ids import ProducerIds
from aegis_cluster.broker.transport import PeerKey
from aegis_cluster.errors import NotLeader
from aegis_cluster.ids import NodeId, ShardId
from aegis_cluster.wire.protocol import Reply


class Links:
    """All of these are up; only one of them leads to the controller."""

    def __init__(self, keys: list[PeerKey], controller: PeerKey) -> None:
        self.keys = keys
        self.controller = controller

    def ups(self) -> list[PeerKey]:
        return self.keys

    def call(self, key: PeerKey, *_: Any, call: Any, now_ms: int) -> None:
        is_controller = key == self.controller
        reply = Reply(0, 0, 0, 0, [1_001, 1_000], [])
        call.done(reply if is_controller else NotLeader("It does not lead the metadata."))


@pytest.mark.parametrize("links", [1, 2, 3, 4])
def test_every_link_is_tried_in_turn(links: int) -> None:
    keys = [PeerKey(NodeId(number), ShardId(0)) for number in range(1, links + 1)]
    for controller in keys:
        shard: Any = SimpleNamespace(
            now_ms=0, controller_key=lambda: None, links=Links(keys, controller), context=None
        )
        shard.context = SimpleNamespace(me=SimpleNamespace(node=9), shard=ShardId(1))
        ids = ProducerIds(shard)
        got: list[Any] = []
        ids.take(1_000, got.append)
        for _ in range(links):
            ids.tick()
        assert got == [1_001]
