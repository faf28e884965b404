"""Peak memory of tensors allocated while something runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Return the largest number of bytes that tensors allocated by ``run`` held at once.

    On CUDA the allocator is asked; elsewhere every operation's outputs are followed until they are freed,
    which leaves out scratch memory inside an operation.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    live = _LiveStorages()
    with live:
        run()
    return live.peak


class _LiveStorages(TorchDispatchMode):
    """Follow the storages that operations return until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        output = func(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                self._follow(x.untyped_storage(), given)
        self.peak = max(self.peak, self._live)
        return output

    def _follow(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._sizes or key in given:
            return
        self._sizes[key] = storage.nbytes()
        self._live += self._sizes[key]
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self._live -= self._sizes.pop(key, 0)
