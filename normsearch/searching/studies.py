"""What a study remembers of a search: its space, prior and costs as JSON, validated when read back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated
from torch import nn

from normsearch.documents import read_plan
from normsearch.errors import NormsearchError, SearchError
from normsearch.methods import Refusal, parse_method
from normsearch.plans import Plan, Row
from normsearch.searching.constraints import KINDS, Constraint
from normsearch.searching.costs import CostTable
from normsearch.searching.identity import TRAINING
from normsearch.searching.space import Choice, SearchSpace
from normsearch.searching.storage import open_storage
from normsearch.sensitivities import Sensitivity
from normsearch.sites import analyse

_PREFIX = "normsearch:"
#: The study in a storage that is named without one.
_NAME = "normsearch"
_CONFIG = ConfigDict(extra="forbid", strict=False)


@validated(config=_CONFIG)
class Settings:
    """The arguments of a search that decide what its trials are: the same for every worker and resumption.

    Attributes:
        methods: spellings.
        sites: patterns, or None.
        directions: of the objective's numbers.
        costs: names of costs that are objectives too.
        constraints: name and fields of each.
        sampler: its name.
        seed: of everything.
        veto: the largest drift that is let pass, or None.
        sense: whether a supernet is asked first.

    """

    methods: tuple[str, ...]
    sites: tuple[str, ...] | None
    directions: tuple[str, ...]
    costs: tuple[str, ...]
    constraints: tuple[tuple[str, dict[str, float]], ...]
    sampler: str
    seed: int
    veto: float | None
    sense: bool

    def built_constraints(self) -> tuple[Constraint, ...]:
        """Return the constraints themselves."""
        return tuple(KINDS[name](**fields) for name, fields in self.constraints)


@validated(config=_CONFIG)
class _Space:
    plan: str
    methods: tuple[str, ...]
    allowed: dict[str, tuple[str, ...]]
    choices: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    refusals: tuple[Refusal, ...]


_SPACE = TypeAdapter(_Space)
_SETTINGS = TypeAdapter(Settings)
_TABLE = TypeAdapter(dict[str, dict[str, float]])
_COSTS = TypeAdapter(CostTable)


@dataclass(frozen=True)
class Memory:
    """A study's user attributes under normsearch's names."""

    study: Study

    def has(self, name: str) -> bool:
        """Whether something was kept under a name."""
        return self.study.user_attrs.get(_PREFIX + name) not in (None, "null")

    def keep(self, name: str, value: Any) -> None:
        """Keep plain data."""
        self.study.set_user_attr(_PREFIX + name, json.dumps(value))

    def read(self, name: str) -> Any:
        """Return plain data; None where nothing was kept."""
        text = self.study.user_attrs.get(_PREFIX + name)
        return None if text is None else json.loads(text)

    def keep_settings(self, settings: Settings) -> None:
        """Keep the settings of a new study, or check them against those of one that is resumed.

        Raises:
            SearchError: the study was made with others.

        """
        if not self.has("settings") or not (self.has("ready") or self.study.get_trials(deepcopy=False)):
            # What was refused while it was being prepared leaves nothing that binds.
            for name in ("sensitivity", "costs", "prior", "reference", "identity"):
                if self.has(name):
                    self.keep(name, None)
            self.keep("settings", asdict(settings))
            return
        before, now = asdict(self.settings()), asdict(settings)
        other = [name for name in now if now[name] != before[name]]
        if other:
            raise SearchError(
                f"the study {self.study.study_name!r} was made with {other[0]}={_shown(before[other[0]])}, "
                f"now it is {_shown(now[other[0]])}; resume with the same arguments, or give another name"
            )

    def keep_identity(self, identity: dict[str, str]) -> None:
        """Keep what is searched, or check it against what the study has searched so far.

        Raises:
            SearchError: network or task are others.

        """
        before = self.read("identity")
        if before is None:
            self.keep("identity", identity)
            return
        known = [name for name in identity if name in before or name != TRAINING]
        other = [name for name in known if identity[name] != before.get(name)]
        if other:
            raise SearchError(
                f"the study {self.study.study_name!r} was made with other {other[0]} "
                f"({before.get(other[0])}, now {identity[other[0]]}): its scores would not be comparable; "
                "give the same model and task, or another name"
            )

    def settings(self) -> Settings:
        """Return the settings.

        Raises:
            SearchError: the study is no search of this library.

        """
        return Settings(**vars(self.read_as("settings", _SETTINGS)))

    def keep_space(self, space: SearchSpace) -> None:
        """Keep a space."""
        batch = parse_method("batch")
        document = _Space(
            plan=Plan(tuple(Row(site, batch) for site in space.sites)).to_json(),
            methods=space.methods,
            allowed=dict(space.allowed),
            choices=tuple((choice.sites, choice.methods) for choice in space.choices),
            refusals=space.refusals,
        )
        self.keep("space", json.loads(_SPACE.dump_json(document)))

    def space(self, model: nn.Module) -> SearchSpace:
        """Return the space, for a model that has its sites.

        Raises:
            SearchError: it is missing, malformed, or of another model.

        """
        document = self.read_as("space", _SPACE)
        sites = tuple(site for site, _, _ in read_plan(document.plan)[0])
        for spelling in document.methods:
            parse_method(spelling)
        space = SearchSpace(
            sites,
            document.methods,
            document.allowed,
            tuple(Choice(*choice) for choice in document.choices),
            document.refusals,
        )
        _check_model(space, model, self.study.study_name)
        return space

    def prior(self) -> Mapping[str, Mapping[str, float]] | None:
        """Return what sensing found; None where nothing was sensed."""
        return self.read_as("prior", _TABLE) if self.has("prior") else None

    def costs(self) -> CostTable | None:
        """Return the table of costs; None where it was not measured."""
        return self.read_as("costs", _COSTS) if self.has("costs") else None

    def sensitivity(self) -> Sensitivity | None:
        """Return the drift of single changes; None where there were no inputs to measure it on."""
        text = self.read("sensitivity")
        return None if text is None else Sensitivity.from_json(text)

    def read_as(self, name: str, adapter: TypeAdapter[Any]) -> Any:
        """Return what was kept, validated.

        Raises:
            SearchError: it is missing or malformed.

        """
        if not self.has(name):
            raise SearchError(
                f"the study {self.study.study_name!r} has no {name}: it was not made by normsearch; "
                "start one with search"
            )
        try:
            return adapter.validate_python(self.read(name))
        except (ValidationError, NormsearchError, ValueError) as error:
            raise SearchError(
                f"the study {self.study.study_name!r} holds a malformed {name}; make it anew"
            ) from error


def _shown(value: Any) -> str:
    """Return a setting as it is given: constraints are kept as names and fields."""
    if isinstance(value, tuple | list) and value and all(isinstance(one, tuple | list) for one in value):
        return ", ".join(repr(KINDS[name](**fields)) for name, fields in value)
    return repr(value)


def _check_model(space: SearchSpace, model: nn.Module, study: str) -> None:
    here = {site.path: site for site in analyse(model, None, dataflow=False)}
    for site in space.sites:
        found = here.get(site.path)
        if found is None or (found.layer, found.channels) != (site.layer, site.channels):
            what = "nothing" if found is None else f"{found.layer} of {found.channels} channels"
            raise SearchError(
                f"the study {study!r} searches a model with {site.layer} of {site.channels} channels at "
                f"{site.path!r}; this one has {what} there; give the same model"
            )


def opened_study(name: str, storage: str | os.PathLike[str] | BaseStorage) -> Study:
    """Return a study that is there.

    Raises:
        SearchError: there is none of this name, it is others', or the storage cannot be used.

    """
    opened = open_storage(storage)
    try:
        study = optuna.load_study(study_name=name, storage=opened)
        check_own(study)
        return study
    except KeyError:
        known = ", ".join(optuna.get_all_study_names(opened)) or "none"
        raise SearchError(f"the storage has no study {name!r}; it has {known}") from None


def made_study(
    settings: Settings, storage: str | os.PathLike[str] | BaseStorage | None, name: str | None
) -> Study:
    """Return the study of a name, made if it is not there.

    Raises:
        SearchError: the storage cannot be used, or the study is others'.

    """
    if storage is None and name is not None:
        if name != Path(name).name or name.startswith("."):
            raise SearchError(
                f"name={name!r} names the journal too; give one that a file may have, or storage="
            )
        storage = f"{name}.journal"
    names = (*settings.directions, *("minimize" for _ in settings.costs))
    directions = [StudyDirection[one.upper()] for one in names]
    opened, wanted = open_storage(storage), name or _NAME
    # To make one that is there would write into a journal.
    if wanted in optuna.get_all_study_names(opened):
        study = opened_study(wanted, opened)
        if study.directions != directions and not Memory(study).has("ready"):
            before = ", ".join(one.name.lower() for one in study.directions)
            raise SearchError(
                f"the study {wanted!r} was made to {before}, now it is to {', '.join(names)}; give the "
                "search another name"
            )
        return study
    with _quiet():
        return optuna.create_study(
            storage=opened, study_name=wanted, directions=directions, load_if_exists=True
        )


def check_own(study: Study) -> None:
    """Raise for a study that others have made, before anything is written into it.

    Raises:
        SearchError: it has trials or attributes, and no settings of a search.

    """
    if Memory(study).has("settings"):
        return
    trials = len(study.get_trials(deepcopy=False))
    if trials or study.user_attrs:
        raise SearchError(
            f"the study {study.study_name!r} is no search of normsearch: it has {trials} trials and no "
            "settings of a search; give the search another name"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from announcing a study; progress is told by callbacks."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
