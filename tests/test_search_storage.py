"""Where trials are kept: what a killed process leaves behind, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from normsearch.errors import SearchError
from normsearch.searching import check_shared, open_storage, run_trials, storage

HALF = b'{"op_code":8,"worker_id":"f00","trial_id":0,"user_at'


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def study_with_trials(path: Path, trials: int) -> optuna.Study:
    study = optuna.create_study(study_name="s", storage=open_storage(path), load_if_exists=True)
    for _ in range(trials):
        study.tell(study.ask(), 1.0)
    return study


def test_names_stand_for_storages(tmp_path: Path) -> None:
    assert isinstance(open_storage(None), InMemoryStorage)
    assert isinstance(open_storage(tmp_path / "a.journal"), JournalStorage)
    assert isinstance(open_storage(str(tmp_path / "b.journal")), JournalStorage)
    assert isinstance(open_storage(f"sqlite:///{tmp_path / 'c.sqlite'}"), RDBStorage)
    given = InMemoryStorage()
    assert open_storage(given) is given


def test_a_journal_is_read_again(tmp_path: Path) -> None:
    study_with_trials(tmp_path / "j", 3)
    again = study_with_trials(tmp_path / "j", 2)
    assert [trial.state for trial in again.trials] == [TrialState.COMPLETE] * 5


def test_a_plan_waits_for_the_disk_as_often_as_a_single_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits(sites: int) -> int:
        study = optuna.create_study(storage=open_storage(tmp_path / str(sites)))
        synced: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", synced.append)
            trial = study.ask()
            for site in range(sites):
                trial.suggest_categorical(f"bn{site}", ["group", "layer"])
            # What is written is there for other processes, and before the result.
            (seen,) = optuna.load_study(study_name=None, storage=open_storage(tmp_path / str(sites))).trials
            assert seen.params == trial.params
            assert len(seen.params) == sites
            before = len(synced)
            study.tell(trial, 1.0)
        assert len(synced) > before
        return len(synced)

    assert waits(20) == waits(1)


def test_a_line_that_a_killed_process_left_unfinished_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "j"
    study = study_with_trials(path, 2)
    whole = path.read_bytes()
    for rest in (HALF, HALF * 200, b"{", b"\x00" * 5000):
        with path.open("ab") as file:
            file.write(rest)
        before = len(study.trials)
        # A process that has read the file already, and one that opens it now.
        study.tell(study.ask(), 1.0)
        study_with_trials(path, 1)
        assert len(study.trials) == before + 2
    assert path.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in path.read_text().splitlines())
    # Others read it too: optuna-dashboard uses Optuna's own backend.
    plain = JournalStorage(JournalFileBackend(str(path)))
    assert len(optuna.load_study(study_name="s", storage=plain).trials) == len(study.trials)


def test_optuna_alone_cannot_read_a_journal_with_an_unfinished_line(tmp_path: Path) -> None:
    """The reason for the above; when this fails, Optuna mends journals itself."""
    path = tmp_path / "j"
    study_with_trials(path, 1)
    with path.open("ab") as file:
        file.write(HALF)
    plain = JournalFileBackend(str(path))
    for _ in range(2):
        plain.append_logs([{"op_code": 2, "worker_id": "f00", "study_id": 0, "user_attr": {"a": 1}}])
    with pytest.raises(ValueError, match="delimiter"):
        list(plain.read_logs(0))


def test_a_reader_that_met_a_line_while_it_was_replaced_reads_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_with_trials(tmp_path / "j", 2)
    read, failures = JournalFileBackend.read_logs, [ValueError("half a line")]

    def fail_once(self: JournalFileBackend, first: int) -> object:
        if failures:
            raise failures.pop()
        return read(self, first)

    monkeypatch.setattr(JournalFileBackend, "read_logs", fail_once)
    assert len(study.trials) == 2
    assert not failures


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "j"
    study = study_with_trials(path, 1)
    hold = (
        "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.kill()
        holder.wait()
    start = time.monotonic()
    study.tell(study.ask(), 1.0)
    assert time.monotonic() - start < 5


def test_a_journal_with_a_broken_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    study_with_trials(path, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], HALF + b"\n", *lines[2:]]))
    with pytest.raises(SearchError, match=r"damaged after entry 0.*restore it from a copy"):
        open_storage(path)


@pytest.mark.parametrize("content", [b"no newline at all", b"weights\nand more", b"\x00" * 9, b"{}\n"])
def test_other_files_are_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(SearchError, match="is not a journal of trials"):
        open_storage(path)
    assert path.read_bytes() == content


def test_paths_that_cannot_be_used_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SearchError, match=r"folder .*does not exist; make it first"):
        open_storage(tmp_path / "no" / "j")
    with pytest.raises(SearchError, match=r"cannot use .* as a journal of trials: Is a directory"):
        open_storage(tmp_path)
    monkeypatch.setattr(storage, "fcntl", None)
    with pytest.raises(SearchError, match="this platform lacks; give sqlite"):
        open_storage(tmp_path / "j")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@127.0.0.1:1/db",
        "postgresql://me@127.0.0.1:1/db?password=hunter2&connect_timeout=1",
        "postgresql+psycopg://me:hunter2@127.0.0.1:1/db",
        "postgresql://me:hunter2@127.0.0.1:hunter2/db",
        "postgresql+nodriver://me:hunter2@127.0.0.1/db",
        "mysql://me:hunter2@127.0.0.1/db",
        "redis://:hunter2@127.0.0.1",
        "postgresql://me:hunter2@[bad/db",
        "://me:hunter2@nowhere",
    ],
)
def test_passwords_are_not_repeated(url: str) -> None:
    with pytest.raises(SearchError) as caught:
        open_storage(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "find_spec", lambda name: None)
    with pytest.raises(
        SearchError, match=r"no driver for PostgreSQL is installed; pip install \"normsearch\["
    ):
        open_storage("postgresql://me@127.0.0.1/db")


def test_storages_of_one_process_are_not_shared(tmp_path: Path) -> None:
    sqlite = open_storage(f"sqlite:///{tmp_path / 's'}")
    study = optuna.create_study(storage=sqlite)
    for one in (sqlite, study._storage):
        with pytest.raises(SearchError, match=r"SQLite is for one process.*give a path"):
            check_shared(one)
    with pytest.raises(SearchError, match="memory cannot be shared"):
        check_shared(open_storage(None))
    check_shared(open_storage(tmp_path / "j"))


@pytest.mark.parametrize(("spoil", "said"), [("remove", "is gone"), ("cut", "was cut while it was in use")])
def test_a_journal_that_disappears_is_named(tmp_path: Path, spoil: str, said: str) -> None:
    path = tmp_path / "study.journal"
    study = optuna.create_study(storage=open_storage(path), study_name="s")

    def evaluate(trial: optuna.Trial) -> float:
        if trial.number == 1:
            path.unlink() if spoil == "remove" else path.write_bytes(b"")
        return 0.0

    with pytest.raises(SearchError, match=said):
        run_trials(study, evaluate, n_trials=3, distributions={"a": CategoricalDistribution(["x", "y"])})
