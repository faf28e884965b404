"""What is asked of children and what they answer, as plain data: the service itself never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from api.messages import Strict

Scalar = Annotated[bool | int | float | str, Field(union_mode="smart")]
Text = Annotated[str, Field(max_length=4000)]
Name = Annotated[str, Field(max_length=2000)]
Keep = Literal["function", "affine", "nothing"]
#: A method's spelling, several in order of preference, or patterns of site paths to these.
Choice = (
    Annotated[str, Field(max_length=300)]
    | Annotated[list[Annotated[str, Field(max_length=300)]], Field(min_length=1, max_length=64)]
)
To = (
    Choice
    | Annotated[dict[Annotated[str, Field(max_length=300)], Choice], Field(min_length=1, max_length=5000)]
)


class Source(Strict):
    """A checkpoint in the child's folder, and the network that it belongs to.

    Attributes:
        file: its name.
        architecture: a registered name, or the operator's ``module:factory``; None where the file says.
        arguments: of the architecture.
        entry: which entry of a training checkpoint.
        configured: whether the operator wrote the architecture.

    """

    file: str
    architecture: str | None = None
    arguments: dict[str, Scalar] = Field(default_factory=dict)
    entry: str | None = None
    configured: bool = False


class Explaining(Strict):
    """Ask what a plan would do."""

    source: Source
    to: To
    input_shape: str | None = None


class Converting(Strict):
    """Ask for a conversion; either ``to`` or ``plan``, which is a plan's JSON."""

    source: Source
    to: To | None = None
    plan: str | None = None
    keep: Keep = "function"
    input_shape: str | None = None
    stem: str


class Describing(Strict):
    """Ask what a file of inputs holds."""

    file: str


class ProducerOf(Strict):
    """The nearest convolution or linear layer upstream of a site."""

    path: Name
    layer: Name
    foldable: bool
    detail: Text | None
    source: Literal["trace", "hooks"]
    groups: int
    transposed: bool
    aliases: tuple[Name, ...]
    plain: bool


class ActivationOf(Strict):
    """The activation that a site's output goes through."""

    path: Name
    layer: Name
    removable: bool
    detail: Text | None
    inside: bool


class Site(Strict):
    """One place where a network normalizes."""

    path: Name = Field(description="as in `named_modules()`")
    kind: Name
    layer: Name = Field(description="the class that stands there")
    channels: int | None
    eps: float
    momentum: float | None
    affine: bool
    bias: bool
    track_running_stats: bool
    trained: bool | None = Field(description="whether its statistics were ever updated")
    ranks: tuple[int, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    calls: int | None
    producer: ProducerOf | None
    aliases: tuple[Name, ...]
    activation: Name | None
    followed_by: ActivationOf | None
    tied: tuple[Name, ...]
    detail: Text | None = Field(description="why it cannot be converted")


class Inspected(Strict):
    """What a checkpoint holds."""

    format: Literal["safetensors", "torch zip", "torch legacy"]
    architecture: Name
    arguments: dict[str, Scalar]
    parameters: int = Field(ge=0)
    converted: bool = Field(description="whether normsearch converted it already")
    notes: tuple[Text, ...]
    sites: Annotated[list[Site], Field(max_length=20_000)]


class Refusal(Strict):
    """Why a method cannot stand at a site."""

    method: Name
    reason: Text
    fix: Text


class Decision(Strict):
    """What is decided for a site."""

    site: Name
    method: Name | None = Field(description="null where every method was refused")
    exact: bool | None = Field(description="whether the function is kept exactly in eval mode")
    refusals: tuple[Refusal, ...]
    notes: tuple[Text, ...]


class Explained(Strict):
    """What a plan would do at every site."""

    rows: Annotated[list[Decision], Field(max_length=20_000)]
    notes: tuple[Text, ...]
    plan: str | None = Field(description="the plan as JSON text, for `plan` of a conversion; null if refused")


class Made(Strict):
    """A file that a conversion wrote."""

    name: str = Field(max_length=200)
    role: Literal["weights", "script", "layers", "plan", "report", "page"]
    media_type: Literal[
        "application/octet-stream", "text/x-python", "application/json", "text/html; charset=utf-8"
    ]


class Converted(Strict):
    """What a conversion came to."""

    model: Inspected
    files: Annotated[list[Made], Field(min_length=1, max_length=8)]
    changed: int = Field(ge=0, description="number of layers replaced")
    exact: bool
    batch_independent: bool
    notes: tuple[Text, ...]


class Array(Strict):
    """An array of numbers."""

    name: Name
    dtype: Name
    shape: tuple[int, ...]


class ImageClass(Strict):
    """A folder of images."""

    name: Name
    images: int


class Described(Strict):
    """What a file of inputs holds."""

    kind: Literal["arrays", "images"]
    samples: int | None = Field(description="null where arrays have different lengths")
    arrays: Annotated[list[Array], Field(max_length=1000)]
    classes: Annotated[list[ImageClass], Field(max_length=10_000)]


class MethodOf(Strict):
    """A normalization method."""

    name: Name
    title: Text
    exact: bool = Field(description="whether the function is kept exactly in eval mode")
    batch_independent: bool
    options: dict[str, Scalar | None]
    citation: Text


class Catalogue(Strict):
    """What the library knows by name."""

    methods: list[MethodOf]
    architectures: dict[str, list[Name]]
    arguments: dict[str, dict[str, Text]]
