"""Log-probs of given responses under a model: the reference pass, and the
likelihood of real responses.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ldalign import ops
from ldalign.data.pairs import Pair
from ldalign.models.weights import LanguageModel
from ldalign.system.memory import naming
from ldalign.system.partial_rows import table
from ldalign.system.transfer import to_device
from ldalign.training.batches import Batch, deal, pair_costs, token_logprobs


@torch.no_grad()
def response_logps(
    model: LanguageModel,
    pairs: Sequence[Pair],
    micro_tokens: int,
    device: torch.device,
    progress: Callable[[int], None] = lambda pairs: None,
    path: Path | None = None,
) -> torch.Tensor:
    """(P, 2) float64: summed natural-log probabilities of each pair's real and generated response
    (0 where none).

    Every rank scores its share with the whole model, through the path that training uses; the
    results are the same on all ranks, and for any number of them: the micro-batches are. path: as
    in `partial_rows.table`, for a stage that can be gone on with. Raises NumericsError naming the
    pair, OutOfMemory.
    """

    def score(micro: Sequence[int]) -> torch.Tensor:
        chosen = [pairs[i] for i in micro]
        with naming(
            lambda: _too_large(chosen),
            "lower training.micro_tokens or max_length, or set dtype=bfloat16",
        ):
            batch = Batch.pack(chosen, device)
            sums = ops.segment_sum(token_logprobs(model, batch), batch.lengths).double()
            there = [[True, pair.generated is not None] for pair in chosen]
            (places,) = to_device(device, torch.tensor(there).flatten().nonzero()[:, 0])
            return sums.new_zeros(2 * len(chosen)).index_copy_(0, places, sums).view(-1, 2)

    (micros,) = deal([pair.tokens for pair in pairs], 1, micro_tokens, pair_costs(model, pairs))
    return table(micros, score, 2, lambda i, value: _refusal(pairs[i], value), path, progress)


def _too_large(pairs: Sequence[Pair]) -> str:
    longest, total = max(pairs, key=lambda pair: pair.tokens), sum(pair.tokens for pair in pairs)
    return f"a micro-batch of {total} tokens (the longest row, {longest.id}, has {longest.tokens})"


def _refusal(pair: Pair, value: float) -> str:
    return (
        f"row {pair.id}: the log-probability of a response is {value}; look at its texts and at "
        "the model's weights"
    )
