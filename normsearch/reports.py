"""Report and Profile: the numbers of a comparison or a measurement, as plain data, JSON and a table."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

from normsearch.dependence import BatchDependence
from normsearch.text import batches, memory

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")


@dataclass(frozen=True)
class Change(Generic[T]):
    """A quantity before and after."""

    before: T
    after: T


@dataclass(frozen=True)
class Drift:
    """How far outputs moved.

    Attributes:
        relative_l2: ‖converted − original‖ / ‖original‖.
        kl: mean Kullback-Leibler divergence in nats; None unless outputs are logits.
        top1_agreement: share of predictions with the same top class; None unless outputs are logits.

    """

    relative_l2: float
    kl: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class Environment:
    """Where numbers were measured."""

    device: str
    dtype: str
    threads: int
    torch: str
    python: str

    @classmethod
    def here(cls, model: nn.Module) -> Environment:
        """Describe the device and dtype of a model and the versions in use."""
        parameter = next(model.parameters(), torch.empty(0))
        return cls(
            device=str(parameter.device),
            dtype=str(parameter.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            python=platform.python_version(),
        )


class _Printable:
    """JSON and a rich table for a dataclass of numbers."""

    def to_json(self) -> str:
        """Return every number as JSON; what could not be measured is null."""
        return json.dumps(_finite(asdict(self)), indent=2, allow_nan=False)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Report(_Printable):
    """What a conversion changed; made by ``compare``.

    Attributes:
        drift: of the outputs in eval mode.
        metric: the caller's metric; None without one.
        batch_dependence: of a sample's output on the other samples.
        crop_dependence: of a tile's pixels on what lies around it; None unless asked for.
        parameters: number of parameters.
        batch_norms: number of BatchNorm sites, modules and functional calls.
        batches: number of batches measured on.
        batch_size: number of samples in the first one, on which dependence was measured.
        environment: device, dtype and versions.

    """

    drift: Drift
    metric: Change[float] | None
    batch_dependence: Change[BatchDependence]
    crop_dependence: Change[float] | None
    parameters: Change[int]
    batch_norms: Change[int]
    batches: int
    batch_size: int
    environment: Environment

    def __rich__(self) -> Table:
        from rich.table import Table

        here = self.environment
        table = Table(
            title="before and after conversion",
            caption=f"{batches(self.batches, self.batch_size)}\n{here.device}, {here.dtype}, "
            f"torch {here.torch}, {here.threads} threads",
        )
        table.add_column("quantity")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for name, before, after in self._lines():
            table.add_row(name, _format(before), _format(after))
        return table

    def _lines(self) -> Iterator[tuple[str, Any, Any]]:
        yield "output drift (relative L2)", None, self.drift.relative_l2
        if self.drift.kl is not None:
            yield "KL divergence (nats)", None, self.drift.kl
            yield "same top-1 class", None, self.drift.top1_agreement
        if self.metric is not None:
            yield "metric", self.metric.before, self.metric.after
        old, new = self.batch_dependence.before, self.batch_dependence.after
        yield "batch dependence, eval", old.eval_batches, new.eval_batches
        yield "batch dependence, train", old.train_batches, new.train_batches
        yield "alone or in a batch, train", old.train_alone, new.train_alone
        if self.crop_dependence is not None:
            yield "crop dependence", self.crop_dependence.before, self.crop_dependence.after
        yield "parameters", self.parameters.before, self.parameters.after
        yield "BatchNorm sites", self.batch_norms.before, self.batch_norms.after


@dataclass(frozen=True)
class Profile(_Printable):
    """The cost of a forward pass; made by ``profile``.

    Attributes:
        parameters: number of parameters.
        latency_ms: median time in milliseconds.
        latency_least_ms: shortest time.
        latency_most_ms: longest time.
        peak_memory_bytes: largest size of tensors alive at once during the pass.
        environment: device, dtype and versions.
        batch_size: number of samples in the pass; None in reports that did not say it.

    """

    parameters: int
    latency_ms: float
    latency_least_ms: float
    latency_most_ms: float
    peak_memory_bytes: int
    environment: Environment
    batch_size: int | None = None

    def __rich__(self) -> Table:
        from rich.table import Table

        here = self.environment
        table = Table(
            title=f"{batches(1, self.batch_size)}\n{here.device}, {here.dtype}, torch {here.torch}, "
            f"{here.threads} threads"
        )
        table.add_column("quantity")
        table.add_column("value", justify="right")
        table.add_row("parameters", f"{self.parameters:,}")
        table.add_row(
            "latency", f"{self.latency_ms:.2f} ms ({self.latency_least_ms:.2f}-{self.latency_most_ms:.2f})"
        )
        table.add_row("peak memory of activations", memory(self.peak_memory_bytes))
        return table


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _format(value: Any) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
