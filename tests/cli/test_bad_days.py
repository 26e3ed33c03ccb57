"""Bad input and bad days at the command line: a sentence, an exit code, and never a traceback."""

from __future__ import annotations

import gzip
import os
import random
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from aegis_cluster.node.free_ports import free_base_port
from aegis_cluster.node.node_files import Wanted, write_nodes
from tests.cli.test_real_cluster import ENVIRONMENT, Directory
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(180)]

CSV = "a,b\n1,2\n3,4\n"


@pytest.fixture(scope="module")
def directory(module_path: Path) -> Iterator[Directory]:
    """One node, with a topic `t`."""
    found = Directory(module_path, free_base_port())
    found.run("cluster", "up", "--nodes", "1", "--base-port", f"{found.base_port}")
    found.run("topic", "create", "t")
    yield found
    found.run("cluster", "down")


def said(directory: Directory, *arguments: str, code: int = 1, **options: Any) -> str:
    """What a command that fails says; it takes one line or two, and shows nothing of the inside."""
    with directory.start(*arguments, **{"stdin": subprocess.DEVNULL, **options}) as process:
        out, error = process.communicate(timeout=60)
    text = error.decode()
    assert process.returncode == code, (arguments, out, text)
    assert "Traceback" not in text
    assert "internal error" not in text
    assert text.strip()
    return text


# ---- files that are not what they are called

BAD_FILES = {
    "utf16.csv": (CSV.encode("utf-16"), "not UTF-8"),
    "binary.csv": (random.Random(1).randbytes(3_000), "not UTF-8"),
    "zeros.jsonl": (bytes(3_000), "line 1"),
    "cut.csv.gz": (gzip.compress(CSV.encode() * 999)[:60], "damaged or cut"),
    "no-gzip.csv.gz": (b"\x1f\x8bnonsense" * 9, "damaged or cut"),
    "wide.csv": (b"a,b\n1,2,3\n", "line 2"),
    "open.csv": (b'a,b\n1,"2\n', "line 2"),
    "broken.jsonl": (b'{"a": 1}\n{"a": \n', "line 2"),
    "large.txt": (b"x" * 2_000_000, "over the limit"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_does_not_read_is_named_with_its_line(directory: Directory, name: str) -> None:
    content, expected = BAD_FILES[name]
    (directory.path / name).write_bytes(content)
    text = said(directory, "publish", "t", "--file", name)
    assert expected in text
    assert "published" in text, "and what became of the lines before"


def test_things_that_are_no_files(directory: Directory) -> None:
    (directory.path / "folder.csv").mkdir()
    assert "directory" in said(directory, "publish", "t", "--file", "folder.csv")
    assert "No such file" in said(directory, "publish", "t", "--file", "none.csv")
    assert "published 0 records" in directory.run("publish", "t", "--file", os.devnull)


def test_a_fifo_is_read_until_its_writers_are_gone(directory: Directory) -> None:
    fifo = directory.path / "fifo.csv"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_text(CSV))
    writer.start()
    assert "published 2 records" in directory.run("publish", "t", "--file", "fifo.csv")
    writer.join(5)


# ---- words


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["consume", "none", "--count", "1"], 1, "no topic 'none'"),
        (["topic", "describe", "none"], 1, "none"),
        (["topic", "create", "t"], 1, "exists already"),
        (["topic", "create", "bad/name"], 1, "no name for a topic"),
        (["topic", "create", "q", "--retention", "5"], 2, "retention"),
        (["topic", "create", "q", "--partitions", "99999999"], 1, "partitions"),
        (["topic", "create", "q", "--replication-factor", "5"], 1, "node"),
        (["consume", "t", "--from", "banana"], 2, "banana"),
        (["cluster", "status", "--bootstrap", "nonsense"], 2, "nonsense"),
        (["cluster", "kill", "node-9"], 2, "node-9"),
    ],
)
def test_wrong_words(directory: Directory, arguments: list[str], code: int, expected: str) -> None:
    assert expected in said(directory, *arguments, code=code)


def test_an_unknown_setting_is_named_wherever_it_stands(directory: Directory) -> None:
    file = directory.path / "aegis.toml"
    file.write_text("[streaming]\nmax_mesage_size = 1\n")
    try:
        assert "max_message_size" in said(directory, "topic", "list", code=2)
    finally:
        file.unlink()
    environment = {**ENVIRONMENT, "AEGIS_STREAMING__CONSUMER__MAX_POLL": "4"}
    process = subprocess.run(
        [sys.executable, "-m", "aegis_cluster.cli", "topic", "list"],
        cwd=directory.path,
        env=environment,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 2
    assert b"MAX_POLL" in process.stderr
    assert b"Traceback" not in process.stderr


# ---- permissions: we may be root, so what is refused is refused to everybody


def test_a_file_where_the_data_should_lie(tmp_path: Path) -> None:
    found = Directory(tmp_path, free_base_port())
    (tmp_path / "data").write_text("in the way")
    text = said(found, "cluster", "up", "--nodes", "1", "--base-port", f"{found.base_port}")
    assert "data" in text


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[node]\nnme = 1\n", b"[node\n", b""])
def test_a_node_file_that_does_not_read(tmp_path: Path, content: bytes) -> None:
    found = Directory(tmp_path, free_base_port())
    write_nodes(tmp_path, Wanted(1, 1, found.base_port))
    (file,) = (node.file for node in found.nodes())
    file.write_bytes(content)
    for arguments in (["cluster", "up"], ["node", "run", "--config", str(file)]):
        with found.start(*arguments, stdin=subprocess.DEVNULL) as process:
            _, error = process.communicate(timeout=60)
        assert process.returncode in (1, 2, 3), error
        assert file.name.encode() in error, error
        assert b"Traceback" not in error


def test_a_node_file_that_is_a_directory(tmp_path: Path) -> None:
    found = Directory(tmp_path, free_base_port())
    (tmp_path / "nodes" / "node-1.toml").mkdir(parents=True)
    for arguments in (["cluster", "up"], ["node", "run", "--config", "nodes/node-1.toml"]):
        with found.start(*arguments, stdin=subprocess.DEVNULL) as process:
            _, error = process.communicate(timeout=60)
        assert process.returncode in (1, 2, 3), error
        assert b"node-1.toml" in error, error
        assert b"Traceback" not in error


# ---- Ctrl-C at any time


def interrupted(directory: Directory, arguments: list[str], after: float, **options: Any) -> str:
    """Send SIGINT so long after the interpreter has begun to load us; how it ends."""
    process = directory.start(*arguments, **options)
    try:
        ours = psutil.Process(process.pid)
        wait_until(lambda: _has_begun(ours), "the interpreter runs our code", seconds=30)
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    text = error.decode()
    assert "Traceback" not in text, text
    assert "Exception ignored" not in text, text
    assert process.returncode in (0, 1, 130, -signal.SIGINT), (process.returncode, out, text)
    return text


def _has_begun(process: psutil.Process) -> bool:
    """A handler of ours or the default stands for SIGINT: Python's own is no longer there, or the
    program is at work. Before that, Python's start-up is interrupted, and says so in its way."""
    with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
        fields = dict(line.split(":\t", 1) for line in file if ":\t" in line)
    return len(process.memory_maps()) > 0 and int(fields["VmRSS"].split()[0]) > 14_000


@pytest.mark.parametrize("seed", range(3))
def test_ctrl_c_while_publishing_and_reading(directory: Directory, seed: int) -> None:
    rng = random.Random(seed)
    (directory.path / "rows.csv").write_text("a\n" + "x\n" * 300_000)
    for arguments in (
        ["publish", "t", "--file", "rows.csv"],
        ["publish", "t"],  # waits for standard input
        ["consume", "t", "--from", "earliest"],
        ["consume", "t"],
    ):
        interrupted(directory, arguments, rng.uniform(0, 1.5), stdin=subprocess.PIPE)


def test_ctrl_c_while_starting_and_stopping(tmp_path: Path) -> None:
    """Whatever is half done, the next `up` and `down` finish it, and nothing is left running."""
    found = Directory(tmp_path, free_base_port())
    rng = random.Random(1)
    up = ["cluster", "up", "--nodes", "2", "--base-port", f"{found.base_port}"]
    try:
        for _ in range(3):
            interrupted(found, up, rng.uniform(0, 2), stdin=subprocess.DEVNULL)
            interrupted(found, ["cluster", "down"], rng.uniform(0, 0.5), stdin=subprocess.DEVNULL)
        found.run(*up)
        assert len(found.alive()) == 2
    finally:
        found.run("cluster", "down")
    wait_until(lambda: not _left(found), "nothing runs any more", seconds=20)


def _left(directory: Directory) -> list[int]:
    path = str(directory.path)
    return [
        process.info["pid"]
        for process in psutil.process_iter(["pid", "cmdline"])
        if any(path in word for word in process.info["cmdline"] or ())
    ]
