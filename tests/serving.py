"""The service, started for a test: in this process, or as users start it."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from starlette.testclient import TestClient

from api import keys
from api.database import sqlite_url
from api.forking import EndingError, Forker
from api.main import create_app
from api.messages import Order
from api.migrating import open_database
from api.settings import Settings

ROOT = Path(__file__).parent.parent


def settings(folder: Path, **others: Any) -> Settings:
    given: dict[str, Any] = {"data": folder / "data", "reserve_bytes": 0, "children": 1, **others}
    return Settings(**given)


@cache
def _made() -> Path:
    """A database that is up to date and empty: to make one takes a process and a second."""
    folder = Path(tempfile.mkdtemp(prefix="normsearch-tests-"))
    atexit.register(shutil.rmtree, folder)
    open_database(sqlite_url(folder)).close()
    return folder / "normsearch.sqlite"


def with_database(folder: Path) -> Path:
    """Return a folder, with a database that is up to date unless it has one."""
    place = folder / "normsearch.sqlite"
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_made(), place)
    return folder


class Borrowed(Forker):
    """Has one process fork the children of every application here: it takes seconds to import everything."""

    def send(self, order: Order, files: list[Path]) -> tuple[socket.socket, int]:
        if self.closed.is_set():
            raise EndingError
        return _lender(self._tasks).send(order, files)


@cache
def _lender(tasks: str) -> Forker:
    # No data are where children may read, in the folders of modules: nothing needs to be hidden there.
    made = Forker(tasks, Path(tempfile.gettempdir()))
    atexit.register(made.close)
    return made


@contextmanager
def served(folder: Path, client: str = "127.0.0.1", **others: Any) -> Iterator[TestClient]:
    """The application in this process, asked from loopback."""
    if "database_url" not in others:
        with_database(folder / "data")
    app = create_app(settings(folder, **others))
    with (
        patch("api.sandbox.Forker", Borrowed),
        TestClient(
            app, base_url="http://127.0.0.1", client=(client, 50_000), raise_server_exceptions=False
        ) as asking,
    ):
        yield asking


def bearer(client: TestClient, name: str = "a", quota_bytes: int | None = None) -> dict[str, str]:
    """The header of a new key."""
    _, secret = keys.create(client.app.state.parts.database, name, quota_bytes)  # type: ignore[attr-defined]
    return {"Authorization": f"Bearer {secret}"}


@contextmanager
def running(
    folder: Path,
    grace: float | None = None,
    tasks: str | None = None,
    port: int = 0,
    *,
    cold: bool = False,
    **environment: str,
) -> Iterator[int]:
    """The service as a process of its own, open on a free port, which is returned.

    A cold one starts nothing beside it, which would import everything for seconds; no job ever runs there.
    """
    if "NORMSEARCH_DATABASE_URL" not in environment:
        with_database(folder / "data")
    code = "import api.observing, api.receiving, api.server, api.__main__ as main\n"
    if grace is not None:
        code += f"api.receiving._GRACE = api.observing._BODY_SECONDS = api.server.HEAD = {grace}\n"
    if cold:
        code += "create = main.create_app\nmain.create_app = lambda settings, warm: create(settings)\n"
        environment = {"NORMSEARCH_WORKERS": "0", **environment}
    code += f"main.app(['serve', '--port', '{port}'])"
    given = {
        **os.environ,
        "NORMSEARCH_DATA": str(folder / "data"),
        "NORMSEARCH_OPEN": "1",
        "NORMSEARCH_RESERVE_BYTES": "0",
        "NORMSEARCH_CHILDREN": "1",
        **environment,
    }
    if tasks is not None:
        # Children do another module's work, of every process that the service starts.
        (folder / "hook").mkdir()
        hook = f"import api.sandbox\napi.sandbox.Sandbox.__init__.__defaults__ = ({tasks!r},)\n"
        (folder / "hook" / "sitecustomize.py").write_text(hook)
        given["PYTHONPATH"] = f"{folder / 'hook'}:{ROOT}:{ROOT / 'tests'}"
    log = folder / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=given, stderr=stderr)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield int(found[1])
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
