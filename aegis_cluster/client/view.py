"""The cluster view in `status`: load figures and leases, added to what the shards themselves said.

The idea: every node is asked for its copy; the newest one that is in order counts. What the view
says only adds keys: which nodes are alive, who leads and what is in sync never come from it, so a
status without a view lacks the figures and says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.config import control_endpoint
from aegis_cluster.errors import AegisError
from aegis_cluster.wire.protocol import Api, take_map

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aegis_cluster.client.cluster import ClusterClient
    from aegis_cluster.wire.descriptions import NodeInfo

VIEW_S: Final = 0.7
"""How long a node's view may take to answer; it must not make `status` slow."""

ViewAnswer = dict[str, Any]
"""One node's copy, as `cluster.view` describes it."""

NO_ANSWER: Final[ViewAnswer] = {"state": "down", "why": "no node was asked"}


async def ask_view(cluster: ClusterClient, info: NodeInfo, deadline: float) -> ViewAnswer:
    """A node's copy of the view; one that says why there is none, where there is none."""
    deadline = min(deadline, cluster.now() + VIEW_S)
    try:
        link = cluster.link(control_endpoint(info.host, info.base_port))
        await link.ready(deadline)
        reply = await link.request(Api.CLUSTER_VIEW, [], deadline=deadline)
        return take_map(reply.fields, 0, "view")
    except AegisError as error:
        return {"state": "down", "why": str(error)}


def add_view(status: dict[str, Any], views: Mapping[int, ViewAnswer]) -> None:
    """Put into a `status` what the newest copy says: `status["view"]`, and figures of each node
    and shard. `views`: by node id, in the order of `status["nodes"]`."""
    for node, own in zip(status["nodes"], views.values(), strict=True):
        node["view"] = {name: own.get(name) for name in ("state", "why", "role")}
    best = max(views.values(), key=_rank, default=NO_ANSWER)
    status["view"] = {"state": best.get("state"), "why": best.get("why")}
    if best.get("state") != "up":
        return
    try:
        _add_details(status, views, best)
    except (KeyError, TypeError, ValueError) as error:
        why = f"the nodes describe it in a way that is not understood here ({error!r})"
        status["view"] = {"state": "down", "why": why}


def _add_details(status: dict[str, Any], views: Mapping[int, ViewAnswer], best: ViewAnswer) -> None:
    names = {node: each["name"] for node, each in zip(views, status["nodes"], strict=True)}
    status["view"] |= {
        "leader": names.get(best["leader"]),
        "reign": best["reign"],
        "leases": [_lease(lease) for lease in best["leases"]],
    }
    seen = {said["node"]: said for said in best["nodes"]}
    for node, each in zip(views, status["nodes"], strict=True):
        if node in seen:
            _add_figures(each, seen[node])


def _rank(view: ViewAnswer) -> tuple[bool, int, int]:
    return view.get("state") == "up", view.get("reign", 0), view.get("clock_ms", 0)


def _lease(lease: list[Any]) -> dict[str, Any]:
    name, holder, token, left_ms = lease
    return {"name": name, "holder": holder, "token": token, "ends_in_s": left_ms / 1000}


def _add_figures(node: dict[str, Any], said: dict[str, Any]) -> None:
    node["announced"] = said["up"]
    node["since_ms"] = said.get("since_ms")
    node["clock_ahead_ms"] = said.get("clock_ahead_ms")
    node["load"] = said.get("load", {})
    shards = {shard["shard"]: shard for shard in said.get("shards", [])}
    for shard in node["shards"]:
        announced = shards.get(shard["shard"])
        # Figures of the very process that answered, not of the one before it.
        if announced is not None and announced.get("boot_id") == shard.get("boot_id"):
            shard["since_ms"] = announced.get("since_ms")
            shard["load"] = {
                name: announced[name]
                for name in ("cpu_percent", "memory_bytes")
                if name in announced
            }
