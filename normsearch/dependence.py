"""How much a sample's output depends on the rest of its batch, and a pixel's on the crop around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map

from normsearch.errors import ModelError
from normsearch.forward import call, evaluating, restored_modes, try_call

Floats = Callable[[Any], list[Tensor]]

#: Layers that are random in training, by class name: timm's and torchvision's beside torch's dropouts.
_RANDOM = {"DropPath", "StochasticDepth", "DropBlock2d"}


@dataclass(frozen=True)
class BatchDependence:
    """Relative L2 distances between outputs of the same sample; 0 means no dependence, None not measurable.

    Attributes:
        eval_alone: in eval mode, alone against inside a batch.
        eval_batches: in eval mode, inside one batch against inside another.
        train_alone: in train mode, alone against inside a batch; None where a single sample is refused.
        train_batches: in train mode, inside one batch against inside another.
        note: why something could not be measured.

    """

    eval_alone: float | None
    eval_batches: float | None
    train_alone: float | None
    train_batches: float | None
    note: str | None = None


@dataclass(frozen=True)
class Crop:
    """A square tile to compare with the same pixels of the whole.

    Attributes:
        size: side of the tile in input pixels.
        margin: pixels at the tile's border to leave out, where padding differs; at least half the
            network's receptive field.

    """

    size: int
    margin: int

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("margin", self.margin)):
            if not isinstance(value, int) or isinstance(value, bool) or value < (name == "size"):
                raise ModelError(f"Crop({name}={value!r}): give a number of pixels as a whole number")


def batch_dependence(model: nn.Module, inputs: Any, floats: Floats) -> BatchDependence:
    """Measure it on one batch of at least three samples (fewer: nothing can be measured)."""
    size = batch_size(inputs)
    if size < 3:
        few = f"the first batch has {size} samples; three are needed to put one into two batches"
        return BatchDependence(None, None, None, None, few)
    half = (size + 1) // 2
    # The same sample alone, with the first neighbours, and with the other neighbours.
    picks = [[0], list(range(half)), [0, *range(half, size)]]
    batches = [_take(inputs, pick, size) for pick in picks]
    try:
        with evaluating(model):
            results = [
                _first_of(floats(try_call(model, b)), len(p)) for b, p in zip(batches, picks, strict=True)
            ]
    except ModelError as error:
        # Programs and ONNX graphs may have been exported for one batch size: a finding, not a failure.
        return BatchDependence(None, None, None, None, f"it takes no other batch than one of {size}: {error}")
    evaluated = (_distance(results[0], results[1]), _distance(results[1], results[2]))
    trained, note = _in_training(model, batches, picks, floats)
    return BatchDependence(*evaluated, *trained, note)


def _in_training(
    model: nn.Module, batches: list[Any], picks: list[list[int]], floats: Floats
) -> tuple[tuple[float | None, float | None], str | None]:
    results: list[list[Tensor] | None] = []
    note: str | None = None
    for batch, pick in zip(batches, picks, strict=True):
        with _training_without_noise(model):
            try:
                results.append(_first_of(floats(call(model, batch)), len(pick)))
            except Exception as error:
                # Train mode may need targets or refuse a single sample: a finding, not a failure.
                note = note or f"train mode, batch of {len(pick)}: {type(error).__name__}: {error}"
                results.append(None)
    alone, first, second = results
    return (
        None if alone is None or first is None else _distance(alone, first),
        None if first is None or second is None else _distance(first, second),
    ), note


@contextmanager
def _training_without_noise(model: nn.Module) -> Iterator[None]:
    """Train mode with dropout and drop-path off; buffers, modes and random state restored."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with restored_modes(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        for module in model.modules():
            random = isinstance(module, _DropoutNd) or type(module).__name__ in _RANDOM
            module.training = not random
        try:
            yield
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)


def crop_dependence(model: nn.Module, inputs: Any, floats: Floats, crop: Crop) -> float:
    """Relative L2 distance between a tile's output computed alone and the same pixels of the whole.

    Raises:
        ModelError: there is not exactly one image input and one output map, or the tile does not fit.

    """
    images = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() == 4]
    if len(images) != 1:
        raise ModelError(f"crop= needs exactly one input (N, C, H, W), got {len(images)}")
    height, width = images[0].shape[2:]
    if not 2 * crop.margin < crop.size < min(height, width):
        raise ModelError(
            f"{crop}: the tile must be smaller than the {height}×{width} image, larger than two margins"
        )
    tile = tree_map(
        lambda x: x[..., : crop.size, : crop.size] if isinstance(x, Tensor) and x.dim() == 4 else x, inputs
    )
    with evaluating(model):
        whole, part = floats(try_call(model, inputs)), floats(try_call(model, tile))
    if len(whole) != 1 or whole[0].dim() != 4 or part[0].dim() != 4:
        raise ModelError("crop= needs one output map (N, C, H, W); give outputs= to pick it")
    stride = height / whole[0].shape[2]
    cut = round(crop.margin / stride)
    side = round(crop.size / stride)
    if part[0].shape[2] != side or side - cut < 1:
        raise ModelError(
            f"{crop}: the output of a tile is {part[0].shape[2]} pixels high, expected {side}; "
            f"use a multiple of the network's stride ({stride:g})"
        )
    # The tile's upper and left borders are the image's own: only the inner borders need the margin.
    inner = (..., slice(0, side - cut), slice(0, side - cut))
    return _distance([part[0][inner]], [whole[0][inner]])


def batch_size(inputs: Any) -> int:
    """Return the number of samples in one forward pass's inputs: a list's length, else the first size."""
    if isinstance(inputs, tuple) and inputs and isinstance(inputs[0], list):
        inputs = inputs[0]
    if isinstance(inputs, list):
        return len(inputs)
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() > 0]
    return tensors[0].shape[0] if tensors else 0


def _take(inputs: Any, pick: list[int], size: int) -> Any:
    if isinstance(inputs, list):
        return [inputs[index] for index in pick]
    if isinstance(inputs, tuple) and inputs and isinstance(inputs[0], list):
        return (_take(inputs[0], pick, size), *inputs[1:])
    return tree_map(
        lambda x: x[pick] if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == size else x, inputs
    )


def _first_of(tensors: list[Tensor], size: int) -> list[Tensor]:
    return [x[0].double() for x in tensors if x.dim() > 0 and x.shape[0] == size]


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    if not a or [x.shape for x in a] != [x.shape for x in b]:
        return float("nan")
    norm = sum(float(x.double().square().sum()) for x in b)
    apart = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    return (apart / norm) ** 0.5 if norm else float(apart > 0)
