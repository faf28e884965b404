"""search_report: what a search found, as a document of ``normsearch.reporting``."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from normsearch.reporting import Document
from normsearch.reports import Environment
from normsearch.searching import parts, remarks
from normsearch.searching.findings import Findings
from normsearch.searching.results import SearchResult
from normsearch.searching.stepwise import Search


def search_report(
    found: SearchResult | Search | Findings,
    *,
    score: str = "score",
    title: str | None = None,
    notes: Sequence[str] = (),
) -> Document:
    """Return the report of a search, finished or not; ``save`` writes it as HTML and JSON.

    Nothing is run: it holds what the study and the confirmation know.

    Args:
        found: what ``search`` returned; or a ``Search``, of which nothing has been confirmed yet; or the
            ``Findings`` of a study.
        score: what the objective's first number is, for example ``accuracy``.
        title: what the report is about; by default the study's name.
        notes: what else its readers should know.

    Example:
        >>> import torch
        >>> from normsearch.searching import Search, search_report
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> run = Search(model, lambda converted, trial: 0.5, methods=["batch", "group"], n_trials=2)
        >>> run.optimize()
        >>> [section.kind for section in search_report(run).sections][:3]
        ['search', 'scores', 'chosen']

    """
    known = found if isinstance(found, Findings) else Findings.of(found, score)
    made = [
        parts.summary(known),
        parts.scores(known),
        parts.chosen(known),
        parts.trials(known),
        parts.front(known),
        parts.effects(known),
        parts.importances(known),
        parts.costs(known),
        parts.sensitivity(known),
        remarks.notes(known, notes),
    ]
    # The package imports this module.
    from normsearch import __version__

    return Document(
        title=known.study.study_name if title is None else title,
        environment=Environment.here(known.model),
        normsearch=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sections=tuple(part for part in made if part is not None),
    )
