"""Jobs over HTTP: asked for, followed, cancelled, and what they make is the library's."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import sqlalchemy as sa
import torch
from factories_of_tests import digits
from safetensors.torch import load as read_safetensors
from serving import bearer, served
from starlette.testclient import TestClient

import normsearch
from api.database import JOBS
from normsearch.reporting import Document, Summary

FACTORIES = {"digits": "factories_of_tests:digits", "fragile": "factories_of_tests:fragile"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("jobs")
    with served(folder, factories=FACTORIES, requests_per_minute=100_000, search_trials=20) as asking:
        asking.headers.update(bearer(asking))
        yield asking


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = digits()
    with torch.no_grad():
        for _ in range(5):
            model.train()(torch.randn(16, 1, 8, 8) * 2 + 1)
    return model.eval()


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray[Any, Any]]:
    chance = np.random.default_rng(0)
    return {
        "x": chance.normal(1, 2, (60, 1, 8, 8)).astype(np.float32),
        "y": np.arange(60, dtype=np.int64) % 10,
    }


def uploaded(client: TestClient, name: str, content: bytes) -> str:
    return str(client.put("/v1/uploads", params={"filename": name}, content=content).json()["id"])


@pytest.fixture(scope="module")
def model(client: TestClient, network: torch.nn.Module) -> str:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    upload = uploaded(client, "digits.pth", buffer.getvalue())
    made = client.post("/v1/models", json={"upload": upload, "architecture": "factories/digits"})
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


@pytest.fixture(scope="module")
def dataset(client: TestClient, arrays: dict[str, np.ndarray[Any, Any]]) -> str:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    upload = uploaded(client, "digits.npz", buffer.getvalue())
    made = client.post("/v1/datasets", json={"upload": upload, "targets": "y"})
    assert made.status_code == 201, made.text
    assert made.json()["targets"] == "y"
    return str(made.json()["id"])


def posted(client: TestClient, path: str, body: dict[str, Any], **headers: str) -> str:
    answer = client.post(path, json=body, headers=headers)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    return str(answer.json()["id"])


def ended(client: TestClient, job: str, seconds: float = 120) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while True:
        found: dict[str, Any] = client.get(f"/v1/jobs/{job}").json()
        if found["finished"] is not None:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def artifacts(client: TestClient, job: dict[str, Any]) -> dict[str, bytes]:
    """What a job made, by role."""
    assert job["state"] == "succeeded", job
    known = {one["id"]: one for one in client.get("/v1/artifacts", params={"limit": 200}).json()["items"]}
    found = {}
    for identifier in job["result"]["artifacts"]:
        assert known[identifier]["job"] == job["id"]
        found[known[identifier]["role"]] = client.get(f"/v1/artifacts/{identifier}").content
    return found


@pytest.fixture(scope="module")
def conversion(client: TestClient, model: str, dataset: str) -> dict[str, Any]:
    job = posted(client, "/v1/conversions", {"model": model, "to": "instance", "dataset": dataset})
    return ended(client, job)


def same(weights: bytes, model: torch.nn.Module) -> bool:
    found, state = read_safetensors(weights), model.state_dict()
    return set(found) == set(state) and all(torch.equal(found[name], state[name]) for name in state)


class TestConversions:
    def test_is_the_librarys_and_measured_on_the_dataset(
        self,
        client: TestClient,
        conversion: dict[str, Any],
        network: torch.nn.Module,
        arrays: dict[str, np.ndarray[Any, Any]],
    ) -> None:
        made = artifacts(client, conversion)
        assert set(made) == {"weights", "script", "plan", "report", "page"}
        converted = normsearch.convert(network, "instance")
        assert same(made["weights"], converted)
        batches = torch.from_numpy(arrays["x"]).split(16)
        drift = normsearch.compare(network, converted, batches).drift.relative_l2
        summary = Document.from_json(made["report"]).section(Summary)
        assert summary is not None
        assert summary.converted is not None
        assert summary.converted.relative_l2 == pytest.approx(drift, rel=1e-4)
        assert b"random numbers" not in made["page"]

    def test_shapes_of_a_dataset_count_in_plans(self, client: TestClient, model: str, dataset: str) -> None:
        found = client.post("/v1/plans", json={"model": model, "to": "instance", "dataset": dataset})
        assert found.status_code == 200, found.text
        assert found.json()["refused"] == 0
        both = {"model": model, "to": "group", "dataset": dataset, "input_shape": "1x8x8"}
        assert client.post("/v1/plans", json=both).status_code == 422

    def test_a_plan_is_taken_as_it_was_answered(self, client: TestClient, model: str) -> None:
        plan = client.post("/v1/plans", json={"model": model, "to": "frozen"}).json()["plan"]
        job = ended(client, posted(client, "/v1/conversions", {"model": model, "plan": plan}))
        assert json.loads(artifacts(client, job)["plan"]) == plan
        assert job["result"]["exact"] is True

    def test_a_refusal_is_the_jobs_problem(self, client: TestClient, model: str) -> None:
        job = ended(client, posted(client, "/v1/conversions", {"model": model, "to": {"nothing": "group"}}))
        assert job["state"] == "failed"
        assert job["problem"]["type"] == "/problems/refused"
        assert (job["problem"]["status"], job["problem"]["error"]) == (422, "PlanError")
        assert "nothing" in job["problem"]["detail"]
        assert job["result"] is None


class TestCalibrations:
    def test_is_the_librarys(
        self,
        client: TestClient,
        conversion: dict[str, Any],
        dataset: str,
        network: torch.nn.Module,
        arrays: dict[str, np.ndarray[Any, Any]],
    ) -> None:
        weights = conversion["result"]["artifacts"][0]
        body = {"weights": weights, "dataset": dataset, "budget": 6, "batch_size": 10}
        job = ended(client, posted(client, "/v1/calibrations", body))
        made = artifacts(client, job)
        batches = torch.from_numpy(arrays["x"]).split(10)
        torch.set_num_threads(1)
        calibrated = normsearch.calibrate(
            normsearch.convert(network, "instance"), network, list(batches), budget=6
        )
        found = read_safetensors(made["weights"])
        for name, tensor in calibrated.state_dict().items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
        record = normsearch.calibration_record(calibrated)
        assert record is not None
        assert job["result"]["after"] == pytest.approx(record.error.after, rel=1e-3)
        assert job["result"]["after"] < job["result"]["before"]
        assert b"calibrat" in made["page"]

    def test_other_artifacts_are_no_weights(
        self, client: TestClient, conversion: dict[str, Any], dataset: str
    ) -> None:
        plan = conversion["result"]["artifacts"][2]
        refused = client.post("/v1/calibrations", json={"weights": plan, "dataset": dataset})
        assert refused.status_code == 422
        assert "give the weights" in refused.json()["detail"]


def test_sensitivity_is_the_librarys(
    client: TestClient,
    model: str,
    dataset: str,
    network: torch.nn.Module,
    arrays: dict[str, np.ndarray[Any, Any]],
) -> None:
    body = {"model": model, "dataset": dataset, "methods": ["group", "instance"], "threshold": 0.01}
    job = ended(client, posted(client, "/v1/sensitivities", body))
    made = artifacts(client, job)
    assert set(made) == {"sensitivity", "report", "page"}
    found = normsearch.Sensitivity.from_json(made["sensitivity"].decode())
    batches = torch.from_numpy(arrays["x"]).split(16)
    expected = normsearch.sensitivity(network, ["group", "instance"], batches)
    assert found.sites == expected.sites
    for site in found.sites:
        assert found.drift[site] == pytest.approx(expected.drift[site], rel=1e-3)
    assert job["result"]["vetoes"] == {site: list(m) for site, m in expected.vetoes(0.01).items()}


class TestSearches:
    def test_finds_a_plan_and_returns_it_trained(
        self, client: TestClient, model: str, dataset: str, network: torch.nn.Module
    ) -> None:
        body = {
            "model": model,
            "dataset": dataset,
            "methods": ["batch", "group"],
            "trials": 3,
            "recipe": {"steps": 2, "batch_size": 8},
            "veto": None,
            "confirm": 1,
            "top": 1,
        }
        job = ended(client, posted(client, "/v1/searches", body))
        made = artifacts(client, job)
        assert set(made) == {"weights", "script", "plan", "report", "page"}
        result = job["result"]
        assert result["trials"] == 3
        assert sum(result["methods"].values()) == 2
        chosen = result["confirmation"][result["chosen"]]
        assert len(chosen["scores"]) == 1
        plan = normsearch.Plan.from_json(made["plan"].decode())
        found = normsearch.convert(network, plan)
        found.load_state_dict(read_safetensors(made["weights"]))
        # It was trained: no longer what conversion alone gives.
        assert not same(made["weights"], normsearch.convert(network, plan))
        kinds = {section["kind"] for section in json.loads(made["report"])["sections"]}
        assert {"search", "scores", "chosen", "trials"} <= kinds
        assert job["log"][0]["text"].startswith("prepared; 3 trials")

    def test_a_plan_that_fails_when_it_is_run_again_does_not_fail_the_job(
        self, client: TestClient, network: torch.nn.Module, dataset: str
    ) -> None:
        buffer = io.BytesIO()
        torch.save(network.state_dict(), buffer)
        upload = uploaded(client, "fragile.pth", buffer.getvalue())
        model = client.post("/v1/models", json={"upload": upload, "architecture": "factories/fragile"})
        body = {
            "model": model.json()["id"],
            "dataset": dataset,
            "methods": ["batch", "group"],
            "trials": 4,
            "recipe": {"steps": 2, "batch_size": 8},
            "veto": None,
            "confirm": 3,
        }
        job = ended(client, posted(client, "/v1/searches", body))
        made = artifacts(client, job)
        # The plans with GroupNorm first are out; both others were run again with every seed.
        assert [len(row["scores"]) for row in job["result"]["confirmation"]] == [3, 3]
        assert job["result"]["confirmation"][0]["uniform"] == "batch"
        notes = json.loads(made["report"])["sections"][-1]["notes"]
        failed = [note["text"] for note in notes if "was left out: ValueError: diverged" in note["text"]]
        assert failed
        said = [line["text"] for line in job["log"]]
        assert any("with seed 2: failed: ValueError: diverged" in text for text in said)
        # Its other seeds are not run.
        assert not any(
            text.startswith("trial") and f"{failed[0].split()[4]} with seed 3" in text for text in said
        )

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({"recipe": {"batch_size": 64}}, "smaller batch_size"),
            ({"methods": ["batch"]}, "one plan only"),
        ],
    )
    def test_what_cannot_be_searched_is_said(
        self, client: TestClient, model: str, dataset: str, changed: dict[str, Any], words: str
    ) -> None:
        body = {"model": model, "dataset": dataset, "trials": 2, **changed}
        job = ended(client, posted(client, "/v1/searches", body))
        assert job["state"] == "failed"
        assert words in job["problem"]["detail"]

    def test_labels_are_needed_and_must_fit(
        self, client: TestClient, model: str, arrays: dict[str, np.ndarray[Any, Any]]
    ) -> None:
        for targets, labels, words in (
            ("y", arrays["y"] + 1, "classes apart"),
            ("y", arrays["y"] / 2, "whole numbers"),
        ):
            buffer = io.BytesIO()
            np.savez(buffer, x=arrays["x"], y=labels)
            upload = uploaded(client, "other.npz", buffer.getvalue())
            other = client.post("/v1/datasets", json={"upload": upload, "targets": targets}).json()["id"]
            body = {"model": model, "dataset": other, "trials": 2, "recipe": {"batch_size": 8}}
            job = ended(client, posted(client, "/v1/searches", body))
            assert words in job["problem"]["detail"]

    def test_what_cannot_succeed_makes_no_job(
        self, client: TestClient, model: str, dataset: str, arrays: dict[str, np.ndarray[Any, Any]]
    ) -> None:
        before = client.get("/v1/jobs").json()
        buffer = io.BytesIO()
        np.savez(buffer, x=arrays["x"])
        upload = uploaded(client, "unlabelled.npz", buffer.getvalue())
        unlabelled = client.post("/v1/datasets", json={"upload": upload}).json()["id"]
        for route, body, words in (
            ("searches", {"dataset": unlabelled}, "has no labels; make a dataset with targets"),
            ("searches", {"dataset": dataset, "methods": ["nope"]}, "unknown method 'nope'; there are"),
            ("sensitivities", {"dataset": dataset, "methods": ["nope(a=1)"]}, "unknown method 'nope'"),
        ):
            refused = client.post(f"/v1/{route}", json={"model": model, **body})
            assert (refused.status_code, refused.json()["type"]) == (422, "/problems/refused"), refused.text
            assert words in refused.json()["detail"]
        assert client.get("/v1/jobs").json() == before

    def test_trials_are_limited(self, client: TestClient, model: str, dataset: str) -> None:
        body = {"model": model, "dataset": dataset, "trials": 21}
        refused = client.post("/v1/searches", json=body)
        assert (refused.status_code, refused.json()["type"]) == (422, "/problems/invalid-request")


def lines_of(answer: httpx2.Response) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for block in answer.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "id" in fields:
            data = json.loads(fields["data"])
            events.append({"id": int(fields["id"]), "event": fields["event"], "data": data})
    return events


class TestEvents:
    def test_are_followed_and_resumed(self, client: TestClient, conversion: dict[str, Any]) -> None:
        path = f"/v1/jobs/{conversion['id']}/events"
        answer = client.get(path)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = lines_of(answer)
        assert [event["id"] for event in events] == list(range(1, len(events) + 1))
        assert [event["event"] for event in events[:2]] == ["queued", "started"]
        assert events[-1]["event"] == "succeeded"
        assert events[-1]["data"]["artifacts"] == conversion["result"]["artifacts"]
        assert {event["event"] for event in events[2:-1]} <= {"progress", "log"}
        for last in (0, 1, len(events) - 1):
            resumed = lines_of(client.get(path, headers={"Last-Event-ID": str(last)}))
            assert resumed == events[last:]
        assert client.get(path, headers={"Last-Event-ID": "x"}).status_code == 422

    def test_are_seen_while_they_happen(self, client: TestClient, model: str) -> None:
        job = posted(client, "/v1/conversions", {"model": model, "to": "layer", "input_shape": "1x8x8"})
        with client.stream("GET", f"/v1/jobs/{job}/events") as answer:
            text = "".join(answer.iter_text())
        assert "event: succeeded" in text


class TestCancelling:
    def test_ends_a_job_and_its_child(
        self, client: TestClient, conversion: dict[str, Any], dataset: str
    ) -> None:
        body = {
            "weights": conversion["result"]["artifacts"][0],
            "dataset": dataset,
            "budget": 20_000,
            "batch_size": 2,
        }
        job = posted(client, "/v1/calibrations", body)
        waiting = posted(client, "/v1/calibrations", body)
        folder = client.app.state.parts.settings.data / "work"  # type: ignore[attr-defined]
        deadline = time.monotonic() + 60
        while client.get(f"/v1/jobs/{job}").json()["progress"] is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert list(folder.iterdir())
        for one in (waiting, job):
            cancelled = client.post(f"/v1/jobs/{one}/cancel")
            assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
        # Its folder goes when its child is dead.
        start = time.monotonic()
        while list(folder.iterdir()):
            assert time.monotonic() - start < 2
            time.sleep(0.02)
        again = client.post(f"/v1/jobs/{job}/cancel")
        assert (again.status_code, again.json()["type"]) == (409, "/problems/conflict")
        assert client.get(f"/v1/jobs/{waiting}").json()["attempts"] == 0

    def test_is_done_once(self, client: TestClient, model: str) -> None:
        job = posted(client, "/v1/conversions", {"model": model, "to": "group"})
        key = {"Idempotency-Key": "cancel-once"}
        first = client.post(f"/v1/jobs/{job}/cancel", headers=key)
        again = client.post(f"/v1/jobs/{job}/cancel", headers=key)
        if first.status_code == 200:
            assert again.json() == first.json()
            assert again.headers["idempotent-replayed"] == "true"


class TestJobs:
    def test_are_listed_in_pages_and_deleted(
        self, client: TestClient, model: str, conversion: dict[str, Any]
    ) -> None:
        page = client.get("/v1/jobs", params={"limit": 1}).json()
        assert len(page["items"]) == 1
        after = client.get("/v1/jobs", params={"limit": 1, "cursor": page["next"]}).json()
        assert after["items"][0]["id"] < page["items"][0]["id"]
        for cursor in ("", "garbage", "job_zzz", page["next"].replace("job", "mod"), "☃", "\0"):
            assert client.get("/v1/jobs", params={"cursor": cursor}).status_code == 422, cursor
        job = ended(client, posted(client, "/v1/conversions", {"model": model, "to": "rms"}))
        artifact = job["result"]["artifacts"][0]
        assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
        assert client.get(f"/v1/jobs/{job['id']}").status_code == 404
        assert client.get(f"/v1/artifacts/{artifact}").status_code == 200

    def test_are_made_once_for_each_key(self, client: TestClient, model: str) -> None:
        body = {"model": model, "to": "group(groups=4)"}
        first = posted(client, "/v1/conversions", body, **{"Idempotency-Key": "job-once"})
        assert posted(client, "/v1/conversions", body, **{"Idempotency-Key": "job-once"}) == first
        other = client.post(
            "/v1/conversions", json={**body, "to": "layer"}, headers={"Idempotency-Key": "job-once"}
        )
        assert other.status_code == 422

    def test_keep_what_they_read(
        self, client: TestClient, network: torch.nn.Module, arrays: dict[str, np.ndarray[Any, Any]]
    ) -> None:
        buffer = io.BytesIO()
        torch.save(network.state_dict(), buffer)
        upload = uploaded(client, "kept.pth", buffer.getvalue())
        body = {"upload": upload, "architecture": "factories/digits"}
        mine = client.post("/v1/models", json=body).json()["id"]
        job = posted(client, "/v1/sensitivities", {"model": mine, "input_shape": "1x8x8"})
        refused = client.delete(f"/v1/models/{mine}")
        if ended(client, job)["state"] == "succeeded" and refused.status_code != 409:
            pytest.fail("a model was deleted under a job that read it")
        assert job in refused.json()["detail"] or "artifact" in refused.json()["detail"]

    def test_other_keys_see_nothing(
        self, client: TestClient, conversion: dict[str, Any], model: str, dataset: str
    ) -> None:
        stranger, job = bearer(client, "stranger"), conversion["id"]
        weights = conversion["result"]["artifacts"][0]
        assert client.get("/v1/jobs", headers=stranger).json()["items"] == []
        for method, path, body in (
            ("GET", f"/v1/jobs/{job}", None),
            ("DELETE", f"/v1/jobs/{job}", None),
            ("GET", f"/v1/jobs/{job}/events", None),
            ("POST", f"/v1/jobs/{job}/cancel", None),
            ("POST", "/v1/conversions", {"model": model, "to": "group"}),
            ("POST", "/v1/sensitivities", {"model": model, "input_shape": "1x8x8"}),
            ("POST", "/v1/searches", {"model": model, "dataset": dataset}),
            ("POST", "/v1/calibrations", {"weights": weights, "dataset": dataset}),
        ):
            answer = client.request(method, path, json=body, headers=stranger)
            assert answer.status_code == 404, (path, answer.text)


def test_unfinished_jobs_are_limited(tmp_path: Path, network: torch.nn.Module) -> None:
    with served(tmp_path, factories=FACTORIES, workers=0, unfinished_jobs=2) as client:
        client.headers.update(bearer(client))
        buffer = io.BytesIO()
        torch.save(network.state_dict(), buffer)
        upload = uploaded(client, "digits.pth", buffer.getvalue())
        body = {"upload": upload, "architecture": "factories/digits"}
        made = client.post("/v1/models", json=body).json()["id"]
        wanted = {"model": made, "to": "group"}
        jobs = [posted(client, "/v1/conversions", wanted) for _ in range(2)]
        refused = client.post("/v1/conversions", json=wanted)
        assert (refused.status_code, refused.json()["type"]) == (429, "/problems/too-many-jobs")
        assert int(refused.headers["retry-after"]) > 0
        # Another key has its own.
        other = bearer(client, "b")
        assert client.post("/v1/conversions", json=wanted, headers=other).status_code == 404
        assert client.post(f"/v1/jobs/{jobs[0]}/cancel").status_code == 200
        assert client.post("/v1/conversions", json=wanted).status_code == 202
        assert client.delete(f"/v1/jobs/{jobs[1]}").status_code == 409
        assert client.delete(f"/v1/models/{made}").status_code == 409


def test_convert_answers_later_where_it_takes_long(tmp_path: Path, network: torch.nn.Module) -> None:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    form = {"architecture": "factories/digits", "to": "group"}
    with served(tmp_path, factories=FACTORIES, convert_seconds=0, workers=0) as client:
        client.headers.update(bearer(client))
        files = {"file": ("digits.pth", buffer.getvalue())}
        key = {"Idempotency-Key": "convert-once"}
        later = client.post("/v1/convert", files=files, data=form, headers=key)
        assert later.status_code == 202
        assert later.headers["location"] == f"/v1/jobs/{later.json()['id']}"
        again = client.post("/v1/convert", files=files, data=form, headers=key)
        assert again.json() == later.json()
        assert again.headers["idempotent-replayed"] == "true"
        # What came with it goes with it.
        assert client.post(f"{later.headers['location']}/cancel").status_code == 200
        assert client.get("/v1/uploads").json()["items"] == []
        assert not [path for path in (tmp_path / "data" / "blobs").rglob("*") if path.is_file()]
        gone = client.post("/v1/convert", files=files, data=form, headers=key)
        assert (gone.status_code, gone.json()["type"]) == (409, "/problems/conflict")


def test_streams_and_waiting_jobs_are_counted(tmp_path: Path, network: torch.nn.Module) -> None:
    with served(tmp_path, factories=FACTORIES, workers=0, convert_seconds=0) as client:
        client.headers.update(bearer(client))
        buffer = io.BytesIO()
        torch.save(network.state_dict(), buffer)
        form = {"architecture": "factories/digits", "to": "group"}
        parts = client.app.state.parts  # type: ignore[attr-defined]
        files = {"file": ("digits.pth", buffer.getvalue())}
        job = client.post("/v1/convert", files=files, data=form).json()["id"]
        assert 'normsearch_jobs{state="queued"} 1.0' in client.get("/metrics").text
        with parts.database.read() as connection:
            asker = connection.scalar(sa.select(JOBS.c.owner).where(JOBS.c.id == job))
        for _ in range(20):
            parts.streams.enter(asker)
        refused = client.get(f"/v1/jobs/{job}/events")
        assert (refused.status_code, refused.json()["type"]) == (429, "/problems/rate-limited")
        for _ in range(20):
            parts.streams.leave(asker)
        assert client.post(f"/v1/jobs/{job}/cancel").status_code == 200
        assert "event: cancelled" in client.get(f"/v1/jobs/{job}/events").text
        # Whoever has left counts no more.
        assert parts.streams._open.total() == 0
