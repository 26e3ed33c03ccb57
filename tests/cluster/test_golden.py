"""Metadata commands as version 1 wrote them are read by every later version."""

from __future__ import annotations

import pytest

from aegis_cluster.cluster.metadata import (
    Command,
    CreateTopic,
    DeleteTopic,
    GrantProducerIds,
    RegisterNode,
    decode_command,
)
from aegis_cluster.ids import GroupId, Member, NodeId, ProducerId
from aegis_cluster.wire.descriptions import NodeInfo, PartitionInfo, TopicInfo, TopicSettings

MEMBER = Member(NodeId(2), "ab" * 16)

GOLDEN_V1: dict[str, Command] = {
    "9301ad72656769737465725f6e6f64659702d920616261626162616261626162616261626162616261626162"
    "6162616261626162a66e6f64652d32a93132372e302e302e31cd1c2001a4626f6f74": RegisterNode(
        NodeInfo(MEMBER.node, MEMBER.incarnation, "node-2", "127.0.0.1", 7200, 1, "boot")
    ),
    "9301ac6372656174655f746f70696394a66f726465727396a5746f706963ce240c8400c0a664656c657465a3"
    "6c7a34ce000f4240919207919202d92061626162616261626162616261626162616261626162616261626162"
    "61626162a5746f6b656e": CreateTopic(
        TopicInfo(
            "orders",
            TopicSettings("topic", 604_800_000, None, "delete", "lz4", 1_000_000),
            (PartitionInfo(0, GroupId(7), (MEMBER,)),),
            "token",
        )
    ),
    "9301ac64656c6574655f746f706963a66f7264657273": DeleteTopic("orders"),
    "9401b26772616e745f70726f64756365725f69647301cd03e8": GrantProducerIds(ProducerId(1), 1000),
}


@pytest.mark.parametrize("written", GOLDEN_V1)
def test_commands_of_version_1_still_read(written: str) -> None:
    assert decode_command(bytes.fromhex(written)) == GOLDEN_V1[written]
