"""The processes of a storm: a server, workers, their children, and the database; each may be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import httpx2
import sqlalchemy as sa

from benchmarks.search.postgresql import Server, cluster

ROOT = Path(__file__).parents[2]
_CODE = """\
import sys, functools, api.tools
from api.sandbox import Sandbox
api.tools.Sandbox = functools.partial(Sandbox, tasks="benchmarks.service_storms.tasks")
from api.__main__ import app
app()
"""


class Processes:
    """A server and workers on one database.

    Args:
        folder: of the data and the logs.
        workers: how many.
        postgresql: the database's server; None for SQLite.

    """

    def __init__(self, folder: Path, workers: int, postgresql: Server | None) -> None:
        self._folder, self.postgresql = folder, postgresql
        self.port = _free_port()
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "NORMSEARCH_DATA": str(folder / "data"),
            "NORMSEARCH_OPEN": "1",
            "NORMSEARCH_WORKERS": "0",
            "NORMSEARCH_CHILDREN": "2",
            "NORMSEARCH_RESERVE_BYTES": "0",
            "NORMSEARCH_REQUESTS_PER_MINUTE": "1000000",
            "NORMSEARCH_UNFINISHED_JOBS": "100000",
        }
        url = f"sqlite:///{folder / 'data' / 'normsearch.sqlite'}"
        if postgresql is not None:
            url = self._environment["NORMSEARCH_DATABASE_URL"] = postgresql.url
        self._engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), pool_pre_ping=True)
        self._table = "workflow_status" if postgresql is None else "dbos.workflow_status"
        self._log: IO[bytes] = (folder / "log").open("ab")
        self.server = self._start_server()
        self.workers = [self._start_worker() for _ in range(workers)]
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        self.await_server()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.client.close()
        for process in (self.server, *self.workers):
            with contextlib.suppress(OSError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        self._engine.dispose()
        self._log.close()

    def await_server(self, seconds: float = 60) -> None:
        """Wait until the server answers."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx2.HTTPError):
                if self.client.get("/health/ready").status_code == 200:
                    return
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server does not answer; {self._folder / 'log'}")
            time.sleep(0.1)

    def asked(self, method: str, path: str, **given: Any) -> httpx2.Response:
        """Ask the server, again and again while it is away; every POST has a key, so that it is done once."""
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(httpx2.HTTPError):
                answer = self.client.request(method, path, **given)
                if answer.status_code not in (409, 500, 503):
                    return answer
            if time.monotonic() > deadline:
                raise RuntimeError(f"{method} {path} is not answered")
            time.sleep(0.2)

    def rows(self, statement: str, **given: Any) -> list[Any]:
        """Ask the database directly."""
        deadline = time.monotonic() + 60
        while True:
            try:
                with self._engine.connect() as connection:
                    text = statement.replace("WORKFLOWS", self._table)
                    return list(connection.execute(sa.text(text), given).all())
            except sa.exc.DBAPIError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def worker_of(self, workflow: str) -> subprocess.Popen[bytes] | None:
        """Return the worker that runs a workflow."""
        query = "SELECT executor_id FROM WORKFLOWS WHERE workflow_uuid = :w AND status = 'PENDING'"
        for (executor,) in self.rows(query, w=workflow):
            pid = int(str(executor).split("-")[-2])
            return next((worker for worker in self.workers if worker.pid == pid), None)
        return None

    def children_of(self, worker: subprocess.Popen[bytes]) -> list[int]:
        """Return the children that a worker has at work: those that its forking process forked."""
        parents = _parents()
        forking = [pid for pid, parent in parents.items() if parent == worker.pid]
        return [pid for pid, parent in parents.items() if parent in forking]

    def kill_worker(self, worker: subprocess.Popen[bytes]) -> None:
        """Kill a worker, and start another one in its place."""
        worker.kill()
        worker.wait()
        self.workers[self.workers.index(worker)] = self._start_worker()

    def stop_worker(self, worker: subprocess.Popen[bytes], seconds: float) -> int | None:
        """Stop a worker for some time, let it go on, and return the code with which it ends, if it does."""
        worker.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        worker.send_signal(signal.SIGCONT)
        try:
            code = worker.wait(10)
        except subprocess.TimeoutExpired:
            return None
        self.workers[self.workers.index(worker)] = self._start_worker()
        return code

    def replace_ended(self) -> int:
        """Start a worker for each that has ended by itself, and return how many did."""
        ended = [number for number, worker in enumerate(self.workers) if worker.poll() is not None]
        for number in ended:
            self.workers[number] = self._start_worker()
        return len(ended)

    def kill_server(self) -> None:
        """Kill the server, and start it again."""
        self.server.kill()
        self.server.wait()
        self.server = self._start_server()

    def kill_postgresql(self, pause: float) -> None:
        """Kill the database's server with all its processes, and start it again a moment later."""
        assert self.postgresql is not None
        self.postgresql.kill()
        time.sleep(pause)
        self.postgresql.start()

    def _start_server(self) -> subprocess.Popen[bytes]:
        return self._start("serve", "--port", str(self.port))

    def _start_worker(self) -> subprocess.Popen[bytes]:
        return self._start("worker")

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", _CODE, *arguments],
            env=self._environment,
            cwd=self._folder,
            stdout=self._log,
            stderr=self._log,
        )


@contextmanager
def running(folder: Path, kind: str, workers: int) -> Iterator[Processes]:
    """Start everything on a new database of a kind."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(cluster()) if kind == "postgresql" else None
        yield stack.enter_context(Processes(folder, workers, server))


def is_alive(pid: int) -> bool:
    """Tell whether a process lives; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _parents() -> dict[int, int]:
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    found[int(path.name)] = int(fields[1])
    return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
