"""Log-probs of given responses: against the plainest means, and what is said of none."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import tiny
import torch

from ldalign.data.pairs import Pair
from ldalign.system import distributed
from ldalign.system.errors import NumericsError
from ldalign.system.memory import OutOfMemory
from ldalign.training import scoring
from ldalign.training.scoring import response_logps

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_rank(in_process: None) -> Iterator[None]:
    distributed.start("cpu")
    yield


def some_pairs() -> list[Pair]:
    """Five pairs, the third without a loser."""
    pairs = tiny.pairs(5)
    pairs[2] = replace(pairs[2], generated=None)
    return pairs


@pytest.mark.parametrize("micro_tokens", [1, 40, 10_000])
def test_sums_are_those_of_each_response_by_itself(micro_tokens: int) -> None:
    model, pairs = tiny.mistral(), some_pairs()
    found = response_logps(model, pairs, micro_tokens, CPU)
    assert found.shape == (5, 2) and found.dtype == torch.float64
    for pair, row in zip(pairs, found, strict=True):
        for n, response in enumerate((pair.real, pair.generated)):
            with torch.no_grad():
                sums = 0.0 if response is None else tiny.logps(model, pair.prompt, response).sum()
            assert float(row[n]) == pytest.approx(float(sums), abs=1e-3)


def test_a_log_prob_that_is_not_finite_names_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = scoring.token_logprobs

    def spoilt(model: torch.nn.Module, batch: scoring.Batch) -> torch.Tensor:
        found = plain(model, batch)
        first = found.detach().clone()
        first[0] = torch.nan
        return first if batch.pairs[0].id == "row-3" else found

    monkeypatch.setattr(scoring, "token_logprobs", spoilt)
    expected = "^row row-3: the log-probability of a response is nan; look at its texts"
    with pytest.raises(NumericsError, match=expected):
        response_logps(tiny.mistral(), some_pairs(), 1, CPU)


def test_memory_that_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scoring, "token_logprobs", failing)
    pairs = some_pairs()
    longest = max(pairs, key=lambda pair: pair.tokens)
    expected = (
        f"^a micro-batch of {sum(pair.tokens for pair in pairs)} tokens \\(the longest row, "
        f"{longest.id}, has {longest.tokens}\\): out of memory; lower training.micro_tokens or "
        "max_length, or set dtype=bfloat16"
    )
    with pytest.raises(OutOfMemory, match=expected):
        response_logps(tiny.mistral(), pairs, 10_000, CPU)
