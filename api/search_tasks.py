"""What children are asked of a search, and what they answer: a study as plain data, a piece at a time.

A child has neither the database nor a network: it is given the whole study, does one thing, and says what
came of it. Whoever asked writes that down.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from api.messages import Strict
from api.tasks import Data, Files, Name, Source, Text

TrialState = Literal["waiting", "running", "complete", "pruned", "fail"]
Parameters = Annotated[dict[Name, Name], Field(max_length=20_000)]
Cost = Literal["latency", "memory"]


class Recipe(Strict):
    """How each plan's network is trained: AdamW, batch by batch, with cross entropy."""

    steps: int = Field(200, ge=1, le=20_000, description="number of batches")
    lr: float = Field(1e-3, gt=0, le=10, description="learning rate")
    weight_decay: float = Field(1e-2, ge=0, le=1)
    warmup: int | None = Field(
        None, ge=0, le=20_000, description="steps over which the rate rises; by default a tenth of steps"
    )
    clip: float = Field(1.0, gt=0, le=1e6, description="the largest joint norm of the gradients")
    batch_size: int = Field(32, ge=1, le=4096)


class Constraints(Strict):
    """What a plan must keep to."""

    max_drop: float | None = Field(None, ge=0, le=1, description="accuracy that may be lost")
    max_latency: float | None = Field(None, gt=0, le=1000, description="times the original's")
    max_memory: float | None = Field(None, gt=0, le=1000, description="times the original's")
    batch_independent: bool = Field(False, description="no output depends on the other samples of its batch")


class Searching(Strict):
    """A search as a child is told of it; the same for every piece."""

    source: Source
    data: Data
    methods: tuple[str, ...] | None
    sites: tuple[str, ...] | None
    trials: int
    recipe: Recipe
    constraints: Constraints
    costs: tuple[Cost, ...]
    seed: int
    veto: float | None
    sense: bool
    confirm: int
    top: int
    stem: str


class TrialOf(Strict):
    """A trial.

    Attributes:
        number: counts them.
        state: as in Optuna.
        params: of the plan, as far as they were suggested.
        fixed: those that it must have.
        values: what it scored.
        constraints: by name, above zero where one is not met.
        user: what else is told of it: where it comes from, why it failed.
        seconds: how long it took.

    """

    number: int
    state: TrialState
    params: Parameters = Field(default_factory=dict)
    fixed: Parameters | None = None
    values: Annotated[list[float], Field(max_length=3)] | None = None
    constraints: dict[Name, float] = Field(default_factory=dict, max_length=10)
    user: dict[Name, str] = Field(default_factory=dict, max_length=10)
    seconds: tuple[float, float] | None = None


class StudyOf(Strict):
    """A study: what it remembers, its trials, and what may be chosen."""

    directions: Annotated[list[Literal["maximize", "minimize"]], Field(min_length=1, max_length=3)]
    attributes: Annotated[dict[Name, str], Field(max_length=50)]
    choices: dict[Name, Annotated[list[Name], Field(min_length=1, max_length=100)]]
    trials: Annotated[list[TrialOf], Field(max_length=5000)]


class Prepared(Strict):
    """What there is before the first trial.

    Attributes:
        study: with the trials that begin it waiting.
        trials: how many there will be: no more than there are plans.

    """

    study: StudyOf
    trials: int = Field(ge=1, le=5000)


class Trying(Strict):
    """Ask for a trial to be run: a running one of the study, by its number."""

    search: Searching
    study: StudyOf
    number: int


class Proposed(Strict):
    """The parameters that a trial is about to be run with: said before it is."""

    params: Parameters


class Tried(Strict):
    """What a trial came to; ``next`` are parameters that it suggests to try."""

    params: Parameters
    state: Literal["complete", "pruned", "fail"]
    values: Annotated[list[float], Field(max_length=3)] | None
    constraints: dict[Name, float] = Field(max_length=10)
    error: Text | None
    next: Annotated[list[TrialOf], Field(max_length=10)]


class Listing(Strict):
    """Ask which plans are to be run again."""

    search: Searching
    study: StudyOf


class Pair(Strict):
    """A trial's plan and a seed to run it with."""

    number: int = Field(ge=0)
    seed: int = Field(ge=0)


class Listed(Strict):
    """The plans that are to be run again."""

    pairs: Annotated[list[Pair], Field(max_length=1000)]


class Confirming(Strict):
    """Ask for a plan to be run again."""

    search: Searching
    study: StudyOf
    pair: Pair


class Confirmed(Strict):
    """What a plan scored under another seed, or why it failed; neither where it was not run any more."""

    score: float | None
    error: Text | None = None


class Concluding(Strict):
    """Ask for the result of a study whose plans were all run again."""

    search: Searching
    study: StudyOf


class ConfirmedPlan(Strict):
    """A plan that was run again."""

    trial: int
    uniform: Name | None = Field(description="the method that stands wherever it may; null for a mix")
    searched: float = Field(description="its score in the search")
    scores: tuple[float, ...] = Field(description="under each fresh seed, on data that no trial saw")
    gain: float | None = Field(description="mean difference to the best uniform plan's")
    error: float | None = Field(description="that difference's standard error")
    beats: bool = Field(description="whether the gain is beyond noise")


class Found(Strict):
    """What a search came to."""

    files: Files
    methods: dict[Name, int] = Field(description="of the best plan: how many sites each method has")
    chosen: int = Field(description="index of the best plan in `confirmation`")
    confirmation: Annotated[list[ConfirmedPlan], Field(max_length=100)]
    trials: int
    notes: tuple[Text, ...]
