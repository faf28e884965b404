"""Progress: how far long work has come, for callers that want to show it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far one stage of long work has come.

    Attributes:
        stage: what is being done, in a few words.
        done: steps of the stage that are finished.
        total: steps that the stage has at most; 0 where nobody knows.
        seconds_left: estimated from the steps done so far; None before the first, and without a total.
        detail: what the last step found, for example a held-out error.

    """

    stage: str
    done: int
    total: int
    seconds_left: float | None
    detail: str = ""


#: Called after each step, in the thread that works; an exception that it raises ends the work.
OnProgress = Callable[[Progress], None]


class Stage:
    """One stage of ``total`` steps, ``done`` of them in an earlier run, that reports to a callback."""

    def __init__(self, name: str, total: int, callback: OnProgress | None, *, done: int = 0) -> None:
        self._name, self._total, self._callback = name, total, callback
        self._done = self._before = done
        self._start = time.monotonic()
        self._report("")

    def advance(self, detail: str = "", *, done: int | None = None) -> None:
        """Count one step, or say how many are done where others work on the same stage, and report it."""
        self._done = self._done + 1 if done is None else done
        self._report(detail)

    def _report(self, detail: str) -> None:
        if self._callback is None:
            return
        left = None
        if self._done > self._before and self._total:
            pace = (time.monotonic() - self._start) / (self._done - self._before)
            left = pace * max(self._total - self._done, 0)
        self._callback(Progress(self._name, self._done, self._total, left, detail))
