"""Child processes: every untrusted file is opened, and every architecture built, in one of these.

A child is forked from a process that has torch imported. It is taken for compromised from the start: what it
says is limited in size and checked; files that it leaves are opened in its own folder, never through a link.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from api.confinement import Confinement
from api.forking import EndingError, Forker
from api.hearing import Reader, death, exceeded, failure, misbehaved, open_plain
from api.messages import ARGUMENT, LOG, Done, Ended, Failed, Order, Progressed
from api.observing import LOG as SERVICE_LOG
from api.observing import Metrics
from api.problems import ProblemError
from api.settings import Settings
from api.store import no_room

R = TypeVar("R", bound=BaseModel)
_TICK, _PATIENCE = 0.2, 10.0


class CancelledError(Exception):
    """The work was no longer wanted; its child is dead."""


@dataclass(frozen=True)
class Finished(Generic[R]):
    """What a child has done; its files are there until the context ends."""

    result: R
    folder: int

    def open(self, name: str) -> int:
        """Open a file that the child wrote.

        Raises:
            ProblemError: there is no such plain file, or it is somewhere else.

        """
        return open_plain(self.folder, name)


class Sandbox:
    """Runs work in children, each with its own folder and limits.

    Args:
        settings: the limits.
        metrics: where work is counted.
        tasks: the module of the work.

    """

    def __init__(self, settings: Settings, metrics: Metrics, tasks: str = "api.engine") -> None:
        self._settings, self._metrics = settings, metrics
        self._forker = Forker(tasks, settings.data)
        self._work = settings.data / "work"
        # What died with its process left it; another process's folders bear another name.
        self._prefix = f"{socket.gethostname()}-{os.getpid()}-{_started(os.getpid())}-"
        self._work.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sweep()

    def confinement(self) -> Confinement:
        """Return which means apply here, as a child finds them."""
        with self.run("confinement", Nothing(), Confinement) as finished:
            return finished.result

    def close(self) -> None:
        """Kill every child and the process that forks."""
        self._forker.close()

    @contextmanager
    def run(
        self,
        task: str,
        argument: BaseModel,
        result: type[R],
        inputs: Mapping[str, Path] | None = None,
        *,
        on_progress: Callable[[Progressed], None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> Iterator[Finished[R]]:
        """Do a piece of work in a child, and give access to what it left.

        Args:
            task: the name of the work.
            argument: what it is asked.
            result: the form of what it answers.
            inputs: files that it may read, by the names that they get in its folder.
            on_progress: is told how far it has come.
            cancelled: kills it when set.

        Raises:
            ProblemError: it refused, failed, exceeded a limit or misbehaved; 503 where no child can be had.
            CancelledError: as asked.
            EndingError: the service ends.

        """
        self._metrics.children.inc()
        outcome = "failed"
        folder = self._work / f"{self._prefix}{os.urandom(12).hex()}"
        folder.mkdir(mode=0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            (folder / ARGUMENT).write_bytes(argument.model_dump_json().encode())
            line = self._in_child(task, folder, descriptor, inputs or {}, on_progress, cancelled)
            if isinstance(line, Failed):
                raise failure(line)
            try:
                checked = result.model_validate(line.result)
            except ValidationError as error:
                raise misbehaved("its result has not the form that was asked for") from error
            outcome = "done"
            yield Finished(checked, descriptor)
        finally:
            os.close(descriptor)
            _remove(folder)
            self._metrics.children.dec()
            self._metrics.tasks.labels(task, outcome).inc()

    def _in_child(
        self,
        task: str,
        folder: Path,
        descriptor: int,
        inputs: Mapping[str, Path],
        on_progress: Callable[[Progressed], None] | None,
        cancelled: threading.Event | None,
    ) -> Done | Failed:
        settings = self._settings
        limits = {
            "memory": settings.child_memory_bytes,
            "file": settings.child_file_bytes,
            "seconds": settings.child_seconds,
            "threads": settings.child_threads,
        }
        order = Order.model_validate(
            {"task": task, "folder": str(folder.resolve()), "inputs": list(inputs), "limits": limits}
        )
        link, output = self._forker.send(order, list(inputs.values()))
        with link:
            try:
                reader = Reader(output, on_progress)
                deadline = time.monotonic() + settings.child_seconds
                while not reader.is_at_end(_TICK):
                    if self._forker.closed.is_set():
                        raise EndingError
                    if cancelled is not None and cancelled.is_set():
                        raise CancelledError
                    if time.monotonic() > deadline:
                        raise exceeded(f"it took more than {settings.child_seconds:g} seconds")
                    if shutil.disk_usage(folder).free < settings.reserve_bytes:
                        raise no_room()
                status = _ended(link)
            finally:
                os.close(output)
                _kill(link)
        if reader.last is None or status != 0:
            self._tell(task, descriptor, status)
            raise death(status)
        return reader.last

    def _tell(self, task: str, folder: int, status: int | None) -> None:
        said = b""
        with contextlib.suppress(OSError, ProblemError), os.fdopen(open_plain(folder, LOG), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4000))
            said = file.read(4000)
        fields = {"task": task, "status": status, "said": said.decode("utf-8", "replace")}
        SERVICE_LOG.warning("child died", extra={"fields": fields})

    def _sweep(self) -> None:
        """Remove the folders of processes of this machine that are no more."""
        for path in self._work.iterdir():
            host, pid, started, _ = (path.name.rsplit("-", 3) + [""] * 3)[:4]
            if host == socket.gethostname() and pid.isdigit() and _started(int(pid)) != started:
                _remove(path)


def _started(pid: int) -> str:
    """Return when a process was started, in the system's ticks: a number alone may be another's by now."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


class Nothing(BaseModel):
    """An argument that says nothing."""


def _ended(link: socket.socket) -> int | None:
    """Return how a child that says no more has ended; None if it has not."""
    link.settimeout(_PATIENCE)
    try:
        return Ended.model_validate_json(link.recv(1000)).status
    except (OSError, ValidationError):
        return None


def _kill(link: socket.socket) -> None:
    """Have a child killed, if it lives, and wait until it is dead."""
    with contextlib.suppress(OSError):
        link.shutdown(socket.SHUT_WR)
        link.settimeout(_PATIENCE)
        link.recv(1000)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:
        # Deeper than Python goes.
        subprocess.run(["rm", "-rf", "--", str(folder)], check=False)
