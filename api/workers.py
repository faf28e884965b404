"""The worker processes that a server runs beside it, so that one command is a whole service.

Jobs run in processes of their own, not in the server: DBOS is one for each process and lives by threads, a
worker whose lease is lost must end at once, and neither may touch a request. The price is a second process
that has torch imported. Where workers run elsewhere, ``NORMSEARCH_WORKERS=0`` leaves these out.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time

from api.observing import LOG
from api.settings import Settings

#: Seconds between two starts of a worker that ends again and again, at most, and for it to end when it is
#: told.
_PAUSE, _PATIENCE = 10.0, 25.0


class Workers:
    """Starts workers when the first job needs them, and again whenever one ends.

    A worker is told the settings over its standard input, since the server has forgotten its environment; it
    ends when that closes, so none outlives the server, however that ends.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._ending, self._closed = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start those that are missing; returns at once."""
        with self._lock:
            if self._closed.is_set():
                return
            while len(self._threads) < self._settings.workers:
                thread = threading.Thread(target=self._keep_one, name="worker", daemon=True)
                self._threads.append(thread)
                thread.start()

    def is_closing(self) -> bool:
        """Tell whether the service is about to end: what clients wait for is then cut short."""
        return self._ending.is_set() or self._closed.is_set()

    def announce_end(self) -> None:
        """Say that the service is about to end."""
        self._ending.set()

    def close(self) -> None:
        """Have every worker give back what it has, and wait until it has ended."""
        self._closed.set()
        with self._lock:
            processes, threads = list(self._processes), list(self._threads)
        for process in processes:
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        for thread in threads:
            thread.join(_PATIENCE)
        for process in processes:
            process.kill()

    def _keep_one(self) -> None:
        pause = 0.1
        while not self._closed.is_set():
            started = time.monotonic()
            code = self._run_one()
            if self._closed.is_set():
                return
            LOG.warning("worker ended", extra={"fields": {"code": code}})
            pause = 0.1 if time.monotonic() - started > _PAUSE else min(2 * pause, _PAUSE)
            self._closed.wait(pause)

    def _run_one(self) -> int:
        code = f"import sys; sys.path[:0] = {sys.path!r}; from api.__main__ import app; app()"
        command = [sys.executable, "-c", code, "worker", "--beside"]
        with self._lock:
            if self._closed.is_set():
                return 0
            process = subprocess.Popen(command, stdin=subprocess.PIPE)
            self._processes.append(process)
        try:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.write(self._settings.as_json().encode() + b"\n")
                process.stdin.flush()
            return process.wait()
        finally:
            with self._lock:
                self._processes.remove(process)
