"""Conclusion: the best plans of a study are run again, and the one to use is returned, trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optuna.study import Study
from torch import nn

from normsearch.errors import SearchError
from normsearch.progress import OnProgress, Stage
from normsearch.searching.confirming import Candidate, candidates, decide
from normsearch.searching.objectives import Evaluation, Objective
from normsearch.searching.results import SearchResult
from normsearch.searching.space import SearchSpace
from normsearch.searching.studies import Memory
from normsearch.searching.tasks import Task


@dataclass(frozen=True)
class Conclusion:
    """How a search ends: scores under fresh seeds, each kept as soon as it is known, and what they say.

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
        kept = self.memory.read("confirmation") or {}
        given = candidates(self.study, self.space, top if confirm else 1, self.memory.prior())
        pairs = [(candidate, seed) for seed in self._seeds(confirm) for candidate in given]
        return [pair for pair in pairs if _key(*pair) not in kept] if confirm else []

    def confirm(self, candidate: Candidate, seed: int) -> float:
        """Run a plan again under a seed, unless it was, and keep the score."""
        kept: dict[str, float] = self.memory.read("confirmation") or {}
        key = _key(candidate, seed)
        if key not in kept:
            kept[key] = self._again(candidate, seed)[0]
            self.memory.keep("confirmation", kept)
        return kept[key]

    def result(self, confirm: int, top: int, on_progress: OnProgress | None) -> SearchResult:
        """Confirm the best plans and return the one to use, trained."""
        memory, seeds = self.memory, self._seeds(confirm)
        given = candidates(self.study, self.space, top if confirm else 1, memory.prior())
        stage = Stage("confirming", confirm * len(given), on_progress)

        def score(candidate: Candidate, seed: int) -> float:
            found = self.confirm(candidate, seed)
            stage.advance(f"trial {candidate.number}, seed {seed}: {found:.4g}")
            return found

        maximize = memory.settings().directions[0] == "maximize"
        if confirm:
            samples = self.objective.confirmed_on() if isinstance(self.objective, Task) else None
            chosen, rows = decide(given, score, seeds, maximize=maximize, samples=samples)
        else:
            sign = 1.0 if maximize else -1.0
            chosen, rows = max(range(len(given)), key=lambda i: (sign * given[i].value, -i)), []
        best = given[chosen]
        _, model = self._again(best, seeds[0], keep=True)
        assert model is not None
        return SearchResult(
            best=self.space.plan(best.params),
            model=model,
            study=self.study,
            space=self.space,
            confirmation=tuple(rows),
            chosen=chosen,
            candidates=tuple(given),
            same_split=getattr(self.objective, "confirm", None) is None,
            costs=memory.costs(),
            sensitivity=memory.sensitivity(),
            prior=memory.prior(),
        )

    def _seeds(self, confirm: int) -> list[int]:
        """Return fresh seeds, one at least."""
        return [self.memory.settings().seed + 1 + number for number in range(max(confirm, 1))]

    def _again(
        self, candidate: Candidate, seed: int, *, keep: bool = False
    ) -> tuple[float, nn.Module | None]:
        """Run a plan under another seed; what fails there is named."""
        objective: Any = self.objective
        run: Objective = getattr(objective, "confirm", None) or objective
        try:
            return self.evaluation.again(run, candidate.params, candidate.number, seed, keep=keep)
        except SearchError:
            raise
        except Exception as error:
            raise SearchError(
                f"the plan of trial {candidate.number} failed when it was run again with seed {seed} "
                f"({type(error).__name__}: {error}); mend the objective and go on with the same call: what "
                "is done is kept where the study has a name or a storage"
            ) from error


def _key(candidate: Candidate, seed: int) -> str:
    return f"{candidate.number}/{seed}"
