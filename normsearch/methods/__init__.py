"""The normalization methods: one file each, registered here, spelled ``name(option=value)`` everywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType

from normsearch.errors import MethodError
from normsearch.methods.base import Built, Keep, Method, Refusal, TrainedNorm
from normsearch.methods.batch import Batch
from normsearch.methods.batch_instance import BatchInstance, BatchInstanceNorm
from normsearch.methods.batch_renorm import BatchRenorm, BatchRenormalization
from normsearch.methods.evonorm_s0 import EvoNorm, EvoNormS0
from normsearch.methods.filter_response import FilterResponse, FilterResponseNorm
from normsearch.methods.frozen import Frozen, FrozenBatchNorm
from normsearch.methods.ghost import Ghost, GhostBatchNorm
from normsearch.methods.group import Group
from normsearch.methods.ibn import InstanceBatch, InstanceBatchNorm
from normsearch.methods.identity import Identity
from normsearch.methods.instance import Instance
from normsearch.methods.layer import ChannelLayerNorm, Layer
from normsearch.methods.rms import Rms, SampleRMSNorm
from normsearch.methods.sparse_switchable import SparseSwitchable, SparseSwitchableNorm
from normsearch.methods.spectral import Spectral, SpectralNorm
from normsearch.methods.switchable import Switchable, SwitchableNorm
from normsearch.methods.upstream import ChannelAffine
from normsearch.methods.weight import MeanOnlyBatchNorm, Weight, WeightNorm
from normsearch.methods.weight_standardization import StandardizedWeight

#: Every method by its name.
METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {
        method.name: method
        for method in (
            Batch,
            Frozen,
            Group,
            Layer,
            Rms,
            Instance,
            FilterResponse,
            EvoNorm,
            BatchRenormalization,
            Ghost,
            InstanceBatch,
            BatchInstance,
            Switchable,
            SparseSwitchable,
            Weight,
            Spectral,
            Identity,
        )
    }
)

_LONGEST = 200
_SPELLING = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(?:\((.*)\))?\s*", re.DOTALL)
_OPTION = re.compile(r"\s*([a-z][a-z0-9_]*)\s*=\s*([A-Za-z0-9_.+-]+)\s*")
_INTEGER = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def parse_method(spelling: str) -> Method:
    """Read a method's spelling: a name, or a name and options that are words, numbers, true or false.

    Args:
        spelling: for example ``group``, ``group(groups=8)`` or ``layer(axes=channel)``; at most 200
            characters.

    Raises:
        MethodError: unknown name or option, a value out of range, or another grammar.

    Example:
        >>> str(parse_method("group( groups = 8 )"))
        'group(groups=8)'

    """
    if len(spelling) > _LONGEST:
        raise MethodError(f"a method's spelling has at most {_LONGEST} characters, got {len(spelling)}")
    match = _SPELLING.fullmatch(spelling)
    if match is None:
        raise MethodError(f"cannot read {spelling!r}: write name or name(option=value, ...)")
    name, inside = match.groups()
    if name not in METHODS:
        raise MethodError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    method = METHODS[name]
    known = [field.name for field in fields(method)]
    options: dict[str, int | float | bool | str] = {}
    for part in (inside or "").split(",") if (inside or "").strip() else ():
        option = _OPTION.fullmatch(part)
        if option is None:
            raise MethodError(f"cannot read {part.strip()!r} in {spelling!r}: write option=value")
        key, value = option.groups()
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise MethodError(f"{name} has no option {key!r}: {has}")
        if key in options:
            raise MethodError(f"{spelling!r} gives {key} twice")
        options[key] = _value(value)
    return method(**options)


def _value(word: str) -> int | float | bool | str:
    if word in ("true", "false"):
        return word == "true"
    if _INTEGER.fullmatch(word):
        return int(word)
    return float(word) if _NUMBER.fullmatch(word) else word


__all__ = [
    "METHODS",
    "BatchInstanceNorm",
    "BatchRenorm",
    "Built",
    "ChannelAffine",
    "ChannelLayerNorm",
    "EvoNormS0",
    "FilterResponseNorm",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "InstanceBatchNorm",
    "Keep",
    "MeanOnlyBatchNorm",
    "Method",
    "Refusal",
    "SampleRMSNorm",
    "SparseSwitchableNorm",
    "SpectralNorm",
    "StandardizedWeight",
    "SwitchableNorm",
    "TrainedNorm",
    "WeightNorm",
    "parse_method",
]
