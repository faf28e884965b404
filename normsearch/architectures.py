"""Architecture: which network a checkpoint belongs to, by a registry's exact name and bounded arguments.

A name alone can make a library read local files or download (``local-dir:``, ``hf-hub:``, default weights),
so names must stand in a registry, arguments in an allowlist, and every pretrained source is turned off.
"""

from __future__ import annotations

import importlib
import keyword
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from normsearch.errors import ArchitectureError
from normsearch.registries import LIBRARIES, Call, Scalar, names

_MOST_ARGUMENTS, _LONGEST = 32, 200
_FORMS = f"write {', '.join(f'{name}/NAME' for name in LIBRARIES)} or package.module:factory"
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


@dataclass(frozen=True)
class Architecture:
    """A network's name and arguments, as plain data.

    Attributes:
        name: ``torchvision/NAME``, ``timm/NAME`` or ``segmentation_models_pytorch/NAME`` with the registry's
            own name, or ``package.module:factory`` for a network of one's own.
        arguments: keyword arguments: words, numbers, true or false.

    Raises:
        ArchitectureError: not such a name, or an argument of another type.

    Example:
        >>> str(Architecture("timm/resnet18", {"num_classes": 10}))
        'timm/resnet18(num_classes=10)'

    """

    name: str
    arguments: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.name) is not str or len(self.name) > _LONGEST or not self.name.isprintable():
            raise ArchitectureError(
                f"an architecture's name is text of at most {_LONGEST} characters, got "
                f"{_short(self.name)}; {_FORMS}"
            )
        if not self.is_factory and self.name.partition("/")[0] not in LIBRARIES:
            raise ArchitectureError(f"cannot read the architecture {self.name!r}; {_FORMS}")
        if not isinstance(self.arguments, Mapping) or len(self.arguments) > _MOST_ARGUMENTS:
            raise ArchitectureError(
                f"{self.name}: arguments are a mapping of at most {_MOST_ARGUMENTS} names"
            )
        for key, value in self.arguments.items():
            _check_argument(self.name, key, value)
        object.__setattr__(self, "arguments", dict(self.arguments))

    @property
    def is_factory(self) -> bool:
        """Whether the name is ``package.module:factory``, which imports and calls code of that name."""
        return _FACTORY.fullmatch(self.name) is not None

    @property
    def library(self) -> str:
        """The registry's library, or the factory's module."""
        return self.name.partition(":" if self.is_factory else "/")[0]

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.name}({inside})" if inside else self.name

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.arguments))))


def build(architecture: Architecture | str, *, allow_factories: bool = False) -> nn.Module:
    """Build a network with fresh weights; nothing is downloaded and no file is read.

    Args:
        architecture: what to build; a name alone is built without arguments.
        allow_factories: whether ``package.module:factory`` may be imported and called. Only for names that
            the user wrote, never for one that was read from a file.

    Raises:
        ArchitectureError: the name is not in the registry, an argument is not allowed or out of range, or
            the library cannot build it.

    Example:
        >>> sum(p.numel() for p in build(Architecture("torchvision/resnet18")).parameters())
        11689512

    """
    if isinstance(architecture, str):
        architecture = Architecture(architecture)
    if not isinstance(architecture, Architecture):
        raise ArchitectureError(
            f"expected an Architecture or its name, got {type(architecture).__name__}; {_FORMS}"
        )
    call = construction(architecture, allow_factories=allow_factories)
    try:
        target: Any = importlib.import_module(call.module)
        for name in call.function.split("."):
            target = getattr(target, name)
    except (ImportError, AttributeError) as error:
        raise ArchitectureError(
            f"{architecture.name}: {error}; check the spelling, and that it can be imported from here"
        ) from error
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # Libraries announce coming changes of their defaults, which are none of the caller's business.
        warnings.simplefilter("ignore")
        try:
            model = target(*call.positional, **call.arguments)
        except Exception as error:
            raise ArchitectureError(
                f"{architecture} cannot be built: {type(error).__name__}: {_short(str(error))}; "
                "check its arguments"
            ) from error
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            f"{architecture.name} returned a {type(model).__name__}, not a torch.nn.Module; name a function "
            "that returns the network alone"
        )
    return model


def construction(architecture: Architecture, *, allow_factories: bool = False) -> Call:
    """Return the call that builds an architecture, checked against registry and allowlist.

    Raises:
        ArchitectureError: as for ``build``.

    """
    if architecture.is_factory:
        if not allow_factories:
            raise ArchitectureError(
                f"{architecture.name} would import and run code of that name, which is done only where "
                "the caller says so: allow_factories=True, or --architecture on the command line"
            )
        return Call(architecture.library, architecture.name.partition(":")[2], (), architecture.arguments)
    library = LIBRARIES[architecture.library]
    name = architecture.name.partition("/")[2]
    known = names(architecture.library)
    if name not in known:
        near = get_close_matches(name, known, 3)
        hint = f"did you mean {', '.join(near)}?" if near else "`normsearch architectures` lists them"
        raise ArchitectureError(f"{architecture.library} has no architecture {name!r}; {hint}")
    for key, value in architecture.arguments.items():
        allowed = library.arguments.get(key)
        if allowed is None:
            raise ArchitectureError(
                f"{architecture.name} takes no argument {key!r} here; allowed are "
                f"{', '.join(library.arguments)}; for anything else write a factory of your own, "
                "package.module:factory"
            )
        if not allowed.accepts(value):
            raise ArchitectureError(
                f"{architecture.name}: {key}={value!r}: {key} must be {allowed.describe()}"
            )
    return library.call(name, architecture.arguments)


def _check_argument(name: str, key: object, value: object) -> None:
    if type(key) is not str or not key.isidentifier() or keyword.iskeyword(key) or len(key) > _LONGEST:
        raise ArchitectureError(f"{name}: {_short(key)} is not the name of an argument")
    bounded = (
        (type(value) is str and len(value) <= _LONGEST)
        or (type(value) is float and math.isfinite(value))
        or (type(value) is int and abs(value) < 2**63)
        or type(value) is bool
    )
    if not bounded:
        raise ArchitectureError(
            f"{name}: {key}={_short(value)}: an argument is a finite number, true, false or text of at most "
            f"{_LONGEST} characters; for anything else write a factory of your own, package.module:factory"
        )


def _short(value: object) -> str:
    if type(value) is str:
        return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
    text = repr(value) if isinstance(value, bool | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
