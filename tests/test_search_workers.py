"""Several processes on one study that are killed and stopped: nothing lost, nothing twice, nothing stuck."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from sqlalchemy import text

from benchmarks.search import postgresql, storms
from benchmarks.search.storms import STUDY, Verdict, Work, Workers, begin, storm, verdict
from normsearch.searching import LeaseTerms, NormSampler, check_shared, open_storage, run_trials

#: Killed at random, a trial may take many workers down without being to blame.
TERMS = LeaseTerms(beat=0.2, patience=1.2, attempts=100)


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    reason = postgresql.missing()
    if reason is not None:
        pytest.skip(reason)
    with postgresql.cluster() as running:
        yield running.url


@pytest.fixture
def database(server: str, request: pytest.FixtureRequest) -> str:
    """An empty database of this test's own."""
    name = f"test_{zlib.crc32(request.node.nodeid.encode())}"
    storage = open_storage(server)
    assert isinstance(storage, RDBStorage)
    with storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    return f"{server.rpartition('/')[0]}/{name}"


@pytest.fixture(params=["journal", "postgresql"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "journal":
        return str(tmp_path / "journal")
    url: str = request.getfixturevalue("database")
    return url


def assert_clean(found: Verdict, trials: int) -> None:
    assert found.is_clean(), found
    assert found.complete == trials, found


def test_killed_workers_lose_nothing(shared: str, tmp_path: Path) -> None:
    """As on several machines: only their beats tell that they are gone."""
    # Three seconds of work at least, for a second of blows: a busy machine strikes late.
    task = Work(shared, tmp_path, n_trials=40, seconds=0.3, terms=TERMS, elsewhere=True)
    found = storm(task, workers=4, kills=6, pause=0.15, seed=7)
    assert_clean(found, 40)
    assert found.struck == 6


def test_stopped_workers_do_no_harm_when_they_go_on(shared: str, tmp_path: Path) -> None:
    task = Work(shared, tmp_path, n_trials=12, seconds=0.3, terms=TERMS)
    found = storm(task, workers=3, kills=1, stops=2, pause=0.3, seed=1)
    assert_clean(found, 12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_long_storms(shared: str, tmp_path: Path, seed: int) -> None:
    task = Work(shared, tmp_path, n_trials=60, seconds=0.2, terms=TERMS, elsewhere=seed % 2 == 0)
    found = storm(task, workers=4, kills=25, stops=5, pause=0.15, seed=seed, limit=120)
    assert_clean(found, 60)


def test_one_worker_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = optuna.create_study(direction="maximize", sampler=NormSampler(seed=0))
    run_trials(whole, lambda t: storms.value(t.params), n_trials=14, distributions=storms.SPACE)
    task = Work(str(tmp_path / "journal"), tmp_path, n_trials=14, seconds=0.05, terms=TERMS)
    task = replace(task, terms=LeaseTerms(attempts=100))
    study = begin(task)
    (tmp_path / "go").touch()
    with Workers(task) as crew:
        for wanted in (2, 7, 11):
            process = crew.start()
            wait_for(lambda wanted=wanted: len(study.trials) > wanted)
            crew.kill(process)
        crew.start()
        crew.wait(30)
    assert_clean(verdict(study, task, struck=3), 14)
    assert [trial.params for trial in study.trials] == [trial.params for trial in whole.trials]


def test_a_stopped_worker_finds_its_trial_finished(tmp_path: Path) -> None:
    task = Work(str(tmp_path / "journal"), tmp_path, n_trials=3, seconds=0.5, terms=TERMS)
    study = begin(task)
    (tmp_path / "go").touch()
    with Workers(task) as crew:
        first = crew.start()
        wait_for((tmp_path / "begun").exists)
        assert first.pid is not None
        os.kill(first.pid, signal.SIGSTOP)
        crew.start()
        wait_for(lambda: [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3)
        os.kill(first.pid, signal.SIGCONT)
        crew.wait(20)
    found = verdict(study, task, struck=1)
    assert_clean(found, 3)
    assert found.repeated == 1


def wait_for(condition: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def open_and_make(url: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.create_study(study_name=STUDY, storage=open_storage(url), load_if_exists=True)


def test_several_may_open_an_empty_storage_at_once(shared: str) -> None:
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=open_and_make, args=(shared,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    storage = open_storage(shared)
    check_shared(storage)
    assert [study.study_name for study in optuna.get_all_study_summaries(storage)] == [STUDY]


@pytest.mark.slow
def test_a_server_that_starts_anew_loses_nothing(tmp_path: Path) -> None:
    reason = postgresql.missing()
    if reason is not None:
        pytest.skip(reason)
    with postgresql.cluster() as server:
        task = Work(server.url, tmp_path, n_trials=20, seconds=0.4, terms=LeaseTerms(beat=1, patience=20))
        study = begin(task)
        (tmp_path / "go").touch()
        with Workers(task) as crew:
            for _ in range(3):
                crew.start()
            for wanted in (4, 10):
                wait_for(lambda wanted=wanted: len(study.trials) > wanted)
                server.restart()
            crew.wait(60)
        assert_clean(verdict(study, task, struck=0), 20)
