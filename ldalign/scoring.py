"""Log-probs of given responses under a model: the reference pass, and the likelihood of real responses."""

from collections.abc import Callable, Sequence

import torch

from ldalign import distributed, ops
from ldalign.batches import Batch, Pair, deal, pair_costs, token_logprobs
from ldalign.weights import LanguageModel


@torch.no_grad()
def response_logps(
    model: LanguageModel,
    pairs: Sequence[Pair],
    micro_tokens: int,
    device: torch.device,
    progress: Callable[[int], None] = lambda pairs: None,
) -> torch.Tensor:
    """(P, 2) float64: summed natural-log probabilities of each pair's real and generated response (0 where none).

    Every rank scores its share with the whole model, through the path that training uses; the results are the same on
    all ranks.
    """
    mine: list[int] = []
    values = []
    sizes = [pair.tokens for pair in pairs]
    plan = deal(sizes, distributed.world_size(), micro_tokens, pair_costs(model, pairs))
    for micro in plan[distributed.rank()]:
        if not micro:
            continue
        batch = Batch.pack([pairs[i] for i in micro], device)
        sums = iter(ops.segment_sum(token_logprobs(model, batch), batch.lengths).double().tolist())
        for i in micro:
            real = next(sums)
            values.append((real, next(sums) if pairs[i].generated is not None else 0.0))
        mine += micro
        progress(len(micro))
    table = torch.tensor(values, dtype=torch.float64).reshape(-1, 2)
    return torch.stack([distributed.merge_rows(len(pairs), mine, table[:, side]) for side in (0, 1)], dim=1)
