"""What the findings about a network mean: complete, alive, exact, equal; and what is wrong."""

from __future__ import annotations

from typing import Any

#: Relative distance of outputs in double precision: of an exact method's, and of a rewritten graph's.
EXACT, EQUAL = 1e-10, 1e-12


#: Methods under which a network may lose its input by design, though every layer is alive: instance norm
#: leaves a pooling that follows nothing but β, and bounds on every layer let a deep network's signal fade.
FADING = frozenset({"instance", "spectral(gain=fixed)"})


def complete(outcome: dict[str, Any]) -> bool:
    """Tell whether every BatchNorm layer that was to go is gone, and no other."""
    return not ("failed" in outcome or outcome["left"] or outcome["calling"])


def alive(outcome: dict[str, Any]) -> bool:
    """Tell whether outputs are finite and depend on the input, and no new layer puts out a constant."""
    if "failed" in outcome:
        return False
    return not outcome["dead"] and outcome.get("finite", True) and outcome.get("depends", True)


def fades(spelling: str, outcome: dict[str, Any]) -> bool:
    """Tell whether a method's design loses the input: rounding is all that the output still shows of it."""
    lost = "failed" not in outcome and not outcome["dead"] and not outcome.get("depends", True)
    return spelling in FADING and lost and outcome.get("finite", True)


def exact(outcome: dict[str, Any]) -> bool:
    """Tell whether an exact method kept the outputs; others have no such number."""
    error = outcome.get("error")
    return error is None or error <= EXACT


def equal(graph: dict[str, Any]) -> bool:
    """Tell whether a rewritten graph is what the converted network is."""
    return "failed" not in graph and not graph["structure"] and graph["error"] <= EQUAL


def problems(record: dict[str, Any]) -> list[str]:
    """Return everything about a network that is not as it must be."""
    name = record["name"]
    if "methods" not in record:
        return [f"{name}: {record.get('failed', 'not examined yet')}"]
    found = []
    for spelling, outcome in record["methods"].items():
        here = f"{name}: {spelling}: "
        if "failed" in outcome:
            found.append(here + outcome["failed"])
            continue
        if not complete(outcome):
            found.append(f"{here}left: {', '.join(outcome['left'] + outcome['calling'])}")
        if not alive(outcome) and not fades(spelling, outcome):
            dead = f"constant: {', '.join(outcome['dead'])}" if outcome["dead"] else "the output"
            found.append(f"{here}not alive: {dead}")
        if not exact(outcome):
            found.append(f"{here}outputs moved by {outcome['error']:.1e}")
    for mode, graph in record["graphs"].items():
        if graph["traced"] and not equal(graph):
            told = graph.get("failed") or f"{graph['error']:.1e} apart; {'; '.join(graph['structure'][:3])}"
            found.append(f"{name}: graph in {mode} mode: {told}")
    return found
