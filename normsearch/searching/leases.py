"""Leases: a worker that is killed loses its trial to another one, which runs it with the same parameters.

A running trial holds a counter that its worker increases every few seconds. The others watch it by their
own clocks: a counter that stands still for long is that of a worker that is gone, and its trial waits again.
No two machines' clocks are compared; on one machine, a process that has ended is known at once. A worker that
was only thought dead finds its lease gone and drops what it has. So a trial runs at least once, possibly more
often, and is counted once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from normsearch.errors import SearchError

T = TypeVar("T")

_logger = logging.getLogger(__name__)

#: The system attribute that holds a trial's lease: {"holder": …, "beat": …, "attempt": …, "process": …}.
LEASE = "normsearch:lease"
#: The user attribute that says why a trial failed.
ERROR = "error"


@dataclass(frozen=True)
class LeaseTerms:
    """When a worker counts as gone.

    Attributes:
        beat: seconds between two signs of life of a worker.
        patience: seconds without one after which its trial is given to another.
        attempts: how many workers a trial may take down before it counts as failed.

    Raises:
        SearchError: a number is not positive, or ``patience`` is shorter than three beats.

    """

    beat: float = 5.0
    patience: float = 30.0
    attempts: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.beat < float("inf"):
            raise SearchError(f"beat={self.beat!r}: give seconds, more than 0")
        if not 3 * self.beat <= self.patience < float("inf"):
            raise SearchError(
                f"patience={self.patience!r} with beat={self.beat!r}: give at least three beats, or workers "
                "that are alive lose their trials"
            )
        if self.attempts < 1:
            raise SearchError(f"attempts={self.attempts!r}: give at least 1")


@dataclass
class _Silence:
    """What is known of a running trial: its last sign of life, and for how long there was no other."""

    sign: Any
    looked: float
    seconds: float = 0.0


class Leases:
    """The leases of one worker, and its view of the others'."""

    def __init__(self, storage: BaseStorage, terms: LeaseTerms) -> None:
        self._storage, self._terms = storage, terms
        self._holder = uuid.uuid4().hex
        self._silences: dict[int, _Silence] = {}

    def first(self) -> dict[str, Any]:
        """Return the system attributes of a new trial of this worker's: its lease begins with it."""
        return {LEASE: _entry(self._holder, 1)}

    def hold(self, trial_id: int) -> HeldLease:
        """Return the lease on a running trial that this worker has made or taken, to be entered."""
        return HeldLease(self._storage, trial_id, self._holder, self._terms)

    def reclaim(self, trials: Sequence[FrozenTrial]) -> bool:
        """Let every running trial whose worker is gone wait again; say whether there was one.

        One that has taken down as many workers as ``attempts`` allows is failed instead.
        """
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        ids = {trial._trial_id for trial in running}
        self._silences = {key: value for key, value in self._silences.items() if key in ids}
        gone = [trial for trial in running if self._is_gone(trial)]
        for trial in gone:
            self._take(trial)
        return bool(gone)

    def _is_gone(self, trial: FrozenTrial) -> bool:
        lease = trial.system_attrs.get(LEASE) or {}
        if lease.get("holder") and _has_ended(lease.get("process")):
            return True
        # With the start: one that waited in between, unseen, is another worker's now.
        sign, now = (trial.datetime_start, lease), time.monotonic()
        known = self._silences.get(trial._trial_id)
        if known is None or known.sign != sign:
            self._silences[trial._trial_id] = _Silence(sign, now)
            return False
        # After a long time without looking, the others may have been stopped together with this process.
        known.seconds += min(now - known.looked, self._terms.patience / 2)
        known.looked = now
        return known.seconds >= self._terms.patience

    def _take(self, trial: FrozenTrial) -> None:
        """Take a trial from its worker, unless something has happened to it."""
        trial_id = trial._trial_id
        lease = trial.system_attrs.get(LEASE) or {}
        now = self._storage.get_trial(trial_id)
        if now.state != TrialState.RUNNING or (now.system_attrs.get(LEASE) or {}) != lease:
            return
        attempts = lease.get("attempt", 0)
        try:
            if lease.get("holder") and attempts >= self._terms.attempts:
                ended = "once" if attempts == 1 else f"{attempts} times"
                self._storage.set_trial_user_attr(
                    trial_id, ERROR, f"its worker ended {ended} without a result (killed, out of memory?)"
                )
                self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
            else:
                _let_wait(self._storage, trial_id, attempts)
        except UpdateFinishedTrialError:
            # It was not dead, and has just finished.
            pass


class HeldLease:
    """The lease on a trial that this process runs, renewed by a thread while it is entered."""

    def __init__(self, storage: BaseStorage, trial_id: int, holder: str, terms: LeaseTerms) -> None:
        self._storage, self._trial_id, self._holder, self._terms = storage, trial_id, holder, terms
        self._entry: dict[str, Any] = {}
        self._asked = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease of trial {trial_id}", daemon=True)

    def __enter__(self) -> Self:
        persistently(self._claim, self._terms)
        self._thread.start()
        return self

    def _claim(self) -> None:
        lease = self._storage.get_trial(self._trial_id).system_attrs.get(LEASE) or {}
        if lease.get("holder") == self._holder:
            self._entry = lease
        else:
            self._entry = _entry(self._holder, lease.get("attempt", 0) + 1)
            self._write()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def end(self) -> None:
        """Renew it no more, without waiting for the thread that does."""
        self._ended.set()

    def is_held(self) -> bool:
        """Say whether the trial is still this worker's to finish."""
        return self.covers(self._storage.get_trial(self._trial_id))

    def covers(self, trial: FrozenTrial) -> bool:
        """Say the same of a trial that has just been read."""
        lease = trial.system_attrs.get(LEASE) or {}
        return trial.state == TrialState.RUNNING and lease.get("holder") == self._holder

    def is_second_hand(self) -> bool:
        """Say whether another worker may have had the trial before."""
        return bool(self._entry["attempt"] > 1)

    def is_fresh(self) -> bool:
        """Say whether it is held, asking only where a beat has passed since: cheap before each write."""
        now = time.monotonic()
        if now - self._asked > self._terms.beat and not self.is_held():
            return False
        self._asked = now
        return True

    def give_back(self) -> None:
        """End the lease and let the trial wait, without counting the attempt; nothing if it was lost.

        Where the storage fails, the lease is left to expire.
        """
        self._end()
        try:
            if self.is_held():
                _let_wait(self._storage, self._trial_id, self._entry["attempt"] - 1)
        except UpdateFinishedTrialError:
            pass
        except Exception as error:
            _logger.warning("trial %d was not given back (%s); it will expire", self._trial_id, error)

    def _end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _write(self) -> None:
        self._storage.set_trial_system_attr(self._trial_id, LEASE, self._entry)

    def _renew(self) -> None:
        while not self._ended.wait(self._terms.beat):
            try:
                if not self.is_held():
                    return
                self._entry = {**self._entry, "beat": self._entry["beat"] + 1}
                self._write()
            except UpdateFinishedTrialError:
                return
            except Exception as error:
                # A database may be away for a moment: the next beat tries again.
                _logger.warning(
                    "no sign of life of trial %d could be written: %s", self._trial_id, type(error).__name__
                )


def _entry(holder: str, attempt: int) -> dict[str, Any]:
    return {"holder": holder, "beat": 0, "attempt": attempt, "process": _process()}


def _let_wait(storage: BaseStorage, trial_id: int, attempts: int) -> None:
    """Take the lease off a running trial, then let it wait; its parameters stay."""
    lease = {"holder": None, "beat": 0, "attempt": attempts, "process": None}
    storage.set_trial_system_attr(trial_id, LEASE, lease)
    storage.set_trial_state_values(trial_id, TrialState.WAITING)


def persistently(action: Callable[[], T], terms: LeaseTerms) -> T:
    """Do something with the storage, again if that fails, for as long as a lease lasts without beats."""
    end, pause = time.monotonic() + terms.patience, 0.05
    while True:
        try:
            return action()
        except (StorageInternalError, OSError):
            if time.monotonic() + pause > end:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _process() -> list[str] | None:
    """Return what identifies this process among all that ever ran: its machine since boot, id and start.

    None where that cannot be known (it needs Linux).
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        _, start = _state(os.getpid())
    except (OSError, IndexError):
        return None
    machine = f"{socket.gethostname()} {boot} {namespace}"
    return [hashlib.sha256(machine.encode()).hexdigest()[:16], str(os.getpid()), start]


def _state(pid: int) -> tuple[str, str]:
    """Return a process's state and when it started, from Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]


def _has_ended(process: list[str] | None) -> bool:
    """Say whether a process is known to have ended: only this machine's can be, others' beats must tell."""
    own = _process()
    if process is None or own is None or process[0] != own[0]:
        return False
    pid = int(process[1])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:
        state, start = _state(pid)
    except (OSError, IndexError):
        # It ended just now, or belongs to somebody whose processes are hidden: the beats will tell.
        return False
    return state in "ZX" or start != process[2]
