"""How pairs become batches: row order, micro-batches by token budget, packing without padding.

The order of the rows is a function of (seed, stage, epoch) over global indices. Ranks and
micro-batches only split a global batch; the divisor of the loss is fixed for the whole of it, so
any split gives the same gradient.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldalign import ops
from ldalign.data.pairs import Pair
from ldalign.models.gpt2 import GPT2Config
from ldalign.models.layout import Packed
from ldalign.models.weights import LanguageModel
from ldalign.system.seeds import permutation
from ldalign.system.transfer import to_device


@dataclass(frozen=True)
class Batch:
    """Pairs packed: sequences [prompt | real | generated] end to end; both
    responses continue the prompt.
    """

    pairs: Sequence[Pair]
    ids: Tensor  # (N,) int64
    layout: Packed
    rows: Tensor  # (M,) int64: the tokens whose hidden state predicts a response token
    targets: Tensor  # (M,) int64: the response tokens they predict
    reference: Tensor  # (S,) float32: the responses' log-probs under the reference
    weights: Tensor  # (P,) float32, s
    tokens: Tensor  # (S,) float32: `lengths`, on the device
    lengths: list[int]  # response lengths: real, generated, real, ...

    @classmethod
    def pack(cls, pairs: Sequence[Pair], device: torch.device | str = "cpu") -> "Batch":
        """Packs pairs for one forward. The first token of either response is predicted by the
        prompt's last. On a GPU all of it is one copy, and the host does not wait.
        """
        rows, start = [], 0
        for pair in pairs:
            if not pair.prompt or not all(pair.responses):
                raise ValueError(
                    f"row {pair.id}: needs at least one prompt token and one token a response"
                )
            last = start + len(pair.prompt) - 1
            start = last + 1
            for response in pair.responses:
                rows += [last, *range(start, start + len(response) - 1)]
                start += len(response)
        responses = [response for p in pairs for response in p.responses]
        reference = [x for p in pairs for x in (p.ref_real, p.ref_generated)[: len(p.responses)]]
        lengths = list(map(len, responses))
        layout = Packed([[len(p.prompt), *map(len, p.responses)] for p in pairs])
        layout.positions, ids, places, targets, references, weights, tokens = to_device(
            torch.device(device),
            layout.positions,
            _joined([part for p in pairs for part in (p.prompt, *p.responses)]),
            torch.tensor(rows),
            _joined(responses),
            torch.tensor(reference, dtype=torch.float32),
            torch.tensor([p.weight for p in pairs], dtype=torch.float32),
            torch.tensor(lengths, dtype=torch.float32),
        )
        return cls(pairs, ids, layout, places, targets, references, weights, tokens, lengths)

    def split(self, per_response: Tensor) -> tuple[Tensor, Tensor]:
        """Per-response values of a batch of pairs as (real (P,), generated (P,))."""
        return per_response[0::2], per_response[1::2]


def _joined(parts: Sequence[Sequence[int]]) -> Tensor:
    """All numbers of all parts, (N,) int64."""
    count = sum(map(len, parts))
    return torch.from_numpy(np.fromiter(itertools.chain.from_iterable(parts), np.int64, count))


def token_logprobs(model: LanguageModel, batch: Batch) -> Tensor:
    """(M,) float32 natural-log probabilities of the batch's response tokens.
    No logits leave the head.
    """
    out = model(
        batch.ids,
        batch.layout,
        lambda hidden, weight: ops.linear_logprob(
            hidden.index_select(0, batch.rows), weight, batch.targets
        ),
    )
    assert isinstance(out, Tensor)
    return out


def global_batches(
    count: int, size: int, epochs: int, seed: int, stage: str
) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, row indices) of each optimizer step of a stage. The last batch of an epoch holds what
    is left: no row is skipped.
    """
    for epoch in range(epochs):
        order = permutation(seed, f"{stage}/epoch/{epoch}", count)
        for start in range(0, count, size):
            yield epoch, order[start : start + size]


def count_steps(count: int, size: int, epochs: int) -> int:
    """How many batches `global_batches` yields."""
    return epochs * -(-count // size)


def pair_costs(model: LanguageModel, pairs: Sequence[Pair]) -> list[int]:
    """What each pair costs `model`: the multiply-adds of its forward in blocks, attention and head.

    Attention is the quadratic part, a third of all for SmolLM2 at 2,000 tokens; the head runs where
    a response token is predicted.
    """
    config = model.config
    if isinstance(config, GPT2Config):
        width, window = config.n_embd * config.n_layer, None
    else:
        width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
        window = config.sliding_window
    blocks = sum(p.numel() for block in model.blocks for p in block.parameters())
    head = model.output_weight.numel()
    return [
        pair.tokens * blocks
        + 2 * width * _keys(pair, window)
        + head * sum(map(len, pair.responses))
        for pair in pairs
    ]


def _keys(pair: Pair, window: int | None) -> int:
    """How many keys the pair's tokens see, added up: token i of a sequence sees
    min(i + 1, window).
    """

    def seen(tokens: int) -> int:
        short = min(tokens, window or tokens)
        return short * (short + 1) // 2 + (tokens - short) * short

    prompt = len(pair.prompt)
    return sum(seen(prompt + len(response)) for response in pair.responses) - (
        len(pair.responses) - 1
    ) * seen(prompt)


def deal(
    sizes: Sequence[int], ranks: int, budget: int, costs: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Splits items over ranks and micro-batches: result[rank][micro] lists item indices.

    sizes: what fills a micro-batch, at most `budget` of it (a larger single item gets one of its
    own); costs: what is balanced, over ranks and over micro-batches; None: the sizes. Every rank
    has the same number of micro-batches, the fewest that are found to do, as FSDP's collectives
    need, the largest first, so that memory which does not suffice shows at once. A rank that runs
    out has empty ones, at the end.
    """
    costs = sizes if costs is None else costs
    order = sorted(range(len(sizes)), key=lambda i: (-costs[i], -sizes[i], i))
    micros = max(1, -(-sum(sizes) // (ranks * budget)))
    while (bins := _fill(order, sizes, costs, ranks * micros, budget)) is None:
        micros += 1 + micros // 20
    # The k-th micro-batches of all ranks run together: give them bins of like cost, in turns from
    # either end.
    bins.sort(key=lambda items: -sum(costs[i] for i in items))
    layers = [bins[start : start + ranks] for start in range(0, len(bins), ranks)]
    layers = [layer[:: 1 if k % 2 == 0 else -1] for k, layer in enumerate(layers) if any(layer)]
    layers.sort(
        key=lambda layer: (not all(layer), -max(sum(sizes[i] for i in items) for items in layer))
    )
    return [[layer[rank] for layer in layers] for rank in range(ranks)]


def _fill(
    order: Sequence[int], sizes: Sequence[int], costs: Sequence[int], bins: int, budget: int
) -> list[list[int]] | None:
    """Puts each item, in this order, into the least loaded bin; None where that
    has no room for it.
    """
    filled: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, 0, k) for k in range(bins)]  # (load, size, bin)
    for i in order:
        load, size, k = heap[0]
        if size and size + sizes[i] > budget:
            return None
        filled[k].append(i)
        heapq.heapreplace(heap, (load + costs[i], size + sizes[i], k))
    return filled
