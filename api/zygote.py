"""The process that has everything imported and forks a child for each piece of work.

It opens no file of a stranger itself. It is told what to do over a socket from the service; when that closes,
the service is gone: it kills its children and ends. Each child has a socket of its own, over which the
service hears how it ended, and which the service closes to have it killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from api.confinement import Confinement, confine, die_with_parent, hide, limit
from api.messages import ARGUMENT, LOG, Done, Ended, Failed, Order, Progressed

_MOST_ORDER, _MOST_FILES = 64 * 2**10, 16
#: Where the descriptors of a child are, in order: what it says, then its inputs.
_FIRST = 3
#: How far children stand back for processor time.
_NICE = 10
#: Read by libraries that are imported late, and by torch to count processors.
_SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/proc/self", "/proc/cpuinfo")
_MORE = ("/proc/meminfo", "/proc/stat", "/sys/devices/system", "/dev/null", "/dev/urandom", "/dev/zero")


class Tasks(Protocol):
    """A module of work for children."""

    def prepare(self) -> None:
        """Import, before anything is forked, what children need."""

    def run(self, task: str, argument: bytes, folder: Path, report: Any) -> BaseModel | Failed:
        """Do the work in the child's folder."""


@dataclass
class _Child:
    pid: int
    group: int
    link: socket.socket


def main() -> None:
    """Serve orders from the socket that is descriptor ``argv[1]`` with the module ``argv[2]``."""
    with contextlib.suppress(OSError):
        # Before the service itself, a child is what the system ends when memory runs out.
        Path("/proc/self/oom_score_adj").write_text("1000")
    # The service answers while children work, however many there are.
    os.nice(_NICE)
    hide()
    control = socket.socket(fileno=int(sys.argv[1]))
    readable = [Path(path) for path in json.loads(sys.argv[3])]
    tasks: Any = importlib.import_module(sys.argv[2])
    tasks.prepare()
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        # Locks that another thread holds would stay locked for ever in a child.
        raise RuntimeError(f"{threads} threads before the first fork")
    gc.collect()
    gc.freeze()
    control.send(b"ready")
    _Zygote(control, tasks, readable).serve()


class _Zygote:
    def __init__(self, control: socket.socket, tasks: Tasks, readable: list[Path]) -> None:
        self._control, self._tasks, self._readable = control, tasks, readable
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        #: By the descriptor that becomes readable when a child ends, and by that of its link.
        self._ends: dict[int, _Child] = {}
        self._links: dict[int, _Child] = {}

    def serve(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._control.fileno():
                    if not self._take():
                        self._kill_all()
                        return
                elif descriptor in self._ends:
                    self._ended(descriptor)
                elif descriptor in self._links:
                    # The service wants it no more.
                    self._poll.unregister(descriptor)
                    _kill(self._links[descriptor])

    def _take(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, _MOST_ORDER, _MOST_FILES)
        if not data:
            return False
        link, *files = descriptors
        order = Order.model_validate_json(data)
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            _child(order, files, parent, self._tasks, self._readable)
        for file in files:
            os.close(file)
        with contextlib.suppress(OSError):
            # Both do it: whoever comes first.
            os.setpgid(pid, pid)
        child = _Child(pid, os.pidfd_open(pid), socket.socket(fileno=link))
        self._ends[child.group] = self._links[child.link.fileno()] = child
        for descriptor in (child.group, child.link.fileno()):
            self._poll.register(descriptor, select.POLLIN)
        return True

    def _ended(self, descriptor: int) -> None:
        child = self._ends.pop(descriptor)
        # Whatever it has started ends with it.
        _kill(child)
        _, status = os.waitpid(child.pid, 0)
        del self._links[child.link.fileno()]
        for one in (descriptor, child.link.fileno()):
            with contextlib.suppress(KeyError):
                self._poll.unregister(one)
        with contextlib.suppress(OSError):
            child.link.send(Ended(status=status).model_dump_json().encode())
        child.link.close()
        os.close(descriptor)

    def _kill_all(self) -> None:
        for child in self._ends.values():
            _kill(child)


def _kill(child: _Child) -> None:
    # Not reaped yet, so that the number is still the child's.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _child(order: Order, files: list[int], parent: int, tasks: Tasks, readable: list[Path]) -> None:
    """Do one piece of work and end; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        die_with_parent(parent)
        folder = Path(order.folder)
        _keep_only(files, folder)
        inputs = list(range(_FIRST + 1, _FIRST + len(files)))
        for name, descriptor in zip(order.inputs, inputs, strict=True):
            os.symlink(f"/proc/self/fd/{descriptor}", folder / name)
        os.chdir(folder)
        os.environ.update(HOME=order.folder, TMPDIR=order.folder, XDG_CACHE_HOME=order.folder)
        # Found once in a process, and the one that forks may have found it.
        tempfile.tempdir = order.folder
        argument = (folder / ARGUMENT).read_bytes()
        limit(order.limits, sum(os.fstat(descriptor).st_size for descriptor in inputs))
        system = [Path(path) for path in (*_SYSTEM, *_MORE)]
        applied = confine((*readable, *system), (folder,), inputs)
        _say(_work(tasks, order, argument, folder, applied))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _work(tasks: Tasks, order: Order, argument: bytes, folder: Path, applied: Confinement) -> Done | Failed:
    if order.task == "confinement":
        return Done(result=applied.model_dump())
    try:
        made = tasks.run(order.task, argument, folder, _say)
    except MemoryError:
        return Failed(error="MemoryError", detail="it needs more memory than a child process may have")
    return made if isinstance(made, Failed) else Done(result=made.model_dump(mode="json"))


def _say(line: Progressed | Done | Failed) -> None:
    data = memoryview(line.model_dump_json().encode() + b"\n")
    while data:
        data = data[os.write(_FIRST, data) :]


def _keep_only(files: list[int], folder: Path) -> None:
    """Put the files at their places, a log at 1 and 2, and close everything else."""
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open("/dev/null", os.O_RDONLY)
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, 100) for file in (nothing, log, log, *files)]
    for place, file in enumerate(high):
        os.dup2(file, place)
    os.closerange(len(high), 65_536)


if __name__ == "__main__":
    main()
