"""The parts of a report as plain data: frozen dataclasses with a ``kind``, JSON-ready through ``asdict``.

A new part is a dataclass here, a place in ``SECTIONS`` and a template ``templates/<kind>.html``.
Numbers that could not be measured are None; drifts are relative L2 distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from normsearch.dependence import BatchDependence
from normsearch.methods import Refusal
from normsearch.reporting import search_sections
from normsearch.reports import Profile


@dataclass(frozen=True, kw_only=True)
class Moved:
    """How far the network's outputs moved from the original's.

    Attributes:
        relative_l2: ‖after − before‖ / ‖before‖.
        kl: mean Kullback-Leibler divergence in nats, where outputs are logits.
        top1_agreement: share of predictions with the same top class, where outputs are logits.

    """

    relative_l2: float | None
    kl: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was changed, and what came of it.

    Attributes:
        sites: number of sites.
        changed: number of those that got another layer.
        methods: how many sites have each method.
        exact: whether the eval-mode function is kept exactly at every site.
        batch_independent: whether no sample's output depends on the others, in training too.
        parameters: number of parameters before and after.
        batches: number of batches measured on; None without.
        batch_size: number of samples in the first of them; None in reports that did not say it.
        converted: the outputs after conversion.
        calibrated: the outputs after calibration.

    """

    kind: Literal["summary"] = "summary"
    sites: int
    changed: int
    methods: dict[str, int]
    exact: bool
    batch_independent: bool
    parameters: tuple[int, int]
    batches: int | None = None
    batch_size: int | None = None
    converted: Moved | None = None
    calibrated: Moved | None = None


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The caller's metric.

    Attributes:
        name: its name.
        original: of the original.
        converted: after conversion.
        calibrated: after calibration.

    """

    kind: Literal["metric"] = "metric"
    name: str
    original: float | None
    converted: float | None
    calibrated: float | None = None


@dataclass(frozen=True, kw_only=True)
class CalibrationStep:
    """One thing that calibration tried.

    Attributes:
        name: of the rung.
        error: the held-out error with it.
        kept: whether it lowered the error and was kept.
        steps: optimisation steps taken.
        seconds: time taken.

    """

    name: str
    error: float | None
    kept: bool
    steps: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CalibrationPart:
    """What calibration did.

    Attributes:
        before: the held-out error before it.
        after: the held-out error after it.
        steps: what was tried, in order.
        whitened: paths of the sites whose input is whitened by the layer before.
        gained_bias: paths of the layers that gained a bias for it.
        batches: how many batches there were.
        held_out: how many of them measured the error and trained nothing.

    """

    kind: Literal["calibration"] = "calibration"

    before: float | None
    after: float | None
    steps: tuple[CalibrationStep, ...]
    whitened: tuple[str, ...] = ()
    gained_bias: tuple[str, ...] = ()
    batches: int
    held_out: int


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One site.

    Attributes:
        site: its path.
        layer: the class that stood there.
        channels: number of channels.
        method: the method that stands there, every option resolved.
        changed: whether it got another layer.
        exact: whether that layer's eval-mode function is the old one's.
        depth: its place in the order of the forward pass; None where it is not reached or was not measured.
        converted: drift of its output after conversion.
        calibrated: drift of its output after calibration.
        reason: why a drift could not be measured.
        notes: what a user should know.

    """

    site: str
    layer: str
    channels: int | None
    method: str
    changed: bool
    exact: bool
    depth: int | None = None
    converted: float | None = None
    calibrated: float | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Every site, in the model's order."""

    kind: Literal["layers"] = "layers"
    rows: tuple[LayerRow, ...]


@dataclass(frozen=True, kw_only=True)
class HeatRow:
    """One site of a heat map.

    Attributes:
        site: its path.
        drift: of the network's output when this site alone changes, one per method; None where the method
            is refused, or where the output was not finite.
        refused: the places of the methods that cannot stand there.
        chosen: which of the methods stands there, by its place in the list; None where it is none of them.
        vetoed: the places of the methods that should not stand there.

    """

    site: str
    drift: tuple[float | None, ...]
    refused: tuple[int, ...] = ()
    chosen: int | None = None
    vetoed: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """The drift of the output when only one site changes, for every site and method.

    Attributes:
        methods: their spellings.
        rows: one per site.
        threshold: a method with a larger drift is vetoed at a site.

    """

    kind: Literal["sensitivity"] = "sensitivity"
    methods: tuple[str, ...]
    rows: tuple[HeatRow, ...]
    threshold: float


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The weights of instance, layer and batch statistics at a switchable site: two softmaxes."""

    site: str
    mean: tuple[float, float, float]
    variance: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """ρ of a batch-instance site, clamped to [0, 1]: 1 is all batch, 0 all instance.

    Attributes:
        site: its path.
        channels: their number.
        mean: over the channels.
        least: over the channels.
        most: over the channels.
        histogram: number of channels in ten equal bins from 0 to 1.

    """

    site: str
    channels: int
    mean: float
    least: float
    most: float
    histogram: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What the layers that mix normalizations have learned."""

    kind: Literal["gates"] = "gates"
    mixtures: tuple[Mixture, ...] = ()
    gates: tuple[Gate, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A forward pass before and after."""

    kind: Literal["cost"] = "cost"
    before: Profile
    after: Profile


@dataclass(frozen=True, kw_only=True)
class Dependence:
    """How much a sample's output depends on its batch, and a tile's on the crop, before and after."""

    kind: Literal["dependence"] = "dependence"
    before: BatchDependence
    after: BatchDependence
    crop: tuple[float | None, float | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something that a user should know, and what it is about: a site's path, or nothing in particular."""

    text: str
    about: str = ""


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Warnings and notes, and what was refused with the way out."""

    kind: Literal["notes"] = "notes"
    notes: tuple[Note, ...] = ()
    refusals: tuple[Refusal, ...] = ()


Section = (
    Summary
    | Metric
    | CalibrationPart
    | Layers
    | HeatMap
    | Gates
    | Cost
    | Dependence
    | search_sections.SearchSection
    | Notes
)

#: Every kind of section that is written and read back.
SECTIONS: MappingProxyType[str, type[Section]] = MappingProxyType(
    {
        "summary": Summary,
        "metric": Metric,
        "calibration": CalibrationPart,
        "layers": Layers,
        "sensitivity": HeatMap,
        "gates": Gates,
        "cost": Cost,
        "dependence": Dependence,
        **search_sections.SEARCH_SECTIONS,
        "notes": Notes,
    }
)
