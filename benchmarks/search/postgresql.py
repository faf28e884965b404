"""A PostgreSQL server of one's own: on loopback, at a free port, in a temporary folder, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

_OWNER = "normsearch"
_PROGRAMS = ("initdb", "postgres", "pg_isready")


def missing() -> str | None:
    """Return what a server cannot be started without, or None if all is there."""
    if _binaries() is None:
        return "PostgreSQL's server is not installed (apt-get install postgresql)"
    if find_spec("psycopg") is None and find_spec("psycopg2") is None:
        return 'PostgreSQL\'s driver is not installed (pip install "normsearch[postgresql]")'
    if os.geteuid() == 0 and "postgres" not in {entry.pw_name for entry in pwd.getpwall()}:
        return "PostgreSQL does not run as root, and there is no user postgres"
    return None


def version() -> str:
    """Return the server's version."""
    return subprocess.run([_binary("postgres"), "--version"], capture_output=True, text=True).stdout.strip()


class Server:
    """A server that is running; ``url`` is that of its database."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, _free_port()
        self._user = "postgres" if os.geteuid() == 0 else None
        password = secrets.token_hex(16)
        self.url = f"postgresql://{_OWNER}:{password}@127.0.0.1:{self._port}/postgres"
        (folder / "password").write_text(password)
        if self._user is not None:
            for path in (folder, folder / "password"):
                shutil.chown(path, self._user)
        make = [
            _binary("initdb"),
            "-D",
            str(folder / "data"),
            "-U",
            _OWNER,
            "--auth=scram-sha-256",
            "--no-sync",
        ]
        make += [f"--pwfile={folder / 'password'}", "--encoding=UTF8", "--locale=C"]
        subprocess.run(make, user=self._user, check=True, capture_output=True, cwd=folder)
        self._process = self._start()

    def restart(self) -> None:
        """Break every connection and come back, as after a crash of the server."""
        self.stop()
        self._process = self._start()

    def stop(self) -> None:
        """Stop it at once: what is committed is in its log."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(30)

    def kill(self) -> None:
        """Kill it with every process of it, as a machine that fails does."""
        for pid in [*_children(self._process.pid), self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(30)

    def start(self) -> None:
        """Start it again."""
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        data, log = self._folder / "data", self._folder / "log"
        serve = [_binary("postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(self._port)]
        with log.open("a") as output:
            process = subprocess.Popen(
                [*serve, "-k", str(self._folder)],
                user=self._user,
                stdout=output,
                stderr=output,
                cwd=self._folder,
            )
        ask = [_binary("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self._port)]
        end = time.monotonic() + 30
        while subprocess.run(ask).returncode != 0:
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()}")
            time.sleep(0.05)
        return process


@contextmanager
def cluster() -> Iterator[Server]:
    """Start a server; stop it and remove everything in the end."""
    folder = Path(tempfile.mkdtemp(prefix="normsearch-postgresql-"))
    try:
        server = Server(folder)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _children(pid: int) -> list[int]:
    """Return a process's children (Linux)."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _binaries() -> Path | None:
    """Return the folder of the newest server: where Debian has it, or on the path."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    found = [*(Path(folder) for folder in os.get_exec_path()), *debian]
    complete = [path for path in found if all((path / name).exists() for name in _PROGRAMS)]
    return complete[-1] if complete else None


def _binary(name: str) -> str:
    folder = _binaries()
    assert folder is not None, missing()
    return str(folder / name)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
