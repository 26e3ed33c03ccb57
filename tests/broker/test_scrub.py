"""What is stored is read again now and then, so that rot is found while peers can mend it."""

from __future__ import annotations

import pytest

from aegis_cluster.broker import scrub
from aegis_cluster.limits import SCRUB_EVERY_MS
from aegis_cluster.wire.protocol import Api
from tests.broker.harness import Client, Cluster, Host
from tests.broker.test_repair import filled, holds_all, segments

pytestmark = pytest.mark.timeout(120)  # much computing; a busy machine stretches it


@pytest.fixture(autouse=True)
def _restless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "REST_MS", 1_000)


def passes(host: Host) -> int:
    found = host.alive.scrub.report()["passes"]
    assert isinstance(found, int)
    return found


def test_a_pass_reads_all_that_is_stored_and_says_so() -> None:
    cluster = Cluster()
    group, _ = filled(cluster)
    before = {host: passes(host) for host in cluster.alive}
    cluster.until(
        lambda: all(passes(host) >= before[host] + 2 for host in cluster.alive), "a whole pass", 500
    )
    for host in cluster.alive:
        found = host.alive.scrub.report()
        stored = sum(
            segment.end
            for partition in host.alive.manager.partitions.values()
            for segment in partition.log.segments
        )
        assert found["stored_bytes"] == stored
        assert 0.9 * stored <= found["last_pass_bytes"] <= stored
        assert found["damage_found"] == 0
    reply = Client(cluster, cluster.elect(group)).ask(Api.STATUS)
    assert reply.fields[0]["scrub"]["passes"] >= 1


@pytest.mark.parametrize("role", ["leader", "follower"])
def test_rot_that_nobody_reads_is_found_and_mended(role: str) -> None:
    cluster = Cluster()
    group, values = filled(cluster)
    leader = cluster.elect(group)
    host = leader if role == "leader" else cluster.followers(group)[0]
    cluster.until(lambda: passes(host) > 0, "a first pass", 500)
    host.disk.flip_bit(segments(host, group)[0], 5_000)
    cluster.until(
        lambda: host.alive.scrub.report()["damage_found"] == 1, "the next pass finds it", 2_000
    )
    cluster.until(lambda: holds_all(host, cluster, group), "it is rebuilt", 2_000)
    assert Client(cluster, cluster.elect(group)).read(group) == values


def test_one_small_read_at_a_time() -> None:
    cluster = Cluster(1)
    filled(cluster, replicas=1)
    (host,) = cluster.alive
    assert host.transport is not None
    reads = 0
    for _ in range(100):
        cluster.now_ms += SCRUB_EVERY_MS // 10
        host.alive.turn(cluster.now_ms)
        assert len(host.transport.reads) <= 1
        reads += len(host.transport.reads)
    assert reads, "it waits for the first one to come back"
