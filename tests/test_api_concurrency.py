"""Many requests at a time on either database: nothing is done twice, lost, or beyond the quota."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from serving import settings

from api.database import BLOBS, UPLOADS, Database, sqlite_url
from api.idempotency import Commit, Outcome, once
from api.keys import Owner, create
from api.migrating import open_database
from api.owned import add, page, remove
from api.problems import ProblemError
from api.store import Content, Store
from benchmarks.search.postgresql import cluster, missing

OWNER = Owner("key_test")


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "sqlite":
        yield sqlite_url(tmp_path_factory.mktemp("database"))
        return
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with cluster() as found:
        yield found.url


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    made = open_database(url)
    with made.write() as connection:
        connection.execute(sa.delete(UPLOADS))
        connection.execute(sa.delete(BLOBS))
    yield made
    made.close()


def _together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Run it on as many threads, all starting at once; exceptions are results."""
    barrier = threading.Barrier(count)

    def one(number: int) -> Any:
        barrier.wait()
        try:
            return work(number)
        except ProblemError as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


@pytest.mark.parametrize("_", range(5))
def test_new_file_is_opened_by_many_at_once(_: int, tmp_path: Path) -> None:
    def use(_: int) -> None:
        database = Database(sqlite_url(tmp_path))
        with database.write() as connection:
            connection.execute(sa.text("CREATE TABLE IF NOT EXISTS x (y)"))
        database.close()

    assert _together(6, use) == [None] * 6


def test_schema_is_made_once(url: str) -> None:
    databases = _together(3, lambda _: open_database(url))
    assert all(isinstance(database, Database) for database in databases)
    for database in databases:
        database.close()


def test_a_key_does_its_work_once(database: Database, tmp_path: Path) -> None:
    done: list[int] = []

    def prepare() -> Commit:
        done.append(1)
        return lambda _: Outcome(201, {"number": len(done)})

    key = os.urandom(8).hex()
    answers = _together(8, lambda _: once(database, OWNER, key, "same", prepare))
    assert len(done) == 1
    kept = [answer for answer in answers if isinstance(answer, Outcome)]
    assert {str(answer.document) for answer in kept} == {"{'number': 1}"}
    assert {answer.status for answer in answers if isinstance(answer, ProblemError)} <= {409}
    assert once(database, OWNER, key, "same", prepare).replayed
    with pytest.raises(ProblemError, match="another request"):
        once(database, OWNER, key, "other", prepare)


def test_what_failed_may_be_tried_again(database: Database) -> None:
    def fail() -> Commit:
        raise ProblemError(422, "failed", "no")

    key = os.urandom(8).hex()
    for _ in range(2):
        with pytest.raises(ProblemError, match="no"):
            once(database, OWNER, key, "same", fail)
    assert not once(database, OWNER, key, "same", lambda: lambda _: Outcome(201, {})).replayed


def test_quota_holds_for_requests_at_once(database: Database, tmp_path: Path) -> None:
    identifier, _ = create(database, "a")
    limits = settings(tmp_path, quota_bytes=350)
    owner = Owner(identifier)

    def put(number: int) -> None:
        with database.write() as connection:
            sha256 = f"{number:064x}"
            connection.execute(sa.insert(BLOBS).values(sha256=sha256, size=100))
            add(connection, UPLOADS, owner, limits, name=f"{number}", size=100, sha256=sha256)

    results = _together(8, put)
    assert sorted(str(result is None) for result in results) == ["False"] * 5 + ["True"] * 3
    with database.read() as connection:
        assert len(page(connection, UPLOADS, owner, 50, None)[0]) == 3


def test_content_that_is_put_and_removed_at_once_is_never_lost(database: Database, tmp_path: Path) -> None:
    store, limits = Store(tmp_path / "data", database, 0), settings(tmp_path)
    data = os.urandom(10_000)

    def put_and_remove(number: int) -> None:
        owner = Owner(f"key_{number}")
        for turn in range(12):
            with store.incoming(10**6, ProblemError(413, "too-large", "")) as file:
                file.write(data)
                content = file.finish()
                with database.write() as connection:
                    store.keep(connection, file, content)
                    values = {"name": f"{turn}", "size": content.size, "sha256": content.sha256}
                    row = add(connection, UPLOADS, owner, limits, **values)
            with store.local(content) as path:
                assert path.read_bytes() == data
            with database.write() as connection:
                remove(connection, UPLOADS, owner, row.id)
            store.forget(content)

    assert _together(4, put_and_remove) == [None] * 4
    assert not [path for path in (tmp_path / "data" / "blobs").rglob("*") if path.is_file()]
    with database.read() as connection:
        assert connection.execute(sa.select(BLOBS)).all() == []


def test_content_of_a_transaction_that_fails_is_removed(database: Database, tmp_path: Path) -> None:
    store = Store(tmp_path / "data", database, 0)

    def fail() -> None:
        with store.incoming(10**6, ProblemError(413, "too-large", "")) as file:
            file.write(b"x")
            content = file.finish()
            with database.write() as connection:
                store.keep(connection, file, content)
                with store.local(content) as path:
                    assert path.exists()
                raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_same_content_is_one_file(database: Database, tmp_path: Path) -> None:
    store, limits = Store(tmp_path / "data", database, 0), settings(tmp_path)

    def put(number: int) -> Content:
        with store.incoming(10**6, ProblemError(413, "too-large", "")) as file:
            file.write(b"x" * 1000)
            content = file.finish()
            with database.write() as connection:
                store.keep(connection, file, content)
                values = {"name": "x", "size": content.size, "sha256": content.sha256}
                add(connection, UPLOADS, Owner(f"key_{number}"), limits, **values)
            return content

    contents = _together(8, put)
    assert len(set(contents)) == 1
    assert len([path for path in (tmp_path / "data" / "blobs").rglob("*") if path.is_file()]) == 1
