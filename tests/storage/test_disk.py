"""One contract for the real disk and the simulated one; then what only the simulated one does."""

from __future__ import annotations

import errno
import os
import random
from typing import TYPE_CHECKING

import pytest

from aegis_cluster.errors import NotReady
from aegis_cluster.storage.disk import RealDisk, remove_tree
from aegis_cluster.testing.disk import SimulatedCrash, SimulatedDisk

if TYPE_CHECKING:
    from pathlib import Path

    from aegis_cluster.storage.disk import Disk


@pytest.fixture(params=["real", "simulated"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Disk, str]:
    """A disk and a directory on it."""
    if request.param == "real":
        return RealDisk(), str(tmp_path)
    disk = SimulatedDisk()
    disk.make_dir("/d")
    return disk, "/d"


def test_what_is_written_is_read(place: tuple[Disk, str]) -> None:
    disk, root = place
    file = disk.open(f"{root}/f", create=True)
    file.pwritev([b"ab", bytearray(b"cd"), memoryview(b"ef")], 3)
    assert file.pread(100, 0) == b"\0\0\0abcdef"
    assert file.pread(2, 4) == b"bc"
    assert file.pread(2, 50) == b""
    assert file.size() == 9


def test_many_buffers_are_one_run(place: tuple[Disk, str]) -> None:
    disk, root = place
    parts = [bytes([number % 256]) for number in range(3_000)]
    file = disk.open(f"{root}/f", create=True)
    file.pwritev(parts, 0)
    assert file.pread(5_000, 0) == b"".join(parts)


def test_forgetting_changes_nothing(place: tuple[Disk, str]) -> None:
    """Neither what is on disk already nor what is not."""
    disk, root = place
    file = disk.open(f"{root}/f", create=True)
    file.pwrite(b"a" * 10_000, 0)
    file.fdatasync()
    file.pwrite(b"b" * 10_000, 10_000)
    file.forget(0, 20_000)
    file.forget(4_096, 50_000)
    assert file.pread(30_000, 0) == b"a" * 10_000 + b"b" * 10_000
    assert file.size() == 20_000


def test_truncate_and_allocate(place: tuple[Disk, str]) -> None:
    disk, root = place
    file = disk.open(f"{root}/f", create=True)
    file.pwrite(b"abcdef", 0)
    file.truncate(2)
    file.allocate(5)
    file.allocate(3)
    file.fdatasync()
    assert file.pread(10, 0) == b"ab\0\0\0"


def test_names(place: tuple[Disk, str]) -> None:
    disk, root = place
    disk.make_dir(f"{root}/a")
    disk.make_dir(f"{root}/a")
    disk.open(f"{root}/a/one", create=True)
    disk.open(f"{root}/a/two", create=True).pwrite(b"2", 0)
    disk.rename(f"{root}/a/two", f"{root}/a/one")
    assert disk.list_dir(f"{root}/a") == ["one"]
    assert disk.open(f"{root}/a/one").pread(9, 0) == b"2"
    disk.rename(f"{root}/a", f"{root}/b")
    disk.sync_dir(root)
    assert disk.exists(f"{root}/b/one")
    assert not disk.exists(f"{root}/a")
    remove_tree(disk, f"{root}/b")
    assert disk.list_dir(root) == []


def test_what_is_missing_is_said(place: tuple[Disk, str]) -> None:
    disk, root = place
    for call in (disk.open, disk.list_dir, disk.remove, disk.sync_dir):
        with pytest.raises(FileNotFoundError):
            call(f"{root}/missing")
    disk.open(f"{root}/f", create=True)
    with pytest.raises(NotADirectoryError):
        disk.list_dir(f"{root}/f")
    disk.make_dir(f"{root}/d")
    disk.open(f"{root}/d/f", create=True)
    with pytest.raises(OSError, match="not empty"):
        disk.remove_dir(f"{root}/d")


def test_a_removed_file_is_read_by_who_holds_it(place: tuple[Disk, str]) -> None:
    disk, root = place
    file = disk.open(f"{root}/f", create=True)
    file.pwrite(b"abc", 0)
    disk.remove(f"{root}/f")
    assert file.pread(3, 0) == b"abc"
    file.close()
    file.close()
    with pytest.raises(OSError, match=r"Bad file descriptor|closed"):
        file.pread(3, 0)


def test_a_lock_has_one_holder(place: tuple[Disk, str]) -> None:
    disk, root = place
    lock = disk.lock(f"{root}/lock")
    with pytest.raises(NotReady):
        disk.lock(f"{root}/lock")
    lock.release()
    lock.release()
    disk.lock(f"{root}/lock").release()
    assert disk.free_bytes(root) > 0


# What only the simulated disk does


def simulated() -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.make_dir("/d")
    disk.sync_dir("/")
    return disk


def test_a_crash_keeps_what_was_synced_and_any_part_of_the_rest() -> None:
    seen = set()
    for seed in range(60):
        disk = simulated()
        file = disk.open("/d/f", create=True)
        disk.sync_dir("/d")
        file.pwrite(b"a" * 512, 0)
        file.fdatasync()
        file.pwrite(b"b" * 512, 512)
        file.pwrite(b"c" * 512, 1024)
        disk.crash(random.Random(seed))
        data = disk.files()["/d/f"]
        assert data[:512] == b"a" * 512
        seen.add((data[512:513], data[1024:1025]))
    assert seen >= {(b"", b""), (b"b", b""), (b"b", b"c"), (b"\0", b"c")}


def test_a_write_is_torn_at_sectors() -> None:
    seen = set()
    for seed in range(60):
        disk = simulated()
        file = disk.open("/d/f", create=True)
        file.allocate(1024)
        file.fdatasync()
        disk.sync_dir("/d")
        file.pwrite(b"x" * 600, 100)
        disk.crash(random.Random(seed))
        data = disk.files()["/d/f"]
        seen.add((data[100:101], data[600:601]))
    assert seen == {(b"x", b"x"), (b"x", b"\0"), (b"\0", b"x"), (b"\0", b"\0")}


def test_a_name_needs_its_directory_synced() -> None:
    kept = 0
    for seed in range(40):
        disk = simulated()
        disk.open("/d/f", create=True).fdatasync()
        disk.crash(random.Random(seed))
        kept += disk.exists("/d/f")
    assert 0 < kept < 40


def test_a_rename_is_whole_or_not_at_all() -> None:
    for seed in range(40):
        disk = simulated()
        disk.open("/d/old", create=True)
        disk.sync_dir("/d")
        disk.rename("/d/old", "/d/new")
        disk.crash(random.Random(seed))
        assert len(disk.list_dir("/d")) == 1


def test_a_restart_loses_nothing_and_closes_handles() -> None:
    disk = simulated()
    file = disk.open("/d/f", create=True)
    file.pwrite(b"abc", 0)
    disk.lock("/d/lock")
    disk.restart()
    assert disk.files()["/d/f"] == b"abc"
    disk.lock("/d/lock")
    with pytest.raises(OSError, match="closed"):
        file.pread(1, 0)


def test_a_failed_sync_loses_pages_that_stay_readable() -> None:
    disk = simulated()
    file = disk.open("/d/f", create=True)
    disk.sync_dir("/d")
    file.pwrite(b"abc", 0)
    disk.fail_next("sync", "/f")
    with pytest.raises(OSError, match="Input/output"):
        file.fdatasync()
    file.fdatasync()
    assert file.pread(3, 0) == b"abc"
    disk.crash(random.Random(0))
    assert disk.files()["/d/f"] == b""


def test_a_full_disk() -> None:
    disk = simulated()
    disk.capacity = 10
    file = disk.open("/d/f", create=True)
    file.pwrite(b"12345678", 0)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        file.pwrite(b"abcd", 8)
    assert disk.free_bytes("/d") < 10
    file.pwrite(b"over", 0)


def test_bit_rot_and_a_planted_crash() -> None:
    disk = simulated()
    disk.open("/d/f", create=True).pwrite(b"\0\0", 0)
    disk.flip_bit("/d/f", 1, 3)
    assert disk.files()["/d/f"] == b"\0\x08"

    def stop(operation: str, path: str) -> None:
        raise SimulatedCrash

    disk.before = stop
    with pytest.raises(SimulatedCrash):
        disk.open("/d/f")
