"""Real nodes at an address that is not 127.0.0.0/8, in a network namespace of their own without any
interface but its loopback: nothing can leave the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aegis_cluster.keys import new_pair, write_new_pair, write_public

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "10.213.7.1"

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(200)]

SETUP = f"""
set -e
ip link set lo up
ip addr add {ADDRESS}/32 dev lo
"""

NODE = f"""
[node]
name = "node-1"
host = "{ADDRESS}"
base_port = 7100
data = "../data/node-1"
peers = ["{ADDRESS}:7100"]
"""

KEYS = """
[node.security]
key = "../keys/node-1.key"
peers = "../keys/peers"
clients = "../keys/clients"
"""

INSECURE = "insecure = true\n"


def in_namespace(directory: Path, script: str) -> tuple[int, str]:
    """Run a shell script where only loopback and our address are; its exit code and output."""
    aegis = f"{sys.executable} -m aegis_cluster.cli"
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", f'{SETUP}aegis() {{ {aegis} "$@"; }}\n{script}'],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def namespaces(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        code, said = in_namespace(tmp_path_factory.mktemp("probe"), "true")
    except OSError as error:
        pytest.skip(f"network namespaces are not at hand: {error}")
    if code:
        pytest.skip(f"network namespaces are not at hand: {said}")


def directory(tmp_path: Path, node: str) -> Path:
    """A directory with one node, its keys, and a client's."""
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "node-1.toml").write_text(node)
    keys = tmp_path / "keys"
    for accepted in ("peers", "clients"):
        (keys / accepted).mkdir(parents=True)
    for name, accepted in (("node-1", "peers"), ("alice", "clients")):
        pair = new_pair(name)
        write_new_pair(pair, keys)
        write_public(pair, keys / accepted / f"{name}.pub")
    write_new_pair(new_pair("eve"), keys)
    return tmp_path


@pytest.mark.usefixtures("namespaces")
def test_a_node_without_keys_does_not_listen_beyond_this_machine(tmp_path: Path) -> None:
    code, said = in_namespace(directory(tmp_path, NODE), "aegis cluster up")
    assert code == 2, said
    assert f'`node.host` is "{ADDRESS}"' in said
    assert "insecure = true" in said
    assert "Traceback" not in said


@pytest.mark.usefixtures("namespaces")
def test_a_node_with_keys_takes_the_clients_it_knows(tmp_path: Path) -> None:
    script = f"""
    trap 'aegis cluster down' EXIT
    export AEGIS_STREAMING__SECURITY__KEY=$PWD/keys/alice.key
    export AEGIS_STREAMING__SECURITY__SERVERS=$PWD/keys/peers
    aegis cluster up
    aegis topic create orders
    printf 'a\\nb\\n' | aegis publish orders
    aegis consume orders --from earliest --to-end --format json >consumed
    grep -c ':1BB[DEF] 00000000:0000 0A' /proc/net/tcp >listening
    if aegis topic list --client-key keys/eve.key --timeout 30s >eve 2>&1; then exit 9; fi
    unset AEGIS_STREAMING__SECURITY__KEY AEGIS_STREAMING__SECURITY__SERVERS
    address=tcp://{ADDRESS}:7101
    if aegis topic list --bootstrap $address --timeout 5s >nobody 2>&1; then exit 9; fi
    export AEGIS_STREAMING__SECURITY__INSECURE=true
    if aegis topic list --bootstrap $address --timeout 10s >insecure 2>&1; then exit 9; fi
    """
    place = directory(tmp_path, NODE + KEYS)
    code, said = in_namespace(place, script)
    assert code == 0, said

    def told(name: str) -> str:
        return (place / name).read_text()

    lines = [json.loads(line)["payload"] for line in told("consumed").splitlines()]
    assert lines == ["a", "b"]
    assert told("listening").strip() == "3", "control, data and peers"
    assert "does not accept this client's key" in told("eve")
    assert "(eve)" in told("eve")
    assert "is not on this machine, and this client has no keys" in told("nobody")
    assert "does not take links without keys" in told("insecure")


@pytest.mark.usefixtures("namespaces")
def test_a_node_that_was_told_to_be_insecure(tmp_path: Path) -> None:
    script = """
    trap 'aegis cluster down' EXIT
    aegis cluster up
    aegis topic create orders
    aegis topic list
    """
    code, said = in_namespace(directory(tmp_path, NODE + INSECURE), script)
    assert code == 0, said
    assert "orders" in said
