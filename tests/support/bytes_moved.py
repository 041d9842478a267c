"""Counts the bytes that tensor operations and interpreted Triton kernels read and write.

An operation of torch reads every tensor it is given and writes every tensor it returns, as if no
cache held anything; a view costs nothing, and what is only written is not read. In Triton's
interpreter the loads and stores themselves are counted, lanes that are masked out left aside.
"""

from contextlib import ExitStack
from typing import Any, Self

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

OVERWRITING = {"copy_", "fill_", "zero_"}  # their first argument is written and not read
ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class BytesMoved(TorchDispatchMode):
    """A context manager; `read` and `written` are bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.written = 0, 0
        self._patches = ExitStack()

    @property
    def total(self) -> int:
        return self.read + self.written

    def __enter__(self) -> Self:
        self._count_triton(self._patches.enter_context(pytest.MonkeyPatch.context()))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        views = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        if not views and name not in ALLOCATING:
            self.read += _bytes(args[1:] if name in OVERWRITING else args)
            self.written += _bytes(result)
        return result

    def _count_triton(self, patch: pytest.MonkeyPatch) -> None:
        from triton.runtime import interpreter

        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store, launch = (
            builder.create_masked_load,
            builder.create_masked_store,
            executor.__call__,
        )

        def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            result = load(builder, pointers, mask, *rest)
            self.read += int(mask.data.sum()) * result.data.itemsize
            return result

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.written += int(mask.data.sum()) * value.data.itemsize
            return store(builder, pointers, value, mask, *rest)

        def uncounted_launch(executor: Any, *args: Any, **options: Any) -> Any:
            with _disable_current_modes():  # what the interpreter itself does with torch
                return launch(executor, *args, **options)

        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        patch.setattr(executor, "__call__", uncounted_launch)


def _bytes(tree: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tree) if isinstance(x, Tensor))
