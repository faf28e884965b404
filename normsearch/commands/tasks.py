"""What ``--task`` names: a function of the user's that returns the model and the objective of a search."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from normsearch.arguments import import_from_here
from normsearch.errors import NormsearchError, SearchError

if TYPE_CHECKING:
    from normsearch.searching.objectives import Objective

_SPELLING = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_FORM = "give package.module:task, the name of a function that returns (model, objective)"
_LONGEST = 300


def check_spelling(name: str) -> None:
    """Raise a ``SearchError`` for what cannot name a task."""
    if _SPELLING.fullmatch(name) is None:
        raise SearchError(f"--task {name!r}: {_FORM}")


def load_task(name: str) -> tuple[nn.Module, Objective]:
    """Import and call the function of a name; return its model and objective.

    It is looked for where Python looks, and in the current folder as with ``python -m``.

    Raises:
        SearchError: it is not such a name, cannot be imported, or does not return such a pair.

    """
    check_spelling(name)
    import_from_here()
    module, _, path = name.partition(":")
    target: Any = _run(f"--task {name}: cannot import {module}", lambda: importlib.import_module(module))
    for part in path.split("."):
        if not hasattr(target, part):
            known = [one for one, value in vars(target).items() if callable(value) and one[0] != "_"]
            there = f"; it has {', '.join(known[:8])}" if known else ""
            raise SearchError(f"--task {name}: {module} has no {path!r}{there}; {_FORM}")
        target = getattr(target, part)
    if not callable(target):
        raise SearchError(f"--task {name}: {path} is a {type(target).__name__}, not a function; {_FORM}")
    returned = _run(f"--task {name}: it failed", target)
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise SearchError(f"--task {name}: it returned {_kind(returned)}; return (model, objective)")
    model, objective = returned
    if not isinstance(model, nn.Module):
        raise SearchError(
            f"--task {name}: it returned {_kind(model)} first; return (model, objective), a torch.nn.Module "
            "first"
        )
    if not callable(objective):
        raise SearchError(
            f"--task {name}: it returned {_kind(objective)} as the objective; return a "
            "normsearch.searching.Task, or a function of (model, trial)"
        )
    return model, objective


def _kind(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, tuple | list) else f"a {type(value).__name__}"


def _run(what: str, run: Callable[[], Any]) -> Any:
    """Run the user's code; say what it raised, and where, in one line. What it prints goes to stderr."""
    try:
        with redirect_stdout(sys.stderr):
            return run()
    except NormsearchError as error:
        raise SearchError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:
        raise SearchError(f"{what}: {said(error)}{place(error)}") from error


def said(error: BaseException) -> str:
    """Return what another's exception says, in one line."""
    text = " ".join(str(error).split())[:_LONGEST]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place(error: BaseException) -> str:
    """Return the file and line of the user's code that raised; nothing where there is none."""
    if isinstance(error, SyntaxError):
        return ""
    inner = [Path(part).resolve() for part in (sys.prefix, sys.base_prefix, Path(__file__).parent.parent)]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename[0] != "<" and not any(Path(frame.filename).is_relative_to(p) for p in inner)
    ]
    return f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
