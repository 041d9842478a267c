"""Continuous batching: decoders against the whole forward, rows alone, and a memory budget."""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import tiny
import torch
from fake_graphs import FakeGraphs
from op_cases import normal
from torch import Tensor

from ldalign.generation import engine as engine_module
from ldalign.generation.decoders import (
    Decoder,
    ModuleDecoder,
    PackedDecoder,
    Paged,
    Weights,
    new_decoder,
    pack_weight,
    slots,
)
from ldalign.generation.engine import Drawn, Engine, Request
from ldalign.generation.paged_cache import PAGE, PagePool, pages_for
from ldalign.generation.sampling import Response, Sampling
from ldalign.kernels import cpp, eager, reference
from ldalign.models.layout import Packed
from ldalign.models.mistral import Mistral
from ldalign.models.toy import random_mistral
from ldalign.system import memory
from ldalign.system.errors import EnvironmentProblem, InputError, NumericsError
from ldalign.system.memory import available_bytes

ISAS = cpp.build_info()["isas"] if cpp.available() else []
PACKED = pytest.param("packed", marks=pytest.mark.skipif(not ISAS, reason="no C++ backend"))
KINDS = [PACKED, "modules", "standing"]  # the last: what on a GPU is captured as a graph


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def decoder_of(kind: str, model: Mistral) -> Decoder:
    return (
        PackedDecoder(model)
        if kind == "packed"
        else ModuleDecoder(model, FakeGraphs if kind == "standing" else None)
    )


def model_of(dtype: torch.dtype = torch.float32, **changes: Any) -> Mistral:
    """tiny.mistral with other sizes."""
    model = random_mistral(replace(tiny.MISTRAL, **changes), 0).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5.0)
    return model


SHAPES: dict[str, dict[str, Any]] = {
    "window": {},
    "no window": {"sliding_window": None},
    "wide heads": {"head_dim": 20, "sliding_window": 17},
    "groups of three": {"num_attention_heads": 6, "hidden_size": 90, "intermediate_size": 70},
    "tied": {"tie_word_embeddings": True},
    "heads of 64": {"head_dim": 64, "sliding_window": 40},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_give_what_one_forward_gives(kind: str, shape: str, dtype: torch.dtype) -> None:
    """Three rows of 75, 40 and 9 tokens, given in uneven runs side by side, to scattered pages."""
    model, exact = model_of(dtype, **SHAPES[shape]), model_of(**SHAPES[shape]).double()
    draw = np.random.default_rng(0)
    texts = [draw.integers(3, 61, n) for n in (75, 40, 9)]
    decoder = decoder_of(kind, model)
    decoder.allocate(20, 80)
    numbers = draw.permutation(20).astype(np.int32)
    pages = np.stack([numbers[:5], numbers[5:10], numbers[10:15]])
    held = [0, 0, 0]
    for new in ([30, 1, 9], [1, 20, 0], [3, 19, 0], [41, 0, 0]):
        rows = [r for r in range(3) if new[r]]
        ids = np.concatenate([texts[r][held[r] : held[r] + new[r]] for r in rows])
        table = torch.tensor([[new[r], held[r]] for r in rows])
        last = torch.tensor([new[r] for r in rows]).cumsum(0) - 1
        logits = decoder.step(torch.from_numpy(ids), table, torch.from_numpy(pages[rows]), last)
        for r, row in zip(rows, logits, strict=True):
            held[r] += new[r]
            with torch.no_grad():
                whole = exact(torch.from_numpy(texts[r][None, : held[r]]))[0, -1]
            error = (row.double() - whole).norm() / whole.norm()
            assert error < (1e-5 if dtype == torch.float32 else 0.05), (new, r, error)
    assert logits.dtype == torch.float32 and held == [75, 40, 9]


def run(engine: Engine, requests: Sequence[Request]) -> list[Response]:
    done = {request.index: response for request, response in engine.run(requests)}
    return [done[i] for i in range(len(requests))]


def requests_of(prompts: Sequence[Sequence[int]]) -> list[Request]:
    return [Request(f"row{i}", prompt, i) for i, prompt in enumerate(prompts)]


@pytest.mark.skipif(not ISAS, reason="no C++ backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_company(isa: None, dtype: torch.dtype) -> None:
    """Log-probs to the last bit: alone, in any batch, with prompts computed
    whole or a few tokens a step.
    """
    decoder = PackedDecoder(model_of(dtype))
    requests = requests_of(tiny.prompts(9, longest=40))
    results = [
        run(
            Engine(decoder, Sampling(20), [2, 5], 0, longest=60, rows=rows, step_tokens=step),
            requests,
        )
        for rows, step in ((9, 512), (1, 512), (4, 7), (9, 1))
    ]
    assert results[1:] == results[:-1]
    other = run(Engine(decoder, Sampling(20), [2, 5], 0, longest=60, rows=3), requests[::-1][:9])
    assert sorted(r.logp or 0 for r in other) == sorted(r.logp or 0 for r in results[0])
    assert len({r.logp for r in results[0]}) == 9 and len({len(r.ids) for r in results[0]}) > 3


class Spy:
    """A decoder that counts: rows and tokens of each step."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.device = decoder, decoder.device
        self.steps: list[list[int]] = []
        self.pages = 0
        self.step_tokens = decoder.step_tokens
        self.graphed = self if decoder.graphed else None
        self.fake = FakeGraphs()

    def graphs(self) -> FakeGraphs:
        return self.fake

    def decode(self, ids: Tensor, held: Tensor, pages: Tensor) -> Tensor:
        if not self.fake.capturing:
            self.steps.append([1] * int((held > 0).sum()))  # the others fill up a graph
        assert self.decoder.graphed is not None
        return self.decoder.graphed.decode(ids, held, pages)

    def page_bytes(self) -> int:
        return self.decoder.page_bytes()

    def allocate(self, pages: int, longest: int) -> None:
        self.pages = pages
        self.decoder.allocate(pages, longest)

    def step(self, ids: Tensor, rows: Tensor, pages: Tensor, last: Tensor) -> Tensor:
        self.steps.append(rows[:, 0].tolist())
        return self.decoder.step(ids, rows, pages, last)


def test_a_finished_row_makes_room_at_once(kind: str) -> None:
    """Rows of very different lengths: no place is empty while somebody waits, no
    step is longer than allowed.
    """
    spy = Spy(decoder_of(kind, model_of()))
    requests = requests_of(tiny.prompts(20, longest=30))
    done = run(
        Engine(spy, Sampling(25), list(range(3, 12)), 0, longest=60, rows=4, step_tokens=10),
        requests,
    )
    assert len({len(r.ids) for r in done}) > 4
    assert all(sum(step) <= 10 for step in spy.steps)
    # One row's tokens are prompt and response but for the last: nothing is computed twice, and
    # nothing else; where a step begins before the last one is read, one more of a row that ended.
    more = sum(map(sum, spy.steps)) - sum(
        len(q.prompt) + len(r.ids) - 1 for q, r in zip(requests, done, strict=True)
    )
    stopped = sum(r.finish_reason == "stop" for r in done)
    assert 0 < more <= stopped if kind == "standing" else more == 0
    busy = sum(len(step) for step in spy.steps) / len(spy.steps)
    assert busy > 2.5
    single = Engine(
        decoder_of(kind, model_of()), Sampling(25), list(range(3, 12)), 0, longest=60, rows=1
    )
    alone = [run(single, [replace(q, index=0)])[0] for q in requests]
    assert [r.ids for r in alone] == [r.ids for r in done]


def test_samples_of_a_prompt_share_its_pages(kind: str) -> None:
    prompt = tiny.prompts(1, seed=4, longest=200)[0]
    prompt = (prompt * 50)[:70]  # four full pages and six tokens
    spy = Spy(decoder_of(kind, model_of()))
    requests = requests_of([prompt] * 6)
    engine = Engine(spy, Sampling(10), [], 0, longest=80, rows=6)
    shared = run(engine, requests)
    assert sum(map(sum, spy.steps)) == 70 + 5 * 6 + 6 * 9
    assert engine.pool.free == spy.pages  # all given back
    single = Engine(decoder_of(kind, model_of()), Sampling(10), [], 0, longest=80, rows=1)
    alone = [run(single, [replace(q, index=0)])[0] for q in requests]
    assert [r.ids for r in alone] == [r.ids for r in shared] and len(
        {tuple(r.ids) for r in shared}
    ) > 3


def test_a_common_beginning_is_computed_once(kind: str) -> None:
    """Forty tokens alike, two full pages; one prompt is that beginning alone, one
    leaves it in the second page.
    """
    draw = np.random.default_rng(3)
    system = draw.integers(3, 61, 40).tolist()
    prompts = [system + draw.integers(3, 61, n).tolist() for n in (5, 30, 1)]
    prompts += [system, system[:32], system[:20] + [4] * 9]
    spy = Spy(decoder_of(kind, model_of()))
    requests = requests_of(prompts)
    engine = Engine(spy, Sampling(10), [], 0, longest=90, rows=6)
    shared = run(engine, requests)
    # the one of 32 tokens needs its last one computed, and with it the whole page
    saved = 2 * 32 + 32 + 16 + 16
    assert sum(map(sum, spy.steps)) == sum(map(len, prompts)) - saved + 6 * 9
    assert engine.pool.free == spy.pages and not engine.shared._page and not engine.shared._key
    single = Engine(decoder_of(kind, model_of()), Sampling(10), [], 0, longest=90, rows=1)
    assert [run(single, [replace(q, index=0)])[0].ids for q in requests] == [r.ids for r in shared]


def test_room_is_kept_for_a_row_that_waits_for_pages(kind: str) -> None:
    """Of two samples the second needs one page more, once the first is computed. A third row fits
    in what is left before that, but has to wait: else the second would find nothing to share.
    """
    draw = np.random.default_rng(5)
    prompt, other, short = (draw.integers(3, 61, n).tolist() for n in (70, 60, 5))
    # The third lacks one of its 5 pages, or a place.
    for rows, pages, third, fourth in ((4, 10, other, short), (2, 10, short, other)):
        spy = Spy(decoder_of(kind, model_of()))
        cache = pages * spy.page_bytes()
        engine = Engine(spy, Sampling(10), [], 0, longest=80, rows=rows, cache_bytes=cache)
        done = run(engine, requests_of([prompt, prompt, third, fourth]))
        assert all(len(response.ids) == 10 for response in done)
        assert spy.steps[0] == [70] and sum(map(sum, spy.steps)) == 70 + 6 + 60 + 5 + 4 * 9
        assert engine.pool.free == spy.pages == pages


def test_what_is_left_of_a_shared_prompt_comes_first(kind: str) -> None:
    """A sample that shares pages needs 6 tokens of its own, and does not wait for a long prompt
    that entered while those pages were computed.
    """
    draw = np.random.default_rng(5)
    prompt, other = (draw.integers(3, 61, n).tolist() for n in (70, 60))
    spy = Spy(decoder_of(kind, model_of()))
    engine = Engine(spy, Sampling(10), [], 0, longest=80, rows=3, step_tokens=40)
    run(engine, requests_of([prompt, prompt, other]))
    assert spy.steps[:4] == [[40], [30, 10], [1, 6, 33], [1, 1, 17]]


def test_who_comes_first_in_a_step() -> None:
    """A response under way before a prompt that entered earlier, however short that is; a prompt of
    which a page or less is left before a longer one.
    """
    engine = Engine(
        decoder_of("modules", model_of()), Sampling(10), [], 0, longest=80, rows=3, step_tokens=12
    )
    engine.entered[:] = [0, 1, 2]
    engine.length[:], engine.held[:] = [PAGE + 1, PAGE, 7], [0, PAGE - 9, 6]
    active, new = engine._share_out(np.array([0, 1, 2]))
    assert (active.tolist(), new.tolist()) == ([2, 1, 0], [1, 9, 2])


def test_a_step_inside_a_prompt_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[Drawn]] = []
    step = Engine._step

    def kept(engine: Engine, everyone: np.ndarray) -> list[Drawn]:
        made.append(step(engine, everyone))
        return made[-1]

    monkeypatch.setattr(Engine, "_step", kept)
    decoder = decoder_of("modules", model_of())
    engine = Engine(decoder, Sampling(3), [], 0, longest=80, rows=1, step_tokens=40)
    run(engine, requests_of([[5] * 70]))
    assert [[len(drawn.ids) for drawn in of_step] for of_step in made] == [[], [1], [1], [1]]
    for places, ids, logp in itertools.chain(*made):
        assert (places.dtype, ids.dtype, logp.dtype) == (np.int64, np.int64, np.float32)


def test_memory_stays_in_its_budget(kind: str) -> None:
    decoder = decoder_of(kind, model_of())
    each = pages_for(50) * decoder.page_bytes()
    requests = requests_of(tiny.prompts(10, longest=20))
    free = run(Engine(decoder, Sampling(30), [2], 0, longest=50, rows=10), requests)
    spy = Spy(decoder_of(kind, model_of()))
    tight = Engine(spy, Sampling(30), [2], 0, longest=50, rows=10, cache_bytes=2 * each + 100)
    assert spy.pages * spy.page_bytes() <= 2 * each + 100
    assert [r.ids for r in run(tight, requests)] == [r.ids for r in free]
    assert max(len(step) for step in spy.steps) < 10
    with pytest.raises(
        InputError,
        match=r"may take 0 MiB, but one row of 50 tokens needs .* "
        r"raise sampling.cache_gib",
    ):
        Engine(decoder, Sampling(30), [2], 0, longest=50, rows=10, cache_bytes=each - 1)


class Unsound(Spy):
    """A decoder whose last row of one step has one bad logit."""

    def __init__(self, decoder: Decoder, step: int, bad: float) -> None:
        super().__init__(decoder)
        self.at, self.bad = step, bad

    def step(self, ids: Tensor, rows: Tensor, pages: Tensor, last: Tensor) -> Tensor:
        return self.spoilt(super().step(ids, rows, pages, last))

    def decode(self, ids: Tensor, held: Tensor, pages: Tensor) -> Tensor:
        return self.spoilt(super().decode(ids, held, pages))

    def spoilt(self, logits: Tensor) -> Tensor:
        if len(self.steps) == self.at and not self.fake.capturing:
            logits[-1, 7] = self.bad
        return logits


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(9, temperature=0.0),
        Sampling(9),
        Sampling(9, top_k=5),
        Sampling(9, top_p=0.9),
        Sampling(9, min_p=0.1),
        Sampling(9, repetition_penalty=1.3),
        Sampling(9, temperature=0.7, top_k=9, top_p=0.8, min_p=0.05, repetition_penalty=1.1),
    ],
    ids=["greedy", "sampled", "top_k", "top_p", "min_p", "penalty", "all"],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_name_their_row(
    kind: str, sampling: Sampling, bad: float
) -> None:
    """One bad logit of the second of two rows, after its prompt and in the middle of its answer."""
    requests = requests_of([[5, 6], [7, 8, 9]])
    named = [requests[0], replace(requests[1], name="piqa, row 4711")]
    for step, made in ((1, 0), (4, 3)):
        spy = Unsound(decoder_of(kind, model_of()), step, bad)
        engine = Engine(spy, sampling, [], 0, longest=30, rows=2)
        with pytest.raises(
            NumericsError,
            match=f"generation: 'row1': .* after a prompt of 3 tokens and {made} of the answer are",
        ):
            run(engine, requests)
    spy = Unsound(decoder_of(kind, model_of()), 1, bad)
    with pytest.raises(NumericsError, match="generation: 'piqa, row 4711': the model's logits"):
        run(Engine(spy, sampling, [], 0, longest=30, rows=2), named)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_overflows_is_refused(kind: str, dtype: torch.dtype) -> None:
    """Weights that are finite, and states that are not."""
    model = model_of(dtype)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.down_proj.weight.fill_(3e38)
    engine = Engine(decoder_of(kind, model), Sampling(4), [], 0, longest=30, rows=2)
    with pytest.raises(NumericsError, match="NaN or infinite"):
        run(engine, requests_of([[5, 6], [7, 8, 9]]))


class Poor(Spy):
    """A decoder with memory for so many pages and, after three steps, for so many tokens."""

    def __init__(
        self, decoder: Decoder, most_pages: int, most_tokens: int, error: Exception
    ) -> None:
        super().__init__(decoder)
        self.graphed = None
        self.most_pages, self.most_tokens, self.error = most_pages, most_tokens, error

    def allocate(self, pages: int, longest: int) -> None:
        if pages > self.most_pages:
            raise self.error
        super().allocate(pages, longest)

    def step(self, ids: Tensor, rows: Tensor, pages: Tensor, last: Tensor) -> Tensor:
        if len(self.steps) >= 3 and len(ids) > self.most_tokens:
            raise self.error
        return super().step(ids, rows, pages, last)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"
    ),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu"])
def test_out_of_memory_halves_the_batch(
    kind: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Fewer rows at a time, the same text; said once for the cache and once for the steps."""
    requests = requests_of(tiny.prompts(10, longest=20))
    free = run(
        Engine(decoder_of(kind, model_of()), Sampling(30), [2], 0, longest=50, rows=10), requests
    )
    each = pages_for(50)
    poor = Poor(decoder_of(kind, model_of()), 6 * each, 2, error)
    engine = Engine(poor, Sampling(30), [2], 0, longest=50, rows=10)
    assert poor.pages == 5 * each
    assert [r.ids for r in run(engine, requests)] == [r.ids for r in free]
    assert max(map(sum, poor.steps[3:])) <= 2 < max(map(sum, poor.steps[:3]))
    told = [record.message for record in caplog.records if "no memory" in record.message]
    assert (
        len(told) == 2 and ("cache of 10 rows; going on with 5") in told[0] and "smaller" in told[1]
    )
    with pytest.raises(
        EnvironmentProblem,
        match=r"cache of one row of 50 tokens .*: out of "
        r"memory; lower max",
    ):
        Engine(
            Poor(decoder_of(kind, model_of()), each - 1, 2, error),
            Sampling(30),
            [2],
            0,
            longest=50,
            rows=10,
        )
    with pytest.raises(EnvironmentProblem, match="a step of one token: out of memory"):
        run(
            Engine(
                Poor(decoder_of(kind, model_of()), 999, 0, error), Sampling(30), [2], 0, longest=50
            ),
            requests,
        )
    with pytest.raises(RuntimeError, match="a bug"):  # what is not memory is not held back
        Engine(
            Poor(decoder_of(kind, model_of()), 1, 2, RuntimeError("a bug")),
            Sampling(30),
            [2],
            0,
            longest=50,
        )


def test_a_prompt_that_fills_the_context(kind: str) -> None:
    engine = Engine(decoder_of(kind, model_of()), Sampling(30), [], 0, longest=20)
    (cut,) = run(engine, requests_of([[5] * 15]))
    assert len(cut.ids) == 5 and cut.finish_reason == "length"
    for prompt in ([5] * 20, []):
        with pytest.raises(
            InputError, match=f"the prompt of 'row0' has {len(prompt)} tokens; expected 1 to 19"
        ):
            run(engine, requests_of([prompt]))


def test_stop_strings_and_the_stream_of_tokens(kind: str) -> None:
    def text(ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)

    decoder, requests = decoder_of(kind, model_of()), requests_of(tiny.prompts(8))
    free = run(Engine(decoder, Sampling(20), [], 0, longest=40), requests)
    stop = text(free[0].ids)[5:8]
    streamed: dict[str, list[int]] = {}

    def note(chosen: list[Request], ids: list[int]) -> None:
        for request, token in zip(chosen, ids, strict=True):
            streamed.setdefault(request.key, []).append(token)

    engine = Engine(
        decoder, Sampling(20, stop=(stop, "never said")), [], 0, longest=40, decode=text
    )
    stopped = {request.index: response for request, response in engine.run(requests, note)}
    for i, whole in enumerate(free):
        place = text(whole.ids).find(stop)
        assert stopped[i].ids == (whole.ids if place < 0 else whole.ids[: place + 3])
        assert stopped[i].finish_reason == ("length" if place < 0 else "stop")
        assert streamed[f"row{i}"] == stopped[i].ids
    assert stopped[0].finish_reason == "stop" and any(
        r.finish_reason == "length" for r in stopped.values()
    )


def test_a_stop_string_of_a_byte_a_token(kind: str) -> None:
    """As many tokens are looked at as the longest stop string has bytes, whichever it is."""

    def text(ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)

    decoder, [request] = decoder_of(kind, model_of()), requests_of(tiny.prompts(1))
    whole = run_one(decoder, Sampling(20), request)
    stop = text(whole.ids)[2:14]
    assert text(whole.ids).find(stop) == 2
    engine = Engine(decoder, Sampling(20, stop=("?", stop)), [], 0, longest=40, decode=text)
    ((_, stopped),) = engine.run([request])
    assert (stopped.ids, stopped.finish_reason) == (whole.ids[:14], "stop")


def test_penalty_counts_prompt_and_response(kind: str) -> None:
    """So strong a penalty that greedy decoding never repeats a token, nor one of the prompt."""
    decoder, requests = decoder_of(kind, model_of()), requests_of(tiny.prompts(6))
    done = run(
        Engine(decoder, Sampling(15, 0.0, repetition_penalty=1e6), [], 0, longest=40), requests
    )
    for request, response in zip(requests, done, strict=True):
        texts = [*set(request.prompt), *response.ids]
        assert len(set(texts)) == len(texts)
    plain = run(Engine(decoder, Sampling(15, 0.0), [], 0, longest=40), requests)
    assert any(len(set(r.ids)) < len(r.ids) for r in plain)


def test_penalty_is_a_rows_own(kind: str) -> None:
    """What a longer row beside it has room for is no token of a shorter one, whatever its number:
    every number that may fill that room is a likely token.
    """
    decoder, sampling = decoder_of(kind, model_of()), Sampling(8, repetition_penalty=3.0)
    requests = requests_of([[5], [9] * 20, [7, 8, 9]])
    together = run(Engine(decoder, sampling, [], 0, longest=40), requests)
    alone = [run_one(decoder, sampling, request) for request in requests]
    assert [r.ids for r in together] == [r.ids for r in alone]
    assert [r.logp for r in together] == pytest.approx([r.logp for r in alone], abs=1e-4)


def run_one(decoder: Decoder, sampling: Sampling, request: Request) -> Response:
    ((_, response),) = Engine(decoder, sampling, [], 0, longest=40).run([request])
    return response


def test_release_takes_the_weights() -> None:
    if not ISAS:
        pytest.skip("no C++ backend")
    model = model_of()
    kept = run(Engine(new_decoder(model), Sampling(5), [], 0, longest=20), requests_of([[4, 5]]))
    decoder = new_decoder(model, release=True)
    assert (
        sum(p.numel() for p in model.parameters()) < 2500 + model.model.embed_tokens.weight.numel()
    )
    assert run(Engine(decoder, Sampling(5), [], 0, longest=20), requests_of([[4, 5]])) == kept


def test_an_engine_counts_the_caches_there_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of an earlier engine of its decoder goes; that of another decoder stays, and only
    what was used of it counts as taken already.
    """
    model = model_of()
    first, second = (Spy(decoder_of(kind, model)) for _ in range(2))
    page, each = first.page_bytes(), pages_for(60)
    free = 2 * 8 * each * page  # half of it: eight rows
    monkeypatch.setattr(engine_module, "available_bytes", lambda device: free)
    monkeypatch.setattr(engine_module, "_POOLS", WeakKeyDictionary())  # not those of other tests
    engine = Engine(first, Sampling(10), [], 0, longest=60, rows=100)
    assert first.pages == 8 * each
    run(engine, requests_of([[4] * 20, [5] * 20]))  # of 30 tokens each, two pages
    free -= 2 * 2 * page
    again = Engine(first, Sampling(10), [], 0, longest=60, rows=100)
    assert first.pages == 8 * each
    assert again.pool.untouched == 8 * each  # memory that the system sees as free
    free += 2 * 2 * page
    other = Engine(second, Sampling(10), [], 0, longest=60, rows=100)
    assert second.pages == 4 * each
    del other, second
    monkeypatch.setattr(first, "device", torch.device("cuda"))
    free -= 8 * each * page  # on a GPU all of a cache is taken at once
    monkeypatch.setattr(first, "allocate", lambda pages, longest: setattr(first, "pages", pages))
    monkeypatch.setattr(first, "graphed", None)
    Engine(first, Sampling(10), [], 0, longest=60, rows=100)
    assert first.pages == 8 * each
    free -= 2  # bytes: a page less fits into the half of it
    Engine(first, Sampling(10), [], 0, longest=60, rows=100)
    assert first.pages == 8 * each - 1


# -------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(("kind", "own", "beside"), [("cuda", 1070, 1000), ("cpu", 1030, 960)])
def test_a_caches_untouched_pages_are_a_cpus_matter(
    kind: str, own: int, beside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's cache has its memory from the start: none of it is free, or free for two."""

    class Device:
        type = kind

    class Cached:
        device = Device()

        def page_bytes(self) -> int:
            return 10

    first: Any = Cached()
    second: Any = Cached()
    pools: Any = WeakKeyDictionary({first: SimpleNamespace(size=7, untouched=4)})
    monkeypatch.setattr(engine_module, "_POOLS", pools)
    monkeypatch.setattr(engine_module, "available_bytes", lambda device: 1000)
    assert engine_module._free_bytes(first) == own
    assert engine_module._free_bytes(second) == beside
    monkeypatch.setattr(engine_module, "available_bytes", lambda device: 0)
    assert engine_module._free_bytes(second) == 0  # less than nothing is nothing


def test_free_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_bytes(torch.device("cpu")) <= total
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text(
        "anon 2000000\nactive_file 100000\ninactive_file 400000\n"
    )
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    assert available_bytes(torch.device("cpu")) == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(torch.device("cpu")) > 3_000_000


def test_page_pool() -> None:
    pool = PagePool(5)
    a, b = pool.take(2), pool.take(2)
    assert sorted([*a, *b]) == [0, 1, 2, 3] and pool.free == 1
    pool.share(a)
    pool.give_back(a)
    assert pool.free == 1  # the other user still has them
    pool.give_back(a)
    pool.give_back(b[:1])
    assert pool.free == 4 and set(pool.take(4)) == {0, 1, 4, int(b[0])}
    with pytest.raises(AssertionError, match="1 pages wanted, 0 free"):
        pool.take(1)
    assert [pages_for(n) for n in (1, 16, 17)] == [1, 1, 2] and PAGE == 16


@pytest.mark.skipif(not ISAS, reason="no C++ backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "K", "N"),
    [
        *((1, 64, 96), (5, 32, 61), (12, 34, 33), (13, 128, 200), (40, 6, 1), (3, 2, 1000)),
        *((16, 96, 64), (32, 64, 40), (33, 32, 32), (49, 34, 70)),  # AMX's tiles: 16 by 16
    ],
)
def test_packed_linear(isa: None, dtype: torch.dtype, rows: int, K: int, N: int) -> None:
    """At most twice eager's error against float64; zeros where nothing is; the same row alone has
    the same bits.
    """
    x, weight = normal(rows, K).to(dtype), normal(N, K, seed=1).to(dtype)
    packed = pack_weight(weight)
    assert packed.shape == (-(-N // 32), K, 32)
    exact = x.double() @ weight.double().T
    for wide in (False, True):
        ours = cpp.packed_linear(x, packed, None, N, wide)
        theirs = x.float() @ weight.float().T if wide else x @ weight.T
        assert ours.dtype == (torch.float32 if wide else dtype)
        floor = 4 * torch.finfo(ours.dtype).eps * exact.norm()
        assert (ours.double() - exact).norm() <= 2 * (theirs.double() - exact).norm() + floor
        assert all(
            torch.equal(cpp.packed_linear(x[i : i + 1], packed, None, N, wide)[0], ours[i])
            for i in range(rows)
        )
    assert (
        cpp.packed_linear(x.roll(1, 1), packed, None, N, True).double() - exact
    ).norm() > 0.1 * exact.norm()
    with pytest.raises(ValueError, match="packed_linear: packed has shape"):
        cpp.packed_linear(x, packed, None, N + 32, False)


@pytest.mark.skipif(not ISAS, reason="no C++ backend")
@pytest.mark.parametrize("weights", ["exact", "int8"])
def test_packed_weights_lie_in_large_pages(weights: Weights) -> None:
    """Linux marks their mapping "hg"."""
    maps = Path("/proc/self/smaps")
    if not maps.is_file() or not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("no large pages here")
    decoder = PackedDecoder(random_mistral(tiny.MISTRAL, 0), weights=weights)
    tensors = [t for packed in (*decoder.packed, decoder.head) for t in packed if t is not None]
    large, here = set(), range(0)
    for line in maps.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = range(int(found[1], 16), int(found[2], 16))
        elif line.startswith("VmFlags:") and "hg" in line.split():
            large |= {t.data_ptr() for t in tensors if t.data_ptr() in here}
    assert large == {t.data_ptr() for t in tensors}


@pytest.mark.skipif(not ISAS, reason="no C++ backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows(dtype: torch.dtype) -> None:
    """Rows of a packed weight are those that were packed; what is no row of it is refused."""
    weight = normal(70, 34).to(dtype)
    ids = torch.tensor([69, 0, 31, 32, 33, 31])
    assert torch.equal(cpp.packed_rows(pack_weight(weight), ids), weight[ids])
    for wrong in (-1, 96):
        with pytest.raises(ValueError, match=f"packed_rows: id {wrong} of 96"):
            cpp.packed_rows(pack_weight(weight), torch.tensor([wrong]))


@pytest.mark.skipif(not ISAS, reason="no C++ backend")
@pytest.mark.parametrize("width", [1, 7, 16, 100])
def test_all_finite(width: int) -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.cat(
        [normal(2, width).float(), torch.full((1, width), largest), torch.zeros(1, width)]
    )
    assert cpp.all_finite(x).tolist() == [True] * 4
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in {0, width // 2, width - 1}:
            y = x.clone()
            y[1, place] = bad
            assert cpp.all_finite(y).tolist() == [True, False, True, True]


def test_paged_attention_of_whole_prompts_is_pair_attention() -> None:
    """The oracle against the oracle of training, and eager against it, in float64."""
    lengths, H, K, E = [40, 3, 17], 4, 2, 8
    qkv = normal(60, H + 2 * K, E)
    pages = torch.tensor([[7, 2, 9], [0, 1, 1], [4, 3, 1]], dtype=torch.int32)
    cache = torch.full((2, 10, PAGE, K, E), float("nan"), dtype=torch.float64)
    rows = torch.tensor([[n, 0] for n in lengths])
    positions = torch.cat([torch.arange(n) for n in lengths])
    row = torch.arange(3).repeat_interleave(rows[:, 0])
    slot = slots(positions, row, pages)
    still = torch.ones(60, E // 2).double(), torch.zeros(60, E // 2).double()  # an angle of 0
    layout = Paged(cache[None, 0], cache[None, 1], slot, positions, rows, pages, 40)
    for window in (None, 1, 6, 18):
        wanted = reference.pair_attention(qkv, H, Packed(lengths).segments, window)
        got = layout.attend(0, qkv, H, window, still)
        assert torch.allclose(got, wanted, atol=1e-12)
        # One token a row, the last of each, over all before it.
        ends = torch.tensor(lengths).cumsum(0) - 1
        single = torch.tensor([[1, n - 1] for n in lengths])
        clean = cache.nan_to_num(0.0)
        last = eager.paged_attention(qkv[ends, :H], clean[0], clean[1], single, pages, 1, window)
        assert torch.allclose(last, wanted[ends], atol=1e-12)
        assert not torch.allclose(last, wanted[ends - 1], atol=1e-3)


@pytest.mark.skipif(not ISAS, reason="no C++ backend")
def test_bad_tables_are_refused() -> None:
    """What would read outside of the cache is an error instead."""
    decoder = PackedDecoder(model_of())
    decoder.allocate(4, 40)
    ids, last = torch.tensor([5, 6]), torch.tensor([1])

    def step(rows: list[list[int]], pages: list[list[int]]) -> None:
        decoder.step(ids, torch.tensor(rows), torch.tensor(pages, dtype=torch.int32), last)

    for rows, pages, message in (
        ([[2, 0]], [[4]], "row 0 has page 4 of 4"),
        ([[2, 0]], [[-1]], "row 0 has page -1 of 4"),
        ([[2, 15]], [[0]], "row 0 adds 2 tokens to 15"),
        ([[2, 39]], [[0, 1, 2]], "there are 40 positions"),
        ([[1, 0]], [[0]], "the rows have 1 tokens, x has 2"),
        ([[2, 0], [0, 3]], [[0], [1]], "row 1 adds 0 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            step(rows, pages)
