"""The application around the nouns: keys, problems, logs, metrics, headers, settings, the database."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from fastapi import APIRouter
from pydantic import ValidationError
from serving import bearer, served, with_database
from starlette.testclient import TestClient

from api import migrating
from api.database import METADATA, new_id, sqlite_url
from api.migrating import MigrationError, newest, open_database, outdated
from api.observing import JsonLines
from api.parts import Asking
from api.queueing import TABLES
from api.settings import Settings

ROOT = Path(__file__).parent.parent
PROBE = APIRouter()


@PROBE.get("/probe")
def probe(asking: Asking) -> str:
    return asking.id


@PROBE.get("/broken")
def broken() -> None:
    raise RuntimeError("the password is hunter2")


def _probed(client: TestClient) -> TestClient:
    client.app.include_router(PROBE)  # type: ignore[attr-defined]
    return client


def test_health_and_headers(tmp_path: Path) -> None:
    with served(tmp_path) as client:
        answer = client.get("/health/live", headers={"X-Request-Id": "mine-1"})
        assert answer.json() == {"status": "live"}
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers
        assert client.get("/health/ready").status_code == 200
        odd = client.get("/health/live", headers={"X-Request-Id": "a b<script>"})
        assert re.fullmatch("[0-9a-f]{16}", odd.headers["x-request-id"])


def test_metrics_count_routes_and_not_paths(tmp_path: Path) -> None:
    with served(tmp_path) as client:
        client.get("/health/live")
        client.get("/nothing/strangers-choice")
        text = client.get("/metrics").text
        assert 'normsearch_requests_total{method="GET",route="/health/live",status="200"} 1.0' in text
        assert "strangers-choice" not in text
        assert client.get("/metrics", headers={"X-Forwarded-For": "8.8.8.8"}).status_code == 401
    with served(tmp_path, client="10.0.0.7") as client:
        assert client.get("/metrics").status_code == 401
    with served(tmp_path, client="10.0.0.7", metrics_token="t0ken") as client:
        assert client.get("/metrics", headers={"Authorization": "Bearer t0ken"}).status_code == 200
        assert client.get("/metrics", headers={"Authorization": "Bearer other"}).status_code == 401


def test_keys_are_needed_hashed_and_revocable(tmp_path: Path) -> None:
    with served(tmp_path) as client:
        _probed(client)
        refused = client.get("/probe")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.headers["content-type"] == "application/problem+json"
        assert client.get("/probe", headers={"Authorization": "Bearer nsk_nobody"}).status_code == 401
        mine = bearer(client)
        identifier = client.get("/probe", headers=mine).json()
        assert identifier.startswith("key_")
        secret = mine["Authorization"].removeprefix("Bearer ")
        stored = b"".join(path.read_bytes() for path in (tmp_path / "data").glob("normsearch.sqlite*"))
        assert secret.encode() not in stored
        assert identifier.encode() in stored
        done = _cli(tmp_path, "keys", "revoke", identifier)
        assert done.returncode == 0, done.stderr
        assert client.get("/probe", headers=mine).status_code == 401


def test_rate_is_limited_per_key_and_per_address(tmp_path: Path) -> None:
    with served(tmp_path, requests_per_minute=5) as client:
        _probed(client)
        one, other = bearer(client), bearer(client)
        statuses = [client.get("/probe", headers=one).status_code for _ in range(7)]
        assert statuses == [200] * 5 + [429] * 2
        assert client.get("/probe", headers=other).status_code == 200
        assert [client.get("/probe").status_code for _ in range(6)] == [401] * 5 + [429]
        assert client.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("127.0.0.1", {"Host": "localhost:8000"}, 200),
        ("127.0.0.1", {"Origin": "http://127.0.0.1"}, 200),
        ("10.0.0.7", {}, 403),
        ("127.0.0.1", {"Host": "evil.example"}, 403),
        ("127.0.0.1", {"Origin": "https://evil.example"}, 403),
        ("127.0.0.1", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("127.0.0.1", {"X-Forwarded-For": "8.8.8.8"}, 403),
    ],
)
def test_open_service_answers_its_own_machine_alone(
    client: str, headers: dict[str, str], status: int, tmp_path: Path
) -> None:
    with served(tmp_path, client=client, open=True) as asking:
        assert _probed(asking).get("/probe", headers=headers).status_code == status


def test_open_service_listens_on_loopback_alone(tmp_path: Path) -> None:
    done = _cli(tmp_path, "serve", "--host", "0.0.0.0", NORMSEARCH_OPEN="1")
    assert done.returncode == 1
    assert "loopback" in done.stderr


def test_errors_are_problem_details(tmp_path: Path) -> None:
    with served(tmp_path) as client:
        _probed(client)
        for answer, status in (
            (client.get("/nothing"), 404),
            (client.post("/health/live"), 405),
            (client.get("/broken"), 500),
        ):
            document = answer.json()
            assert answer.status_code == document["status"] == status
            assert answer.headers["content-type"] == "application/problem+json"
            assert document["request_id"] == answer.headers["x-request-id"]
            assert document["type"].startswith("/problems/")
            assert "hunter2" not in answer.text


def test_busy_and_ending_services_say_so(tmp_path: Path) -> None:
    with served(tmp_path, wait_seconds=0.1) as client:
        mine, parts = bearer(client), client.app.state.parts  # type: ignore[attr-defined]
        assert client.portal is not None
        client.portal.call(parts.turns.acquire_on_behalf_of, "somebody")
        busy = client.post("/v1/models", json={"upload": "x"}, headers=mine)
        assert (busy.status_code, busy.json()["type"]) == (503, "/problems/busy")
        assert int(busy.headers["retry-after"]) > 0
        assert client.get("/v1/uploads", headers=mine).status_code == 200
        client.portal.call(parts.turns.release_on_behalf_of, "somebody")
        parts.sandbox.close()
        assert client.get("/v1/methods", headers=mine).status_code == 503


def test_database_that_fails_is_503_or_507(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tmp_path) as client:
        _probed(client)
        for reason, status in (("database is locked", 503), ("database or disk is full", 507)):

            def fail(*_: Any, reason: str = reason) -> Any:
                raise sa.exc.OperationalError("SELECT", {}, sqlite3.OperationalError(reason))

            monkeypatch.setattr("api.parts.owner_of", fail)
            answer = client.get("/probe", headers={"Authorization": "Bearer nsk_x"})
            assert answer.status_code == status
            assert "SELECT" not in answer.text


def test_log_is_json_without_secrets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "normsearch.api")
    with served(tmp_path) as client:
        mine = bearer(client)
        _probed(client).get("/probe?token=abc", headers=mine)
        client.get("/a%0ab", headers={"X-Request-Id": "x\ny"})
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    seen = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in seen] == [200, 404]
    assert seen[0]["key"].startswith("key_")
    assert mine["Authorization"][-20:] not in json.dumps(lines)
    assert "abc" not in json.dumps(lines)


def test_migrations_make_what_the_code_expects(tmp_path: Path) -> None:
    # The queue's tables are DBOS's.
    ours = {"include_name": lambda name, kind, _: kind != "table" or name in METADATA.tables}
    for _ in range(2):
        database = open_database(sqlite_url(tmp_path))
        with database.read() as connection:
            assert compare_metadata(MigrationContext.configure(connection, opts=ours), METADATA) == []
        database.close()


def test_the_last_migrations_are_known_without_what_runs_them() -> None:
    from dbos._migration import get_dbos_migrations, sqlite_migrations

    assert newest() == ScriptDirectory(str(ROOT / "api" / "migrations")).get_current_head()
    assert len(sqlite_migrations) == len(get_dbos_migrations("dbos", True)) == TABLES


def test_database_that_cannot_be_used_is_named_at_the_start(tmp_path: Path) -> None:
    for url in ("nonsense", "postgresql+asyncpg://anna:secret@localhost/x"):
        with pytest.raises(ValidationError, match="write postgresql://USER:PASSWORD@HOST/NAME") as raised:
            Settings(database_url=url)
        assert "secret" not in str(raised.value)
    mysql = "mysql://anna:secret@localhost/x"
    done = _cli(tmp_path, "serve", "--port", "0", NORMSEARCH_OPEN="1", NORMSEARCH_DATABASE_URL=mysql)
    assert done.returncode == 1
    assert done.stderr.startswith("error: NORMSEARCH_DATABASE_URL: ")
    assert "secret" not in done.stderr
    # A newer release was here.
    with_database(tmp_path / "data")
    place = tmp_path / "data" / "normsearch.sqlite"
    with closing(sqlite3.connect(place)) as plain, plain:
        plain.execute("UPDATE alembic_version SET version_num = '9999'")
    done = _cli(tmp_path, "serve", "--port", "0", NORMSEARCH_OPEN="1")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: the database sqlite:///{place} cannot be brought up to date: ")
    assert "9999" in last
    # A table is there that a migration would make: nothing of it is done.
    with closing(sqlite3.connect(place)) as plain, plain:
        plain.execute("UPDATE alembic_version SET version_num = '0001'")
    with pytest.raises(MigrationError, match="already exists"):
        open_database(sqlite_url(tmp_path / "data"))
    with closing(sqlite3.connect(place)) as plain:
        assert plain.execute("SELECT version_num FROM alembic_version").fetchone() == ("0001",)


def test_an_sqlite_that_cannot_hold_the_queue_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outdated((3, 11), (3, 40, 1)) is None
    assert outdated((3, 12), (3, 42, 0)) is None
    said = "SQLite 3.40.1 is too old for the queue under Python 3.13, which needs 3.42; use PostgreSQL"
    assert str(outdated((3, 13), (3, 40, 1))).startswith(said)
    monkeypatch.setattr(migrating, "outdated", lambda python, sqlite: said)
    with pytest.raises(MigrationError, match="is too old for the queue"):
        open_database(sqlite_url(tmp_path))


def test_a_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    database = open_database(sqlite_url(with_database(tmp_path)))
    table = METADATA.tables["blobs"]

    def fail() -> None:
        with database.write() as connection:
            connection.execute(sa.insert(table).values(sha256="0" * 64, size=1))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with database.read() as connection:
        assert connection.execute(sa.select(table)).all() == []
    database.close()
    with sqlite3.connect(tmp_path / "normsearch.sqlite") as plain:
        assert plain.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    plain.close()


def test_ids_sort_by_time_and_differ() -> None:
    made = [new_id("x") for _ in range(1000)]
    assert len(set(made)) == 1000
    assert [one[:14] for one in made] == sorted(one[:14] for one in made)


def test_settings_are_documented_and_checked(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "service.md").read_text()
    for name, field in Settings.model_fields.items():
        assert f"| `NORMSEARCH_{name.upper()}` |" in page, name
        assert field.description
        assert field.description in page, name
    done = _cli(tmp_path, "keys", "list", NORMSEARCH_UPLOAD_BYTES="a lot")
    assert done.returncode == 1
    assert "NORMSEARCH_UPLOAD_BYTES" in done.stderr
    done = _cli(tmp_path, "keys", "list", NORMSEARCH_FACTORIES='{"x": "os.system(1)"}')
    assert done.returncode == 1


def test_command_line_makes_and_lists_keys(tmp_path: Path) -> None:
    made = _cli(tmp_path, "keys", "create", "anna", "--quota", "5GiB")
    assert re.fullmatch(r"nsk_[\w-]{43}\n", made.stdout)
    listed = _cli(tmp_path, "keys", "list").stdout
    assert "anna" in listed
    assert "5.0GiB" in listed
    assert made.stdout.strip() not in listed
    assert _cli(tmp_path, "keys", "revoke", "key_nothing").returncode == 1


def _cli(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    given: dict[str, Any] = {**os.environ, "NORMSEARCH_DATA": str(folder / "data"), **environment}
    return subprocess.run(
        [sys.executable, "-m", "api", *arguments],
        cwd=ROOT,
        env=given,
        capture_output=True,
        text=True,
        check=False,
    )
