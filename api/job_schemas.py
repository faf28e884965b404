"""What jobs are asked, and how they are shown."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, Literal, Self

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from api.jobs import Kind, State
from api.schemas import (
    BatchSize,
    ConvertForm,
    DatasetId,
    ModelId,
    Request,
    Samples,
    Seed,
    Shape,
    Wanted,
    moment,
    one_of_inputs,
)
from api.search_tasks import Constraints, Cost, Recipe
from api.tasks import Keep, Text

_JOB_ID = "job_019e2f0c5b1a0123456789abcdef01234567"
_WEIGHTS_ID = "art_019e2f0c5b1a0123456789abcdef01234567"
MethodName = Annotated[str, Field(min_length=1, max_length=300)]
Pattern = Annotated[str, Field(min_length=1, max_length=300)]


class ConversionRequest(Request):
    """Ask for a conversion of a model."""

    model: ModelId
    to: Wanted | None = None
    plan: dict[str, Any] | None = Field(
        None, description="a plan, as POST /v1/plans answers it, instead of `to`"
    )
    keep: Keep = Field("function", description="what new layers keep of the old ones")
    input_shape: Shape | None = None
    dataset: DatasetId | None = Field(
        None, description="inputs that the report measures on; tells shapes too"
    )
    batch_size: BatchSize = 16
    samples: Samples = 256

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.to is None) == (self.plan is None):
            raise ValueError("give either to, for example group, or plan")
        return one_of_inputs(self)


class ConvertJob(Request):
    """What POST /v1/convert asks, once its file is an upload.

    Attributes:
        upload: the file.
        is_new: whether the upload was made for this job, and goes with it if it comes to nothing.
        form: the fields beside the file.

    """

    upload: str
    is_new: bool
    form: ConvertForm


class CalibrationRequest(Request):
    """Ask to bring converted weights back to their original with unlabelled inputs."""

    weights: str = Field(
        max_length=40,
        description="the artifact of a conversion whose role is weights",
        examples=[_WEIGHTS_ID],
    )
    dataset: DatasetId
    budget: int = Field(
        200,
        ge=0,
        le=20_000,
        description="the most optimisation steps, one batch each; ONNX files are fitted without any",
    )
    parameters: Literal["all", "affine"] = Field(
        "all", description="what may change: everything, or the new layers alone; of ONNX files everything"
    )
    batch_size: BatchSize = 32
    samples: Samples = 256
    seed: Seed = 0


class SensitivityRequest(Request):
    """Ask how far a model's output moves when a single site changes."""

    model: ModelId
    methods: list[MethodName] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="by default every method",
        examples=[["group", "instance"]],
    )
    sites: list[Pattern] | None = Field(
        None, min_length=1, max_length=1000, description="patterns of site paths; by default all"
    )
    threshold: float = Field(0.2, gt=0, le=1e6, description="drifts above are vetoes (relative L2)")
    input_shape: Shape | None = None
    dataset: DatasetId | None = None
    batch_size: BatchSize = 16
    samples: Samples = 256

    @model_validator(mode="after")
    def _inputs(self) -> Self:
        if self.input_shape is None and self.dataset is None:
            raise ValueError("give dataset, or input_shape for random numbers")
        return one_of_inputs(self)


class SearchRequest(Request):
    """Ask for the plan that suits a model best, trained: a few plans are, on a dataset with labels."""

    model: ModelId
    dataset: DatasetId
    methods: list[MethodName] | None = Field(
        None,
        min_length=1,
        max_length=32,
        description="to choose from, the preferred first; by default seven",
        examples=[["batch", "group", "instance"]],
    )
    sites: list[Pattern] | None = Field(
        None, min_length=1, max_length=1000, description="patterns of site paths to search; by default all"
    )
    trials: int = Field(40, ge=2, le=5000, description="plans that are tried; the operator sets the most")
    recipe: Recipe = Field(default_factory=Recipe)
    samples: int = Field(
        10_000,
        ge=10,
        le=1_000_000,
        description="the most samples of the dataset; 60 % train, 20 % score, 20 % confirm",
    )
    constraints: Constraints = Field(default_factory=Constraints)
    costs: list[Cost] = Field(default_factory=list, max_length=2, description="minimised beside the accuracy")
    veto: float | None = Field(
        0.75,
        gt=0,
        le=1e6,
        description="a single change that moves the output this far is not tried; null for none",
    )
    sense: bool = Field(True, description="ask a network that trains all methods at once first")
    confirm: int = Field(3, ge=0, le=20, description="fresh seeds that the best plans are run again with")
    top: int = Field(3, ge=1, le=10, description="how many mixes are confirmed")
    seed: Seed = 0


class Progress(BaseModel):
    """How far a job has come."""

    stage: str = Field(description="what is being done")
    done: int = Field(description="steps of the stage that are finished")
    total: int = Field(description="steps that the stage has at most; 0 where nobody knows")
    seconds_left: float | None = Field(description="of the stage, estimated from the steps done so far")
    detail: str = Field(description="what the last step found")


class LogLine(BaseModel):
    """A line of a job's log."""

    time: datetime
    text: str


class Result(BaseModel):
    """What a job came to."""

    model_config = ConfigDict(extra="allow")

    artifacts: list[str] = Field(description="ids of what was made; `/v1/artifacts/ID` is the file")
    notes: list[Text] = Field(default_factory=list)


class Job(BaseModel):
    """Work that takes longer than a request."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": _JOB_ID,
                "kind": "conversion",
                "name": "resnet50.pth",
                "state": "running",
                "model": "mod_019e2f0c5b1a0123456789abcdef01234567",
                "dataset": None,
                "attempts": 1,
                "progress": {
                    "stage": "measuring",
                    "done": 2,
                    "total": 4,
                    "seconds_left": 1.5,
                    "detail": "layers",
                },
                "seconds_left": 1.5,
                "result": None,
                "problem": None,
                "log": [],
                "created": "2026-11-28T12:00:00Z",
                "started": "2026-11-28T12:00:01Z",
                "finished": None,
            }
        }
    )

    id: str
    kind: Kind
    name: str = Field(description="the file that it works on")
    state: State
    model: str | None
    dataset: str | None
    attempts: int = Field(description="how often it was begun: again where a worker was lost")
    progress: Progress | None
    seconds_left: float | None = Field(description="of the stage that it is in; null where nothing is known")
    result: Result | None
    problem: dict[str, Any] | None = Field(description="problem details, where it failed")
    log: list[LogLine] = Field(description="the last lines; in lists it is left out")
    created: datetime
    started: datetime | None
    finished: datetime | None

    @classmethod
    def of(cls, row: sa.Row[Any], log: list[sa.Row[Any]] | None = None) -> Self:
        """Return it as its row says."""
        progress = None if row.progress is None else Progress.model_validate_json(row.progress)
        going = row.state == "running"
        return cls(
            id=row.id,
            kind=row.kind,
            name=row.name,
            state=row.state,
            model=row.model,
            dataset=row.dataset,
            attempts=row.attempts,
            progress=progress,
            seconds_left=progress.seconds_left if progress is not None and going else None,
            result=None if row.result is None else Result.model_validate_json(row.result),
            problem=None if row.problem is None else json.loads(row.problem),
            log=[
                LogLine(time=moment(line.created_ms), text=json.loads(line.document)["text"])
                for line in log or []
            ],
            created=moment(row.created_ms),
            started=None if row.started_ms is None else moment(row.started_ms),
            finished=None if row.finished_ms is None else moment(row.finished_ms),
        )
