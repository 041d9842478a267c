"""What a forward pass leaves in memory for the backward, and the products that both take."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


class Meter(TorchDispatchMode):
    """Counts the products inside, and notes every storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.products += func in PRODUCTS
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> int:
        """Returns the bytes of those storages that are still there."""
        return sum(size for ref, size in self.made.values() if not ref.expired())
