"""The durable queue: whoever dies, a job is run by another process and published once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from dbos import DBOS, DBOSClient, EnqueueOptions
from serving import ROOT, settings, with_database

from api import jobs, leasing, queueing
from api.database import ARTIFACTS, EVENTS, JOBS, LEASES, MODELS, PARTS, UPLOADS, now_ms
from api.job_schemas import ConversionRequest
from api.keys import Owner
from api.leasing import Lease
from api.observing import Metrics
from api.owned import add
from api.problems import ProblemError
from api.queueing import Claim
from api.retention import Cleaner
from api.runs import GivenUpError, Run
from api.tools import Tools, opened
from api.workflows import JsonSerializer
from benchmarks.search.postgresql import cluster, missing
from benchmarks.service_storms.__main__ import Storm
from benchmarks.service_storms.processes import running

OWNER = Owner("key_test")
REQUEST = ConversionRequest(model="mod_1", to="group")
#: What differs from one row to the next.
CHANGING = {"workflow_uuid", "creator_xid", "retention_timestamp", "created_at", "updated_at", "completed_at"}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "sqlite":
        yield None
        return
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with cluster() as found:
        yield found.url


@pytest.fixture
def tools(url: str | None, tmp_path: Path) -> Iterator[Tools]:
    given = settings(tmp_path, **({} if url is None else {"database_url": url}))
    with_database(given.data)
    with opened(given, Metrics(), 10) as made:
        with made.database.write() as connection:
            # A server is for all tests of this file.
            for table in (LEASES, EVENTS, PARTS, ARTIFACTS, MODELS, JOBS, UPLOADS):
                connection.execute(sa.delete(table))
            connection.execute(sa.delete(made.queue._workflows))
        yield made


def _submitted(tools: Tools) -> sa.Row[Any]:
    with tools.database.write() as connection:
        return jobs.submit(
            connection, tools.queue, tools.settings, OWNER, "conversion", REQUEST, name="x", model="mod_1"
        )


def _claimed(tools: Tools, job: str, executor: str) -> Claim:
    """Give a job to a process, as the queue does."""
    with tools.database.write() as connection:
        table = tools.queue._workflows
        held = sa.update(table).where(table.c.workflow_uuid == job)
        connection.execute(held.values(status="PENDING", executor_id=executor))
    return Claim(job, executor)


def _run(tools: Tools, claim: Claim) -> Run:
    with tools.database.write() as connection:
        row = jobs.start(connection, tools.queue, claim, claim.workflow)
    assert row is not None
    return Run(tools, claim, row, threading.Semaphore(1))


def _rows(tools: Tools, workflow: str) -> dict[str, list[dict[str, Any]]]:
    """What DBOS's tables hold of a workflow, without what is another's or later each time."""
    found = {}
    with tools.database.read() as connection:
        schema = tools.queue._workflows.schema
        for name in sa.inspect(connection).get_table_names(schema):
            table = sa.Table(name, sa.MetaData(), autoload_with=connection, schema=schema)
            if "workflow_uuid" in table.c:
                rows = connection.execute(
                    sa.select(table).where(table.c.workflow_uuid == workflow)
                ).mappings()
                found[name] = [{key: row[key] for key in row if key not in CHANGING} for row in rows]
    return found


def test_rows_are_those_that_dbos_writes(tools: Tools) -> None:
    client = DBOSClient(
        system_database_url=tools.settings.url(),
        dbos_system_schema=queueing.SCHEMA,
        serializer=JsonSerializer(),
        application_name=queueing.APPLICATION,
        lazy=True,
    )
    options: EnqueueOptions = {
        "workflow_name": queueing.JOB_QUEUE,
        "queue_name": queueing.JOB_QUEUE,
        "workflow_id": "theirs",
        "app_version": queueing.VERSION,
    }
    with tools.database.write() as connection:
        client.enqueue_in_transaction(connection, options, "job_1", "trial-0")
        tools.queue.put(connection, "ours", queueing.JOB_QUEUE, "job_1", "trial-0")
    rows = _rows(tools, "ours")
    assert rows == _rows(tools, "theirs")
    assert len(rows["workflow_status"]) == len(rows["workflow_input"]) == 1
    for name in ("ours", "theirs"):
        _claimed(tools, name, "one")
    client.cancel_workflows(["theirs"])
    with tools.database.write() as connection:
        tools.queue.cancel(connection, ["ours"])
    rows = _rows(tools, "ours")
    assert rows == _rows(tools, "theirs")
    assert rows["workflow_status"][0]["status"] == "CANCELLED"
    with tools.database.write() as connection:
        for name in ("workflow_output", "operation_outputs"):
            table = sa.Table(
                name, sa.MetaData(), autoload_with=connection, schema=tools.queue._workflows.schema
            )
            needed = {"function_id": 1, "function_name": "x"} if "function_id" in table.c else {}
            connection.execute(sa.insert(table).values(workflow_uuid="ours", **needed))
        tools.queue.forget(connection, ["ours"])
    assert not any(_rows(tools, "ours").values())
    client.destroy()


def test_what_is_private_of_dbos_is_as_it_was() -> None:
    pinned = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if '"dbos==' in line)
    assert f'"dbos=={version("dbos")}"' in pinned
    assert callable(DBOS._recover_pending_workflows)
    made = DBOS(config={"name": "guard", "system_database_url": "sqlite:///unused.sqlite"})
    assert made.background_thread_stop_events == []
    DBOS.destroy()
    assert not Path("unused.sqlite").exists()


def test_a_job_waits_for_exactly_one_worker(tools: Tools) -> None:
    row = _submitted(tools)
    assert (row.state, row.attempts) == ("queued", 0)
    claim = _claimed(tools, row.id, "one")
    with tools.database.read() as connection:
        assert tools.queue.held(connection, "one") == {row.id}
        assert tools.queue.held(connection, "two") == set()
    with tools.database.write() as connection:
        assert jobs.start(connection, tools.queue, Claim(row.id, "two"), row.id) is None
        started = jobs.start(connection, tools.queue, claim, row.id)
        assert started is not None
        assert (started.state, started.attempts) == ("running", 1)


def test_a_transaction_that_fails_leaves_no_job(tools: Tools) -> None:
    def fail() -> None:
        with tools.database.write() as connection:
            row = jobs.submit(connection, tools.queue, tools.settings, OWNER, "conversion", REQUEST, name="x")
            found.append(row.id)
            raise RuntimeError

    found: list[str] = []
    with pytest.raises(RuntimeError):
        fail()
    claim = _claimed(tools, found[0], "one")
    with tools.database.write() as connection:
        assert jobs.start(connection, tools.queue, claim, found[0]) is None
        assert tools.queue.held(connection, "one") == set()


class TestPublishing:
    def test_is_for_whoever_holds_the_job(self, tools: Tools) -> None:
        row = _submitted(tools)
        run = _run(tools, _claimed(tools, row.id, "one"))
        written: list[str] = []

        def commit(connection: sa.Connection) -> dict[str, Any]:
            written.append("x")
            return {"artifacts": []}

        # It was taken for dead, and another process has the job now.
        _claimed(tools, row.id, "two")
        with pytest.raises(GivenUpError):
            run.publish(commit)
        run.fail(ProblemError(422, "failed", "no"))
        run.log("not heard")
        other = _run(tools, Claim(row.id, "two"))
        assert other.job.attempts == 2
        other.publish(commit)
        with pytest.raises(GivenUpError):
            other.publish(commit)
        assert written == ["x"]
        with tools.database.read() as connection:
            kinds = [event.kind for event in jobs.events_after(connection, row.id, 0)]
            assert kinds == ["queued", "started", "started", "succeeded"]

    def test_many_at_once_publish_once(self, tools: Tools) -> None:
        row = _submitted(tools)
        run = _run(tools, _claimed(tools, row.id, "one"))
        outcomes: list[str] = []

        def publish() -> None:
            try:
                run.publish(lambda _: {"artifacts": []})
                outcomes.append("published")
            except GivenUpError:
                outcomes.append("given up")

        threads = [threading.Thread(target=publish) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["given up"] * 5 + ["published"]

    def test_not_of_what_was_cancelled(self, tools: Tools) -> None:
        row = _submitted(tools)
        run = _run(tools, _claimed(tools, row.id, "one"))
        with tools.database.write() as connection:
            assert jobs.finish(connection, tools.store, sa.true(), row.id, "cancelled")
            assert not jobs.finish(connection, tools.store, sa.true(), row.id, "cancelled")
        with pytest.raises(GivenUpError):
            run.publish(lambda _: {"artifacts": []})


def test_events_of_many_have_no_gaps(tools: Tools) -> None:
    row = _submitted(tools)
    run = _run(tools, _claimed(tools, row.id, "one"))
    threads = [
        threading.Thread(target=lambda: [run.log(f"{number}") for number in range(10)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with tools.database.read() as connection:
        events = jobs.events_after(connection, row.id, 0)
        assert [event.number for event in events] == list(range(1, 43))
        assert [event.number for event in jobs.events_after(connection, row.id, 40)] == [41, 42]
        assert len(jobs.last_events(connection, row.id, ["log"], 100)) == 40


class TestLeases:
    @pytest.fixture(autouse=True)
    def faster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leasing, "BEAT", 0.1)
        monkeypatch.setattr(leasing, "LEASE", 0.6)
        monkeypatch.setattr(leasing, "_START", 1.0)

    def test_of_the_dead_end_and_their_jobs_go_to_others(self, tools: Tools) -> None:
        row = _submitted(tools)
        taken: list[Sequence[str]] = []
        lease = Lease(tools.database, tools.queue, taken.append, lambda: None)
        dead = Lease(tools.database, tools.queue, taken.append, lambda: None)
        with tools.database.write() as connection:
            expires = leasing.clock(connection) + 1.0
            connection.execute(sa.insert(LEASES).values(executor=dead.executor, expires=expires, dead=0))
        _claimed(tools, row.id, dead.executor)
        start = time.monotonic()
        lease.begin()
        while not taken and time.monotonic() - start < 20:
            time.sleep(0.02)
        assert dead.executor in taken[0]
        assert lease.executor not in taken[0]
        # Not before it has expired.
        assert time.monotonic() - start > 0.9
        lease.end()

    def test_that_are_lost_end_their_process(self, tools: Tools) -> None:
        lost = threading.Event()
        lease = Lease(tools.database, tools.queue, lambda _: None, lost.set)
        lease.begin()
        assert not lost.wait(0.5)
        with tools.database.write() as connection:
            connection.execute(sa.update(LEASES).where(LEASES.c.executor == lease.executor).values(dead=1))
        assert lost.wait(20)
        lease.end()

    def test_nobody_is_declared_dead_before_ones_own_beats_are_on_time(self, tools: Tools) -> None:
        with tools.database.write() as connection:
            values = {"executor": "old", "expires": leasing.clock(connection) - 100, "dead": 0}
            connection.execute(sa.insert(LEASES).values(values))
        lease = Lease(tools.database, tools.queue, lambda _: None, lambda: None)
        start = time.monotonic()
        lease.begin()
        with tools.database.read() as connection:
            query = sa.select(LEASES.c.dead).where(LEASES.c.executor == "old")
            assert connection.scalar(query) == 0
        while time.monotonic() - start < 20:
            with tools.database.read() as connection:
                if connection.scalar(query) == 1:
                    break
            time.sleep(0.02)
        assert time.monotonic() - start > leasing.LEASE - leasing.BEAT
        lease.end()

    def test_names_are_never_used_twice(self) -> None:
        names = {leasing.new_executor() for _ in range(100)}
        assert len(names) == 100
        assert all(f"-{os.getpid()}-" in name for name in names)


class TestRetention:
    def _kept(self, tools: Tools, owner: Owner) -> tuple[str, str, str]:
        """An upload, a model and an artifact."""
        rows = []
        with ExitStack() as stack:
            for data in (os.urandom(10), os.urandom(20)):
                file = stack.enter_context(tools.store.incoming(100, ProblemError(413, "too-large", "")))
                file.write(data)
                rows.append((file, file.finish()))
            with tools.database.write() as connection:
                for file, content in rows:
                    tools.store.keep(connection, file, content)
                (_, first), (_, second) = rows
                values = {"name": "x", "size": first.size, "sha256": first.sha256}
                upload = add(connection, UPLOADS, owner, tools.settings, **values)
                values = {"name": "x", "size": 2, "document": "{}", "upload": upload.id}
                model = add(connection, MODELS, owner, tools.settings, **values)
                values = {"name": "x", "size": second.size, "sha256": second.sha256, "model": model.id}
                made = add(
                    connection, ARTIFACTS, owner, tools.settings, role="weights", media_type="x", **values
                )
        return upload.id, model.id, made.id

    def test_removes_what_is_old_and_unused(self, tools: Tools) -> None:
        young, old = self._kept(tools, OWNER), self._kept(tools, OWNER)
        job = _submitted(tools)
        other = _submitted(tools)
        with tools.database.write() as connection:
            assert jobs.finish(connection, tools.store, sa.true(), job.id, "cancelled")
            long_ago = now_ms() - 31 * 86_400_000
            for table, identifier in zip((UPLOADS, MODELS, ARTIFACTS), old, strict=True):
                connection.execute(
                    sa.update(table).where(table.c.id == identifier).values(created_ms=long_ago)
                )
            connection.execute(sa.update(JOBS).where(JOBS.c.id == job.id).values(finished_ms=long_ago))
        Cleaner(tools).clean()
        Cleaner(tools).clean()
        with tools.database.read() as connection:
            for table, gone, there in zip((UPLOADS, MODELS, ARTIFACTS), old, young, strict=True):
                found = set(connection.scalars(sa.select(table.c.id)))
                assert gone not in found
                assert there in found
            found = set(connection.scalars(sa.select(JOBS.c.id)))
            assert job.id not in found
            assert other.id in found
            assert connection.scalar(sa.select(EVENTS.c.number).where(EVENTS.c.job == job.id)) is None
        # The files of the young ones are there, the others' are not.
        files = [path for path in (tools.settings.data / "blobs").rglob("*") if path.is_file()]
        assert len(files) == 2

    def test_ends_jobs_that_nobody_will_go_on_with(self, tools: Tools) -> None:
        row = _submitted(tools)
        cleaner = Cleaner(tools)
        cleaner.close_orphans()
        with tools.database.read() as connection:
            assert connection.scalar(sa.select(JOBS.c.state).where(JOBS.c.id == row.id)) == "queued"
        with tools.database.write() as connection:
            tools.queue.cancel(connection, [row.id])
        cleaner.close_orphans()
        with tools.database.read() as connection:
            assert connection.scalar(sa.select(JOBS.c.state).where(JOBS.c.id == row.id)) == "failed"


def test_messages_of_the_queue_are_json() -> None:
    serializer = JsonSerializer()
    assert serializer.deserialize(serializer.serialize({"a": [1, "x", None]})) == {"a": [1, "x", None]}
    assert serializer.serialize(ValueError("x")) == '"ValueError: x"'
    with pytest.raises(TypeError):
        serializer.serialize(object())


def _stormed(folder: Path, kind: str, rounds: int) -> None:
    with running(folder, kind, 2) as processes:
        storm = Storm(processes, seed=1)
        for _ in range(rounds):
            storm.round()
        storm.cancel()
    tally = storm.tally
    bad = (tally.lost, tally.stuck, tally.failed, tally.doubled, tally.wrong)
    assert bad == (0, 0, 0, 0, 0), tally.notes
    assert sum(tally.struck.values()) == rounds
    assert max(tally.take_overs, default=0) < 10
    assert max(tally.cancels) < 2


def test_short_storm(tmp_path: Path) -> None:
    _stormed(tmp_path, "sqlite", 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_longer_storm(kind: str, tmp_path: Path) -> None:
    reason = missing() if kind == "postgresql" else None
    if reason is not None:
        pytest.skip(reason)
    _stormed(tmp_path, kind, 15)


def test_a_job_that_kills_its_children_is_given_up(tmp_path: Path) -> None:
    with running(tmp_path, "sqlite", 1) as processes:
        storm = Storm(processes, seed=2)
        job = storm._convert(100.0, 1000)
        killed: set[int] = set()
        deadline = time.monotonic() + 60
        while len(killed) < 3 and time.monotonic() < deadline:
            for child in set(processes.children_of(processes.workers[0])) - killed:
                os.kill(child, 9)
                killed.add(child)
            time.sleep(0.05)
        found: dict[str, Any] = {}
        while found.get("finished") is None and time.monotonic() < deadline:
            found = processes.asked("GET", f"/v1/jobs/{job}").json()
        assert (found["state"], found["attempts"]) == ("failed", 3)
        assert "died" in found["problem"]["detail"]
        # The worker takes the next one.
        assert processes.workers[0].poll() is None
        after = storm._convert(0.1, 100)
        while processes.asked("GET", f"/v1/jobs/{after}").json()["state"] != "succeeded":
            assert time.monotonic() < deadline
            time.sleep(0.1)
