"""How names that come from files, and numbers, are written for people."""

from __future__ import annotations

#: What the steps of calibration that train are called.
STEPS = {"affine": "distilling into the new layers", "all": "distilling into all parameters"}


def visible(text: str) -> str:
    r"""Return a text with what cannot be seen written as an escape: control characters, direction marks.

    Example:
        >>> print(visible("conv\u202e1"))
        conv\u202e1

    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def percent(value: float | None) -> str:
    """Return a share as a percentage of three digits; what is less than a tenth of a thousandth says so.

    Example:
        >>> [percent(x) for x in (0.0, 1e-7, 0.00123, 0.0567, 0.345, 2.5, 12.345, None)]
        ['0 %', '< 0.01 %', '0.12 %', '5.67 %', '34.5 %', '250 %', '1,234 %', '–']

    """
    if value is None:
        return "–"
    if value == 0:
        return "0 %"
    if 0 < value < 1e-4:
        return "< 0.01 %"
    shown = 100 * value
    digits = 2 if abs(shown) < 10 else 1 if abs(shown) < 100 else 0
    return f"{shown:,.{digits}f} %"


def batches(count: int, size: int | None) -> str:
    """Return how many batches there were, and how many samples in the first.

    Example:
        >>> [batches(1, 8), batches(3, 1), batches(2, None)]
        ['1 batch of 8 samples', '3 batches, the first of 1 sample', '2 batches']

    """
    counted = f"{count:,} batch{'' if count == 1 else 'es'}"
    if size is None:
        return counted
    return f"{counted}{'' if count == 1 else ', the first'} of {size:,} sample{'' if size == 1 else 's'}"


def memory(size: int) -> str:
    """Return a number of bytes in MiB, or in KiB where it is less than one.

    Example:
        >>> [memory(3_200_000), memory(20_000)]
        ['3.1 MiB', '19.5 KiB']

    """
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
