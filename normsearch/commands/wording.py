"""What the library says about its arguments, in the words of the command line."""

from __future__ import annotations

import re

_IN_PYTHON = "from Python, outputs= picks what is compared"
_ON_TASK = (
    "measured on inputs, which the task has none of; let it return a normsearch.searching.Task as the "
    "objective, whose training inputs are used"
)
#: What a message says to someone who calls a function, and what to someone who types options; in order.
_WORDS: tuple[tuple[str, str], ...] = (
    (r"measured on inputs; give inputs=, at least one batch", _ON_TASK),
    (r"leave the (method or the )?site out with sites=", r"leave the \1site out with --sites"),
    (r"give methods= that differ, for example", "give --methods that differ, for example"),
    (
        r"give veto=None, or a larger one, or other methods=",
        "give --no-veto, a larger --veto or other --methods",
    ),
    (r"give other methods=", "give other --methods"),
    (r"search without veto", "search with --no-veto"),
    (r"allow it with batch_independent=False", "search without --batch-independent"),
    (r"was made with directions=", "was made with --direction "),
    (r"was made with costs=", "was made with --cost "),
    (r"was made with (methods|sites|sampler|seed|veto|sense)=", r"was made with --\1 "),
    (r"or give another name$", "or give another --study"),
    (r"give its storage \(--storage\)$", "give its --storage"),
    (r"give the search another name$", "give another --study"),
    (r"MaxDrop\(([^)]*)\): ", r"--max-drop \1: "),
    (r"MaxLatency\(([^)]*)\): ", r"--max-latency \1: "),
    (r"MaxMemory\(([^)]*)\): ", r"--max-memory \1: "),
    (r"n_trials=", "--trials "),
    (r"^seed=", "--seed "),
    (r"run one forward pass first, or give inputs=", "give --inputs or --input-shape"),
    (r"give inputs= if there were none", "give --inputs or --input-shape if neither was given"),
    (
        r"untrained: v and g are drawn anew if convert is given inputs=",
        "untrained: v and g are drawn anew with --inputs",
    ),
    (r"\(plan\(model, \.\.\., inputs=example\) refuses", "(with --inputs or --input-shape the plan refuses"),
    (r"give inputs=", "give --inputs or --input-shape"),
    (r"leave it out with where=(lambda site: site\.kind != '\w+')?", "leave it out with --to 'PATH=batch'"),
    (r"use in_place=True to edit the model itself", "convert without --report, which needs no copy"),
    (r"keep='(\w+)'", r"--keep \1"),
    (r"entry=('[^']*'|\S+)", r"--entry \1"),
    (r"logits=True", "--logits"),
    (r"; (give|pick with) outputs=[^;]*", f"; {_IN_PYTHON}"),
    (r", and outputs= to pick.*", f"; {_IN_PYTHON}"),
    (r", or pick other outputs with outputs=", f"; {_IN_PYTHON}"),
    (r", or (give )?outputs=.*", f"; {_IN_PYTHON}"),
    (r"replace it with force=True \(--force\)", "replace it with --force"),
    (r"allow_factories=True, or --architecture on the command line", "--architecture"),
    (r"\(--architecture, or architecture= and allow_factories=True\)", "(--architecture)"),
)
_PATTERNS = tuple((re.compile(python), options) for python, options in _WORDS)


def in_options(message: str) -> str:
    """Return a message with the ways out that an option offers.

    Example:
        >>> in_options("its number of channels is not known yet; run one forward pass first, or give inputs=")
        'its number of channels is not known yet; give --inputs or --input-shape'

    """
    for pattern, options in _PATTERNS:
        message = pattern.sub(options, message)
    return message
