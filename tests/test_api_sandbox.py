"""Children that misbehave: none reaches out of its folder, harms the service, or outlives its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import Ask, Seen
from serving import ROOT, settings

from api.forking import without
from api.hearing import open_plain
from api.messages import Progressed
from api.observing import Metrics
from api.problems import ProblemError
from api.sandbox import CancelledError, Sandbox, _remove

MEMORY = 300_000_000


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    os.environ["NORMSEARCH_SECRET"] = "hunter2"
    folder = tmp_path_factory.mktemp("sandbox")
    limits = {"child_seconds": 4, "child_memory_bytes": MEMORY, "child_file_bytes": 5_000_000}
    made = Sandbox(settings(folder, **limits), Metrics(), "hostile")
    (folder / "data" / "secret").write_text("secret")
    yield made
    made.close()
    del os.environ["NORMSEARCH_SECRET"]


def _secret(sandbox: Sandbox) -> Path:
    return sandbox._settings.data / "secret"


def _run(sandbox: Sandbox, task: str, **ask: Any) -> Seen:
    with sandbox.run(task, Ask(**ask), Seen) as finished:
        return finished.result


def test_work_is_done_and_its_files_are_read(sandbox: Sandbox) -> None:
    steps: list[Progressed] = []
    with sandbox.run("obey", Ask(path="content"), Seen, on_progress=steps.append) as finished:
        assert int(finished.result.text) != os.getpid()
        with os.fdopen(finished.open("made.txt")) as file:
            assert file.read() == "content"
        for name in ("../secret", "/etc/passwd", "missing", ".", "a/b", ""):
            with pytest.raises(ProblemError, match="misbehaved"):
                finished.open(name)
    assert [step.stage for step in steps] == ["a"]
    assert list((sandbox._settings.data / "work").iterdir()) == []


def test_platform_confines_fully_here(sandbox: Sandbox) -> None:
    applied = sandbox.confinement()
    # What is missing elsewhere is reported; here nothing is.
    assert applied.landlock >= 1
    assert applied.seccomp
    assert applied.no_capabilities


def test_child_reaches_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = _secret(sandbox)
    given = tmp_path / "blob"
    given.write_text("the input")
    with sandbox.run(
        "look_around", Ask(pid=os.getpid(), path=str(secret)), Seen, {"given.pth": given}
    ) as finished:
        assert finished.result.possible == []
        assert finished.result.text == "the input"
    assert secret.read_text() == "secret"


def test_what_a_child_cannot_is_possible_elsewhere(tmp_path: Path) -> None:
    code = (
        "import hostile, json, pathlib, sys; "
        "print(json.dumps(hostile.harmless(hostile.Ask(path=sys.argv[1]), pathlib.Path(sys.argv[2]))))"
    )
    (tmp_path / "secret").write_text("x")
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "secret"), str(tmp_path / "work")],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "NORMSEARCH_SECRET": "hunter2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(done.stdout)) >= 16


@pytest.mark.parametrize(
    ("task", "kind", "words"),
    [
        ("huge_line", "failed", "more than it may"),
        ("many_lines", "failed", "more than it may"),
        ("wrong_form", "failed", "form"),
        ("say_more", "failed", "last word"),
        ("crash", "failed", "died"),
        ("leave", "failed", "died"),
        ("answer_and_die", "failed", "died"),
        ("fill_disk", "failed", "died"),
        ("eat_memory", "limits-exceeded", "memory"),
        ("hang", "limits-exceeded", "seconds"),
        ("spin", "limits-exceeded", "seconds|processor"),
    ],
)
def test_misbehaviour_is_a_problem_of_the_request(sandbox: Sandbox, task: str, kind: str, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(ProblemError, match=words) as caught:
        _run(sandbox, task)
    assert caught.value.status == 422
    assert caught.value.kind == kind
    assert time.monotonic() - start < 8
    assert _run(sandbox, "obey").text


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "null",
        '{"kind": "done"}',
        '{"kind": "evil"}',
        '{"kind":"done","result":[]}',
        "\xff\xfe",
        "[" * 9999,
        '{"kind":"progress","stage":"x","done":-1,"total":1}',
        '{"kind":"failed","error":"x","detail":"y","z":1}',
    ],
)
def test_lines_that_are_none(sandbox: Sandbox, line: str) -> None:
    with pytest.raises(ProblemError, match="not understood"):
        _run(sandbox, "malformed", path=line)


def test_child_that_closes_its_pipe_and_lingers_is_killed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.sandbox._PATIENCE", 0.5)
    with pytest.raises(ProblemError, match="died"):
        _run(sandbox, "hang_silently")


def test_refusals_come_with_site_and_fix(sandbox: Sandbox) -> None:
    with pytest.raises(ProblemError) as caught:
        _run(sandbox, "refuse")
    assert caught.value.members["site"] == "bn1"
    assert caught.value.members["fix"] == "do"


def test_folders_of_any_depth_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(tmp_path)
    _remove(tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_cancelling_kills_at_once(sandbox: Sandbox, tmp_path: Path) -> None:
    cancelled = threading.Event()
    timer = threading.Timer(0.5, cancelled.set)
    timer.start()
    start = time.monotonic()

    def run() -> None:
        with sandbox.run("hang", Ask(), Seen, cancelled=cancelled):
            pass

    with pytest.raises(CancelledError):
        run()
    assert time.monotonic() - start < 2.5


def test_process_that_forks_is_started_again(sandbox: Sandbox) -> None:
    assert sandbox._forker.process is not None
    first = sandbox._forker.process.pid
    sandbox._forker.process.kill()
    sandbox._forker.process.wait()
    assert _run(sandbox, "obey").text
    assert sandbox._forker.process is not None
    assert sandbox._forker.process.pid != first


def test_plain_files_alone_are_opened(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    (tmp_path / "plain").write_text("x")
    (tmp_path / "outside").write_text("x")
    os.symlink("/etc/passwd", tmp_path / "symbolic")
    os.link(tmp_path / "outside", tmp_path / "hard")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    os.close(open_plain(folder, "plain"))
    for name in ("symbolic", "hard", "pipe", "folder"):
        with pytest.raises(ProblemError, match="misbehaved"):
            open_plain(folder, name)
    os.close(folder)


def test_data_are_in_no_readable_folder(tmp_path: Path) -> None:
    for name in ("a/b", "a/data/x", "c"):
        (tmp_path / name).mkdir(parents=True)
    found = set(without(tmp_path, tmp_path / "a" / "data"))
    assert found == {tmp_path / "c", tmp_path / "a" / "b"}
    assert set(without(tmp_path / "c", tmp_path / "a" / "data")) == {tmp_path / "c"}


def test_environment_is_forgotten_where_the_system_shows_it() -> None:
    code = (
        "import os; from pathlib import Path; from api.confinement import forget_environment; "
        "forget_environment('NORMSEARCH_'); "
        "shown = Path('/proc/self/environ').read_bytes(); "
        "print(b'hunter2' in shown, b'KEPT=1' in shown, 'NORMSEARCH_A' in os.environ, os.environ['KEPT'])"
    )
    given = {"NORMSEARCH_A": "hunter2", "KEPT": "1", "NORMSEARCH_B": "hunter2", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", code], env=given, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True", "False", "1"]


_PARENT = """
import sys
from pathlib import Path
from hostile import Ask, Seen
from serving import settings
from api.observing import Metrics
from api.sandbox import Sandbox
from api.confinement import hide
hide()
folder = Path(sys.argv[1])
sandbox = Sandbox(settings(folder, child_seconds=60), Metrics(), "hostile")
with sandbox.run("hang_noting", Ask(), Seen):
    pass
"""


@pytest.mark.parametrize("victim", ["service", "zygote"])
def test_children_die_with_their_parents(victim: str, tmp_path: Path) -> None:
    code = _PARENT.replace("hang_noting", "hang").replace("Ask()", "Ask(path='pid')")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    try:
        deadline = time.monotonic() + 20
        while not (noted := list((tmp_path / "data").glob("work/*/pid"))) or not noted[0].read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child = int(noted[0].read_text())
        zygote = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent.pid if victim == "service" else zygote, signal.SIGKILL)
        deadline = time.monotonic() + 2
        while _lives(child) or (victim == "service" and _lives(zygote)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        parent.kill()
        parent.wait()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
