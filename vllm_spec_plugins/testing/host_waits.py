"""How often code waits for the device, counted where there is none.

On a GPU some calls wait until everything before them has run: reading a tensor on the host, and
asking which elements of it are not zero, which picking rows by booleans does too. `waits_counted`
counts them on the CPU, by the file that makes them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Methods of a tensor that wait for its device, and of which torch's dispatcher hears nothing.
_METHODS = ("tolist", "cpu")
#: Operations that do.
_OPERATIONS = ("_local_scalar_dense", "masked_select", "nonzero")
_INDEXING = ("index", "index_put", "index_put_")
_TORCH = str(Path(torch.__file__).parent)


@contextmanager
def waits_counted(counts: Callable[[Path], bool] = lambda _file: True) -> Iterator[Counter[str]]:
    """Waits by name of the file that called, until the context ends.

    Args:
        counts: Whether calls from that file are counted.
    """
    counted: Counter[str] = Counter()

    def count() -> None:
        frame = sys._getframe(1)
        while (name := frame.f_code.co_filename).startswith(_TORCH) or name == __file__:
            assert frame.f_back is not None
            frame = frame.f_back
        if counts(file := Path(name)):
            counted[file.name] += 1

    def counting_calls(original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            count()
            return original(self, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in _METHODS:
            counting = counting_calls(getattr(torch.Tensor, name))
            stack.enter_context(mock.patch.object(torch.Tensor, name, counting))
        stack.enter_context(_Operations(count))
        yield counted


class _Operations(TorchDispatchMode):
    """Tells of operations that wait: `count` is called at each."""

    def __init__(self, count: Callable[[], None]) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = func.overloadpacket.__name__
        indices = args[1] if name in _INDEXING else ()
        if name in _OPERATIONS or any(i is not None and i.dtype == torch.bool for i in indices):
            self._count()
        return func(*args, **(kwargs or {}))
