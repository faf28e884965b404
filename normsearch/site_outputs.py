"""site_drift: how far each site's output moved, which shows where in a network a conversion goes astray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.errors import ModelError
from normsearch.forward import evaluating, preserved, try_call
from normsearch.sites import NormSite, analyse, with_calls_lifted

#: The most bytes of the original's outputs that are kept at once; what is more takes another forward pass.
_MOST_BYTES = 2**29


@dataclass(frozen=True)
class SiteDrift:
    """How far the output of one site moved.

    Attributes:
        site: the site's path.
        depth: its place in the order in which the original's forward pass first reaches the sites, from 0;
            None where it is not reached.
        relative_l2: ‖converted − original‖ / ‖original‖ over all batches; None where there is nothing to
            compare.
        reason: why there is nothing to compare.

    """

    site: str
    depth: int | None
    relative_l2: float | None
    reason: str | None = None


@dataclass
class _Sum:
    distance: float = 0.0
    norm: float = 0.0
    reason: str | None = None

    def result(self, site: str, depth: int | None) -> SiteDrift:
        if depth is None and self.reason is None:
            self.reason = "the forward pass does not reach it"
        if self.reason is not None:
            return SiteDrift(site, depth, None, self.reason)
        relative = (self.distance / self.norm) ** 0.5 if self.norm else float(self.distance > 0)
        if not relative < float("inf"):
            return SiteDrift(site, depth, None, "an output there is not finite")
        return SiteDrift(site, depth, relative)


def site_drift(
    original: nn.Module,
    converted: nn.Module,
    batches: Iterable[Any],
    *,
    sites: Sequence[NormSite] | None = None,
) -> tuple[SiteDrift, ...]:
    """Measure how far the output of every site moved, matched by the site's path.

    d = ‖converted − original‖ / ‖original‖ over all calls and batches, both models in eval mode. A site's
    drift holds what it adds and what reaches it from the sites before. Memory does not grow with the number
    of batches. Models, random state and modes are left as they were.

    Args:
        original: the model before.
        converted: the model after.
        batches: inputs, never labels: a tuple is ``*args``, a dict ``**kwargs``, anything else one argument.
        sites: which; by default every BatchNorm site of the original. ``Plan.sites`` has those of
            ``weights=True`` too.

    Raises:
        ModelError: a model fails, or there is no batch.

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> converted = normsearch.convert(model, "frozen")
        >>> [(drift.site, drift.relative_l2 < 1e-6)
        ...  for drift in site_drift(model, converted, [torch.randn(4, 3, 8, 8)])]
        [('1', True)]

    """
    if sites is None:
        sites = analyse(original, None, dataflow=False)
    # An F.batch_norm call has an output to look at once it is a layer of the graph.
    before = with_calls_lifted(original, certain=any(site.kind == "functional" for site in sites))
    sums = {site.path: _Sum(reason=_missing(site, before, converted)) for site in sites}
    depths: dict[str, int] = {}
    seen = False
    with _undisturbed(before), _undisturbed(converted):
        for inputs in batches:
            seen = True
            waiting = [path for path, total in sums.items() if total.reason is None]
            while waiting:
                kept, waiting = _record(before, inputs, waiting, depths)
                _compare(converted, inputs, kept, sums)
    if not seen:
        raise ModelError("site_drift got no batch; give at least one input")
    return tuple(total.result(path, depths.get(path)) for path, total in sums.items())


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    with preserved(model), evaluating(model), torch.compiler.set_stance("force_eager"):
        yield


def _missing(site: NormSite, before: nn.Module, after: nn.Module) -> str | None:
    """Return why a site's outputs cannot be looked at in both models."""
    if _layer(before, site.path) is None:
        return site.detail or "it is no layer of the original"
    if _layer(after, site.path) is None:
        return "the converted model has no layer there"
    return None


def _layer(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


@contextmanager
def _watching(
    model: nn.Module, paths: Iterable[str], see: Callable[[str, Tensor | None], None]
) -> Iterator[None]:
    """Call ``see`` with each output of the layers at ``paths``; None for one that is no tensor."""
    with ExitStack() as stack:
        for path in paths:

            def hook(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                see(path, output.detach() if isinstance(output, Tensor) else None)

            stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        yield


def _record(
    model: nn.Module, inputs: Any, paths: Sequence[str], depths: dict[str, int]
) -> tuple[dict[str, list[Tensor | None]], list[str]]:
    """Return the outputs of the sites by path and the paths left for another pass; note their order."""
    kept: dict[str, list[Tensor | None]] = {}
    later: dict[str, None] = {}
    size = 0

    def see(path: str, output: Tensor | None) -> None:
        nonlocal size
        depths.setdefault(path, len(depths))
        bytes_ = 0 if output is None else output.numel() * output.element_size()
        # The first site is kept whatever its size, so that every pass makes progress.
        if path in later or (path not in kept and kept and size + bytes_ > _MOST_BYTES):
            later[path] = None
            return
        size += bytes_
        # A copy: activations that follow may work in place.
        kept.setdefault(path, []).append(None if output is None else output.clone())

    with _watching(model, paths, see):
        try_call(model, inputs)
    return kept, list(later)


def _compare(
    model: nn.Module, inputs: Any, kept: dict[str, list[Tensor | None]], sums: dict[str, _Sum]
) -> None:
    """Add the distance of the converted model's outputs from those that were kept."""
    calls = dict.fromkeys(kept, 0)

    def see(path: str, output: Tensor | None) -> None:
        total, number = sums[path], calls[path]
        calls[path] += 1
        if number >= len(kept[path]):
            return
        old = kept[path][number]
        kept[path][number] = None
        if old is None or output is None or old.shape != output.shape:
            total.reason = total.reason or "its outputs before and after have no common shape"
            return
        total.distance += float((output.double() - old.double()).square().sum())
        total.norm += float(old.double().square().sum())

    with _watching(model, kept, see):
        try_call(model, inputs)
    for path, number in calls.items():
        if number != len(kept[path]):
            sums[path].reason = f"called {len(kept[path])} times before and {number} times after"
