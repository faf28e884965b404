"""What is asked of children and what they answer, as plain data: the service itself never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, TypeAdapter, field_validator, model_validator

from api.messages import Strict

Scalar = Annotated[bool | int | float | str, Field(union_mode="smart")]
Text = Annotated[str, Field(max_length=4000)]
Name = Annotated[str, Field(max_length=2000)]
_OBJECT = TypeAdapter(dict[str, JsonValue])
Keep = Literal["function", "affine", "nothing"]
#: What a file of a network may be; the last two say themselves what their network is.
Format = Literal["safetensors", "torch zip", "torch legacy", "exported program", "onnx"]
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
    """The file of a network in the child's folder, and the architecture that it belongs to.

    Attributes:
        file: its name.
        architecture: a registered name, or the operator's ``module:factory``; None where the file says.
        arguments: of the architecture.
        entry: which entry of a training checkpoint.
        configured: whether the operator wrote the architecture.
        known_as: what clients know the architecture by; None where the file says.

    """

    file: str
    architecture: str | None = None
    arguments: dict[str, Scalar] = Field(default_factory=dict)
    entry: str | None = None
    configured: bool = False
    known_as: str | None = None


class Preparation(Strict):
    """How an image becomes a network's input: resized, the middle square taken, (x / 255 − mean) / std."""

    size: int = Field(224, ge=1, le=4096, description="height and width in pixels")
    mean: tuple[float, ...] = Field(
        (0.485, 0.456, 0.406),
        min_length=1,
        max_length=3,
        description="one value for grey images, three for RGB",
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.229, 0.224, 0.225), min_length=1, max_length=3)

    @model_validator(mode="after")
    def _channels(self) -> Self:
        if len(self.mean) != len(self.std) or len(self.mean) == 2:
            raise ValueError("give one value each for grey images, or three for RGB")
        return self


class Data(Strict):
    """A dataset in the child's folder.

    Attributes:
        file: its name.
        targets: the array that holds labels and is no input; folders are the labels of images.
        preparation: what is done to images.
        batch_size: number of samples in a forward pass.
        samples: the most samples that are read; None for all.

    """

    file: str
    targets: str | None = None
    preparation: Preparation = Field(default_factory=Preparation)
    batch_size: int = 16
    samples: int | None = 256


class Explaining(Strict):
    """Ask what a plan would do."""

    source: Source
    to: To
    input_shape: str | None = None
    data: Data | None = None


class Choosing(Strict):
    """Ask what each method would mean at each site; by default every method."""

    source: Source
    methods: tuple[str, ...]
    input_shape: str | None = None
    data: Data | None = None


class Converting(Strict):
    """Ask for a conversion; either ``to`` or ``plan``, which is a plan's JSON."""

    source: Source
    to: To | None = None
    plan: str | None = None
    keep: Keep = "function"
    input_shape: str | None = None
    data: Data | None = None
    stem: str


class Calibrating(Strict):
    """Ask for a calibration: what was converted, its original, and inputs.

    Attributes:
        source: the original.
        converted: the name of the file that was converted.
        plan: the name of the file of its plan, where there is one; ONNX files do not say theirs.
        data: the inputs.
        budget: the most optimisation steps.
        parameters: what may change.
        seed: of all that is random.
        stem: what the files that are made begin with.

    """

    source: Source
    converted: str
    plan: str | None = None
    data: Data
    budget: int
    parameters: Literal["all", "affine"]
    seed: int
    stem: str


class Sensing(Strict):
    """Ask how far the output moves when one site changes."""

    source: Source
    methods: tuple[str, ...]
    sites: tuple[str, ...] | None
    threshold: float
    input_shape: str | None = None
    data: Data | None = None
    stem: str


class Describing(Strict):
    """Ask what a file of inputs holds."""

    file: str
    targets: str | None = None


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
    trained: bool | None = Field(
        description="whether its statistics, scale or shift are anything but initial values"
    )
    ranks: tuple[int, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    calls: int | None
    producer: ProducerOf | None
    aliases: tuple[Name, ...]
    activation: Name | None
    followed_by: ActivationOf | None
    tied: tuple[Name, ...]
    detail: Text | None = Field(description="why it cannot be converted")
    open_batch: bool = Field(description="whether an exported program leaves its batch size open")
    read: tuple[Name, ...] = Field((), description="its numbers that a forward method reads from outside")


class InputOf(Strict):
    """An input of a network, as its file describes it."""

    name: Name
    dtype: Name | None
    shape: tuple[int | None, ...] | None = Field(
        description="null where a size is open, or nothing is known of it"
    )


class Inspected(Strict):
    """What a file of a network holds."""

    format: Format
    architecture: Name | None
    arguments: dict[str, Scalar]
    parameters: int = Field(ge=0)
    converted: bool = Field(description="whether normsearch converted it already")
    notes: tuple[Text, ...]
    inputs: Annotated[list[InputOf], Field(max_length=1000)] | None = Field(
        None, description="of an exported program or an ONNX file; null where the file does not say"
    )
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

    @field_validator("plan")
    @classmethod
    def _is_object(cls, value: str | None) -> str | None:
        if value is not None:
            # Of limited depth too, so that it can be answered with.
            _OBJECT.validate_json(value)
        return value


class Meaning(Strict):
    """What a method would mean at a site."""

    method: Name | None = Field(description="with every option resolved; null where it is refused")
    exact: bool | None = Field(description="whether the function is kept exactly in eval mode")
    reason: Text | None = Field(description="why it is refused")
    fix: Text | None
    notes: tuple[Text, ...]


class Choices(Strict):
    """What each method would mean at each site."""

    sites: Annotated[list[Site], Field(max_length=20_000)]
    order: tuple[Name, ...] | None = Field(
        description="sites in the order in which a forward pass reaches them; null without inputs"
    )
    methods: tuple[Name, ...]
    choices: Annotated[list[tuple[Meaning, ...]], Field(max_length=20_000)] = Field(
        description="for each site, in order, one for each method"
    )


class Made(Strict):
    """A file that a conversion wrote."""

    name: str = Field(max_length=200)
    role: Literal["weights", "script", "layers", "plan", "report", "page", "sensitivity"]
    media_type: Literal[
        "application/octet-stream", "text/x-python", "application/json", "text/html; charset=utf-8"
    ]


Files = Annotated[list[Made], Field(min_length=1, max_length=8)]


class Converted(Strict):
    """What a conversion came to."""

    model: Inspected
    files: Files
    changed: int = Field(ge=0, description="number of layers replaced")
    exact: bool
    batch_independent: bool
    notes: tuple[Text, ...]


class Rung(Strict):
    """One thing that a calibration tried."""

    name: Name
    error: float | None = Field(description="the held-out error with it; null where it was not finite")
    kept: bool
    steps: int
    seconds: float


class Calibrated(Strict):
    """What a calibration came to."""

    files: Files
    before: float | None = Field(description="held-out error before: relative L2 distance of the outputs")
    after: float | None
    rungs: Annotated[list[Rung], Field(max_length=20)]
    notes: tuple[Text, ...]


class Sensed(Strict):
    """What a measurement of sensitivity came to."""

    files: Files
    sites: int
    methods: tuple[Name, ...]
    vetoes: dict[str, tuple[Name, ...]] = Field(description="by site: methods that move the output too far")
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
    classes: Annotated[list[ImageClass], Field(max_length=10_000, description="in the order of their labels")]


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
