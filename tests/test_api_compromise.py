"""A child that was taken over: it reads nothing of the service, makes it run nothing, breaks nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from planted import SECRET
from serving import ROOT, running


class Service:
    """A service whose children were taken over, as its clients see it."""

    def __init__(self, port: int, folder: Path) -> None:
        self.port, self.folder, self.canary = port, folder, folder / "canary"
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self.upload = self.client.put("/v1/uploads?filename=x.pth", content=b"x").json()["id"]

    def told(self, kind: str) -> str:
        return f"{self.canary}|{self.port}|{kind}"

    def model(self, kind: str) -> Any:
        return self.client.post("/v1/models", json={"upload": self.upload, "entry": self.told(kind)})

    def convert(self, kind: str) -> Any:
        fields = {"to": "group", "entry": self.told(kind)}
        return self.client.post("/v1/convert", files={"file": ("x.pth", b"x")}, data=fields)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("compromise")
    given = {"NORMSEARCH_METRICS_TOKEN": SECRET, "ANOTHER_TOKEN": SECRET}
    with running(folder, tasks="planted", **given) as port:
        made = Service(port, folder)
        yield made
        made.client.close()
    events = [json.loads(line) for line in (folder / "log").read_text().splitlines() if line.startswith("{")]
    assert [event for event in events if event["level"] == "error" or event.get("status", 0) >= 500] == []
    assert SECRET not in (folder / "log").read_text()
    # After the service has ended too: nothing was left that it imports.
    assert not made.canary.exists()


def test_it_reaches_nothing_and_its_answer_is_only_data(service: Service) -> None:
    made = service.model("look")
    assert made.status_code == 201, made.text
    # Of what was tried, nothing was possible.
    assert made.json()["notes"] == []
    assert SECRET not in made.text
    assert made.headers["content-type"] == "application/json"


def test_all_of_that_is_possible_elsewhere(service: Service, tmp_path: Path) -> None:
    code = (
        "import json, planted, pathlib, sys; _, folder, canary, port = sys.argv; "
        "print(json.dumps(planted.possible(pathlib.Path(folder), canary, int(port))))"
    )
    folder = service.folder / "data" / "work" / "x"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "canary"), str(service.port)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "A": SECRET},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(done.stdout)) == 7, done.stdout


def test_a_pickle_as_its_answer_is_refused(service: Service) -> None:
    refused = service.model("pickle")
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/failed")
    assert "misbehaved" in refused.json()["detail"]


@pytest.mark.parametrize("kind", ["text", "list", "deep"])
def test_a_plan_that_is_none_is_refused(service: Service, kind: str) -> None:
    # The entry that a model was made with is what the next child is told.
    model = service.model(kind).json()["id"]
    refused = service.client.post("/v1/plans", json={"model": model, "to": "group"})
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/failed"), refused.text


@pytest.mark.parametrize("kind", ["outside", "missing", "input"])
def test_files_that_are_not_its_own_are_refused(service: Service, kind: str) -> None:
    before = service.client.get("/v1/artifacts").json()
    refused = service.convert(kind)
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/failed"), refused.text
    assert service.client.get("/v1/artifacts").json() == before


def test_files_of_its_own_are_kept_as_bytes_and_sent_as_attachments(service: Service) -> None:
    made = service.convert("pickle")
    assert made.status_code == 200, made.text
    assert made.content.startswith(b"\x80")
    assert made.headers["content-disposition"] == 'attachment; filename="sitecustomize.py"'
    assert "sandbox" in made.headers["content-security-policy"]
    assert made.headers["x-content-type-options"] == "nosniff"
    assert not list((service.folder / "data").rglob("sitecustomize.py"))


def test_a_description_beyond_its_limits_is_refused(service: Service) -> None:
    refused = service.client.post("/v1/datasets", json={"upload": service.upload})
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/failed"), refused.text


def test_names_that_it_makes_up_are_only_names(service: Service) -> None:
    for place in ("/v1/architectures", "/v1/methods"):
        answer = service.client.get(place)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
    assert os.listdir(service.folder / "data" / "work") == []
