"""Child processes: every untrusted file is opened, and every architecture built, in one of these.

A child is forked from a process that has torch imported. It is taken for compromised from the start: what it
says is limited in size and checked; files that it leaves are opened in its own folder, never through a link.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from api.confinement import Confinement
from api.messages import ARGUMENT, LINE, LOG, MOST_LINE, MOST_LINES, Done, Ended, Failed, Order, Progressed
from api.observing import LOG as SERVICE_LOG
from api.observing import Metrics
from api.problems import ProblemError
from api.settings import Settings
from api.store import no_room

R = TypeVar("R", bound=BaseModel)
#: What the process that forks gets of the environment: nothing that could be a secret.
_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")
_SET = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "HF_HUB_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_TICK, _PATIENCE, _START = 0.2, 10.0, 120.0
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


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
        self._settings, self._metrics, self._tasks = settings, metrics, tasks
        self._work = settings.data / "work"
        # What died with its process left it; another process's folders bear another name.
        self._prefix = f"{socket.gethostname()}-{os.getpid()}-"
        self._work.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sweep()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = threading.Event()

    def start(self) -> None:
        """Start the process that forks, unless it runs; it takes seconds to import everything."""
        with self._lock:
            if self._closed.is_set():
                raise CancelledError
            if self._process is None or self._process.poll() is not None:
                self._spawn()

    def confinement(self) -> Confinement:
        """Return which means apply here, as a child finds them."""
        with self.run("confinement", Nothing(), Confinement) as finished:
            return finished.result

    def close(self) -> None:
        """Kill every child and the process that forks."""
        self._closed.set()
        with self._lock:
            self._end()

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
            CancelledError: as asked, or the service ends.

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
                raise _failure(line)
            try:
                checked = result.model_validate(line.result)
            except ValidationError as error:
                raise _misbehaved("its result has not the form that was asked for") from error
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
        link, output = self._send(order, list(inputs.values()))
        with link:
            try:
                reader = _Reader(output, on_progress)
                deadline = time.monotonic() + settings.child_seconds
                while not reader.is_at_end(_TICK):
                    if self._closed.is_set() or (cancelled is not None and cancelled.is_set()):
                        raise CancelledError
                    if time.monotonic() > deadline:
                        raise _exceeded(f"it took more than {settings.child_seconds:g} seconds")
                    if shutil.disk_usage(folder).free < settings.reserve_bytes:
                        raise no_room()
                status = _ended(link)
            finally:
                os.close(output)
                _kill(link)
        if reader.last is None or status != 0:
            self._tell(task, descriptor, status)
            raise _death(status)
        return reader.last

    def _send(self, order: Order, files: list[Path]) -> tuple[socket.socket, int]:
        """Give an order; return the socket that stands for the child, and where what it says is read."""
        for last in (False, True):
            self.start()
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            output, says = os.pipe()
            opened: list[int] = []
            try:
                opened += [os.open(file, os.O_RDONLY | os.O_CLOEXEC) for file in files]
                control = self._control
                assert control is not None
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
                    self._end()
            finally:
                theirs.close()
                for descriptor in (says, *opened):
                    os.close(descriptor)
        raise AssertionError

    def _spawn(self) -> None:
        self._end()
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The folders of modules are given, not the environment; the service's data are in none of them.
        paths = [str(Path(path or ".").resolve()) for path in sys.path]
        readable = [
            str(part)
            for path in dict.fromkeys((*paths, sys.prefix, sys.base_prefix))
            for part in without(Path(path).resolve(), self._settings.data.resolve())
        ]
        code = f"import sys; sys.path[:0] = {paths!r}; from api.zygote import main; main()"
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ} | _SET
        self._process = subprocess.Popen(
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
            self._process.kill()
            if self._closed.is_set():
                raise CancelledError
            raise ProblemError(
                503, "busy", "the process for children does not start; the operator's log says why"
            )
        mine.settimeout(_PATIENCE)
        self._control = mine

    def _is_ready(self, control: socket.socket) -> bool:
        """Wait until everything is imported; False if that fails, or the service ends first."""
        deadline = time.monotonic() + _START
        control.settimeout(_TICK)
        while not self._closed.is_set() and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                return control.recv(16) == b"ready"
        return False

    def _end(self) -> None:
        if self._control is not None:
            # It kills its children and ends when this closes.
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

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
            host, _, rest = path.name.rpartition("-")[0].rpartition("-")
            if host == socket.gethostname() and rest.isdigit() and not Path("/proc", rest).exists():
                _remove(path)


def open_plain(folder: int, name: str) -> int:
    """Open a plain file in a folder that a child could write, and nothing else."""
    if not _NAME.fullmatch(name):
        raise _misbehaved("it named a file outside its folder")
    try:
        # A pipe would block without the last one.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        raise _misbehaved(f"its result cannot be opened ({error.strerror})") from error
    state = os.fstat(descriptor)
    # A second name may be anywhere.
    if not stat.S_ISREG(state.st_mode) or state.st_nlink != 1:
        os.close(descriptor)
        raise _misbehaved("its result is no plain file")
    return descriptor


class Nothing(BaseModel):
    """An argument that says nothing."""


class _Reader:
    """Reads a child's lines, within limits."""

    def __init__(self, descriptor: int, on_progress: Callable[[Progressed], None] | None) -> None:
        self.last: Done | Failed | None = None
        self._descriptor, self._on_progress = descriptor, on_progress
        self._pieces, self._length, self._total = [b""], 0, 0
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def is_at_end(self, seconds: float) -> bool:
        """Read what comes within some time; tell whether there will be no more."""
        if not self._poll.poll(seconds * 1000):
            return False
        data = os.read(self._descriptor, 2**16)
        self._total += len(data)
        self._length += len(data)
        if self._length > MOST_LINE or self._total > MOST_LINES:
            raise _misbehaved("it said more than it may")
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._take(b"".join((*self._pieces, end)))
            self._pieces, self._length = [], len(rest)
        self._pieces.append(rest)
        return not data

    def _take(self, line: bytes) -> None:
        try:
            said = LINE.validate_json(line)
        except ValidationError as error:
            raise _misbehaved("it said something that is not understood") from error
        if self.last is not None:
            raise _misbehaved("it went on after its last word")
        if not isinstance(said, Progressed):
            self.last = said
        elif self._on_progress is not None:
            self._on_progress(said)


def without(folder: Path, hidden: Path) -> Iterator[Path]:
    """Yield a folder, or what is in it except for the part that leads to ``hidden``."""
    if folder == hidden or not folder.exists():
        return
    if not hidden.is_relative_to(folder):
        yield folder
        return
    for path in folder.iterdir():
        yield from without(path, hidden)


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


def _failure(failed: Failed) -> ProblemError:
    if failed.error == "MemoryError":
        return _exceeded(failed.detail)
    refusals = [
        {"site": one.site, "method": one.method, "reason": one.reason, "fix": one.remedy}
        for one in failed.refusals
    ]
    first = refusals[0] if refusals else {}
    return ProblemError(
        422,
        "refused",
        failed.detail,
        error=failed.error,
        site=first.get("site"),
        fix=first.get("fix"),
        refusals=refusals or None,
    )


def _death(status: int | None) -> ProblemError:
    if status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return _exceeded("it used more processor time than a child process may have")
    return ProblemError(
        422,
        "failed",
        "the process that worked on it died, which damaged files, or too little memory, may cause; "
        "check the file with normsearch on a machine of your own",
    )


def _exceeded(what: str) -> ProblemError:
    return ProblemError(
        422,
        "limits-exceeded",
        f"{what}; give a smaller file or network, or ask the operator for higher limits",
    )


def _misbehaved(how: str) -> ProblemError:
    return ProblemError(
        422, "failed", f"the process that worked on it misbehaved: {how}; nothing of it was kept"
    )
