"""What a block's backward makes again instead of keeping it: `checkpointing=selective`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputed(
    on: bool, x: Tensor, function: Callable[..., Tensor], *inputs: Tensor
) -> AbstractContextManager[None]:
    """Returns a context in which autograd keeps nothing of x, which is function(*inputs).

    Where a backward asks for x it is made again from the inputs, which must be kept anyway. The
    caller holds x until the context ends. With `on` false the context does nothing.
    """
    if not on:
        return nullcontext()
    known = id(x)  # x itself would be kept by the hooks
    return saved_tensors_hooks(
        lambda tensor: None if id(tensor) == known else tensor,
        lambda kept: function(*inputs) if kept is None else kept,
    )
