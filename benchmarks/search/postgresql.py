"""A PostgreSQL server of one's own: on loopback, at a free port, in a temporary folder, gone afterwards."""

from __future__ import annotations

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

_USER = "normsearch"
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


@contextmanager
def cluster() -> Iterator[str]:
    """Start a server and give the URL of its database; stop it and remove everything in the end."""
    folder = Path(tempfile.mkdtemp(prefix="normsearch-postgresql-"))
    user = "postgres" if os.geteuid() == 0 else None
    password, port = secrets.token_hex(16), _free_port()
    try:
        (folder / "password").write_text(password)
        if user is not None:
            for path in (folder, folder / "password"):
                shutil.chown(path, user)
        data, log = folder / "data", folder / "log"
        make = [_binary("initdb"), "-D", str(data), "-U", _USER, "--auth=scram-sha-256", "--no-sync"]
        make += [f"--pwfile={folder / 'password'}", "--encoding=UTF8", "--locale=C"]
        subprocess.run(make, user=user, check=True, capture_output=True, cwd=folder)
        with log.open("w") as output:
            serve = [
                _binary("postgres"),
                "-D",
                str(data),
                "-h",
                "127.0.0.1",
                "-p",
                str(port),
                "-k",
                str(folder),
            ]
            server = subprocess.Popen(serve, user=user, stdout=output, stderr=output, cwd=folder)
        try:
            _wait(port, server, log)
            yield f"postgresql://{_USER}:{password}@127.0.0.1:{port}/postgres"
        finally:
            # The fast shutdown: it closes connections that are still open.
            server.send_signal(signal.SIGINT)
            server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    ask = [_binary("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    end = time.monotonic() + 30
    while subprocess.run(ask).returncode != 0:
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()}")
        time.sleep(0.05)
