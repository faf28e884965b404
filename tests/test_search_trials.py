"""One worker and several in one process: leases, the budget, failures, interruptions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from normsearch.errors import SearchError
from normsearch.searching import LeaseTerms, NormSampler, counted_trials, leases, open_storage, run_trials
from normsearch.searching.leases import LEASE, Leases

METHODS = ("batch", "group", "layer", "instance")
SPACE = {f"bn{site}": CategoricalDistribution(METHODS) for site in range(3)}
SHORT = LeaseTerms(beat=0.05, patience=0.4)
#: No lease expires during a test.
LONG = LeaseTerms(beat=100, patience=1000)
QUICK = LeaseTerms(beat=0.05, patience=1000)


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(params=["memory", "journal", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> BaseStorage:
    names = {"memory": None, "journal": tmp_path / "j", "sqlite": f"sqlite:///{tmp_path / 's'}"}
    return open_storage(names[request.param])


def make_study(storage: BaseStorage | None = None, directions: Sequence[str] = ("maximize",)) -> optuna.Study:
    return optuna.create_study(
        study_name="s",
        storage=storage,
        directions=list(directions),
        sampler=NormSampler(seed=3),
        load_if_exists=True,
    )


def score(trial: Trial | FrozenTrial) -> float:
    return float(sum((place + 1) * METHODS.index(trial.params[name]) for place, name in enumerate(SPACE)))


def run(study: optuna.Study, evaluate: Callable[[Trial], Any] = score, n: int = 6, **options: Any) -> None:
    run_trials(study, evaluate, n_trials=n, distributions=SPACE, **{"terms": LONG, **options})


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def begun(study: optuna.Study, own: Leases) -> int:
    """Begin a trial with all its parameters, and return its id; nobody goes on with it."""
    template = optuna.create_trial(
        state=TrialState.RUNNING,
        params=dict.fromkeys(SPACE, "layer"),
        distributions=SPACE,
        system_attrs=own.first(),
    )
    return study._storage.create_new_trial(study._study_id, template)


def all_trials(study: optuna.Study) -> list[FrozenTrial]:
    return study._storage.get_all_trials(study._study_id)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can look at others' processes, as between machines."""
    monkeypatch.setattr(leases, "_process", lambda: None)


class TestLeases:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"beat": 0}, "beat=0: give seconds"),
            ({"beat": float("nan")}, "beat=nan"),
            ({"patience": 14.0}, r"patience=14.0 with beat=5.0: give at least three beats"),
            ({"patience": float("inf")}, "patience=inf"),
            ({"attempts": 0}, "attempts=0: give at least 1"),
        ],
    )
    def test_terms_that_make_no_sense_are_refused(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(SearchError, match=message):
            LeaseTerms(**given)

    @pytest.mark.usefixtures("elsewhere")
    def test_a_silent_trial_waits_again_with_its_parameters(self, storage: BaseStorage) -> None:
        study = make_study(storage)
        begun(study, Leases(study._storage, SHORT))
        watcher = Leases(study._storage, SHORT)
        end = time.monotonic() + 10
        assert not watcher.reclaim(all_trials(study))
        while not watcher.reclaim(all_trials(study)):
            assert time.monotonic() < end
            assert states(study) == ["RUNNING"]
            time.sleep(0.05)
        assert states(study) == ["WAITING"]
        assert study.trials[0].params == dict.fromkeys(SPACE, "layer")
        trial = study.ask(SPACE)
        assert (trial.number, trial.params) == (0, dict.fromkeys(SPACE, "layer"))

    @pytest.mark.usefixtures("elsewhere")
    def test_a_trial_without_any_lease_is_taken_over_too(self, storage: BaseStorage) -> None:
        study = make_study(storage)
        study.ask()
        run(study, n=2, terms=SHORT)
        assert states(study) == ["COMPLETE"] * 2

    @pytest.mark.usefixtures("elsewhere")
    def test_beats_keep_a_trial(self, storage: BaseStorage) -> None:
        study = make_study(storage)
        own, watcher = Leases(study._storage, SHORT), Leases(study._storage, SHORT)
        with own.hold(begun(study, own)) as lease:
            end = time.monotonic() + 4 * SHORT.patience
            while time.monotonic() < end:
                assert not watcher.reclaim(all_trials(study))
                time.sleep(0.05)
            assert lease.is_held()
        assert study.trials[0].system_attrs[LEASE]["beat"] > 3

    @pytest.mark.usefixtures("elsewhere")
    def test_time_without_looking_counts_half(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """All processes of a machine may have been stopped at once; none was dead."""
        study, now = make_study(), [0.0]
        monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
        begun(study, Leases(study._storage, LONG))
        watcher = Leases(study._storage, LONG)
        assert not watcher.reclaim(all_trials(study))
        now[0] += 10 * LONG.patience
        assert not watcher.reclaim(all_trials(study))
        now[0] += 10 * LONG.patience
        assert watcher.reclaim(all_trials(study))

    def test_a_process_that_has_ended_is_known_at_once(
        self, storage: BaseStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = leases._process()
        if here is None:
            pytest.skip("processes can be told apart on Linux only")
        study, watcher = make_study(storage), Leases(make_study(storage)._storage, LONG)
        alive = begun(study, Leases(study._storage, LONG))
        monkeypatch.setattr(leases, "_process", lambda: [here[0], here[1], "1"])
        reused = begun(study, Leases(study._storage, LONG))
        monkeypatch.setattr(leases, "_process", lambda: ["another machine", *here[1:]])
        far = begun(study, Leases(study._storage, LONG))
        monkeypatch.undo()
        assert watcher.reclaim(all_trials(study))
        found = {trial._trial_id: trial.state.name for trial in all_trials(study)}
        assert found == {alive: "RUNNING", reused: "WAITING", far: "RUNNING"}

    def test_a_trial_that_takes_its_workers_down_fails(
        self, storage: BaseStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = make_study(storage)
        watcher = Leases(study._storage, LONG)
        first = Leases(study._storage, LONG)
        trial_id = begun(study, first)
        monkeypatch.setattr(leases, "_has_ended", lambda process: True)
        for attempt in (1, 2, 3):
            assert study.trials[0].system_attrs[LEASE]["attempt"] == attempt
            assert watcher.reclaim(all_trials(study))
            if attempt < 3:
                assert states(study) == ["WAITING"]
                study._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
                with Leases(study._storage, LONG).hold(trial_id):
                    pass
        assert states(study) == ["FAIL"]
        assert study.trials[0].user_attrs["error"].startswith("its worker ended 3 times without a result")

    def test_the_thread_outlives_an_error_of_the_database(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        study = make_study()
        own = Leases(study._storage, SHORT)
        trial_id = begun(study, own)
        with own.hold(trial_id):
            with monkeypatch.context() as away:
                away.setattr(
                    study._storage, "set_trial_system_attr", failing(StorageInternalError("away"), 99)
                )
                time.sleep(0.3)
            before = study.trials[0].system_attrs[LEASE]["beat"]
            time.sleep(0.3)
            assert study.trials[0].system_attrs[LEASE]["beat"] > before
        assert "no sign of life of trial 0 could be written: StorageInternalError" in caplog.text

    def test_the_thread_ends_with_the_trial(self) -> None:
        study = make_study()
        start = time.monotonic()
        run(study, n=20)
        assert time.monotonic() - start < LONG.beat / 10
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("lease")]


def failing(error: Exception, times: int, then: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return a function that raises a few times before it does something."""
    left = [times]

    def call(*args: Any, **options: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise error
        assert then is not None
        return then(*args, **options)

    return call


class TestFalselyDead:
    """A worker that loses its trial, because it was thought dead, and comes back."""

    def test_what_it_tells_is_dropped_while_another_runs(self, storage: BaseStorage) -> None:
        study = make_study(storage)
        told: list[int] = []

        def evaluate(trial: Trial) -> float:
            if trial.number == 0 and not told:
                taken_over(study, trial._trial_id)
                run(make_study(storage), n=1, on_trial=lambda done: told.append(done.number))
                return -1.0
            return score(trial)

        run(study, evaluate, n=3, on_trial=lambda done: told.append(done.number))
        assert told == [0, 1, 2]
        assert [trial.value for trial in study.trials] == [score(trial) for trial in study.trials]

    def test_it_may_write_to_its_trial_too_late(self, storage: BaseStorage) -> None:
        study, others = make_study(storage), []

        def evaluate(trial: Trial) -> float:
            if trial.number == 0 and not others:
                taken_over(study, trial._trial_id)
                run(make_study(storage), n=1, on_trial=others.append)
                trial.set_user_attr("late", True)
            return score(trial)

        run(study, evaluate, n=2)
        assert states(study) == ["COMPLETE"] * 2
        assert "error" not in study.trials[0].user_attrs

    def test_it_runs_the_trial_again_if_nobody_has(self, storage: BaseStorage) -> None:
        study, starts = make_study(storage), []

        def evaluate(trial: Trial) -> float:
            starts.append((trial.number, tuple(trial.params.values())))
            if len(starts) == 1:
                taken_over(study, trial._trial_id)
            return score(trial)

        run(study, evaluate, n=2)
        assert [number for number, _ in starts] == [0, 0, 1]
        assert starts[0] == starts[1]
        assert states(study) == ["COMPLETE"] * 2

    def test_parameters_that_were_overwritten_are_restored(self, tmp_path: Path) -> None:
        study, starts = make_study(open_storage(tmp_path / "j")), []

        def evaluate(trial: Trial) -> float:
            starts.append(tuple(trial.params.values()))
            study._storage.set_trial_param(trial._trial_id, "bn1", 3, SPACE["bn1"])
            return score(trial)

        run(study, evaluate, n=1)
        assert starts == [("batch", "batch", "batch")]
        assert study.trials[0].params == dict.fromkeys(SPACE, "batch")
        assert study.trials[0].value == score(study.trials[0])

    def test_one_that_was_proposing_parameters_leaves_the_others_alone(self, storage: BaseStorage) -> None:
        study, second = make_study(storage), make_study(storage)
        begins, goes_on, plans = threading.Event(), threading.Event(), []

        def evaluate(trial: Trial) -> float:
            plans.append(dict(trial.params))
            begins.set()
            assert goes_on.wait(20)
            return score(trial)

        other = threading.Thread(target=run, args=(second, evaluate), kwargs={"n": 1, "terms": QUICK})
        propose = study.sampler.sample_independent

        def stall(study: optuna.Study, trial: FrozenTrial, name: str, *given: Any) -> Any:
            if name != "bn1" or other.ident is not None:
                return propose(study, trial, name, *given)
            taken_over(study, trial._trial_id)
            other.start()
            assert begins.wait(20)
            time.sleep(2 * QUICK.beat)
            return "instance"

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(study.sampler, "sample_independent", stall)
            first = threading.Thread(target=run, args=(study, evaluate), kwargs={"n": 1, "terms": QUICK})
            first.start()
            assert begins.wait(20)
            time.sleep(4 * QUICK.beat)
            goes_on.set()
            for thread in (first, other):
                thread.join(20)
        assert plans == [dict.fromkeys(SPACE, "batch")]
        assert study.trials[0].params == plans[0]
        assert states(study) == ["COMPLETE"]


def taken_over(study: optuna.Study, trial_id: int) -> None:
    """Take a trial from its worker, as another one does that has waited for long."""
    Leases(study._storage, LONG)._take(study._storage.get_trial(trial_id))


class TestBudget:
    def test_exactly_as_many_as_asked_for(self, storage: BaseStorage) -> None:
        study = make_study(storage)
        run(study, n=5)
        assert states(study) == ["COMPLETE"] * 5
        run(study, n=5)
        run(study, n=4)
        assert len(study.trials) == 5
        run(study, n=7)
        assert states(study) == ["COMPLETE"] * 7

    def test_waiting_trials_count(self, storage: BaseStorage) -> None:
        study = make_study(storage)
        for method in METHODS:
            study.enqueue_trial(dict.fromkeys(SPACE, method))
        run(study, n=3)
        assert states(study) == [*["COMPLETE"] * 3, "WAITING"]
        run(study, n=5)
        assert states(study) == ["COMPLETE"] * 5
        assert [trial.params["bn0"] for trial in study.trials[:4]] == list(METHODS)

    def test_trials_that_were_made_at_the_same_time_are_dropped_by_number(self, storage: BaseStorage) -> None:
        study, others = make_study(storage), []
        create = study._storage.create_new_trial

        def create_second(study_id: int, template: FrozenTrial | None = None) -> int:
            if len(study.trials) == 3 and not others:
                others.append(create(study_id, None))
            return create(study_id, template)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(study._storage, "create_new_trial", create_second)
            # The other one dies: its trial counts all the same, and is run here.
            run(study, n=4, terms=SHORT)
        assert [trial.number for trial in counted_trials(study.trials)] == [0, 1, 2, 3]
        assert states(study) == [*["COMPLETE"] * 4, "FAIL"]
        assert study.trials[4].user_attrs["error"] == "not needed: the study has its 4 trials"
        run(study, n=5)
        assert [trial.number for trial in counted_trials(study.trials)] == [0, 1, 2, 3, 5]

    def test_threads_share_a_study(self, storage: BaseStorage) -> None:
        if "sqlite" in str(getattr(storage, "url", "")):
            pytest.skip("SQLite is for one worker")
        study = make_study(storage)
        told: list[int] = []

        def evaluate(trial: Trial) -> float:
            time.sleep(0.01)
            return score(trial)

        def work() -> None:
            run(make_study(storage), evaluate, n=30, on_trial=lambda trial: told.append(trial.number))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        counted = counted_trials(study.trials)
        assert [trial.state for trial in counted] == [TrialState.COMPLETE] * 30
        assert sorted(told) == [trial.number for trial in counted]
        assert all(trial.value == score(trial) for trial in counted)

    @pytest.mark.parametrize("n", [0, -1, 2.0, True])
    def test_other_budgets_are_refused(self, n: Any) -> None:
        with pytest.raises(SearchError, match="give a whole number, at least 1"):
            run(make_study(), n=n)


class TestOutcomes:
    def test_a_failure_is_recorded_and_the_loop_goes_on(self, storage: BaseStorage) -> None:
        study = make_study(storage)

        def evaluate(trial: Trial) -> float:
            if trial.number == 1:
                raise ValueError("loss exploded")
            if trial.number == 2:
                raise optuna.TrialPruned("hopeless")
            return score(trial)

        run(study, evaluate, n=4)
        assert states(study) == ["COMPLETE", "FAIL", "PRUNED", "COMPLETE"]
        assert study.trials[2].user_attrs["error"] == "hopeless"
        assert study.trials[1].user_attrs["error"] == "ValueError: loss exploded"

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (
                float("nan"),
                "nan; give finite numbers, or raise optuna.TrialPruned for a plan that is to be given up",
            ),
            (
                float("-inf"),
                "-inf; give finite numbers, or raise optuna.TrialPruned for a plan that is to be given up",
            ),
            (None, "None; give a number"),
            ("much", "'much'; give a number"),
            ([1.0, 2.0], "2 numbers; give one"),
        ],
    )
    def test_values_that_are_no_scores_fail(self, returned: Any, message: str) -> None:
        study = make_study()
        run(study, lambda trial: returned if trial.number == 1 else 1.0, n=3)
        assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"]
        assert study.trials[1].user_attrs["error"] == f"the objective returned {message}"

    def test_several_objectives(self) -> None:
        study = make_study(directions=("maximize", "minimize"))
        run(study, lambda trial: (score(trial), 2), n=3)
        assert [trial.values[1] for trial in study.trials] == [2.0] * 3

    def test_three_equal_failures_at_the_beginning_end_the_search(self) -> None:
        study = make_study()

        def evaluate(trial: Trial) -> float:
            raise KeyError("label")

        with pytest.raises(SearchError, match="first 3 trials all failed: KeyError: 'label'") as caught:
            run(study, evaluate, n=9)
        assert isinstance(caught.value.__cause__, KeyError)
        # What they tried waits for a mended objective.
        assert states(study) == ["FAIL"] * 3 + ["WAITING"] * 3
        waiting = [trial.system_attrs["fixed_params"] for trial in study.trials[3:]]
        assert waiting == [trial.params for trial in study.trials[:3]]

    def test_other_failures_do_not(self) -> None:
        study = make_study()

        def evaluate(trial: Trial) -> float:
            if trial.number != 3:
                raise RuntimeError(f"trial {trial.number}" if trial.number < 3 else "again")
            return 1.0

        run(study, evaluate, n=9)
        assert states(study) == [*["FAIL"] * 3, "COMPLETE", *["FAIL"] * 5]

    def test_a_database_that_is_away_for_a_moment_loses_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study, starts = make_study(), []
        for name in ("set_trial_state_values", "create_new_trial", "get_all_trials", "set_trial_system_attr"):
            then = getattr(study._storage, name)
            monkeypatch.setattr(study._storage, name, failing(StorageInternalError("away"), 2, then))

        def evaluate(trial: Trial) -> float:
            starts.append(trial.number)
            return score(trial)

        run(study, evaluate, n=3)
        assert states(study) == ["COMPLETE"] * 3
        assert starts == [0, 1, 2]

    def test_a_storage_that_fails_under_an_objective_ends_the_worker(self) -> None:
        """The trial is not to blame: it waits for another worker."""
        study = make_study()

        def evaluate(trial: Trial) -> float:
            raise StorageInternalError("away")

        with pytest.raises(StorageInternalError):
            run(study, evaluate)
        assert states(study) == ["WAITING"]


class TestInterruptions:
    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    def test_a_resumed_search_is_the_same(self, storage: BaseStorage, kind: type[BaseException]) -> None:
        whole = make_study()
        run(whole, n=16)
        interrupted_at = iter([0, 3, 3, 3, 3, 15])
        following: list[int | None] = [next(interrupted_at)]

        def evaluate(trial: Trial) -> float:
            if trial.number == following[0]:
                following[0] = next(interrupted_at, None)
                raise kind
            return score(trial)

        study = make_study(storage)
        for _ in range(6):
            with pytest.raises(kind):
                run(study, evaluate, n=16)
            assert states(study)[-1] == "WAITING"
            study = make_study(storage)
        run(study, evaluate, n=16)
        assert [t.params for t in study.trials] == [t.params for t in whole.trials]
        assert [t.values for t in study.trials] == [t.values for t in whole.trials]

    def test_an_interruption_in_a_callback_keeps_the_trial(self) -> None:
        study = make_study()

        def stop(trial: FrozenTrial) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(study, on_trial=stop)
        assert states(study) == ["COMPLETE"]

    def test_an_interruption_while_a_plan_is_proposed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        study = make_study()
        run(study, n=2)
        with monkeypatch.context() as patch:
            patch.setattr(study.sampler, "sample_relative", failing(KeyboardInterrupt(), 1))  # type: ignore[arg-type]
            with pytest.raises(KeyboardInterrupt):
                run(study, n=3)
        assert states(study) == ["COMPLETE", "COMPLETE", "WAITING"]
        run(study, n=3)
        assert states(study) == ["COMPLETE"] * 3
