"""Questions about the whole cluster: what `status` shows, and asking a shard to step aside.

The idea: every shard knows its own replicas; the whole is put together here, from what each says
of itself, so a node that does not answer is shown as such and nothing is guessed for it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.client.cluster import ClusterClient, addresses_of
from aegis_cluster.client.view import add_view, ask_view
from aegis_cluster.config import control_endpoint
from aegis_cluster.errors import AegisError
from aegis_cluster.wire.protocol import Api, take_int, take_list, take_map

if TYPE_CHECKING:
    from aegis_cluster.keys import LinkKeys
    from aegis_cluster.wire.descriptions import NodeInfo, TopicInfo

SHARD_S: Final = 2.0
"""How long one shard may take to answer before it is shown as not alive."""

ShardStatus = dict[str, Any]
"""One shard's answer: `identity`, `linked`, `replicas`, `damaged`."""


async def cluster_status(
    bootstrap: str, timeout: float, *, keys: LinkKeys | None = None, insecure: bool = False
) -> dict[str, Any]:
    """The cluster as its shards see it: `{"nodes": [...], "topics": [...]}`.

    Raises `Unavailable` when no node answers in time.
    """
    cluster = ClusterClient(addresses_of(bootstrap), stale_ok=True, keys=keys, insecure=insecure)
    try:
        deadline = cluster.deadline(timeout)
        await cluster.connect(deadline)
        infos = sorted(cluster.metadata.nodes.values(), key=lambda info: info.node)
        asking = asyncio.gather(*(ask_view(cluster, info, deadline) for info in infos))
        answers = await asyncio.gather(
            *(_ask_node(cluster, info, min(deadline, cluster.now() + SHARD_S)) for info in infos)
        )
        nodes = dict(zip(infos, answers, strict=True))
        status = {
            "cluster_id": cluster.metadata.cluster_id,
            "controller": _name(cluster, cluster.metadata.controller),
            "nodes": [_node_status(info, shards) for info, shards in nodes.items()],
            "topics": _topics(cluster, nodes),
        }
        views = await asking
        add_view(status, dict(zip((info.node for info in infos), views, strict=True)))
        return status
    finally:
        await cluster.close()


async def shard_status(
    endpoint: str, timeout: float, *, keys: LinkKeys | None = None, insecure: bool = False
) -> ShardStatus:
    """What the shard at this control endpoint says of itself. Raises `Unavailable`."""
    cluster = ClusterClient([endpoint], keys=keys, insecure=insecure)
    try:
        return await _ask_shard(cluster, endpoint, cluster.deadline(timeout))
    finally:
        await cluster.close()


async def step_down(
    endpoint: str, timeout: float, *, keys: LinkKeys | None = None, insecure: bool = False
) -> int:
    """Have a shard hand over what it leads; return how many leaderships it could not pass on."""
    cluster = ClusterClient([endpoint], keys=keys, insecure=insecure)
    try:
        deadline = cluster.deadline(timeout)
        link = cluster.link(endpoint)
        await link.ready(deadline)
        reply = await link.request(Api.STEP_DOWN, [], deadline=deadline)
        return take_int(reply.fields, 0, "left")
    finally:
        await cluster.close()


async def _ask_node(
    cluster: ClusterClient, info: NodeInfo, deadline: float
) -> list[ShardStatus | None]:
    """Every shard's answer, None for one that gives none."""

    async def ask(shard: int) -> ShardStatus | None:
        try:
            endpoint = control_endpoint(info.host, info.base_port, shard)
            return await _ask_shard(cluster, endpoint, deadline)
        except AegisError:
            return None

    return list(await asyncio.gather(*(ask(shard) for shard in range(info.shards))))


async def _ask_shard(cluster: ClusterClient, endpoint: str, deadline: float) -> ShardStatus:
    link = cluster.link(endpoint)
    await link.ready(deadline)
    reply = await link.request(Api.STATUS, [], deadline=deadline)
    return {
        "identity": take_map(reply.fields, 0, "identity"),
        "linked": take_list(reply.fields, 1, "linked"),
        "replicas": take_list(reply.fields, 2, "replicas"),
        "damaged": take_list(reply.fields, 3, "damaged"),
    }


def _node_status(info: NodeInfo, shards: list[ShardStatus | None]) -> dict[str, Any]:
    answered = [shard for shard in shards if shard is not None]
    return {
        "name": info.name,
        "endpoint": control_endpoint(info.host, info.base_port),
        "alive": bool(answered) and len(answered) == len(shards),
        "shards": [_shard_line(number, shard) for number, shard in enumerate(shards)],
    }


def _shard_line(number: int, shard: ShardStatus | None) -> dict[str, Any]:
    if shard is None:
        return {"shard": number, "alive": False}
    replicas = shard["replicas"]
    return {
        "shard": number,
        "alive": True,
        "boot_id": shard["identity"].get("boot_id"),
        "replicas": len(replicas),
        "leaders": sum(replica.get("role") == "leader" for replica in replicas),
        "damaged": shard["damaged"],
        "violations": shard["identity"].get("violations", 0),
        "scrub": shard["identity"].get("scrub"),
    }


def _topics(
    cluster: ClusterClient, nodes: dict[NodeInfo, list[ShardStatus | None]]
) -> list[dict[str, Any]]:
    leading: dict[int, dict[str, Any]] = {}
    for shards in nodes.values():
        for shard in shards:
            for replica in shard["replicas"] if shard else ():
                if replica.get("role") != "leader":
                    continue
                known = leading.get(replica["group"])
                if known is None or known["term"] < replica["term"]:
                    leading[replica["group"]] = replica
    topics = sorted(cluster.metadata.topics.values(), key=lambda topic: topic.name)
    return [_topic_status(cluster, topic, leading) for topic in topics]


def _topic_status(
    cluster: ClusterClient, topic: TopicInfo, leading: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    partitions = []
    for placed in topic.partitions:
        found: dict[str, Any] = defaultdict(lambda: None, leading.get(placed.group, {}))
        partitions.append(
            {
                "partition": placed.partition,
                "group": placed.group,
                "leader": _name(cluster, found["leader"]),
                "term": found["term"],
                "replicas": [_name(cluster, member.node) for member in placed.replicas],
                "in_sync": [_name(cluster, node) for node in found["in_sync"] or ()],
                "log_start": found["log_start"],
                "high_watermark": found["high_watermark"],
                "last_stable": found["last_stable"],
                "compaction": found["compaction"],
            }
        )
    return {"name": topic.name, "partitions": partitions}


def _name(cluster: ClusterClient, node: Any) -> str | None:
    info = cluster.metadata.nodes.get(node)
    return info.name if info else None
