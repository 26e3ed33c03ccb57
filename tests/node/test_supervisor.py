"""The supervisor with real processes that only pretend to be shards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from aegis_cluster.node.log import LOG_NAME
from aegis_cluster.node.processes import terminate
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(60)]


@contextmanager
def supervisor(directory: Path, *modes: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.node.fake_supervisor", str(directory), *modes]
    process = subprocess.Popen(command, start_new_session=True, cwd=ROOT)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def log_of(directory: Path) -> str:
    file = directory / LOG_NAME
    return file.read_text() if file.exists() else ""


def shard_pids(directory: Path, mode: str) -> list[int]:
    """The processes that said their line, in that order."""
    return [int(pid) for pid in re.findall(rf"shard-\d: {mode} (\d+)", log_of(directory))]


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_shards(directory: Path, mode: str, count: int) -> list[int]:
    wait_until(
        lambda: len(shard_pids(directory, mode)) >= count, f"{count} shards in {directory}", 20
    )
    return shard_pids(directory, mode)


def test_sigterm_ends_everything_in_order(tmp_path: Path) -> None:
    with supervisor(tmp_path, "calm") as process:
        pids = wait_for_shards(tmp_path, "calm", 2)
        process.terminate()
        assert process.wait(20) == 0
    assert not any(runs(pid) for pid in pids)
    assert sorted(re.findall(r"asked (\d)", log_of(tmp_path))) == ["0", "1"]


def test_a_ctrl_c_for_the_whole_group_is_answered_by_the_supervisor_alone(tmp_path: Path) -> None:
    with supervisor(tmp_path, "calm") as process:
        wait_for_shards(tmp_path, "calm", 2)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) == 0
    assert "leaders hand over first" in log_of(tmp_path)
    assert "starts again" not in log_of(tmp_path)


def test_asked_twice_it_does_not_wait_for_leaders(tmp_path: Path) -> None:
    with supervisor(tmp_path, "calm", "never-aside") as process:
        wait_for_shards(tmp_path, "calm", 2)
        started = time.monotonic()
        terminate(psutil.Process(process.pid), hurry=True)
        assert process.wait(20) == 0
    assert time.monotonic() - started < 2.0
    assert sorted(re.findall(r"asked (\d)", log_of(tmp_path))) == ["0", "1"]


def test_a_killed_shard_comes_back(tmp_path: Path) -> None:
    with supervisor(tmp_path, "calm"):
        first = wait_for_shards(tmp_path, "calm", 2)
        os.kill(first[0], signal.SIGKILL)
        after = wait_for_shards(tmp_path, "calm", 3)
        assert runs(after[2])
        assert runs(first[1])
    assert "was ended by signal 9" in log_of(tmp_path)


def test_a_supervisor_that_is_killed_leaves_no_orphans(tmp_path: Path) -> None:
    with supervisor(tmp_path, "calm") as process:
        pids = wait_for_shards(tmp_path, "calm", 2)
        process.kill()
        process.wait()
        wait_until(lambda: not any(runs(pid) for pid in pids), "the shards end with it")


def test_wrong_settings_end_the_node_and_stand_in_the_log(tmp_path: Path) -> None:
    with supervisor(tmp_path, "3") as process:
        assert process.wait(20) == 3
    log = log_of(tmp_path)
    assert log.count("a port is taken") >= 1
    assert log.index("shard-") < log.index("a port is taken")


def test_a_shard_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    with supervisor(tmp_path, "stubborn") as process:
        pids = wait_for_shards(tmp_path, "stubborn", 2)
        process.terminate()
        assert process.wait(20) == 0
    assert not any(runs(pid) for pid in pids)
    assert "it is killed" in log_of(tmp_path)
