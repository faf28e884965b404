"""python -m benchmarks.service_storms: strike after strike, and what becomes of the jobs."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import statistics
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.search.postgresql import missing
from benchmarks.service_storms.processes import Processes, is_alive, running
from benchmarks.service_storms.tasks import result

RESULTS = Path(__file__).parents[1] / "results" / "service_storms.json"
#: Who is struck; a worker that is stopped comes back and must find that it was taken for dead.
VICTIMS = ("worker", "child", "server", "stopped worker", "postgresql")
#: In which phase of a job: waiting, begun, its child at work (three stages), being published, and in a
#: search.
PHASES = ("queued", "opening", "working", "writing", "publishing", "trial", "confirm")
_LIMIT = 90.0


@dataclass
class Tally:
    """What a storm came to."""

    jobs: int = 0
    lost: int = 0
    stuck: int = 0
    failed: int = 0
    doubled: int = 0
    wrong: int = 0
    struck: Counter[str] = field(default_factory=Counter)
    given_back: list[float] = field(default_factory=list)
    take_overs: list[float] = field(default_factory=list)
    cancels: list[float] = field(default_factory=list)
    zombies: Counter[str] = field(default_factory=Counter)
    ended: int = 0
    notes: list[str] = field(default_factory=list)


class Storm:
    """Rounds of jobs and strikes on one database."""

    def __init__(self, processes: Processes, seed: int) -> None:
        self.processes, self.tally = processes, Tally()
        self._random, self._seed = random.Random(seed), seed
        self._victims = [one for one in VICTIMS if one != "postgresql" or processes.postgresql is not None]
        self._turn = 0
        upload = self._uploaded("data.npz", b"{}")
        self._dataset = self._posted("/v1/datasets", {"upload": upload, "targets": "y"})["id"]

    def round(self) -> None:
        """Put jobs in, strike, and look at what became of them."""
        phase = PHASES[self._turn % len(PHASES)]
        victim = self._victims[(self._turn // len(PHASES) + self._turn) % len(self._victims)]
        self._turn += 1
        # A worker that found itself marked dead after an outage of the database ends, as it must.
        self.tally.ended += self.processes.replace_ended()
        jobs = [self._convert(0.9, 4_000_000) for _ in range(2)]
        if phase in ("trial", "confirm"):
            jobs.append(self._search())
        if phase == "queued":
            # More than there are places.
            jobs += [self._convert(0.5, 1000) for _ in range(6)]
        struck = self._await_phase(jobs, phase)
        if struck is None:
            self.tally.notes.append(f"no job was {phase} when it was to be struck")
            struck = jobs[0]
        elif phase != "queued":
            time.sleep(self._random.uniform(0, 0.15))
        self._strike(victim, phase, struck)
        self._settle(jobs, victim, phase)

    def cancel(self) -> None:
        """Cancel a job whose child is at work, and see how long that lives."""
        job = self._convert(60.0, 1000)
        if self._await_phase([job], "opening") is None:
            self.tally.notes.append("a job to be cancelled did not begin")
            return
        worker = self.processes.worker_of(job)
        children = [] if worker is None else self.processes.children_of(worker)
        start = time.monotonic()
        answer = self.processes.asked("POST", f"/v1/jobs/{job}/cancel", headers=_key())
        while any(map(is_alive, children)) and time.monotonic() - start < 10:
            time.sleep(0.02)
        if answer.status_code != 200 or not children:
            self.tally.notes.append(f"cancel: {answer.status_code}, {len(children)} children")
        self.tally.cancels.append(time.monotonic() - start)

    def _strike(self, victim: str, phase: str, job: str) -> None:
        """Strike the worker that has the job, or its child; where nobody has it, one that has another."""
        workers = [worker for worker in self.processes.workers if self.processes.children_of(worker)]
        worker = self._worker(job) or self._random.choice(workers or self.processes.workers)
        children = self.processes.children_of(worker)
        if victim == "child" and not children:
            victim = "worker"
        self.tally.struck[f"{victim} while {phase}"] += 1
        if victim == "worker":
            self._kill(worker, phase)
        elif victim == "child":
            # It may have ended just now.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._random.choice(children), 9)
        elif victim == "server":
            self.processes.kill_server()
        elif victim == "stopped worker":
            code = self.processes.stop_worker(worker, 8.0)
            self.tally.zombies[str(code)] += 1
        elif victim == "postgresql":
            self.processes.kill_postgresql(self._random.uniform(0, 3))

    def _kill(self, worker: Any, phase: str) -> None:
        """Kill a worker, and see how soon others begin what it held."""
        query = "SELECT workflow_uuid FROM WORKFLOWS WHERE status = 'PENDING' AND executor_id LIKE :e"
        pattern = f"%-{worker.pid}-%"
        start = time.monotonic()
        self.processes.kill_worker(worker)
        held = {str(one) for (one,) in self.processes.rows(query, e=pattern)}
        if not held:
            return
        while self.processes.rows(query, e=pattern):
            if time.monotonic() - start > 60:
                self.tally.notes.append("nobody took over")
                return
            time.sleep(0.05)
        self.tally.given_back.append(time.monotonic() - start)
        if phase == "queued":
            # There is no place for them before others are done.
            return
        # Back in the queue; now begun by another.
        ids = ", ".join(f"'{one}'" for one in held)
        begun = f"SELECT count(*) FROM WORKFLOWS WHERE status = 'ENQUEUED' AND workflow_uuid IN ({ids})"
        while int(str(self.processes.rows(begun)[0][0])) and time.monotonic() - start < 60:
            time.sleep(0.05)
        self.tally.take_overs.append(time.monotonic() - start)

    def _settle(self, jobs: list[str], victim: str, phase: str) -> None:
        self.processes.await_server()
        deadline = time.monotonic() + _LIMIT
        for job in jobs:
            self.tally.jobs += 1
            where = f"round {self._turn}, {victim} while {phase}, {job}"
            while True:
                answer = self.processes.asked("GET", f"/v1/jobs/{job}")
                if answer.status_code == 404:
                    self.tally.lost += 1
                    self.tally.notes.append(f"lost: {where}")
                    break
                found = answer.json()
                if found["finished"] is not None:
                    self._check(job, found, where)
                    break
                if time.monotonic() > deadline:
                    self.tally.stuck += 1
                    self.tally.notes.append(f"stuck: {where}, {found}")
                    break
                time.sleep(0.1)

    def _check(self, job: str, found: dict[str, Any], where: str) -> None:
        if found["state"] != "succeeded":
            self.tally.failed += 1
            self.tally.notes.append(f"failed: {where}, {found['problem']}")
            return
        made = self.processes.rows("SELECT id, sha256 FROM artifacts WHERE job = :j", j=job)
        ends = self.processes.rows(
            "SELECT number FROM job_events WHERE job = :j AND kind = 'succeeded'", j=job
        )
        expected = 1 if found["kind"] == "search" else 2
        if len(made) != expected or len(ends) != 1 or len(found["result"]["artifacts"]) != expected:
            self.tally.doubled += 1
            self.tally.notes.append(f"doubled: {where}, {len(made)} artifacts, {len(ends)} ends")
        for identifier, sha256 in made:
            content = self.processes.asked("GET", f"/v1/artifacts/{identifier}").content
            if hashlib.sha256(content).hexdigest() != sha256:
                self.tally.wrong += 1
                self.tally.notes.append(f"wrong content: {where}")
        if found["kind"] == "conversion":
            # Named by its model's file: storm-SEED-SIZE.
            seed, size = map(int, found["name"].removesuffix(".pth").split("-")[1:])
            wanted = {hashlib.sha256(result(seed + n, size)).hexdigest() for n in range(2)}
            if {str(sha256) for _, sha256 in made} != wanted:
                self.tally.wrong += 1
                self.tally.notes.append(f"another's content: {where}")

    def _await_phase(self, jobs: list[str], phase: str) -> str | None:
        """Return a job as soon as it is in a phase; None if none is for a long time."""
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            for job in jobs:
                if self._phase(job) == phase:
                    return job
            time.sleep(0.02)
        return None

    def _phase(self, job: str) -> str:
        (row,) = self.processes.rows("SELECT state, progress, kind FROM jobs WHERE id = :j", j=job)
        state, progress, kind = row
        if state != "running":
            return str(state)
        if kind == "search":
            parts = self.processes.rows(
                "SELECT stage FROM job_parts WHERE job = :j AND holder IS NOT NULL AND result IS NULL", j=job
            )
            return str(parts[0][0]) if parts else ""
        stage = "" if progress is None else str(json.loads(str(progress))["stage"])
        if stage == "writing":
            # Its child is done, and the files are on their way.
            worker = self.processes.worker_of(job)
            if worker is not None and not self.processes.children_of(worker):
                return "publishing"
        return stage

    def _worker(self, job: str) -> Any:
        query = "SELECT holder FROM job_parts WHERE job = :j AND holder IS NOT NULL AND result IS NULL"
        holders = [str(holder) for (holder,) in self.processes.rows(query, j=job)]
        for workflow in (*holders, job):
            worker = self.processes.worker_of(workflow)
            if worker is not None:
                return worker
        return None

    def _convert(self, seconds: float, size: int) -> str:
        seed = self._random.randrange(10**9)
        text = json.dumps({"seconds": seconds, "bytes": size, "seed": seed})
        upload = self._uploaded(f"storm-{seed}-{size}.pth", text.encode())
        model = self._posted("/v1/models", {"upload": upload, "architecture": "storm"})["id"]
        return str(self._posted("/v1/conversions", {"model": model, "to": "group"})["id"])

    def _search(self) -> str:
        upload = self._uploaded(f"search-{self._random.randrange(10**9)}.pth", b"{}")
        model = self._posted("/v1/models", {"upload": upload, "architecture": "storm"})["id"]
        return str(self._posted("/v1/searches", {"model": model, "dataset": self._dataset})["id"])

    def _uploaded(self, name: str, content: bytes) -> str:
        answer = self.processes.asked("PUT", "/v1/uploads", params={"filename": name}, content=content)
        return str(answer.json()["id"])

    def _posted(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.processes.asked("POST", path, json=body, headers=_key())
        if answer.status_code not in (201, 202):
            raise RuntimeError(f"{path}: {answer.status_code} {answer.text}")
        found: dict[str, Any] = answer.json()
        return found


def storm(kind: str, rounds: int, workers: int, seed: int) -> Iterator[Tally]:
    """Run a storm on a new database, and yield what it came to after each round."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), kind, workers) as processes:
        made = Storm(processes, seed)
        for number in range(rounds):
            start = time.monotonic()
            made.round()
            if number % 5 == 0:
                made.cancel()
            took = f"{time.monotonic() - start:.1f} s"
            print(f"{kind} {number + 1}/{rounds} {took} {_short(made.tally)}", flush=True)
            yield made.tally


def _short(tally: Tally) -> str:
    bad = {name: getattr(tally, name) for name in ("lost", "stuck", "failed", "doubled", "wrong")}
    return f"{tally.jobs} jobs, {bad}" + (f" {tally.notes[-1]}" if any(bad.values()) else "")


def summary(tally: Tally) -> dict[str, Any]:
    """Return a storm's numbers."""
    by_victim: Counter[str] = Counter()
    by_phase: Counter[str] = Counter()
    for name, count in tally.struck.items():
        victim, _, phase = name.partition(" while ")
        by_victim[victim] += count
        by_phase[phase] += count
    return {
        **{name: getattr(tally, name) for name in ("jobs", "lost", "stuck", "failed", "doubled", "wrong")},
        "struck": dict(by_victim),
        "phases": dict(by_phase),
        "back_in_the_queue_seconds": _spread(tally.given_back),
        "take_over_seconds": _spread(tally.take_overs),
        "cancel_seconds": _spread(tally.cancels),
        "exit_codes_of_stopped_workers": dict(tally.zombies),
        "workers_that_ended_by_themselves": tally.ended,
        "notes": tally.notes,
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "count": len(values),
        "median": round(statistics.median(values), 2),
        "most": round(max(values), 2),
    }


def _key() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def main() -> None:
    """Run storms and write down what they came to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    given = parser.parse_args()
    versions = {name: version(name) for name in ("dbos", "sqlalchemy", "optuna")}
    about = {"workers": given.workers, "python": platform.python_version(), **versions}
    found: dict[str, Any] = {"about": about}
    for kind in given.databases:
        reason = missing() if kind == "postgresql" else None
        if reason is not None:
            print(f"{kind}: left out: {reason}")
            continue
        for number, tally in enumerate(storm(kind, given.rounds, given.workers, given.seed), 1):
            found[kind] = {"rounds": number, **summary(tally)}
            if given.save:
                # After each round: a storm is long.
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({kind: found[kind]}, indent=1))


if __name__ == "__main__":
    main()
