"""Conclusion: the best plans of a study are run again, and the one to use is returned, trained."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from optuna.study import Study, StudyDirection
from optuna.trial import TrialState
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass as validated
from torch import nn

from normsearch.errors import NormsearchError, SearchError
from normsearch.progress import OnProgress, Stage
from normsearch.searching.confirming import Candidate, Confirmed, candidates, decide, feasible
from normsearch.searching.objectives import Evaluation, Objective
from normsearch.searching.results import SearchResult
from normsearch.searching.space import SearchSpace
from normsearch.searching.studies import Memory
from normsearch.searching.tasks import Task
from normsearch.searching.trials import finished_trials

#: Names in a study's memory: scores by trial and seed, plans that failed, seeds with which all of them did,
#: and how the search ended.
_SCORES, _FAILURES, _SKIPPED, _CONCLUSION = "confirmation", "failures", "skipped", "conclusion"
#: So many more seeds are left out than have scores; beyond, the objective is to blame.
_MOST_SKIPPED = 2
#: So many plans that all fail with their first seed, in the same way, are no accident.
_SAME_FAILURES = 3
_LONGEST_REASON = 500
_WAY_OUT = (
    "mend the objective and go on with the same call: what is done is kept where the study has a name or a "
    "storage"
)


@validated
class Failure:
    """Why a plan is out: it failed when it was run again.

    Attributes:
        seed: with which it was.
        reason: what was raised.

    """

    seed: int
    reason: str


@validated
class Concluded:
    """How a search ended.

    Attributes:
        trial: whose plan was returned.
        reference: number of the best uniform plan's trial.
        rows: the confirmation.
        same_split: whether it used the data of the search.
        finished: how many trials were finished then.

    """

    trial: int
    reference: int | None
    rows: tuple[Confirmed, ...]
    same_split: bool
    finished: int


_FAILED = TypeAdapter(dict[int, Failure])
_SKIPS = TypeAdapter(tuple[Failure, ...])
_CONCLUDED = TypeAdapter(Concluded)


class _PlanFailedError(SearchError):
    """A plan failed when it was run again; why is kept."""


def failures(memory: Memory) -> Mapping[int, Failure]:
    """Return the plans that failed when they were run again, by the number of their trial."""
    return memory.read_as(_FAILURES, _FAILED) if memory.has(_FAILURES) else {}


def skipped(memory: Memory) -> tuple[Failure, ...]:
    """Return the seeds with which every plan failed when it was run again, and why."""
    return memory.read_as(_SKIPPED, _SKIPS) if memory.has(_SKIPPED) else ()


def fresh_seeds(memory: Memory, count: int) -> list[int]:
    """Return the seeds that plans are run again with."""
    out, first = {failure.seed for failure in skipped(memory)}, memory.settings().seed + 1
    return list(islice((seed for seed in itertools.count(first) if seed not in out), count))


def forget_failures(memory: Memory) -> None:
    """Let the plans that failed when they were run again, and seeds, have another go."""
    for name in (_FAILURES, _SKIPPED):
        if memory.has(name):
            memory.keep(name, None)


def concluded(memory: Memory) -> Concluded | None:
    """Return how a search ended; None where it has not, or where trials have finished since."""
    if not memory.has(_CONCLUSION):
        return None
    found: Concluded = memory.read_as(_CONCLUSION, _CONCLUDED)
    if found.finished != finished_trials(memory.study):
        return None
    trials = memory.study.get_trials(deepcopy=False)
    known = {None, *(trial.number for trial in trials if trial.state == TrialState.COMPLETE)}
    if not {found.trial, found.reference, *(row.number for row in found.rows)} <= known:
        raise SearchError(f"the study {memory.study.study_name!r} holds a malformed conclusion; make it anew")
    return found


@dataclass(frozen=True)
class Conclusion:
    """How a search ends: scores under fresh seeds, each kept as soon as it is known, and what they say.

    A plan that fails when it is run again is out, and the next one takes its place; a seed with which every
    plan fails is left out instead, for another one.

    Attributes:
        study: Optuna's.
        memory: what it remembers.
        space: what was searched.
        evaluation: runs plans.
        objective: what they are scored by.

    """

    study: Study
    memory: Memory
    space: SearchSpace
    evaluation: Evaluation
    objective: Objective | Task | None

    def unconfirmed(self, confirm: int, top: int) -> list[tuple[Candidate, int]]:
        """Return which plans are still to be run again, each with its seed."""
        kept, given = self._scores(), self._candidates(confirm, top)
        pairs = [(one, seed) for seed in self._seeds(confirm) for one in given] if confirm else []
        return [pair for pair in pairs if _key(*pair) not in kept]

    def confirm(self, candidate: Candidate, seed: int) -> float:
        """Run a plan again under a seed, unless it was, and keep the score, or why it failed."""
        kept = self._scores()
        key = _key(candidate, seed)
        if key not in kept:
            kept[key] = self._again(candidate, seed)[0]
            self.memory.keep(_SCORES, kept)
        return kept[key]

    def result(self, confirm: int, top: int, on_progress: OnProgress | None) -> SearchResult:
        """Confirm the best plans and return the one to use, trained."""
        cause: Exception | None = None
        while True:
            given = self._candidates(confirm, top, cause)
            try:
                chosen, rows = self._decided(given, confirm, on_progress)
                _, model = self._again(given[chosen], self._seeds(confirm)[0], keep=True)
            except _PlanFailedError as error:
                cause = error
                self._skip(given)
                continue
            assert model is not None
            return self._kept(given, chosen, rows, model)

    def _decided(
        self, given: list[Candidate], confirm: int, on_progress: OnProgress | None
    ) -> tuple[int, list[Confirmed]]:
        """Return which plan to take, and why.

        Raises:
            SearchError: a plan failed; the others have been run with that seed too.

        """
        if not confirm:
            return max(range(len(given)), key=lambda i: (self._sign() * given[i].value, -i)), []
        seeds, known = self._seeds(confirm), self._scores()
        left = [(seed, [one for one in given if _key(one, seed) not in known]) for seed in seeds]
        pending = sum(len(several) for _, several in left)
        total = confirm * len(given)
        stage = Stage("confirming", total, on_progress, done=total - pending)
        for seed, several in left:
            failed: _PlanFailedError | None = None
            for one in several:
                try:
                    stage.advance(f"trial {one.number}, seed {seed}: {self.confirm(one, seed):.4g}")
                except _PlanFailedError as error:
                    failed = error
                    stage.advance(str(error))
            if failed is not None:
                raise failed
        found, samples = self._scores(), None
        if isinstance(self.objective, Task):
            samples = self.objective.confirmed_on()
        return decide(
            given,
            lambda one, seed: found[_key(one, seed)],
            seeds,
            maximize=self._sign() > 0,
            samples=samples,
        )

    def _kept(
        self, given: list[Candidate], chosen: int, rows: list[Confirmed], model: nn.Module
    ) -> SearchResult:
        """Return the result, and remember how the search ended."""
        same_split = getattr(self.objective, "confirm", None) is None
        reference = next((one.number for one in given if one.uniform is not None), None)
        ended = Concluded(
            given[chosen].number, reference, tuple(rows), same_split, finished_trials(self.study)
        )
        self.memory.keep(_CONCLUSION, asdict(ended))
        return SearchResult(
            best=self.space.plan(given[chosen].params),
            model=model,
            study=self.study,
            space=self.space,
            confirmation=tuple(rows),
            chosen=chosen,
            candidates=tuple(given),
            same_split=same_split,
            costs=self.memory.costs(),
            sensitivity=self.memory.sensitivity(),
            prior=self.memory.prior(),
        )

    def _candidates(self, confirm: int, top: int, cause: Exception | None = None) -> list[Candidate]:
        """Return the plans to confirm, the best uniform one first: those that have not failed.

        Raises:
            SearchError: no trial meets the constraints, no plan is left, or all fail in the same way.

        """
        out = failures(self.memory)
        wanted = top if confirm else 1
        found = candidates(self.study, self.space, wanted + len(out), self.memory.prior())
        mixes = [one for one in found if one.uniform is None]
        given = [*self._uniform(found, out), *[one for one in mixes if one.number not in out][:wanted]]
        first = [*[one for one in found if one.uniform is not None], *mixes[:wanted]]
        alike = len({failure.reason for failure in out.values()}) == 1 and not self._scores()
        same = alike and len(out) >= _SAME_FAILURES and all(one.number in out for one in first)
        if same and self._skip(first):
            return self._candidates(confirm, top, cause)
        if same or not given:
            raise SearchError(_failed(out, left=len(given))) from cause
        return given

    def _skip(self, plans: Sequence[Candidate]) -> bool:
        """Leave out a seed with which all plans failed, instead of the plans; say whether it was so."""
        out, before = failures(self.memory), skipped(self.memory)
        seeds = {out[one.number].seed if one.number in out else None for one in plans}
        good = {key.partition("/")[2] for key in self._scores()}
        if len(seeds) != 1 or None in seeds or len(before) >= _MOST_SKIPPED + len(good):
            return False
        (seed,) = seeds
        there = {number: failure for number, failure in out.items() if failure.seed == seed}
        if len(there) < 2:
            return False
        self.memory.keep(_SKIPPED, [asdict(one) for one in (*before, next(iter(there.values())))])
        rest = {number: asdict(failure) for number, failure in out.items() if number not in there}
        self.memory.keep(_FAILURES, rest)
        return True

    def _uniform(self, found: list[Candidate], out: Mapping[int, Failure]) -> list[Candidate]:
        """Return the best uniform plan that has not failed, if there is one."""
        if not out:
            return [one for one in found if one.uniform is not None]
        done = [t for t in self.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
        names = {t.number: self.space.uniform_method(t.params) for t in done}
        gone = {None, *(names.get(number) for number in out)}
        left = [t for t in done if names[t.number] not in gone and feasible(t)]
        left.sort(key=lambda trial: (-self._sign() * trial.values[0], trial.number))
        return [Candidate(t.number, t.params, names[t.number], t.values[0]) for t in left[:1]]

    def _scores(self) -> dict[str, float]:
        """Return the scores that are known, by trial and seed."""
        return self.memory.read(_SCORES) or {}

    def _seeds(self, confirm: int) -> list[int]:
        """Return fresh seeds, one at least."""
        return fresh_seeds(self.memory, max(confirm, 1))

    def _sign(self) -> float:
        return -1.0 if self.study.directions[0] == StudyDirection.MINIMIZE else 1.0

    def _again(
        self, candidate: Candidate, seed: int, *, keep: bool = False
    ) -> tuple[float, nn.Module | None]:
        """Run a plan under another seed; where it fails, keep why.

        Raises:
            SearchError: it fails, or has.

        """
        out = dict(failures(self.memory))
        if candidate.number in out:
            raise _PlanFailedError(_said(candidate.number, out[candidate.number]))
        objective: Any = self.objective
        run: Objective = getattr(objective, "confirm", None) or objective
        try:
            return self.evaluation.again(run, candidate.params, candidate.number, seed, keep=keep)
        except Exception as error:
            kind = "" if isinstance(error, NormsearchError) else f"{type(error).__name__}: "
            out[candidate.number] = Failure(seed, f"{kind}{error}"[:_LONGEST_REASON])
            self.memory.keep(_FAILURES, {number: asdict(failure) for number, failure in out.items()})
            raise _PlanFailedError(_said(candidate.number, out[candidate.number])) from error


def _said(number: int, failure: Failure) -> str:
    return (
        f"the plan of trial {number} failed when it was run again with seed {failure.seed} "
        f"({failure.reason}) and is out"
    )


def _failed(out: Mapping[int, Failure], *, left: int) -> str:
    """Say that no plan is left, or that so many failed alike that the others need not be tried."""
    told = "; ".join(
        f"the plan of trial {number} failed when it was run again with seed {one.seed} ({one.reason})"
        for number, one in list(out.items())[:_SAME_FAILURES]
    )
    more = len(out) - _SAME_FAILURES
    rest = f"; and {more} more" if more > 0 else ""
    what = f"all of the {len(out)} plans that were run again failed alike" if left else "no plan is left"
    return f"{what}: {told}{rest}; {_WAY_OUT}"


def _key(candidate: Candidate, seed: int) -> str:
    return f"{candidate.number}/{seed}"
