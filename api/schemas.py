"""Requests and responses, as OpenAPI shows them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Self, TypeVar

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from api.tasks import Decision, Described, Format, InputOf, Keep, Preparation, Scalar, To

T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    """A part of a list."""

    items: list[T]
    next: str | None = Field(description="give it as `cursor` to get the next part; null at the end")


class Upload(BaseModel):
    """A file that was received."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "upl_019e2f0c5b1a0123456789abcdef01234567",
                "filename": "resnet50.pth",
                "bytes": 102540417,
                "sha256": "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
                "created": "2026-11-28T12:00:00Z",
            }
        }
    )

    id: str
    filename: str
    bytes: int
    sha256: str
    created: datetime

    @classmethod
    def of(cls, row: sa.Row[Any]) -> Self:
        """Return it as its row says."""
        return cls(
            id=row.id, filename=row.name, bytes=row.size, sha256=row.sha256, created=moment(row.created_ms)
        )


def moment(milliseconds: int) -> datetime:
    """Return a time as it is shown."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


_MODEL_ID = "mod_019e2f0c5b1a0123456789abcdef01234567"
Architecture = Annotated[
    str,
    Field(
        max_length=200,
        description="as GET /v1/architectures lists it; not needed for checkpoints that name one themselves, "
        "and none for exported programs (.pt2) and ONNX files (.onnx)",
        examples=["torchvision/resnet50"],
    ),
]
Arguments = Annotated[
    dict[Annotated[str, Field(max_length=200)], Scalar],
    Field(max_length=32, description="of the architecture", examples=[{"num_classes": 10}]),
]
Entry = Annotated[
    str, Field(max_length=200, description="which entry of a training checkpoint", examples=["model_ema"])
]
Shape = Annotated[
    str,
    Field(
        pattern=r"^[1-9][0-9]{0,6}(x[1-9][0-9]{0,6}){0,4}$",
        description="of one sample: random numbers of this shape tell the shapes at each site",
        examples=["3x224x224"],
    ),
]
Wanted = Annotated[
    To,
    Field(
        description="a method; a list in order of preference; or patterns of site paths to these, where * "
        "matches any text and the first that matches counts, * alone last",
        examples=["group", ["identity", "frozen"], {"layer4.*": "instance", "*": "group(groups=8)"}],
    ),
]


ModelId = Annotated[str, Field(max_length=40, examples=[_MODEL_ID])]
DatasetId = Annotated[str, Field(max_length=40, examples=["dat_019e2f0c5b1a0123456789abcdef01234567"])]
BatchSize = Annotated[int, Field(ge=1, le=4096, description="samples of the dataset in one forward pass")]
Samples = Annotated[
    int,
    Field(ge=1, le=1_000_000, description="the most samples of the dataset, evenly spread over all of it"),
]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="the same seed gives the same result")]


class Request(BaseModel):
    """A body: nothing unknown is taken, no number is infinite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ModelRequest(Request):
    """Ask what an upload holds."""

    upload: str = Field(max_length=40, examples=["upl_019e2f0c5b1a0123456789abcdef01234567"])
    architecture: Architecture | None = None
    arguments: Arguments = Field(default_factory=dict)
    entry: Entry | None = None


class Model(BaseModel):
    """A network: a checkpoint that fits its architecture, an exported program, or an ONNX file."""

    id: str = Field(examples=[_MODEL_ID])
    upload: str
    filename: str
    format: Format = Field(examples=["torch zip"])
    architecture: str | None = Field(
        description="null for an exported program or an ONNX file, which says itself what its network is",
        examples=["torchvision/resnet50"],
    )
    arguments: dict[str, Scalar]
    entry: str | None
    parameters: int = Field(examples=[25557032])
    converted: bool = Field(description="whether normsearch converted it already; ONNX files do not say")
    inputs: list[InputOf] | None = Field(
        description="of an exported program or an ONNX file; null where the file does not say"
    )
    sites: int = Field(description="number of places where it normalizes; /sites lists them", examples=[53])
    notes: list[str] = Field(description="what was unwrapped, renamed or cast to read it")
    created: datetime

    @classmethod
    def of(cls, row: sa.Row[Any]) -> Self:
        """Return it as its row says."""
        document = json.loads(row.document)
        asked, found = document["asked"], document["found"]
        return cls(
            id=row.id,
            upload=row.upload,
            filename=row.name,
            # Operators' factories are known by the names that they gave them.
            architecture=asked["architecture"] or found["architecture"],
            entry=asked["entry"],
            inputs=found.get("inputs"),
            sites=len(found["sites"]),
            created=moment(row.created_ms),
            **{key: found[key] for key in ("format", "arguments", "parameters", "converted", "notes")},
        )


class PlanRequest(Request):
    """Ask what a plan would do."""

    model: ModelId
    to: Wanted
    input_shape: Shape | None = None
    dataset: DatasetId | None = Field(None, description="tells shapes, instead of input_shape")

    @model_validator(mode="after")
    def _inputs(self) -> Self:
        return one_of_inputs(self)


class ChoicesRequest(Request):
    """Ask what each method would mean at each site."""

    model: ModelId
    methods: list[Annotated[str, Field(min_length=1, max_length=300)]] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="by default every method",
        examples=[["group", "layer(axes=channel)"]],
    )
    input_shape: Shape | None = None
    dataset: DatasetId | None = Field(None, description="tells shapes, instead of input_shape")

    @model_validator(mode="after")
    def _inputs(self) -> Self:
        return one_of_inputs(self)


class PlanResponse(BaseModel):
    """What a plan would do at every site, refusals included."""

    rows: list[Decision]
    notes: list[str] = Field(description="what concerns the network as a whole")
    refused: int = Field(description="number of sites where every method was refused")
    plan: dict[str, Any] | None = Field(
        description="the plan, for `plan` of a conversion; null where a site was refused"
    )


class Artifact(BaseModel):
    """A file that was made here."""

    id: str = Field(examples=["art_019e2f0c5b1a0123456789abcdef01234567"])
    model: str = Field(description="what it was made from", examples=[_MODEL_ID])
    job: str | None = Field(description="what made it")
    role: str = Field(
        description="weights (the rewritten file, of the kind that was given: .safetensors, .pt2 or .onnx), "
        "script, layers, plan, report (JSON), page (HTML) or sensitivity"
    )
    filename: str = Field(examples=["resnet50-converted.safetensors"])
    media_type: str
    bytes: int
    sha256: str
    created: datetime

    @classmethod
    def of(cls, row: sa.Row[Any]) -> Self:
        """Return it as its row says."""
        return cls(
            id=row.id,
            model=row.model,
            job=row.job,
            role=row.role,
            filename=row.name,
            media_type=row.media_type,
            bytes=row.size,
            sha256=row.sha256,
            created=moment(row.created_ms),
        )


class DatasetRequest(Request):
    """Ask what an upload holds as inputs."""

    upload: str = Field(max_length=40, examples=["upl_019e2f0c5b1a0123456789abcdef01234567"])
    targets: str | None = Field(
        None,
        max_length=200,
        description="of arrays: the one that holds labels, whole numbers from 0, and is no input; `arr_1` is "
        "the second of `numpy.savez(path, x, y)`. Images have their folders, in alphabetical order",
        examples=["arr_1"],
    )
    preparation: Preparation = Field(
        default_factory=Preparation, description="of images; ImageNet's by default"
    )


class Dataset(Described):
    """Inputs for forward passes, with labels or without."""

    id: str = Field(examples=["dat_019e2f0c5b1a0123456789abcdef01234567"])
    upload: str
    filename: str
    targets: str | None
    preparation: Preparation
    created: datetime

    @classmethod
    def of(cls, row: sa.Row[Any]) -> Self:
        """Return it as its row says."""
        document = json.loads(row.document)
        return cls(
            id=row.id,
            upload=row.upload,
            filename=row.name,
            created=moment(row.created_ms),
            **document["asked"],
            **document["found"],
        )


class ArchitecturePage(Page[str]):
    """Names of architectures, and the arguments that each library's may be given."""

    arguments: dict[str, dict[str, str]] = Field(description="by library and argument")


class ConvertForm(Request):
    """The fields beside `file`; `to` and `arguments` may be repeated."""

    architecture: Architecture | None = None
    arguments: Annotated[
        Arguments, WithJsonSchema({"type": "array", "items": {"type": "string", "pattern": "^[^=]+=.*$"}})
    ] = Field(default_factory=dict, description="of the architecture, each `name=value`")
    entry: Entry | None = None
    to: list[Annotated[str, Field(max_length=300)]] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="methods in order of preference, or `PATTERN=METHOD` for some sites",
        examples=[["group"]],
    )
    plan: str | None = Field(None, max_length=2**20, description="a plan as JSON, instead of `to`")
    keep: Keep = Field("function", description="what new layers keep of the old ones")
    input_shape: Shape | None = None

    @field_validator("arguments", mode="before")
    @classmethod
    def _pairs(cls, given: Any) -> Any:
        if not isinstance(given, list):
            return given
        made: dict[str, Any] = {}
        for text in given:
            name, equals, value = text.partition("=")
            if not equals or name in made:
                raise ValueError("write each as name=value, once")
            made[name] = _scalar(value)
        return made

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.to is None) == (self.plan is None):
            raise ValueError("give either to, for example group, or plan")
        return self


def _scalar(text: str) -> Any:
    """Read true, false and numbers as JSON does; anything else is text as it stands."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float | str) else text


def one_of_inputs(request: T) -> T:
    """Return a request that names at most one kind of inputs."""
    given: Any = request
    if given.input_shape is not None and given.dataset is not None:
        raise ValueError("give input_shape or dataset, not both")
    return request
