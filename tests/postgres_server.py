"""A PostgreSQL server of a test's own: made in a folder, reached over loopback, run as an unprivileged user."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PASSWORD = "a password of the tests"


@dataclass(frozen=True)
class PostgresServer:
    """A running server with the superuser `seal`, who has PASSWORD."""

    folder: Path
    binaries: Path
    port: int
    user: str | None

    def url(self, database: str, user: str = "seal") -> str:
        """The URL of a database."""
        return f"postgresql+psycopg://{user}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> str:
        """Make an empty database and return its URL."""
        import psycopg

        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"')
        return self.url(database)

    def dsn(self, database: str) -> str:
        """The connection string of the superuser."""
        return f"host=127.0.0.1 port={self.port} user=seal password='{PASSWORD}' dbname={database}"

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        words = ["-w", "-t", "60", "-l", str(self.folder / "log"), "-o", f"-p {self.port}", "start"]
        self._control(*words)

    def stop(self) -> None:
        """End it, its connections too."""
        self._control("-w", "-t", "60", "-m", "fast", "stop")

    def _control(self, *words: str) -> None:
        as_user([str(self.binaries / "pg_ctl"), "-D", str(self.folder / "data"), *words], self.user)


def find_binaries() -> Path | None:
    """The folder of initdb, postgres and pg_ctl: on the PATH or where Debian puts them."""
    found = shutil.which("pg_ctl")
    candidates = [Path(found).resolve().parent] if found else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in candidates:
        if all((folder / name).exists() for name in ("initdb", "postgres", "pg_ctl")):
            return folder
    return None


def as_user(command: list[str], user: str | None) -> None:
    """Run a command as an unprivileged user (None: as ourselves), with nothing of our environment but the path."""
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        user=user,
        group=None if user is None else pwd.getpwnam(user).pw_gid,
        extra_groups=None if user is None else [],
        cwd="/",
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: {done.stdout[-500:]} {done.stderr[-1500:]}")


@contextmanager
def running_postgres(binaries: Path) -> Iterator[PostgresServer]:
    """A server in a folder of its own, ended and removed with the block. It does not run as root: `nobody` does."""
    user = "nobody" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="seal-postgres-"))  # pytest's own folders are closed to other users
    secret = folder / "password"
    secret.write_text(PASSWORD)
    if user is not None:
        for path in (folder, secret):
            shutil.chown(path, user)
    initdb = [str(binaries / "initdb"), "-D", str(folder / "data"), "-U", "seal", "-A", "scram-sha-256"]
    as_user([*initdb, "--pwfile", str(secret), "-E", "UTF8", "--no-sync"], user)
    with (folder / "data/postgresql.conf").open("a") as settings:
        settings.write("listen_addresses = '127.0.0.1'\nunix_socket_directories = ''\nmax_connections = 80\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server = PostgresServer(folder, binaries, port, user)
    server.start()
    try:
        yield server
    finally:
        with suppress(RuntimeError, subprocess.TimeoutExpired):
            server.stop()
        _end(folder / "data/postmaster.pid")
        shutil.rmtree(folder, ignore_errors=True)


def _end(pid_file: Path) -> None:
    """End a server that did not end in time."""
    try:
        number = int(pid_file.read_text().splitlines()[0])
    except (OSError, ValueError, IndexError):
        return
    with suppress(ProcessLookupError):
        os.kill(number, signal.SIGQUIT)
        time.sleep(1)
