"""What a process is given is its own until it ends, whoever else asks at the same moment."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import ExitStack

from aegis_cluster.node.free_ports import BLOCKS, can_bind, free_base_port

ASK = """
from aegis_cluster.node.free_ports import free_base_port
input()
print(free_base_port(), flush=True)
input()
"""


def test_processes_that_ask_at_once_are_given_ports_of_their_own() -> None:
    with ExitStack() as stack:
        asking = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", ASK],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(4)
        ]
        for process in asking:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        given = {int(process.stdout.readline()) for process in asking if process.stdout}
        assert len(given) == len(asking)
        assert given <= set(BLOCKS)
        assert free_base_port() not in given
        assert not any(map(can_bind, given)), "held while nothing listens in them"
        for process in asking:
            process.kill()
    assert all(map(can_bind, given)), "and let go, however their holder ends"


def test_a_block_in_which_something_listens_is_passed_over() -> None:
    first = free_base_port(nodes=2, shards=2)
    with socket.create_server(("127.0.0.1", first + 213)):
        assert free_base_port(nodes=2, shards=2) != first
        assert free_base_port(nodes=1) == first
    assert free_base_port(nodes=2, shards=2) == first
