"""Child processes and what they found: one line per network in a file that a later run goes on with."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import resource
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import normsearch
from benchmarks.zoo.examination import examine_apart

_HERE = Path(__file__).parent
_VERSIONS = ("torch", "torchvision", "timm", "segmentation_models_pytorch", "opacus")
#: These say how a run is made, judged and shown, not what is found.
_ABOVE = {"__init__.py", "searching", "reporting", "commands", "cli.py"}
_PRESENTATION = {"__init__.py", "__main__.py", "counts.py", "page.py", "runs.py", "verdicts.py"}
#: Seconds that one network may compute; waiting on a busy machine does not count.
_TIME = 300


def versions() -> dict[str, str]:
    """Return the versions of everything that the results depend on."""
    return {"normsearch": normsearch.__version__, **{name: version(name) for name in _VERSIONS}}


def fingerprint() -> str:
    """Return a hash of the versions, normsearch's sources and this benchmark's: older results are stale.

    Packages above conversion are left out: imports go down only, so nothing there changes a conversion.
    """
    digest = hashlib.sha256(json.dumps(versions()).encode())
    package = Path(normsearch.__file__).parent
    sources = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in _ABOVE]
    for path in sorted([*sources, *_HERE.glob("*.py")]):
        if path.parent != _HERE or path.name not in _PRESENTATION:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """The results so far of one state of the sources, by the networks' names."""

    def __init__(self, path: Path, key: str, *, fresh: bool = False) -> None:
        self.path, self.key = path, key
        self.records: dict[str, dict[str, Any]] = {}
        if fresh:
            path.unlink(missing_ok=True)
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                # The line that a killed run was writing.
                continue
            # A failure may have been the machine's: it is tried again.
            if record.get("key") == key and "failed" not in record:
                self.records[record["name"]] = record

    def add(self, record: dict[str, Any]) -> None:
        """Keep one network's result, on disk at once."""
        self.records[record["name"]] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A leading newline ends a line that was cut off.
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(record | {"key": self.key}))


@dataclass
class _Job:
    name: str
    process: Any
    connection: Connection


def examined(names: Iterable[str], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each network's result as it arrives; what a process dies of is a result too."""
    # Forked from here, where the libraries are imported: that takes ten seconds.
    context = multiprocessing.get_context("fork")
    queue, running = list(names), list[_Job]()
    try:
        while queue or running:
            while queue and len(running) < jobs:
                running.append(_start(context, queue.pop(0)))
            wait([job.connection for job in running], timeout=1)
            for job in list(running):
                record = _result(job)
                if record is not None:
                    running.remove(job)
                    yield job.name, record
    finally:
        for job in running:
            job.process.kill()


def _start(context: Any, name: str) -> _Job:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=examine_apart, args=(name, sender), daemon=True)
    process.start()
    resource.prlimit(process.pid, resource.RLIMIT_CPU, (_TIME, _TIME))
    sender.close()
    return _Job(name, process, receiver)


def _result(job: _Job) -> dict[str, Any] | None:
    """Return what a job sent, or why it sent nothing; None while it is at work."""
    record: dict[str, Any] | None = None
    if job.connection.poll():
        try:
            record = json.loads(job.connection.recv_bytes())
        except EOFError:
            job.process.join()
            code = job.process.exitcode
            late = code in (-signal.SIGXCPU, -signal.SIGKILL)
            why = f"killed, perhaps for more than {_TIME} seconds" if late else f"ended with {code}"
            record = {"name": job.name, "failed": why}
    if record is not None:
        job.process.kill()
        job.process.join()
        job.connection.close()
    return record
