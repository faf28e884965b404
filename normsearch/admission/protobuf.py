"""A protobuf message checked as bytes, before any parser makes objects of it.

A parser takes what it is given: an empty message of two bytes becomes an object of a hundred, a field that
may be there once is merged if it is there twice, and what is not known is kept. Here every field must be
allowed by name, of the wire type that its kind has, whole, and not too deep; nothing is made but counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10
_WIRE_TYPE_BITS, _WIRE_TYPE = 3, 7
_SIZES = {FIXED64: 8, FIXED32: 4}


class WireError(Exception):
    """Bytes are not the message that they should be; the message completes a sentence about the file."""


@dataclass(frozen=True)
class Limits:
    """How much there may be.

    Attributes:
        depth: messages inside messages.
        messages: messages in all.
        fields: fields in all.

    """

    depth: int
    messages: int
    fields: int


def check(
    data: bytes,
    descriptor: Any,
    allowed: Mapping[str, frozenset[str]],
    reasons: Mapping[str, str],
    limits: Limits,
) -> None:
    """Raise unless ``data`` is a message of this kind, with allowed fields only.

    Args:
        data: the bytes.
        descriptor: of the message, from its generated class.
        allowed: names of the fields that may be there, by the message's full name.
        reasons: what is said of certain other fields, by the message's full name and theirs.
        limits: how much there may be.

    Raises:
        WireError: anything else.

    """
    kinds: dict[str, dict[int, _Field]] = {}
    stack: list[tuple[int, int, Any, int]] = [(0, len(data), descriptor, 0)]
    messages, fields = 1, 0
    while stack:
        place, end, kind, depth = stack.pop()
        if depth > limits.depth:
            raise WireError(f"nests messages more than {limits.depth} deep")
        known = kinds.setdefault(kind.full_name, {})
        seen: set[int] = set()
        while place < end:
            fields += 1
            if fields > limits.fields:
                raise WireError(f"has more than {limits.fields:,} fields")
            tag, place = _varint(data, place, end)
            number, wire_type = tag >> _WIRE_TYPE_BITS, tag & _WIRE_TYPE
            field = known.get(number)
            if field is None:
                field = known[number] = _field(kind, number, allowed, reasons)
            stop, value = _extent(data, place, end, wire_type)
            packed = field.repeated and field.wire_type != LENGTH and wire_type == LENGTH
            if wire_type != field.wire_type and not packed:
                raise WireError(f"has a {kind.name}.{field.name} of the wrong wire type")
            if number in seen and not field.repeated:
                raise WireError(f"has two of {kind.name}.{field.name}")
            seen.add(number)
            if packed:
                _check_packed(data, value, stop, field.wire_type)
            elif field.message is not None:
                messages += 1
                if messages > limits.messages:
                    raise WireError(f"has more than {limits.messages:,} parts")
                if stop > value:
                    stack.append((value, stop, field.message, depth + 1))
            elif field.text:
                _check_text(data[value:stop], kind, field.name)
            place = stop


@dataclass(frozen=True)
class _Field:
    """A field that may be there: its name, how it is written, whether more than once, and what it holds."""

    name: str
    wire_type: int
    repeated: bool
    message: Any
    text: bool


def _field(
    kind: Any, number: int, allowed: Mapping[str, frozenset[str]], reasons: Mapping[str, str]
) -> _Field:
    found = kind.fields_by_number.get(number)
    if found is None:
        raise WireError(f"has a field {number} in {kind.name}, which is not known")
    name = found.name
    if name not in allowed.get(kind.full_name, frozenset()):
        raise WireError(reasons.get(f"{kind.full_name}.{name}", f"has {kind.name}.{name}, which is not read"))
    text = found.type == found.TYPE_STRING
    return _Field(name, _wire_type(found), found.is_repeated, found.message_type, text)


def _wire_type(field: Any) -> int:
    if field.type in (field.TYPE_MESSAGE, field.TYPE_STRING, field.TYPE_BYTES):
        return LENGTH
    if field.type in (field.TYPE_DOUBLE, field.TYPE_FIXED64, field.TYPE_SFIXED64):
        return FIXED64
    if field.type in (field.TYPE_FLOAT, field.TYPE_FIXED32, field.TYPE_SFIXED32):
        return FIXED32
    return VARINT


def _extent(data: bytes, place: int, end: int, wire_type: int) -> tuple[int, int]:
    """Return where a field's value ends, and where what it holds begins."""
    if wire_type == VARINT:
        return _varint(data, place, end)[1], place
    if wire_type == LENGTH:
        length, place = _varint(data, place, end)
        stop = place + length
    elif wire_type in _SIZES:
        stop = place + _SIZES[wire_type]
    else:
        raise WireError(f"has a field of wire type {wire_type}, which is not used any more")
    if stop > end:
        raise WireError("ends in the middle of a field: it is truncated")
    return stop, place


def _varint(data: bytes, place: int, end: int) -> tuple[int, int]:
    """Return a number written in groups of seven bits, and where it ends."""
    value = 0
    for count in range(_LONGEST_VARINT):
        if place + count >= end:
            raise WireError("ends in the middle of a number: it is truncated")
        byte = data[place + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, place + count + 1
    raise WireError("has a number of more than 64 bits")


def _check_packed(data: bytes, place: int, stop: int, expected: int) -> None:
    if expected in _SIZES:
        if (stop - place) % _SIZES[expected]:
            raise WireError("has numbers that are cut off")
    elif stop > place and data[stop - 1] >= 0x80:
        raise WireError("has numbers that are cut off")


def _check_text(text: bytes, kind: Any, name: str) -> None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        raise WireError(f"has a {kind.name}.{name} that is no text") from None


def elements(dims: Any) -> int:
    """Return the number of elements of a shape; negative sizes are no shape.

    Raises:
        WireError: a size is negative.

    """
    if any(size < 0 for size in dims):
        raise WireError(f"has a tensor of shape {tuple(dims)[:8]}")
    return math.prod(dims)
