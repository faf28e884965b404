"""Listing: a table for terminals that fits their width without breaking names into pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from normsearch.text import visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

#: Between columns: one space of padding and the place of the line.
_GAP = 2
#: The least width of a column of prose, and of one whose words must be broken after all.
_LEAST_PROSE, _LEAST = 16, 12


@dataclass(frozen=True)
class Column:
    """A column of a listing.

    Attributes:
        name: its heading.
        prose: whether it is wrapped between words; other columns are kept on one line where possible.
        number: whether it is aligned to the right.
        optional: whether it may be left out: said once where all rows have the same, or named where there
            is no room. The later ones go first.

    """

    name: str
    prose: bool = False
    number: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Listing:
    """Rows of text under headings; ``rich.print`` shows it as wide as the terminal.

    Attributes:
        title: of the table.
        columns: its columns.
        rows: one text per column.
        notes: lines below it.

    """

    title: str
    columns: tuple[Column, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        yield from self._parts(options.max_width)

    def _parts(self, width: int) -> Iterator[Any]:
        from rich.text import Text

        filled = [n for n in range(len(self.columns)) if any(row[n] for row in self.rows)]
        common = [number for number in filled if self._is_common(number)]
        shown = [number for number in filled if number not in common]
        dropped: list[int] = []
        while self._least(shown) > width and any(self.columns[number].optional for number in shown):
            last = max(number for number in shown if self.columns[number].optional)
            shown.remove(last)
            dropped.insert(0, last)
        yield self._table(shown, self._widths(shown, width))
        lines = list(self.notes)
        said = [f"{self.columns[number].name} {self.rows[0][number]}" for number in common]
        if said:
            lines.append(f"everywhere: {', '.join(said)}")
        if dropped:
            names = ", ".join(self.columns[number].name for number in dropped)
            lines.append(f"no room for: {names}; a wider terminal or --json shows all")
        if lines:
            yield Text(visible("\n".join(lines)), style="italic")

    def _is_common(self, number: int) -> bool:
        different = {row[number] for row in self.rows}
        return self.columns[number].optional and len(self.rows) > 1 and len(different) == 1

    def _natural(self, number: int) -> int:
        from rich.cells import cell_len

        heading = max(cell_len(word) for word in self.columns[number].name.split())
        lines = (line for row in self.rows for line in visible(row[number]).split("\n"))
        return max([heading, *map(cell_len, lines)])

    def _least(self, shown: Sequence[int]) -> int:
        return sum(
            min(self._natural(number), _LEAST_PROSE) if self.columns[number].prose else self._natural(number)
            for number in shown
        ) + _GAP * len(shown)

    def _widths(self, shown: Sequence[int], width: int) -> list[int]:
        """Return a width for each column: prose shares what is left; then the widest names are broken."""
        widths = [self._natural(number) for number in shown]
        least = [
            _LEAST_PROSE if self.columns[number].prose else own
            for number, own in zip(shown, widths, strict=True)
        ]
        for bound in (least, [_LEAST] * len(shown)):
            while sum(widths) + _GAP * len(widths) > width:
                able = [index for index, own in enumerate(widths) if own > bound[index]]
                if not able:
                    break
                widths[max(able, key=widths.__getitem__)] -= 1
        return widths

    def _table(self, shown: Sequence[int], widths: Sequence[int]) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=self.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
        )
        for number, width in zip(shown, widths, strict=True):
            column = self.columns[number]
            table.add_column(
                column.name, width=width, overflow="fold", justify="right" if column.number else "left"
            )
        for row in self.rows:
            table.add_row(*(Text(visible(row[number])) for number in shown))
        return table
