"""The cluster of one directory: starts, stops, kills and restarts the nodes in `./nodes`.

The idea: what should be is in the node files, what is can be seen (run files, processes, answers
of the nodes), and every command closes the gap between the two. So `up` after a half-failed `up`
is the same command again: it formats what is empty and starts what is dead.

The rule it protects: it returns when what it promises is true, or says what is not: a node that
died names its reason from its own log, and one that does not answer is named at the deadline.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol

from aegis_cluster import limits
from aegis_cluster.errors import AegisError, ConfigError, NotReady, Unavailable, WrongCluster
from aegis_cluster.node import processes
from aegis_cluster.node.identity import PLAN_NAME, format_nodes, read_identity
from aegis_cluster.node.log import last_lines, size_of_log
from aegis_cluster.node.node_files import (
    NODES_DIRECTORY,
    LocalNode,
    Wanted,
    ensure_nodes,
    load_nodes,
)
from aegis_cluster.node.run_file import remove_run_file, running_mark, write_run_file
from aegis_cluster.storage.disk import RealDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

UP_SECONDS: Final = 60.0
_PROBE_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 0.05
_LOG_LINES: Final = 8
_SAID_BYTES: Final = 4_096
_KILL_MS: Final = 10_000


class Probe(Protocol):
    """Asks one node for its view of the cluster, in the shape of `aegis cluster status --json`."""

    def __call__(self, endpoint: str, timeout: float, /) -> dict[str, Any]:
        """Raise AegisError when the node does not answer, or not yet."""


@dataclass(slots=True)
class _Started:
    """A node that this process has just started."""

    node: LocalNode
    pid: int
    said: BinaryIO
    """What it wrote to its standard error, where it writes when it has no log; has no name."""
    log_end: int
    """Where its log ended before this start."""

    def exit_code(self) -> int | None:
        """None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def last_words(self) -> list[str]:
        """The end of what it wrote into its log and to its standard error since it was started."""
        self.said.seek(0)
        said = self.said.read(_SAID_BYTES).decode(errors="replace").splitlines()
        logged = last_lines(self.node.config.data, _LOG_LINES, since=self.log_end)
        return logged + said[-_LOG_LINES:]


def node_command(file: Path) -> list[str]:
    """Run the node of this file until it is stopped."""
    return [sys.executable, "-m", "aegis_cluster.cli", "node", "run", "--config", str(file)]


class LocalCluster:
    """The nodes of `directory/nodes`, and what can be done to them.

    tell: gets a sentence about each step, for whoever waits.
    command: the command line that runs a node from its file.
    """

    def __init__(
        self,
        directory: Path,
        *,
        probe: Probe,
        tell: Callable[[str], None],
        command: Callable[[Path], list[str]] = node_command,
    ) -> None:
        self._directory = directory.absolute()
        self._probe = probe
        self._tell = tell
        self._command = command

    def up(self, wanted: Wanted, *, seconds: float = UP_SECONDS) -> list[LocalNode]:
        """Start what does not run; return when every node serves."""
        deadline = time.monotonic() + seconds
        nodes = ensure_nodes(self._directory, wanted)
        with self._alone(nodes):
            plan = self._directory / NODES_DIRECTORY / PLAN_NAME
            format_nodes(RealDisk(), [node.config for node in nodes], str(plan))
            dead = [node for node in nodes if running_mark(node.config.data) is None]
            self._start_and_wait(dead, nodes, deadline)
        return nodes

    def down(self) -> list[LocalNode]:
        """Stop every node; return those that ran.

        No leader hands over: those who could take over end too.
        """
        nodes = load_nodes(self._directory)
        with self._alone(nodes):
            running = [node for node in nodes if running_mark(node.config.data) is not None]
            self._stop(running, hand_over=False)
        return running

    def kill(self, name: str) -> LocalNode:
        """SIGKILL to a node's supervisor and shards in one instant, as a crash would."""
        node = _named(load_nodes(self._directory), name)
        mark = running_mark(node.config.data)
        if mark is None or not processes.kill(mark, _KILL_MS):
            raise NotReady(f"{name} does not run", node=name)
        return node

    def restart(self, name: str, *, seconds: float = UP_SECONDS) -> LocalNode:
        """Stop a node in order if it runs, start it, and return when it serves."""
        deadline = time.monotonic() + seconds
        nodes = load_nodes(self._directory)
        node = _named(nodes, name)
        with self._alone(nodes):
            self._stop([node], hand_over=True)
            self._start_and_wait([node], [node], deadline)
        return node

    @contextlib.contextmanager
    def _alone(self, nodes: list[LocalNode]) -> Iterator[None]:
        """One command at a time starts or stops nodes: it holds the first one's file."""
        try:
            lock = RealDisk().lock(str(nodes[0].file))
        except NotReady as error:
            folder = nodes[0].file.parent
            raise NotReady(f"another command is at work on the nodes in {folder}") from error
        try:
            yield
        finally:
            lock.release()

    # Starting

    def _start_and_wait(
        self, dead: list[LocalNode], nodes: list[LocalNode], deadline: float
    ) -> None:
        """Start the dead ones; return when all of `nodes` serve."""
        with contextlib.ExitStack() as files:
            started = {}
            for node in dead:
                said = files.enter_context(tempfile.TemporaryFile())
                started[node.name] = self._start(node, said)
            self._wait_until_serving(nodes, started, deadline)

    def _start(self, node: LocalNode, said: BinaryIO) -> _Started:
        """A supervisor in a session of its own, which outlives us and our terminal."""
        self._tell(f"starting {node.name}")
        log_end = size_of_log(node.config.data)
        pid = os.posix_spawn(
            sys.executable,
            self._command(node.file),
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, said.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, said.fileno(), 2),
            ],
            setsid=True,
        )
        write_run_file(node.config.data, processes.mark_of(pid, str(node.file)), boot_id="")
        return _Started(node, pid, said, log_end)

    def _wait_until_serving(
        self, nodes: list[LocalNode], started: dict[str, _Started], deadline: float
    ) -> None:
        waiting = list(nodes)
        reason = "nothing was asked yet"
        while waiting:
            if time.monotonic() > deadline:
                raise _too_late(waiting, reason)
            for node in waiting:
                _check_alive(node, started.get(node.name))
            node = waiting[0]
            try:
                self._check_serves(node, nodes)
            except WrongCluster:
                raise
            except AegisError as error:
                reason = str(error)
                time.sleep(_POLL_SECONDS)
            else:
                self._tell(f"{node.name} serves")
                waiting.pop(0)

    def _check_serves(self, node: LocalNode, nodes: list[LocalNode]) -> None:
        """A node serves when it answers, and sees itself and the others as alive.

        Raises `WrongCluster` when somebody else answers in its place.
        """
        view = self._probe(node.config.endpoint, _PROBE_SECONDS)
        own = read_identity(RealDisk(), str(node.config.data))
        if own is not None and view.get("cluster_id", own.cluster_id) != own.cluster_id:
            raise WrongCluster(
                f"Another cluster answers at {node.config.endpoint}, so the ports of {node.name}"
                " are taken. Stop that one, or choose another --base-port (in an empty directory),"
                " or other ports in the node files.",
                endpoint=node.config.endpoint,
            )
        alive = {seen["name"] for seen in view["nodes"] if seen["alive"]}
        missing = [other.name for other in nodes if other.name not in alive]
        if missing:
            raise NotReady(f"{node.name} does not see {', '.join(missing)} yet")

    # Stopping

    def _stop(self, nodes: list[LocalNode], *, hand_over: bool) -> None:
        """Ask all at once to end; SIGKILL to those that have not done so by the deadline."""
        ending = {}
        for node in nodes:
            mark = running_mark(node.config.data)
            process = processes.find(mark) if mark else None
            if mark is not None and process is not None:
                self._tell(f"stopping {node.name}")
                ending[process] = (node.name, mark)
        for process in ending:
            processes.terminate(process, hurry=not hand_over)
        for process in processes.wait_for_end(list(ending), limits.NODE_STOP_MS):
            name, mark = ending[process]
            self._tell(f"{name} does not end by itself; it is killed")
            processes.kill(mark, _KILL_MS)
        for node in nodes:
            remove_run_file(node.config.data)


def _named(nodes: list[LocalNode], name: str) -> LocalNode:
    for node in nodes:
        if node.name == name:
            return node
    known = ", ".join(node.name for node in nodes)
    raise ConfigError(f"there is no node {name} here; nodes: {known}", node=name)


def _check_alive(node: LocalNode, started: _Started | None) -> None:
    """A node that has ended will never serve: say so now, in its own words."""
    if started is None:
        if running_mark(node.config.data) is None:
            raise Unavailable(
                f"{node.name} has ended{_said(last_lines(node.config.data, _LOG_LINES))}"
            )
        return
    code = started.exit_code()
    if code is not None:
        said = _said(started.last_words())
        raise Unavailable(f"{node.name} ended while starting, with code {code}{said}", code=code)


def _too_late(waiting: list[LocalNode], reason: str) -> Unavailable:
    names = ", ".join(node.name for node in waiting)
    said = _said(last_lines(waiting[0].config.data, _LOG_LINES))
    return Unavailable(f"{names} did not serve in time: {reason}{said}", nodes=names)


def _said(lines: list[str]) -> str:
    return "".join([":", *(f"\n  {line}" for line in lines)]) if lines else ""
