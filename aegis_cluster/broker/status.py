"""What a shard says of itself when asked: who it is, and how each of its replicas stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aegis_cluster.broker.partition import Partition
    from aegis_cluster.broker.shard import Shard


def shard_status(shard: Shard) -> list[Any]:
    """[identity, nodes linked to, replicas, damaged groups]; a replica is `_replica_status`."""
    context = shard.context
    identity = {
        "cluster_id": context.cluster_id,
        "node": context.me.node,
        "incarnation": context.me.incarnation,
        "name": context.name,
        "shard": context.shard,
        "shards": context.shards,
        "boot_id": context.boot_id,
        "metadata_index": shard.table.index,
        "violations": shard.complaints.count,
        "syncs": shard.store.syncs,
        "scrub": shard.scrub.report(),
    }
    partitions = sorted(shard.manager.partitions.items())
    replicas = [
        _replica_status(partition) | {"compaction": shard.compaction.report(partition)}
        for _, partition in partitions
    ]
    linked = sorted({key.node for key in shard.links.ups()})
    return [identity, linked, replicas, shard.damaged]


def _replica_status(partition: Partition) -> dict[str, Any]:
    replica = partition.replica
    return {
        "group": partition.group,
        "topic": partition.name.topic,
        "partition": partition.name.partition,
        "role": replica.role.value,
        "serving": partition.serving,
        "term": replica.term,
        "leader": replica.leader.node if replica.leader else 0,
        "commit_index": replica.commit_index,
        "applied": partition.applied,
        "log_start": partition.log_start_offset,
        "high_watermark": partition.high_watermark,
        "last_stable": partition.last_stable_offset,
        "voters": [member.node for member in replica.membership.voters],
        "incarnations": [member.incarnation for member in replica.membership.voters],
        "in_sync": _in_sync(partition),
    }


def _in_sync(partition: Partition) -> list[int]:
    """Nodes that a leader knows to hold everything committed; empty elsewhere."""
    if not partition.leads:
        return []
    replica = partition.replica
    held = {member: progress.matched for member, progress in replica.progress.items()}
    held[replica.me] = replica.durable_index
    return sorted(m.node for m, index in held.items() if index >= replica.commit_index)
