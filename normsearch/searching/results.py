"""SearchResult: what a search found, and what it is based on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optuna.study import Study
from torch import nn

from normsearch.plans import Plan
from normsearch.searching.confirming import Candidate, Confirmed
from normsearch.searching.costs import CostTable
from normsearch.searching.space import SearchSpace
from normsearch.sensitivities import Sensitivity

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from normsearch.reporting import Document

#: What a confirmation with one seed comes to.
SINGLE_SEED = (
    "a single seed cannot tell a mix from noise, so the uniform plan is returned; "
    "confirm with 2 seeds or more"
)


@dataclass(frozen=True)
class SearchResult:
    """What ``search`` returns.

    Attributes:
        best: the plan to use: the best uniform one unless a mix beat it beyond noise.
        model: the network converted by it and trained as the objective trains.
        study: Optuna's study, with every trial.
        space: what was searched.
        confirmation: the plans that were run again, the best uniform one first; empty with ``confirm=0``.
        chosen: index of ``best`` there and in ``candidates``.
        candidates: the plans' parameters.
        same_split: whether confirmation used the data of the search, under fresh seeds alone.
        costs: what each method costs at each site; None where nothing asked for it.
        sensitivity: drift of single changes; None without inputs.
        prior: what sensing found; None where nothing was sensed.

    """

    best: Plan
    model: nn.Module = field(repr=False)
    study: Study = field(repr=False)
    space: SearchSpace = field(repr=False)
    confirmation: tuple[Confirmed, ...]
    chosen: int
    candidates: tuple[Candidate, ...] = field(repr=False)
    same_split: bool = False
    costs: CostTable | None = field(repr=False, default=None)
    sensitivity: Sensitivity | None = field(repr=False, default=None)
    prior: Mapping[str, Mapping[str, float]] | None = field(repr=False, default=None)

    @property
    def params(self) -> Mapping[str, Any]:
        """The study's parameters of the best plan."""
        return self.candidates[self.chosen].params

    @property
    def further(self) -> Mapping[str, Any]:
        """What else the objective suggested in the best plan's trial, a learning rate for example."""
        return {name: value for name, value in self.params.items() if name not in self.space.distributions}

    def report(self, *, score: str = "score", title: str | None = None) -> Document:
        """Return the report, as ``search_report`` makes it; ``report().save("report.html")`` writes it."""
        # That module imports this one.
        from normsearch.searching.documents import search_report

        return search_report(self, score=score, title=title)

    def __rich__(self) -> Table | Text:
        from rich import box
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text

        if not self.confirmation:
            best = self.candidates[self.chosen]
            name = f"all {best.uniform}" if best.uniform else f"trial {best.number}"
            return Text(f"not confirmed: {name}, {best.value:.4f} in the search")
        split = "on the search's data" if self.same_split else "on held-out data"
        table = Table(title=f"confirmed {split}, paired by seed", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head in ("", "plan", "search", "confirmed", "gain", "± error"):
            table.add_column(head, justify="left" if head in ("", "plan") else "right")
        for index, row in enumerate(self.confirmation):
            table.add_row(
                "→" if index == self.chosen else "",
                escape(f"all {row.uniform}" if row.uniform else f"trial {row.number}"),
                f"{row.searched:.4f}",
                f"{row.mean:.4f}",
                "" if row.gain is None else f"{row.gain:+.4f}",
                "" if row.error is None else f"{row.error:.4f}",
            )
        if any(row.gain is not None and len(row.scores) == 1 for row in self.confirmation):
            table.caption = SINGLE_SEED
        return table
