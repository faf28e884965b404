"""Which part of a training checkpoint is the state dict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from normsearch.admission.pickles import resave
from normsearch.errors import CheckpointError

#: Where training programs keep the weights, best first.
ENTRIES = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "weights",
    "params",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
)


#: How deep state dicts are looked for that could be asked for.
_DEEPEST = 3


def state_dict_in(content: Any, path: Path, entry: str | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the state dict in what a file holds, and notes on where it was.

    Args:
        content: what the file holds.
        path: its name, for messages.
        entry: which of its entries to take, ``ema.shadow`` for one inside another; None for the best known.

    Raises:
        CheckpointError: there is none, or not the entry asked for.

    """
    notes: list[str] = []
    whole, inside = content, "" if entry is None else f"{entry}."
    if entry is not None and isinstance(content, dict):
        content = _entry(whole, entry)
        if content is None:
            there = _list([name for name in whole if isinstance(whole[name], dict)])
            raise CheckpointError(f"{path} has no entry {entry!r}; it has {there}")
        notes.append(f"read from the entry {entry!r}")
    for _ in range(4):
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{path} holds {_kind(content)}, not a state dict; save torch.save(model.state_dict(), path)"
            )
        if _is_state_dict(content):
            return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}, tuple(
                notes
            )
        candidates = [name for name in content if isinstance(content[name], dict)]
        known = [name for name in ENTRIES if name in candidates and content[name]]
        if not known:
            raise CheckpointError(_without(whole, content, path))
        chosen = known[0]
        others = [name for name in known[1:] if "ema" in name]
        if others:
            notes.append(f"{', '.join(others)} left aside; entry={inside + others[0]!r} takes it instead")
        notes.append(f"read from the entry {chosen!r}")
        content, inside = content[chosen], f"{inside}{chosen}."
    raise CheckpointError(f"{path} nests its state dict too deeply; {resave()}")


def _entry(content: dict[Any, Any], entry: str) -> dict[Any, Any] | None:
    """Return the entry that was asked for; names may have dots of their own."""
    found = content.get(entry)
    if isinstance(found, dict):
        return found
    for name, value in content.items():
        if isinstance(value, dict) and isinstance(name, str) and entry.startswith(f"{name}."):
            inner = _entry(value, entry.removeprefix(f"{name}."))
            if inner is not None:
                return inner
    return None


def _without(whole: Any, content: dict[Any, Any], path: Path) -> str:
    """Say that there is no state dict where one is looked for, and where there are some."""
    if not content:
        return f"{path} holds an empty dict, no weights; save torch.save(model.state_dict(), path)"
    places = list(_places(whole, set()))
    if not places:
        return f"{path} holds no state dict: its entries are {_list(list(content))}; {resave()}"
    return f"{path} does not say which state dict to take: there is {_list(places)}; give entry={places[0]!r}"


def _places(content: dict[Any, Any], seen: set[int], before: str = "", depth: int = 1) -> Iterator[str]:
    """Yield where state dicts are that can be asked for, each once."""
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        if _is_state_dict(value):
            yield f"{before}{name}"
        elif depth < _DEEPEST:
            yield from _places(value, seen, f"{before}{name}.", depth + 1)


def _is_state_dict(content: dict[Any, Any]) -> bool:
    return bool(content) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _kind(content: Any) -> str:
    return "one tensor" if isinstance(content, Tensor) else f"a {type(content).__name__}"


def _list(names: list[Any]) -> str:
    shown = ", ".join(repr(name)[:60] for name in names[:10]) or "none"
    return f"{shown}, ..." if len(names) > 10 else shown
