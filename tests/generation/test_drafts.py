"""Drafts: what is proposed, and that a response is the same with any draft or none."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from test_engine import Spy, decoder_of, kind, model_of, requests_of, run  # noqa: F401
from torch import Tensor

from ldalign.generation.decoders import PackedDecoder
from ldalign.generation.drafts import Draft
from ldalign.generation.engine import Engine, Request
from ldalign.generation.sampling import Response, Sampling
from ldalign.kernels import cpp

LONGEST = 60
SAMPLINGS = {
    "plain": Sampling(20),
    "greedy": Sampling(20, temperature=0.0),
    "penalty": Sampling(20, repetition_penalty=1.5),
    "cuts": Sampling(20, 0.8, top_k=30, top_p=0.9, min_p=0.01),
    "stop": Sampling(20, stop=("b",)),
}


def text(ids: list[int]) -> str:
    return "".join(chr(97 + i % 26) for i in ids)


def with_drafts(requests: Sequence[Request], drafts: Sequence[Sequence[int]]) -> list[Request]:
    return [replace(q, draft=draft) for q, draft in zip(requests, drafts, strict=True)]


def made_drafts(done: Sequence[Response]) -> list[list[int]]:
    """A draft for each response, one of a kind after the other."""
    kinds: list[Callable[[list[int]], list[int]]] = [
        lambda ids: ids,
        lambda ids: [],
        lambda ids: [(token + (i % 3 == 2)) % 61 for i, token in enumerate(ids)],
        lambda ids: ids[:2] + ids[4:9] + ids[10:],
        lambda ids: ids + [7] * 30,
        lambda ids: done[0].ids,
        lambda ids: list(range(30)),
    ]
    return [kinds[i % len(kinds)](r.ids) for i, r in enumerate(done)]


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("rows, step_tokens", [(9, None), (4, 7), (1, None)])
def test_a_response_is_the_same(
    kind: str,  # noqa: F811
    name: str,
    rows: int,
    step_tokens: int | None,
) -> None:
    decoder, sampling = decoder_of(kind, model_of()), SAMPLINGS[name]
    requests = requests_of(tiny.prompts(14, longest=20))

    def engine(draft_tokens: int) -> Engine:
        return Engine(
            decoder,
            sampling,
            [2, 5],
            0,
            longest=LONGEST,
            rows=rows,
            step_tokens=step_tokens,
            draft_tokens=draft_tokens,
            decode=text,
        )

    plain = run(engine(0), requests)
    assert len({r.finish_reason for r in plain}) == 2 or name in ("penalty", "greedy")
    drafting = engine(5)
    assert drafting.draft_tokens == (0 if kind == "standing" else 5)
    made = run(drafting, with_drafts(requests, made_drafts(plain)))
    assert [(r.ids, r.finish_reason) for r in made] == [(r.ids, r.finish_reason) for r in plain]
    assert [r.logp for r in made] == pytest.approx([r.logp for r in plain], abs=1e-4)


@pytest.mark.skipif(not cpp.available(), reason="no C++ backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_the_same(isa: None, dtype: torch.dtype) -> None:
    decoder, requests = PackedDecoder(model_of(dtype)), requests_of(tiny.prompts(14, longest=20))
    settings = {"longest": LONGEST, "rows": 4}
    plain = run(Engine(decoder, Sampling(20), [2, 5], 0, **settings), requests)
    for most in (1, 6):
        engine = Engine(decoder, Sampling(20), [2, 5], 0, draft_tokens=most, **settings)
        assert run(engine, with_drafts(requests, made_drafts(plain))) == plain


def test_steps_are_saved_and_no_more_is_computed() -> None:
    """A draft that is right takes as many steps as its tokens make at 1, 2, 3, 4, 4, ... a time
    and one more each; one that is wrong at once takes no more tokens than the one.
    """
    requests = requests_of(tiny.prompts(5))
    spy = Spy(decoder_of("modules", model_of()))

    def steps(drafts: Sequence[Sequence[int]]) -> list[list[int]]:
        spy.steps.clear()
        engine = Engine(spy, Sampling(24), [], 0, longest=LONGEST, rows=1, draft_tokens=4)
        nonlocal done
        done = run(engine, with_drafts(requests, drafts))
        return list(spy.steps)

    done: list[Response] = []
    plain = steps([[]] * 5)
    assert len(plain) == 5 * 24
    # 2 + 3 + 4 + 5 + 5 + 5 tokens, the last of which are drawn without a draft behind them.
    assert len(steps([r.ids for r in done])) == 5 * 6
    wrong = [[(r.ids[0] + 1) % 61] * 9 for r in done]
    assert sum(map(sum, steps(wrong))) == sum(map(sum, plain)) + 5


def test_a_step_has_no_more_tokens_than_it_may() -> None:
    """Rows under way first, and of their drafts what there is room for."""
    requests, spy = requests_of([[5]] * 4), Spy(decoder_of("modules", model_of()))
    plain = run(Engine(spy, Sampling(24), [], 0, longest=LONGEST, rows=4), requests)
    spy.steps.clear()
    engine = Engine(
        spy, Sampling(24), [], 0, longest=LONGEST, rows=4, step_tokens=9, draft_tokens=4
    )
    made = run(engine, with_drafts(requests, [r.ids for r in plain]))
    assert [r.ids for r in made] == [r.ids for r in plain]
    assert max(map(sum, spy.steps)) == 9 and {5, 2, 1} <= {n for step in spy.steps for n in step}


def test_a_row_on_a_shared_prompt_goes_on() -> None:
    """A draft takes its row out of its prompt and further in one step: those that wait for the
    prompt's pages still hear of them.
    """
    prompt = tiny.prompts(1, longest=40)[0] * 8
    requests = [Request(f"row{i}", [*prompt[:40], 3 + i], i) for i in range(4)]
    decoder = decoder_of("modules", model_of())
    plain = run(Engine(decoder, Sampling(12), [], 0, longest=LONGEST), requests)
    spy = Spy(decoder)
    engine = Engine(spy, Sampling(12), [], 0, longest=LONGEST, draft_tokens=4)
    made = run(engine, with_drafts(requests, [r.ids for r in plain]))
    assert [r.ids for r in made] == [r.ids for r in plain]
    assert [len(step) for step in spy.steps[:2]] == [1, 4]  # the first alone, then all


class Unsound(Spy):
    """Its logits are NaN where the newest token is the one that is `forbidden`."""

    forbidden = 60

    def step(self, ids: Tensor, rows: Tensor, pages: Tensor, last: Tensor) -> Tensor:
        logits = super().step(ids, rows, pages, last)
        logits[ids[last] == self.forbidden] = float("nan")
        return logits


def test_what_a_wrong_draft_computes_is_nobodys() -> None:
    """Logits behind a token that was not drawn are no part of the response: not refused, either."""
    decoder = Unsound(decoder_of("modules", model_of()))
    requests = requests_of([[*prompt, 3] for prompt in tiny.prompts(6)])
    plain = run(Engine(decoder, Sampling(9), [60], 0, longest=LONGEST), requests)
    drafts = [[60] * 9 for _ in plain]
    engine = Engine(decoder, Sampling(9), [60], 0, longest=LONGEST, draft_tokens=3)
    assert [r.ids for r in run(engine, with_drafts(requests, drafts))] == [r.ids for r in plain]


def test_the_distribution_is_the_models() -> None:
    """Two tokens of 4,000 rows, the draft being the likeliest two: chi-square of the pairs against
    the model's own probabilities.
    """
    model, prompt = model_of(), [5, 9, 11]

    def after(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids]))[0, -1].double().softmax(0).numpy()

    first = after(prompt)
    expected = np.stack([p * after([*prompt, i]) for i, p in enumerate(first)])  # (V, V)
    draft = list(np.unravel_index(expected.argmax(), expected.shape))
    count = 4000
    requests = [Request(f"row{i}", prompt, i, draft=[int(i) for i in draft]) for i in range(count)]
    engine = Engine(
        decoder_of("modules", model), Sampling(2), [], 0, longest=8, rows=500, draft_tokens=2
    )
    found = np.zeros_like(expected)
    for response in run(engine, requests):
        found[tuple(response.ids)] += 1
    cells = np.argsort(-expected, axis=None)[:40]  # and all others in one
    p = np.append(expected.ravel()[cells], 0.0)
    n = np.append(found.ravel()[cells], 0.0)
    p[-1], n[-1] = 1 - p.sum(), count - n.sum()
    statistic = ((n - count * p) ** 2 / (count * p)).sum()
    assert found[tuple(draft)] > 5 and statistic < 73.4  # 40 degrees of freedom, 1 in 1,000


def test_a_draft_follows() -> None:
    draft = Draft([1, 2, 3, 4, 5, 2, 3, 6], most=3)
    assert draft.proposal() == [1]
    draft.append(1)
    assert draft.proposal() == [2, 3]
    draft.append(2)
    draft.append(3)
    assert draft.proposal() == [4, 5, 2]  # as many as were right and one more, at most 3
    draft.append(9)
    assert draft.proposal() == []
    draft.append(2)
    assert draft.proposal() == []  # one token says too little
    draft.append(3)
    assert draft.proposal() == [6]  # of two places the one behind
    draft.append(6)
    assert draft.proposal() == []  # its end
    draft.append(1)
    draft.append(2)
    assert draft.proposal() == [3]  # none behind: an earlier one
    draft = Draft([1, 2, 3, 1, 2, 4], most=3)
    for token in (1, 2, 3, 1, 2, 4, 1, 2):
        draft.append(token)
    assert draft.proposal() == [4]  # of two earlier places the later one


def test_an_empty_draft_proposes_nothing() -> None:
    draft = Draft([], most=3)
    assert draft.proposal() == []
    draft.append(1)
    assert draft.proposal() == []
