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
_MOST_FIELD_BITS = 3
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
    stack: list[tuple[int, int, Any, int]] = [(0, len(data), descriptor, 0)]
    messages = fields = 0
    while stack:
        start, end, kind, depth = stack.pop()
        messages += 1
        if messages > limits.messages:
            raise WireError(f"has more than {limits.messages:,} parts")
        if depth > limits.depth:
            raise WireError(f"nests messages more than {limits.depth} deep")
        seen: set[str] = set()
        place, known = start, kind.fields_by_number
        while place < end:
            fields += 1
            if fields > limits.fields:
                raise WireError(f"has more than {limits.fields:,} fields")
            tag, place = _varint(data, place, end)
            field = known.get(tag >> _MOST_FIELD_BITS)
            name = _allowed(kind, field, tag >> _MOST_FIELD_BITS, allowed, reasons)
            stop, value = _extent(data, place, end, tag & 7)
            expected = _wire_type(field)
            packed = field.is_repeated and expected != LENGTH and tag & 7 == LENGTH
            if tag & 7 != expected and not packed:
                raise WireError(f"has a {kind.name}.{name} of the wrong wire type")
            if name in seen and not field.is_repeated:
                raise WireError(f"has two of {kind.name}.{name}")
            seen.add(name)
            if packed:
                _check_packed(data, value, stop, expected)
            elif field.message_type is not None:
                stack.append((value, stop, field.message_type, depth + 1))
            elif field.type == field.TYPE_STRING:
                _check_text(data[value:stop], kind, name)
            place = stop


def _allowed(
    kind: Any, field: Any, number: int, allowed: Mapping[str, frozenset[str]], reasons: Mapping[str, str]
) -> str:
    if field is None:
        raise WireError(f"has a field {number} in {kind.name}, which is not known")
    name: str = field.name
    if name not in allowed.get(kind.full_name, frozenset()):
        raise WireError(reasons.get(f"{kind.full_name}.{name}", f"has {kind.name}.{name}, which is not read"))
    return name


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
