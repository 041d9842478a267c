"""Row order, micro-batches and packing: every row once, any split, no label off by one."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldalign.data.pairs import Pair
from ldalign.models.toy import random_mistral
from ldalign.training.batches import (
    Batch,
    count_steps,
    deal,
    global_batches,
    pair_costs,
    token_logprobs,
)


def orders(seed: int, stage: str = "guide", size: int = 5, epochs: int = 3) -> list[list[int]]:
    return [indices.tolist() for _, indices in global_batches(23, size, epochs, seed, stage)]


def test_every_row_once_an_epoch_and_a_ragged_last_batch() -> None:
    steps = list(global_batches(23, 5, 3, 1, "guide"))
    assert len(steps) == count_steps(23, 5, 3) == 15
    for epoch in range(3):
        batches = [indices for e, indices in steps if e == epoch]
        assert [len(b) for b in batches] == [5, 5, 5, 5, 3]
        assert sorted(np.concatenate(batches).tolist()) == list(range(23))
    assert count_steps(20, 5, 2) == 8 and count_steps(1, 5, 2) == 2


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert orders(1) == orders(1) != orders(2)
    assert orders(1, epochs=1) == orders(1)[:5]  # later epochs do not change earlier ones
    assert orders(1)[:5] != orders(1)[5:10] and orders(1)[0] != [0, 1, 2, 3, 4]
    flat = [row for batch in orders(1, size=5) for row in batch]
    assert flat == [row for batch in orders(1, size=7) for row in batch]  # nor does the batch size


def test_two_stages_with_one_seed_read_their_rows_in_different_orders() -> None:
    """The order was one of seed and epoch alone: SFT, guide and policy all met their rows in it."""
    stages = ("sft/policy", "guide", "iteration_0/policy", "iteration_1/policy")
    found = [[row for batch in orders(1, stage) for row in batch] for stage in stages]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 15  # of 69, 3 by chance


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.integers(1, 300), min_size=1, max_size=50),
    ranks=st.integers(1, 8),
    budget=st.integers(1, 800),
)
def test_deal(costs: list[int], ranks: int, budget: int) -> None:
    plan = deal(costs, ranks, budget)
    assert len(plan) == ranks
    assert sorted(i for micros in plan for micro in micros for i in micro) == list(
        range(len(costs))
    )
    assert len({len(micros) for micros in plan}) == 1 and len(plan[0]) >= 1
    for micros in plan:
        for micro in micros:
            assert sum(costs[i] for i in micro) <= budget or len(micro) == 1
        filled = [bool(micro) for micro in micros]
        assert filled == sorted(filled, reverse=True)  # empty ones come last
    layers = list(zip(*plan, strict=True))
    largest = [max(sum(costs[i] for i in micro) for micro in layer) for layer in layers]
    assert largest == sorted(largest, reverse=True)
    loads = [sum(costs[i] for micro in micros for i in micro) for micros in plan]
    assert max(loads) - min(loads) <= max(costs)
    assert deal(costs, ranks, budget) == plan


@pytest.mark.parametrize("count", range(1, 51))
def test_deal_every_size(count: int) -> None:
    """No rank is left without a micro-batch to take part with: it would hang the others."""
    for ranks in (2, 3, 4):
        plan = deal([10] * count, ranks, 25)
        sizes = [sum(map(len, micros)) for micros in plan]
        assert sum(sizes) == count and max(sizes) - min(sizes) <= 1
        assert {len(micros) for micros in plan} == {-(-max(sizes) // 2)}


def test_deal_balances_ranks_and_micro_batches() -> None:
    """All micro-batches cost about the same, those that run together nearly
    exactly; none is left over.
    """
    draw = random.Random(0)
    costs = [draw.randint(50, 900) for _ in range(64)]
    for ranks, budget in ((1, 4096), (2, 4096), (4, 2048), (8, 8192)):
        plan = deal(costs, ranks, budget)
        assert len(plan[0]) <= 1.2 * sum(costs) / (ranks * budget) + 1
        loads = np.array([[sum(costs[i] for i in micro) for micro in micros] for micros in plan])
        assert loads.max() < 1.1 * loads.mean()
        assert (loads.max(0).sum() / loads.mean(0).sum()) < 1.05


def test_deal_takes_turns_from_either_end() -> None:
    """Items of one micro-batch each: no rank has the larger one every time."""
    assert deal([12, 11, 10, 9, 8, 7], 2, 12) == [[[0], [3], [4]], [[1], [2], [5]]]


def test_deal_takes_the_largest_first() -> None:
    """By what fills them, not by what they cost; those of a rank that has none left are last."""
    assert deal([5, 6, 7, 8], 1, 8, [40, 30, 20, 10]) == [[[3], [2], [1], [0]]]
    assert deal([5, 6, 8], 2, 8, [40, 30, 10]) == [[[0], []], [[1], [2]]]


def test_deal_balances_costs_within_sizes() -> None:
    """What fills a micro-batch is not what it costs: four short items cost as
    much as one long one.
    """
    sizes, costs = [8, 2, 2, 2, 2], [16, 4, 4, 4, 4]
    assert sorted(sorted(micros[0]) for micros in deal(sizes, 2, 8, costs)) == [[0], [1, 2, 3, 4]]
    dear = deal([4, 4, 4], 2, 8, [9, 1, 1])
    assert sorted(sorted(micros[0]) for micros in dear) == [[0], [1, 2]]
    assert len(deal([4, 4, 4], 1, 8, [9, 1, 1])[0]) == 2


def test_deal_many_rows_at_once() -> None:
    """The reference pass deals a whole data set: time must not be quadratic."""
    draw = random.Random(0)
    costs = [draw.randint(50, 900) for _ in range(50_000)]
    began = time.process_time()
    deal(costs, 2, 8192)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("pair", [Pair("a", [5, 6], [7, 8, 9], [4]), Pair("b", [5] * 7, [4])])
def test_pair_costs_count_every_product(pair: Pair, window: int | None) -> None:
    """Against a count of what is seen token by token."""
    config = replace(tiny.MISTRAL, sliding_window=window)
    model = random_mistral(config, 0)
    prompt = len(pair.prompt)
    positions = [
        *range(prompt),
        *(prompt + i for response in pair.responses for i in range(len(response))),
    ]
    keys = sum(min(position + 1, window or 10**9) for position in positions)
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys
    head = sum(map(len, pair.responses)) * config.vocab_size * config.hidden_size
    assert pair_costs(model, [pair]) == [len(positions) * blocks + attention + head]


def test_pack_by_hand() -> None:
    """Prompt (7, 8), response (9, 10, 2): token 9 is predicted at 8, 10 at 9, 2
    at 10, and nothing at 2.
    """
    batch = Batch.pack([Pair("a", [7, 8], [9, 10, 2])])
    assert batch.ids.tolist() == [7, 8, 9, 10, 2]
    assert batch.rows.tolist() == [1, 2, 3]
    assert batch.targets.tolist() == [9, 10, 2]
    assert batch.lengths == [3] and batch.layout.positions.tolist() == [0, 1, 2, 3, 4]


def test_pack_pairs_by_hand() -> None:
    """The prompt once; the first token of either response is predicted by the prompt's last."""
    batch = Batch.pack([Pair("a", [7, 8], [9, 2], [3]), Pair("b", [5], [4], [6, 1])])
    assert batch.ids.tolist() == [7, 8, 9, 2, 3, 5, 4, 6, 1]
    assert batch.layout.positions.tolist() == [0, 1, 2, 3, 2, 0, 1, 1, 2]
    assert batch.rows.tolist() == [1, 2, 1, 5, 5, 7]
    assert batch.targets.tolist() == [9, 2, 3, 4, 6, 1]
    assert batch.lengths == [2, 1, 1, 2]
    assert batch.tokens.tolist() == batch.lengths
    assert {t.dtype for t in (batch.reference, batch.weights, batch.tokens)} == {torch.float32}
    real, generated = batch.split(torch.tensor([10.0, 20.0, 30.0, 40.0]))
    assert real.tolist() == [10, 30] and generated.tolist() == [20, 40]


@pytest.mark.parametrize("pair", [Pair("a", [], [1]), Pair("a", [1], []), Pair("a", [1], [2], [])])
def test_pack_refuses_an_empty_side(pair: Pair) -> None:
    with pytest.raises(ValueError, match="row a: needs at least one"):
        Batch.pack([pair])


def test_token_logprobs_of_a_three_token_example_by_hand() -> None:
    """A bigram model: the hidden state of a token is its one-hot, so the log-prob of t after s is a
    table's entry.
    """
    table = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.6, 0.3, 0.1]]).log()

    def bigram(ids: torch.Tensor, layout: object, head: object) -> torch.Tensor:
        hidden = torch.nn.functional.one_hot(ids, 3).float()
        return head(hidden, table.T)  # type: ignore[operator]

    out = token_logprobs(bigram, Batch.pack([Pair("a", [0], [2, 1])]))  # type: ignore[arg-type]
    assert out.tolist() == pytest.approx([np.log(0.7), np.log(0.3)])  # p(2 | 0), p(1 | 2)


@pytest.mark.parametrize("model", [tiny.mistral(), tiny.gpt2()], ids=["mistral", "gpt2"])
def test_packed_equals_one_by_one(model: torch.nn.Module) -> None:
    """Sequences of one pack, and the two responses of a pair, do not see each other, and come back
    in their order.
    """
    pairs = tiny.pairs(7)
    packed = token_logprobs(model, Batch.pack(pairs))  # type: ignore[arg-type]
    alone = torch.cat(
        [tiny.logps(model, p.prompt, response) for p in pairs for response in p.responses]
    )
    assert (packed - alone).abs().max() < 1e-4 and packed.std() > 0.1
