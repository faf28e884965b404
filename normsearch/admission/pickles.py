"""A pickle of tensors and plain values, read without running anything: what torch.save writes, no more.

torch's own ``weights_only`` reader still allocates what a file claims and calls dozens of functions. This
one knows the handful of instructions and names of a state dict, calls nothing, and describes tensors instead
of making them; whatever passes is then given to torch.
"""

from __future__ import annotations

import io
import pickletools
import warnings
from collections.abc import Callable
from typing import Any

from normsearch.admission.descriptions import (
    ALLOWED,
    SCALARS,
    Global,
    PickleError,
    expect,
    reduced,
    refused,
    storage_of,
)
from normsearch.errors import CheckpointError

LONGEST = 64 * 2**20
MOST_INSTRUCTIONS = 5_000_000

_MARK = object()


def read(data: bytes | io.BufferedIOBase) -> Any:
    """Return what a pickle holds: dicts, lists, tuples, scalars and ``Described`` tensors.

    Args:
        data: the pickle; a stream is left behind its end.

    Raises:
        PickleError: it is malformed, too long, or holds anything else.

    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    with warnings.catch_warnings():
        # Escapes in damaged names.
        warnings.simplefilter("ignore", DeprecationWarning)
        return _Reader().run(stream)


class _Reader:
    """A stack machine for the instructions that torch.save writes."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: Any) -> Any:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if count > MOST_INSTRUCTIONS:
                    raise PickleError(f"has more than {MOST_INSTRUCTIONS:,} instructions")
                if opcode.name == "STOP":
                    (value,) = self.stack
                    return value
                self._step(opcode.name, argument)
        except PickleError:
            raise
        except (
            ValueError,
            IndexError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            MemoryError,
        ) as error:
            raise PickleError(f"is malformed ({type(error).__name__}: {str(error)[:200]})") from error
        raise PickleError("has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            if len(stack) < count or any(item is _MARK for item in stack[-count:]):
                raise PickleError("is malformed (a tuple of nothing)")
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            items = self._to_mark()
            stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS"):
            items = self._to_mark() if name == "APPENDS" else [stack.pop()]
            expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._to_mark() if name == "SETITEMS" else self._pop(2)
            self._set_items(items)
        elif name == "GLOBAL":
            if argument not in ALLOWED:
                raise PickleError(refused(argument))
            stack.append(Global(argument))
        elif name == "REDUCE":
            function, arguments = self._pop(2)
            stack.append(reduced(expect(function, Global), expect(arguments, tuple)))
        elif name == "BUILD":
            # OrderedDict carries the state dict's versions as an attribute.
            target, state = self._pop(2)
            if type(target) is not dict or type(state) is not dict or set(state) - {"_metadata"}:
                raise PickleError("sets attributes of an object, which a state dict does not need")
            stack.append(target)
        elif name == "BINPERSID":
            stack.append(storage_of(stack.pop()))
        elif name == "PROTO":
            if argument != 2:
                raise PickleError(f"is a pickle of protocol {argument}, torch.save writes 2")
        else:
            raise PickleError(
                f"uses the pickle instruction {name}, which torch.save never writes for a state dict"
            )

    def _pop(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count or any(item is _MARK for item in items):
            raise PickleError("is malformed (the stack is too short)")
        del self.stack[-count:]
        return items

    def _to_mark(self) -> list[Any]:
        position = next((i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is _MARK), None)
        if position is None:
            raise PickleError("is malformed (a mark is missing)")
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def _set_items(self, items: list[Any]) -> None:
        target = expect(self.stack[-1], dict)
        if len(items) % 2:
            raise PickleError("is malformed (a key without a value)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing nested tuples can take forever.
            if type(key) not in SCALARS:
                raise PickleError("has a dictionary whose keys are neither text nor numbers")
            target[key] = value


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}


def resave() -> str:
    """Return the way out of a file with more than tensors in it."""
    return (
        "in a process where you trust the file, load it with torch.load(path, weights_only=False) and save "
        "the weights alone: torch.save(model.state_dict(), path)"
    )


def refusal(path: object, error: PickleError) -> CheckpointError:
    """Return the error for a file whose pickle was not accepted."""
    return CheckpointError(f"{path} {error}; {resave()}")
