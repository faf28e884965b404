"""Studies: the trials of searches in Optuna's storage, where the operator's dashboard finds them.

In PostgreSQL they are in a schema of their own in the service's database: Optuna's tables have names of
theirs that others use too. Beside SQLite they have a file of their own. Workers write them; children only
see copies.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from api.search_tasks import Prepared, StudyOf, TrialOf, Tried
from api.searches import STUDIES_FILE, STUDIES_SCHEMA
from api.settings import Settings

#: The attribute of a study that is whole, and the one of a trial that says which part of the search it is.
_WHOLE, _PART = "normsearch:whole", "normsearch:part"
_ERROR = "error"


class Studies:
    """The studies of a service.

    Args:
        settings: which database.

    """

    def __init__(self, settings: Settings) -> None:
        url = sa.make_url(settings.url())
        self.is_shared = url.get_backend_name() != "sqlite"
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if self.is_shared:
            plain = url.set(drivername="postgresql+psycopg")
            _make_schema(plain)
            found = plain.update_query_dict({"options": f"-csearch_path={STUDIES_SCHEMA}"})
            engine: dict[str, Any] = {"pool_pre_ping": True}
        else:
            assert url.database is not None
            found = url.set(database=str(Path(url.database).with_name(STUDIES_FILE)))
            engine = {"connect_args": {"timeout": 30}}
        with _answering():
            self._storage = RDBStorage(
                found.render_as_string(hide_password=False),
                engine_kwargs=engine,
                skip_compatibility_check=False,
            )

    def make(self, job: str, prepared: Prepared) -> None:
        """Make the study of a job; what is there of an attempt that did not come to its end is made anew."""
        with _answering():
            if self._known(job) is not None:
                return
            with contextlib.suppress(KeyError):
                optuna.delete_study(study_name=job, storage=self._storage)
            study = optuna.create_study(
                storage=self._storage, study_name=job, directions=prepared.study.directions
            )
            for name, value in prepared.study.attributes.items():
                study.set_user_attr(name, value)
            for trial in prepared.study.trials:
                study.enqueue_trial(dict(trial.fixed or {}), user_attrs=dict(trial.user))
            choices = {"choices": prepared.study.choices, "trials": prepared.trials}
            study.set_user_attr(_WHOLE, choices)

    def trials(self, job: str) -> int | None:
        """Return how many trials a job's study is to have; None where there is no whole study yet."""
        with _answering():
            study = self._known(job)
            return None if study is None else int(study.user_attrs[_WHOLE]["trials"])

    def told(self, job: str, again: Mapping[str, Any] | None = None) -> StudyOf:
        """Return a study as plain data, with what it is to remember of plans that were run again."""
        with _answering():
            study = self._study(job)
            attributes = dict(study.user_attrs)
            whole = attributes.pop(_WHOLE)
            for name, value in (again or {}).items():
                attributes[f"normsearch:{name}"] = json.dumps(value)
            return StudyOf(
                directions=[direction.name.lower() for direction in study.directions],
                attributes=attributes,
                choices=whole["choices"],
                trials=[_told(trial) for trial in study.get_trials(deepcopy=False)],
            )

    def take(self, job: str, part: int) -> int:
        """Return the number of the trial that is a part of a search: begun before, waiting, or a new one."""
        with _answering():
            study = self._study(job)
            trials = study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.system_attrs.get(_PART) == part:
                    return trial.number
            for trial in trials:
                if trial.state == TrialState.WAITING and self._pop(trial, part):
                    return trial.number
            made = create_trial(state=TrialState.RUNNING, system_attrs={_PART: part})
            identifier = self._storage.create_new_trial(study._study_id, made)
            return self._storage.get_trial(identifier).number

    def _pop(self, trial: FrozenTrial, part: int) -> bool:
        """Take a waiting trial; False if another worker did."""
        try:
            if not self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                return False
        except UpdateFinishedTrialError:
            return False
        self._storage.set_trial_system_attr(trial._trial_id, _PART, part)
        return True

    def propose(self, job: str, number: int, params: Mapping[str, str]) -> None:
        """Keep the parameters that a trial is about to be run with."""
        with _answering(), contextlib.suppress(UpdateFinishedTrialError):
            self._propose(self._study(job), number, params)

    def tell(self, job: str, number: int, tried: Tried) -> None:
        """Finish a trial, unless it is finished already."""
        with _answering(), contextlib.suppress(UpdateFinishedTrialError):
            study = self._study(job)
            if study.get_trials(deepcopy=False)[number].state.is_finished():
                return
            self._propose(study, number, tried.params)
            identifier = study.get_trials(deepcopy=False)[number]._trial_id
            for name, value in tried.constraints.items():
                optuna.trial.Trial(study, identifier).set_constraint(name, value)
            if tried.error is not None:
                self._storage.set_trial_user_attr(identifier, _ERROR, tried.error)
            state = TrialState[tried.state.upper()]
            values = tried.values if state == TrialState.COMPLETE else None
            self._storage.set_trial_state_values(identifier, state, values)
            for one in tried.next:
                study.enqueue_trial(dict(one.fixed or {}), user_attrs=dict(one.user), skip_if_exists=True)

    def names(self) -> list[str]:
        """Return the jobs that there are studies of."""
        with _answering():
            return optuna.get_all_study_names(self._storage)

    def forget(self, job: str) -> None:
        """Remove the study of a job, if there is one."""
        with _answering(), contextlib.suppress(KeyError):
            optuna.delete_study(study_name=job, storage=self._storage)

    def _propose(self, study: optuna.Study, number: int, params: Mapping[str, str]) -> None:
        choices = study.user_attrs[_WHOLE]["choices"]
        trial = study.get_trials(deepcopy=False)[number]
        for name, value in params.items():
            # From a child: what is no choice of this search is kept nowhere.
            if name in choices and value in choices[name] and name not in trial.params:
                distribution = CategoricalDistribution(choices[name])
                internal = distribution.to_internal_repr(value)
                self._storage.set_trial_param(trial._trial_id, name, internal, distribution)

    def _known(self, job: str) -> optuna.Study | None:
        try:
            study = self._study(job)
        except KeyError:
            return None
        return study if _WHOLE in study.user_attrs else None

    def _study(self, job: str) -> optuna.Study:
        return optuna.load_study(study_name=job, storage=self._storage)


def _told(trial: FrozenTrial) -> TrialOf:
    times = (trial.datetime_start, trial.datetime_complete)
    return TrialOf.model_validate(
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "params": trial.params,
            "fixed": trial.system_attrs.get("fixed_params"),
            "values": trial.values if trial.state == TrialState.COMPLETE else None,
            "constraints": trial.constraints,
            "user": {name: str(value) for name, value in trial.user_attrs.items() if value is not None},
            "seconds": None if None in times else tuple(time.timestamp() for time in times if time),
        }
    )


def _make_schema(url: sa.URL) -> None:
    engine = sa.create_engine(url)
    try:
        with engine.begin() as connection:
            # Two that make it at once would fail.
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(0x6F707475)))
            connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {STUDIES_SCHEMA}"))
    finally:
        engine.dispose()


@contextmanager
def _answering() -> Iterator[None]:
    """Say of a database that does not answer what the service's own says."""
    try:
        yield
    except StorageInternalError as error:
        cause = error.__cause__ if isinstance(error.__cause__, sa.exc.OperationalError) else error
        raise sa.exc.OperationalError("a study", {}, cause) from error
