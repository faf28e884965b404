"""Tables of what each choice of each parameter adds to a sum: what is one, and the least that plans add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from normsearch.errors import SearchError

#: Contribution of each choice of each parameter: {"layer1.bn": {"group": 0.1, "batch": -0.2}, …}.
Table = Mapping[str, Mapping[str, float]]


def least(table: Table, params: Mapping[str, Any]) -> float:
    """Return the least that a table adds up to, given some of the parameters."""
    return sum(_added(row, name, params) for name, row in table.items())


def _added(row: Mapping[Any, float], name: str, params: Mapping[str, Any]) -> float:
    try:
        return row[params[name]]
    except (KeyError, TypeError):
        # It is not set yet, or to what no table can name.
        return min(row.values(), default=0.0)


def checked_costs(costs: Any) -> dict[int, Table]:
    """Return tables by objective; raise a ``SearchError`` for anything else."""
    if not isinstance(costs, Mapping):
        raise SearchError(f"costs={costs!r}: give {{number of an objective: table}}")
    for index in costs:
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise SearchError(f"costs[{index!r}]: give the objective's number, from 0 on")
    return {index: checked_table(f"costs[{index}]", table) for index, table in costs.items()}


def checked_ceilings(ceilings: Any) -> list[tuple[Table, float]]:
    """Return pairs of tables and limits; raise a ``SearchError`` for anything else."""
    if not isinstance(ceilings, Sequence) or any(
        not isinstance(one, Sequence) or len(one) != 2 for one in ceilings
    ):
        raise SearchError(f"ceilings={ceilings!r}: give a list of pairs (table, limit)")
    return [
        (checked_table(f"ceilings[{index}]", table), _finite(f"ceilings[{index}]'s limit", limit))
        for index, (table, limit) in enumerate(ceilings)
    ]


def checked_table(what: str, table: Any) -> Table:
    """Return a table of finite numbers; raise a ``SearchError`` for anything else."""
    if not isinstance(table, Mapping):
        raise SearchError(f"{what} = {table!r}: give {{parameter: {{choice: number}}}}")
    for name, row in table.items():
        if not isinstance(row, Mapping):
            raise SearchError(f"{what}[{name!r}] = {row!r}: give {{choice: number}}")
        for choice, value in row.items():
            _finite(f"{what}[{name!r}][{choice!r}]", value)
    return table


def _finite(what: str, value: Any) -> float:
    if not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise SearchError(f"{what} = {value!r}: give a finite number")
    return float(value)
