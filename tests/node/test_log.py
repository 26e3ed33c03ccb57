"""A node's log: lines arrive, the file stays small, a bad disk costs lines and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegis_cluster.node.log import LOG_NAME, OLD_LOG_NAME, NodeLog, last_lines, size_of_log
from tests.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path


def test_lines_carry_their_time_and_source(tmp_path: Path) -> None:
    log = NodeLog(tmp_path)
    log.write("shard-0", "serving\n")
    log.write("supervisor", "stopping")
    log.close()
    lines = (tmp_path / LOG_NAME).read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["shard-0: serving", "supervisor: stopping"]
    assert all(line.split(" ")[0].endswith("Z") for line in lines)


def test_the_log_goes_on_where_the_last_run_ended(tmp_path: Path) -> None:
    for number in range(2):
        log = NodeLog(tmp_path)
        log.write("supervisor", f"run {number}")
        log.close()
    assert [line.rsplit(" ", 1)[1] for line in last_lines(tmp_path, 10)] == ["0", "1"]


def test_the_files_are_bounded_and_the_newest_lines_stay(tmp_path: Path) -> None:
    log = NodeLog(tmp_path, file_bytes_max=1_000)
    for number in range(100):
        log.write("shard-0", f"line {number}")
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOG_NAME, OLD_LOG_NAME]
    assert all(path.stat().st_size <= 1_000 for path in tmp_path.iterdir())
    assert last_lines(tmp_path, 1)[0].endswith("line 99")


def test_a_disk_that_refuses_costs_lines_which_are_counted(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    log = NodeLog(directory)
    log.write("shard-0", "lost: there is no directory yet")
    wait_until(lambda: log._dropped == 1, "the lost line is counted")
    directory.mkdir()
    log.write("shard-0", "kept")
    log.close()
    lines = last_lines(directory, 2)
    assert lines[0] == "(before this line, 1 were dropped)"
    assert lines[1].endswith("shard-0: kept")


def test_text_that_is_no_text_is_written_all_the_same(tmp_path: Path) -> None:
    log = NodeLog(tmp_path)
    log.write("shard-0", "odd \ud800 text")
    log.close()
    assert last_lines(tmp_path, 1)[0].endswith("odd ? text")


def test_no_log_has_no_lines(tmp_path: Path) -> None:
    assert last_lines(tmp_path, 5) == []
    assert size_of_log(tmp_path) == 0


def test_lines_since_a_position(tmp_path: Path) -> None:
    log = NodeLog(tmp_path)
    log.write("shard-0", "before")
    log.close()
    position = size_of_log(tmp_path)
    log = NodeLog(tmp_path)
    log.write("shard-0", "after")
    log.close()
    (line,) = last_lines(tmp_path, 5, since=position)
    assert line.endswith("after")
    assert len(last_lines(tmp_path, 5, since=10**9)) == 2
