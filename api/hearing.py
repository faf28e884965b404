"""What comes back from a child: lines and files, none of which is trusted, and how failures are told."""

from __future__ import annotations

import os
import re
import select
import signal
import stat
from collections.abc import Callable

from pydantic import ValidationError

from api.messages import LINE, MOST_LINE, MOST_LINES, Done, Failed, Progressed
from api.problems import ProblemError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


class Reader:
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
            raise misbehaved("it said more than it may")
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
            raise misbehaved("it said something that is not understood") from error
        if self.last is not None:
            raise misbehaved("it went on after its last word")
        if not isinstance(said, Progressed):
            self.last = said
        elif self._on_progress is not None:
            self._on_progress(said)


def open_plain(folder: int, name: str) -> int:
    """Open a plain file in a folder that a child could write, and nothing else."""
    if not _NAME.fullmatch(name):
        raise misbehaved("it named a file outside its folder")
    try:
        # A pipe would block without the last one.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        raise misbehaved(f"its result cannot be opened ({error.strerror})") from error
    state = os.fstat(descriptor)
    # A second name may be anywhere.
    if not stat.S_ISREG(state.st_mode) or state.st_nlink != 1:
        os.close(descriptor)
        raise misbehaved("its result is no plain file")
    return descriptor


def failure(failed: Failed) -> ProblemError:
    """Return what a request is answered with whose child refused."""
    if failed.error == "MemoryError":
        return exceeded(failed.detail)
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


class KilledError(ProblemError):
    """A child that somebody else killed: the system for want of memory, or an operator."""


def death(status: int | None) -> ProblemError:
    """Return what a request is answered with whose child died."""
    if status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return exceeded("it used more processor time than a child process may have")
    killed = status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)
    return (KilledError if killed else ProblemError)(
        422,
        "failed",
        "the process that worked on it died, which damaged files, or too little memory, may cause; "
        "check the file with normsearch on a machine of your own",
    )


def exceeded(what: str) -> ProblemError:
    """Return what a request is answered with whose child went beyond a limit."""
    return ProblemError(
        422,
        "limits-exceeded",
        f"{what}; give a smaller file or network, or ask the operator for higher limits",
    )


def misbehaved(how: str) -> ProblemError:
    """Return what a request is answered with whose child did what none of ours does."""
    return ProblemError(
        422, "failed", f"the process that worked on it misbehaved: {how}; nothing of it was kept"
    )
