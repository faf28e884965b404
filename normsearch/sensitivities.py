"""Sensitivity: the drift that each site and method causes alone, as plain data, JSON and a table."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from normsearch.errors import PlanError
from normsearch.methods import Method, Refusal, parse_method
from normsearch.reports import Environment

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

#: In the benchmarks' networks one site with a drift up to 0.2 cost at most 3 points of accuracy before any
#: calibration; losses of 7 points and more begin at 0.25.
THRESHOLD = 0.2


@dataclass(frozen=True)
class Sensitivity:
    """How far a model's output moves when a single site changes; made by ``sensitivity``.

    Attributes:
        sites: paths in the order in which data reaches them.
        methods: spellings as they were asked for.
        drift: relative L2 distance of the output by site and method; None where the method is refused,
            infinite where the output was not finite.
        refusals: why, for each None.
        environment: device, dtype and versions.

    """

    sites: tuple[str, ...]
    methods: tuple[str, ...]
    drift: Mapping[str, Mapping[str, float | None]]
    refusals: tuple[Refusal, ...]
    environment: Environment

    def vetoes(self, threshold: float = THRESHOLD) -> dict[str, tuple[str, ...]]:
        """Return the methods that must not stand at a site: refused, or with a drift above ``threshold``.

        Args:
            threshold: the largest drift that is let pass.

        Returns:
            Spellings by site path; sites without a veto are left out.

        Raises:
            PlanError: the threshold is no number above 0.

        """
        check_threshold(threshold)
        vetoed = {
            site: tuple(m for m in self.methods if self._vetoed(site, m, threshold)) for site in self.sites
        }
        return {site: methods for site, methods in vetoed.items() if methods}

    def preferring(self, *methods: str | Method, threshold: float = THRESHOLD) -> dict[str, str]:
        """Return a mapping for ``convert``: at each site the first method that may stand there, or the last.

        Args:
            methods: in order of preference. All but the last must have been measured.
            threshold: as for ``vetoes``.

        Returns:
            Spellings by site path, escaped as patterns. Sites that were not measured are left out, so that
            ``convert`` keeps their BatchNorm.

        Raises:
            PlanError: no method is given, or one was not measured.
            MethodError: a spelling is not valid.

        Example:
            >>> import torch, normsearch
            >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32)).eval()
            >>> result = normsearch.sensitivity(model, ["instance"], [torch.randn(4, 3, 3, 3)])
            >>> result.preferring("instance", "group")
            {'1': 'group'}

        """
        check_threshold(threshold)
        spellings = [
            str(method if isinstance(method, Method) else parse_method(method)) for method in methods
        ]
        if not spellings:
            raise PlanError("preferring got no method; give them in order of preference")
        unknown = [spelling for spelling in spellings[:-1] if spelling not in self.methods]
        if unknown:
            raise PlanError(
                f"{unknown[0]} was not measured, so nothing tells where it may stand; measured were "
                f"{', '.join(self.methods)}"
            )
        return {
            glob.escape(site): next(
                (m for m in spellings[:-1] if not self._vetoed(site, m, threshold)), spellings[-1]
            )
            for site in self.sites
        }

    def _vetoed(self, site: str, method: str, threshold: float) -> bool:
        drift = self.drift[site][method]
        return drift is None or drift > threshold

    def to_json(self) -> str:
        """Return everything as JSON; ``from_json`` reads it back."""
        document = asdict(self)
        document["drift"] = {
            site: {method: _number(value) for method, value in row.items()}
            for site, row in self.drift.items()
        }
        return json.dumps(document, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Sensitivity:
        """Read what ``to_json`` wrote; the text may come from anywhere and is validated.

        Raises:
            PlanError: not JSON, or not a sensitivity.
            MethodError: a method's spelling is not valid.

        """
        # pydantic takes a third of a second to import: only where something is read from outside.
        from normsearch.documents import read_sensitivity

        fields = read_sensitivity(text)
        for spelling in fields["methods"]:
            parse_method(spelling)
        return cls(**fields)

    def __rich__(self) -> Table:
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        here = self.environment
        # Long spellings leave no room for the sites: letters stand for them.
        short = sum(map(len, self.methods)) <= _ROOM_FOR_NAMES
        heads = self.methods if short else tuple(map(_letter, range(len(self.methods))))
        legend = "" if short else "\n".join(map("  ".join, zip(heads, self.methods, strict=True))) + "\n"
        table = Table(
            title="output drift (relative L2) when one site alone changes",
            caption=escape(f"{legend}× refused; {here.device}, {here.dtype}, torch {here.torch}"),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("site", overflow="fold", min_width=12)
        for head in heads:
            table.add_column(escape(head), justify="right", no_wrap=True)
        for site in self.sites:
            table.add_row(escape(site or "(model)"), *(_shaded(self.drift[site][m]) for m in self.methods))
        return table


def check_threshold(threshold: float) -> None:
    """Raise unless drifts can be above and below a threshold.

    Raises:
        PlanError: it is no number above 0.

    """
    if not threshold > 0:
        raise PlanError(f"threshold={threshold}: give a drift above 0")


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else "inf"


#: From this drift on, a colour; the darker the further the output moves.
_SHADES = (
    (0.0, "black on grey93"),
    (0.02, "black on light_goldenrod1"),
    (0.05, "black on gold1"),
    (0.1, "black on dark_orange"),
    (THRESHOLD, "bold white on red3"),
)
_WIDTH, _ROOM_FOR_NAMES = 5, 40


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index)


def _shaded(value: float | None) -> Text:
    from rich.text import Text

    if value is None:
        return Text("×", style="dim")
    style = next(style for least, style in reversed(_SHADES) if value >= least)
    if math.isinf(value):
        number = "inf"
    elif value < 5e-4 or value >= 1e4:
        number = f"{value:.0e}"
    else:
        number = f"{value:.3f}" if value < 10 else f"{value:.0f}"
    return Text(number.rjust(_WIDTH), style=style)
