"""The OpenAPI document says what the service does: schemathesis asks what the document allows, and more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from serving import running, settings, with_database

from api import keys
from api.database import Database, sqlite_url
from api.main import create_app


@pytest.mark.parametrize("examples", ["2", pytest.param("20", marks=pytest.mark.slow)])
def test_schemathesis_finds_nothing(examples: str, tmp_path: Path) -> None:
    program = shutil.which("st", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("schemathesis is not installed")
    database = Database(sqlite_url(with_database(tmp_path / "data")))
    _, key = keys.create(database, "schemathesis", None)
    database.close()
    given = {
        "NORMSEARCH_OPEN": "0",
        "NORMSEARCH_METRICS_TOKEN": key,
        "NORMSEARCH_REQUESTS_PER_MINUTE": "1000000",
        "NORMSEARCH_UNFINISHED_JOBS": "1000000",
    }
    with running(tmp_path, **given) as port:
        header = {"Authorization": f"Bearer {key}"}
        # The first child takes seconds; those of the run have a time limit.
        httpx2.get(f"http://127.0.0.1:{port}/v1/methods", headers=header, timeout=100)
        done = subprocess.run(
            [
                program,
                "run",
                f"http://127.0.0.1:{port}/openapi.json",
                "--header",
                f"Authorization: Bearer {key}",
                "--max-examples",
                examples,
                "--seed",
                "1",
                "--no-color",
                # A request may wait for its job.
                "--request-timeout",
                "90",
                # Whether a file holds a network, and which, no schema says.
                "--exclude-checks",
                "positive_data_acceptance",
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    events = [
        json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")
    ]
    assert [event for event in events if event["level"] == "error"] == []
    statuses = {event["status"] for event in events if event["event"] == "request"}
    assert {status for status in statuses if status >= 500} == set()


def test_every_answer_is_documented(tmp_path: Path) -> None:
    document = create_app(settings(tmp_path)).openapi()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            assert operation["description"], (method, path)
            if not path.startswith("/v1"):
                continue
            assert {"401", "403", "429", "503"} <= set(operation["responses"]), (method, path)
            assert operation["security"] == [{"HTTPBearer": []}]
            names = {parameter["name"].lower() for parameter in operation.get("parameters", [])}
            assert (method == "post") == ("idempotency-key" in names), (method, path)
            for status, answer in operation["responses"].items():
                if status >= "400":
                    assert list(answer["content"]) == ["application/problem+json"], (method, path, status)
    for noun in ("uploads", "models", "datasets", "artifacts", "jobs"):
        assert {"limit", "cursor"} <= {
            parameter["name"] for parameter in document["paths"][f"/v1/{noun}"]["get"]["parameters"]
        }
