"""The process that forks children, as the service holds it: started when needed, told what to do, ended."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from api.messages import Order
from api.problems import ProblemError

#: What it gets of the environment: nothing that could be a secret.
_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")
_SET = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "HF_HUB_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_TICK, _PATIENCE, _START = 0.2, 10.0, 120.0


class EndingError(Exception):
    """The service ends: there are no more children."""


class Forker:
    """Starts the process that forks, again if it dies, and gives it orders.

    Args:
        tasks: the module of the work.
        hidden: the folder of the service's data, which no child may read.

    """

    def __init__(self, tasks: str, hidden: Path) -> None:
        self._tasks, self._hidden = tasks, hidden
        self._lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self.closed = threading.Event()

    def close(self) -> None:
        """Kill every child and the process that forks."""
        self.closed.set()
        with self._lock:
            self._end()

    def send(self, order: Order, files: list[Path]) -> tuple[socket.socket, int]:
        """Give an order; return the socket that stands for the child, and where what it says is read.

        Raises:
            ProblemError: 503; no child can be had.
            EndingError: the service ends.

        """
        for last in (False, True):
            control = self._started()
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            output, says = os.pipe()
            opened: list[int] = []
            try:
                opened += [os.open(file, os.O_RDONLY | os.O_CLOEXEC) for file in files]
                socket.send_fds(control, [order.model_dump_json().encode()], [theirs.fileno(), says, *opened])
                return mine, output
            except OSError as error:
                mine.close()
                os.close(output)
                if last or isinstance(error, FileNotFoundError):
                    raise ProblemError(
                        503, "busy", "no child process can be had just now; try again", {"Retry-After": "10"}
                    ) from error
                with self._lock:
                    # Unless another thread has started it again meanwhile.
                    if self._control is control:
                        self._end()
            finally:
                theirs.close()
                for descriptor in (says, *opened):
                    os.close(descriptor)
        raise AssertionError

    def _started(self) -> socket.socket:
        """Return the socket for orders, of a process that has imported everything, which takes seconds."""
        with self._lock:
            if self.closed.is_set():
                raise EndingError
            if self._control is None or self.process is None or self.process.poll() is not None:
                self._control = self._spawn()
            return self._control

    def _spawn(self) -> socket.socket:
        self._end()
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The folders of modules are given, not the environment; the service's data are in none of them.
        paths = [str(Path(path or ".").resolve()) for path in sys.path]
        readable = [
            str(part)
            for path in dict.fromkeys((*paths, sys.prefix, sys.base_prefix))
            for part in without(Path(path).resolve(), self._hidden.resolve())
        ]
        code = f"import sys; sys.path[:0] = {paths!r}; from api.zygote import main; main()"
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ} | _SET
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-W",
                "ignore",
                "-c",
                code,
                str(theirs.fileno()),
                self._tasks,
                json.dumps(readable),
            ],
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        if not self._is_ready(mine):
            mine.close()
            self.process.kill()
            if self.closed.is_set():
                raise EndingError
            raise ProblemError(
                503, "busy", "the process for children does not start; the operator's log says why"
            )
        mine.settimeout(_PATIENCE)
        return mine

    def _is_ready(self, control: socket.socket) -> bool:
        """Wait until everything is imported; False if that fails, or the service ends first."""
        deadline = time.monotonic() + _START
        control.settimeout(_TICK)
        while not self.closed.is_set() and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                return control.recv(16) == b"ready"
        return False

    def _end(self) -> None:
        if self._control is not None:
            # It kills its children and ends when this closes.
            self._control.close()
            self._control = None
        if self.process is not None:
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


def without(folder: Path, hidden: Path) -> Iterator[Path]:
    """Yield a folder, or what is in it except for the part that leads to ``hidden``."""
    if folder == hidden or not folder.exists():
        return
    if not hidden.is_relative_to(folder):
        yield folder
        return
    for path in folder.iterdir():
        yield from without(path, hidden)
