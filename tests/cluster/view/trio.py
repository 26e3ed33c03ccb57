"""Several views in one process, over loopback, turned by one thread.

A view that is not turned is paused; one that is crashed is gone without a word. Each one that
starts again has forgotten everything.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any

from aegis_cluster.cluster.view.transport import Place
from aegis_cluster.cluster.view.view import View
from aegis_cluster.errors import AegisError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aegis_cluster.cluster.view.leases import Outcome
    from aegis_cluster.cluster.view.replica import ViewReplica

CLUSTER_ID = "the cluster"
_STEP_S = 0.005


def free_endpoints(count: int) -> list[str]:
    """Addresses that nobody uses now."""
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    found = [f"tcp://127.0.0.1:{each.getsockname()[1]}" for each in held]
    for each in held:
        each.close()
    return found


class Views:
    """Nodes 1 to 3 vote, those after them read along."""

    def __init__(self, nodes: int) -> None:
        endpoints = free_endpoints(min(nodes, 3))
        self.voters = dict(enumerate(endpoints, start=1))
        self.nodes = range(1, nodes + 1)
        self.views: dict[int, View] = {}
        self.paused: set[int] = set()
        self.told: list[str] = []
        for node in self.nodes:
            self.start(node)

    def start(self, node: int) -> View:
        """A new life of a node."""
        place = Place(CLUSTER_ID, node, self.voters)
        view = self.views[node] = View(place, tell=self.told.append)
        view.said = {"name": f"node-{node}"}
        return view

    def crash(self, *nodes: int) -> None:
        for node in nodes:
            view = self.views.pop(node)
            if view._replica is not None:
                view._replica.end()
            view._context.destroy(linger=0)

    def close(self) -> None:
        for view in self.views.values():
            view.close()

    def turn(self) -> None:
        for node, view in self.views.items():
            if node not in self.paused:
                view.turn()
        time.sleep(_STEP_S)

    def turn_for(self, seconds: float) -> None:
        """Let time pass; only where nothing is waited for."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.turn()

    def until(self, condition: Callable[[], object], what: str, seconds: float = 25.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}; {self.described()}; told: {self.told}"
            self.turn()

    # ---- questions

    def described(self) -> dict[int, dict[str, Any]]:
        return {node: view.described() for node, view in self.views.items()}

    def replica(self, node: int) -> ViewReplica:
        replica = self.views[node]._replica
        assert replica is not None
        return replica

    def leader(self) -> int:
        """The node that the living ones agree on; 0 while they do not."""
        living = [view for node, view in self.views.items() if node not in self.paused]
        leaders = {view.described()["leader"] for view in living if not view.problem}
        agreed = all(not view.problem for view in living) and len(leaders) == 1
        return leaders.pop() if agreed else 0

    def is_whole(self) -> bool:
        """All nodes are up, agree, and have announced themselves to everyone."""
        living = [node for node in self.nodes if node in self.views]
        return bool(self.leader()) and all(
            {each["node"] for each in view.described()["nodes"] if each["up"]} >= set(living)
            for view in self.views.values()
        )

    def make_whole(self) -> int:
        """Start what is dead, wait until all is well, and return the leader."""
        self.paused.clear()
        for node in self.nodes:
            if node not in self.views:
                self.start(node)
        self.until(self.is_whole, "all nodes agree")
        return self.leader()

    def ask(self, node: int, action: str, *fields: Any) -> Outcome | AegisError:
        """A lease request at one node, and its answer."""
        answers: list[Outcome | AegisError] = []
        self.views[node].lease(action, fields, answers.append)
        self.until(lambda: answers, "an answer")
        return answers[0]

    def acquire(self, node: int, name: str, holder: str, ttl_ms: int = 5_000) -> Outcome:
        """As a client: again until the view can decide."""
        deadline = time.monotonic() + 25
        while time.monotonic() < deadline:
            answer = self.ask(node, "acquire", name, holder, 0, ttl_ms)
            if not isinstance(answer, AegisError):
                return answer
            self.turn()
        raise AssertionError(f"the view did not decide: {answer}")
