"""Which part of a training checkpoint is the state dict."""

from __future__ import annotations

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


def state_dict_in(content: Any, path: Path, entry: str | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the state dict in what a file holds, and notes on where it was.

    Raises:
        CheckpointError: there is none, or not the entry asked for.

    """
    notes: list[str] = []
    for _ in range(4):
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{path} holds {_kind(content)}, not a state dict; save torch.save(model.state_dict(), path)"
            )
        if entry is None and _is_state_dict(content):
            return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}, tuple(
                notes
            )
        candidates = [name for name in content if isinstance(content[name], dict)]
        if entry is not None:
            if entry not in candidates:
                raise CheckpointError(f"{path} has no entry {entry!r}; it has {_list(candidates)}")
            chosen, entry = entry, None
        else:
            known = [name for name in ENTRIES if name in candidates and content[name]]
            if not known:
                raise CheckpointError(
                    f"{path} holds no state dict: its entries are {_list(list(content))}; {resave()}"
                )
            chosen = known[0]
            others = [name for name in known[1:] if "ema" in name]
            if others:
                notes.append(f"{', '.join(others)} left aside; entry={others[0]!r} takes it instead")
        notes.append(f"read from the entry {chosen!r}")
        content = content[chosen]
    raise CheckpointError(f"{path} nests its state dict too deeply; {resave()}")


def _is_state_dict(content: dict[Any, Any]) -> bool:
    return bool(content) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _kind(content: Any) -> str:
    return "one tensor" if isinstance(content, Tensor) else f"a {type(content).__name__}"


def _list(names: list[Any]) -> str:
    shown = ", ".join(repr(name)[:60] for name in names[:10]) or "none"
    return f"{shown}, ..." if len(names) > 10 else shown
