"""The registries of three libraries: their exact names, and the arguments that may be given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from normsearch.errors import ArchitectureError

#: What an argument may be.
Scalar = bool | int | float | str


@dataclass(frozen=True)
class Call:
    """What builds an architecture: an import, a callable in it, and every keyword argument."""

    module: str
    function: str
    positional: tuple[str, ...]
    arguments: Mapping[str, Scalar | None]


@dataclass(frozen=True)
class Range:
    """A number between two bounds; whole if the bounds are."""

    least: float
    most: float

    def accepts(self, value: Scalar) -> bool:
        """Tell whether a value may be given."""
        if isinstance(value, bool | str) or (isinstance(self.least, int) and not isinstance(value, int)):
            return False
        return self.least <= value <= self.most

    def describe(self) -> str:
        """Complete the sentence "it must be"."""
        return f"a {'whole ' * isinstance(self.least, int)}number from {self.least} to {self.most}"


@dataclass(frozen=True)
class Words:
    """One of a few words, or true and false."""

    words: Callable[[], tuple[Scalar, ...]]

    def accepts(self, value: Scalar) -> bool:
        """Tell whether a value may be given."""
        return any(type(value) is type(word) and value == word for word in self.words())

    def describe(self) -> str:
        """Complete the sentence "it must be"."""
        words = self.words()
        return "one of " + ", ".join(map(str, words[:20])) + (", ..." if len(words) > 20 else "")


def _words(*words: Scalar) -> Words:
    return Words(lambda: words)


@dataclass(frozen=True)
class Library:
    """A registry: its names, its allowlist, and how it is called without any pretrained source."""

    list: Callable[[], list[str]]
    arguments: Mapping[str, Range | Words]
    call: Callable[[str, Mapping[str, Scalar]], Call]


def _torchvision_names() -> list[str]:
    from torchvision import models

    # The quantized ones hold packed weights, which are no state dict of tensors.
    return [name for name in models.list_models() if not name.startswith("quantized_")]


def _torchvision_call(name: str, arguments: Mapping[str, Scalar]) -> Call:
    from torchvision import models

    off: dict[str, None] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        off["weights_backbone"] = None
    return Call("torchvision.models", "get_model", (name,), {**arguments, **off})


def _timm_names() -> list[str]:
    import timm

    return list(timm.list_models())


def _timm_call(name: str, arguments: Mapping[str, Scalar]) -> Call:
    return Call("timm", "create_model", (name,), {**arguments, "pretrained": False})


def _smp_names() -> list[str]:
    import segmentation_models_pytorch as smp

    return [model.__name__ for model in smp.MODEL_ARCHITECTURES_MAPPING.values()]


def _smp_call(name: str, arguments: Mapping[str, Scalar]) -> Call:
    off = {"encoder_weights": None}
    # The default encoder of some names a download; it must stand in the registry like any other.
    return Call("segmentation_models_pytorch", name, (), {**arguments, **off})


@cache
def _encoders() -> tuple[Scalar, ...]:
    from segmentation_models_pytorch.encoders import get_encoder_names

    return (*get_encoder_names(), *(f"tu-{name}" for name in names("timm")))


_CLASSES, _CHANNELS = 100_000, 4096
_SWITCH = _words(True, False)

#: The registries, by the name of their library.
LIBRARIES: Mapping[str, Library] = {
    "torchvision": Library(
        _torchvision_names,
        {
            "num_classes": Range(1, _CLASSES),
            "aux_logits": _SWITCH,
            "aux_loss": _SWITCH,
            "transform_input": _SWITCH,
            "dropout": Range(0.0, 1.0),
            "num_keypoints": Range(1, 1000),
            "image_size": Range(16, 4096),
        },
        _torchvision_call,
    ),
    "timm": Library(
        _timm_names,
        {
            "num_classes": Range(0, _CLASSES),
            "in_chans": Range(1, _CHANNELS),
            "global_pool": _words("", "avg", "max", "avgmax", "catavgmax", "token", "map"),
            "img_size": Range(16, 4096),
            "output_stride": _words(8, 16, 32),
            "drop_rate": Range(0.0, 1.0),
            "drop_path_rate": Range(0.0, 1.0),
            "features_only": _SWITCH,
        },
        _timm_call,
    ),
    "segmentation_models_pytorch": Library(
        _smp_names,
        {
            "encoder_name": Words(_encoders),
            "encoder_depth": Range(1, 5),
            "in_channels": Range(1, _CHANNELS),
            "classes": Range(1, _CLASSES),
            "activation": _words("sigmoid", "softmax", "softmax2d", "logsoftmax", "tanh", "identity"),
            "decoder_attention_type": _words("scse"),
            "decoder_use_norm": _words("batchnorm", True, False),
            "encoder_output_stride": _words(8, 16, 32),
            "upsampling": _words(1, 2, 4, 8, 16, 32),
        },
        _smp_call,
    ),
}


@cache
def names(library: str) -> tuple[str, ...]:
    """Return the exact names in a library's registry, sorted.

    Raises:
        ArchitectureError: the library is not one of the three, or is not installed.

    """
    if library not in LIBRARIES:
        raise ArchitectureError(f"there is no registry {library!r}; there are {', '.join(LIBRARIES)}")
    try:
        return tuple(sorted(LIBRARIES[library].list()))
    except ImportError as error:
        raise ArchitectureError(
            f"{library} is not installed ({error}): pip install {library.replace('_', '-')}"
        ) from error
