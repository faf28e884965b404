"""Whether the arguments of a search are of their kinds, before anything is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from normsearch.errors import ModelError, SearchError
from normsearch.methods import Method


def check_whole(name: str, value: int, least: int) -> None:
    """Raise a ``SearchError`` for anything but a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SearchError(f"{name}={value!r}: give a whole number, at least {least}")


def check_arguments(model: Any, methods: Any, sites: Any, veto: Any, name: Any) -> None:
    """Raise for arguments of other types, before anything is made."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}; load the model first")
    if not isinstance(methods, str | Method | Sequence):
        raise SearchError(f"methods={methods!r}: give a list of methods or spellings")
    if sites is not None:
        sites = [sites] if isinstance(sites, str) else list(sites)
        if not all(isinstance(one, str) for one in sites):
            raise SearchError(f"sites={sites!r}: give glob patterns of paths")
    if veto is not None and (isinstance(veto, bool) or not isinstance(veto, int | float) or not veto > 0):
        raise SearchError(f"veto={veto!r}: give a drift above 0, or None to veto nothing")
    if name is not None and (not isinstance(name, str) or not name or not name.isprintable()):
        raise SearchError(f"name={name!r}: give a name in printable characters")
