"""What each kind of checkpointing keeps and makes again, and that gradients are the same bits."""

from collections.abc import Callable
from typing import Literal

import pytest
import tiny
import torch
from kept import Meter
from torch import Tensor

from ldalign.models.gpt2 import GPT2
from ldalign.models.layout import Packed
from ldalign.models.mistral import Mistral

Kind = Literal["none", "selective", "full"]
PARTS = [(10, 12, 8), 10]
TOKENS, LAYERS = 40, 2
PRODUCTS = 4 * LAYERS  # of a forward; a backward has two for each


def backward(model: Mistral | GPT2, checkpointing: Kind) -> tuple[list[Tensor], int, int]:
    """The gradients of the final states; products of both passes; bytes between the passes."""
    for block in model.blocks:
        block.checkpointing = checkpointing
    make = torch.Generator().manual_seed(0)
    ids = torch.randint(tiny.VOCABULARY, (TOKENS,), generator=make)
    layout = Packed(PARTS)
    used = [p for name, p in model.named_parameters() if not name.startswith("lm_head")]
    with Meter() as meter:
        states = model(ids, layout, lambda hidden, weight: hidden)
        kept = meter.alive() - states.untyped_storage().nbytes()
        upstream = torch.randn(states.shape, generator=make).to(states.dtype)
        gradients = torch.autograd.grad(states, used, upstream)
    return list(gradients), meter.products, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny.mistral, tiny.gpt2])
def test_full_alone_repeats_products(
    make: Callable[[], Mistral | GPT2], dtype: torch.dtype
) -> None:
    model = make().to(dtype)
    plain, products, _ = backward(model, "none")
    assert products == 3 * PRODUCTS
    # Of a block's forward, full leaves out the last product: nothing behind it is asked for.
    for kind, repeated in (("selective", 0), ("full", 3 * LAYERS)):
        gradients, products, _ = backward(model, kind)
        assert products == 3 * PRODUCTS + repeated
        assert all(map(torch.equal, gradients, plain))


def test_bytes_kept() -> None:
    """selective keeps neither the two norms' results nor the activation; full, one stream alone."""
    c, g = tiny.MISTRAL, tiny.GPT2_CONFIG
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    width, inner = c.hidden_size, c.intermediate_size
    less = {  # numbers a token and layer
        "selective": 2 * width + inner,
        # and the second sum, q, k, v, attention's result, gate and up, and in float32 the second
        # norm's scale and a log-sum-exp for each head
        "full": 3 * width + 2 * q + 2 * kv + 3 * inner + 1 + c.num_attention_heads,
    }
    kept = {kind: backward(tiny.mistral(), kind)[2] for kind in ("none", "selective", "full")}
    for kind, numbers in less.items():
        assert kept["none"] - kept[kind] == 4 * TOKENS * LAYERS * numbers, kind
    kept = {kind: backward(tiny.gpt2(), kind)[2] for kind in ("none", "selective")}
    numbers = 2 * g.n_embd + g.inner
    assert kept["none"] - kept["selective"] == 4 * TOKENS * LAYERS * numbers
