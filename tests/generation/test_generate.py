"""Generation against transformers and the training path; sampling's distribution; batches."""

import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from ldalign.data.pairs import Pair
from ldalign.data.tokenizer import load_tokenizer
from ldalign.generation.generate import generate, generate_ids
from ldalign.generation.sampling import Sampling, sample
from ldalign.kernels import cpp
from ldalign.models.toy import write_toy_model
from ldalign.models.weights import load_model, stored_state
from ldalign.training.batches import Batch, token_logprobs

GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


@pytest.fixture(autouse=True, params=["cpp", "eager"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both decoders and both samplers."""
    if request.param == "cpp" and not cpp.available():
        pytest.skip(f"no C++ backend: {cpp.why_not()}")
    monkeypatch.setenv("LDALIGN_BACKEND", request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def peer() -> Any:
    """transformers' Mistral with the weights of tiny.mistral()."""
    transformers = pytest.importorskip("transformers")
    keys = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim rms_norm_eps rope_theta sliding_window tie_word_embeddings "
        "max_position_embeddings"
    ).split()
    raw = {key: getattr(tiny.MISTRAL, key) for key in keys}
    config = transformers.MistralConfig(
        **raw, attn_implementation="eager", bos_token_id=0, eos_token_id=2
    )
    theirs = transformers.MistralForCausalLM(config).eval()
    theirs.load_state_dict(stored_state(tiny.mistral(), tiny.mistral().state_dict()))
    return theirs


def test_greedy_equals_transformers(peer: Any) -> None:
    """Mixed prompt lengths in one batch; transformers answers them one by one,
    through a cache of its own.
    """
    prompts = tiny.prompts(9)
    ours = generate_ids(tiny.mistral(), prompts, [str(i) for i in range(9)], [2], GREEDY, seed=0)
    for prompt, response in zip(prompts, ours, strict=True):
        theirs = peer.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )
        assert response.ids == theirs[0, len(prompt) :].tolist()
    assert len({tuple(r.ids) for r in ours}) > 4  # else equality says little
    assert max(len(p) for p in prompts) + 12 > 2 * tiny.MISTRAL.sliding_window


def test_same_tokens_whatever_batch_and_order() -> None:
    model, prompts, keys = tiny.mistral(), tiny.prompts(13), [f"row{i}" for i in range(13)]
    sampling = Sampling(max_new_tokens=15, temperature=1.2, top_k=40, top_p=0.97)

    def run(order: list[int], batch_rows: int, seed: int = 7) -> list[list[int]]:
        chosen = [prompts[i] for i in order], [keys[i] for i in order]
        responses = generate_ids(model, *chosen, [2, 5, 9], sampling, seed, batch_rows)
        return [responses[order.index(i)].ids for i in range(13)]

    whole = run(list(range(13)), 64)
    assert run(list(range(13)), 1) == whole
    assert run(list(range(13)), 5) == whole
    assert run([*range(6, 13), *range(6)][::-1], 4) == whole
    assert run(list(range(13)), 64, seed=8) != whole
    assert len({tuple(ids) for ids in whole}) == 13


def test_key_and_not_prompt_decides_the_stream() -> None:
    prompts = [[5, 6, 7]] * 3
    first, twin, other = generate_ids(
        tiny.mistral(), prompts, ["a", "a", "b"], [2], Sampling(10), seed=0
    )
    assert first.ids == twin.ids != other.ids


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(14),
        GREEDY,
        Sampling(14, 0.7),
        Sampling(14, 1.3, top_k=7),
        Sampling(14, 0.9, top_p=0.6),
    ],
    ids=str,
)
def test_logp_equals_the_training_path(sampling: Sampling) -> None:
    """logp is that of the distribution sampled from; the greedy one's is the untempered model's."""
    model, prompts = tiny.mistral(), tiny.prompts(10, seed=3)
    responses = generate_ids(
        model, prompts, [str(i) for i in range(10)], [2, 11], sampling, 0, batch_rows=4
    )
    pairs = [
        Pair(str(i), prompt, r.ids)
        for i, (prompt, r) in enumerate(zip(prompts, responses, strict=True))
    ]
    if sampling in (Sampling(14), GREEDY):
        per_token = (
            token_logprobs(model, Batch.pack(pairs)).detach().split([len(r.ids) for r in responses])
        )
        expected = [float(p.sum()) for p in per_token]
    else:
        expected = [teacher_forced(model, pair, sampling) for pair in pairs]
    assert [r.logp for r in responses] == pytest.approx(expected, abs=1e-4)


def teacher_forced(model: torch.nn.Module, pair: Pair, sampling: Sampling) -> float:
    """One row at a time, the distribution cut by hand, in numpy."""
    logits = (
        model(torch.tensor([[*pair.prompt, *pair.real]]))[0, len(pair.prompt) - 1 : -1]
        .double()
        .detach()
        .numpy()
    )
    return sum(
        math.log(distribution(row, sampling)[token])
        for row, token in zip(logits, pair.real, strict=True)
    )


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Does to (V,) logits what `sampling` does: tempered, top k, the least set of mass top_p."""
    probs = np.exp((logits - logits.max()) / sampling.temperature)
    order = np.argsort(-probs)
    if sampling.top_k:
        probs[order[sampling.top_k :]] = 0.0
    probs /= probs.sum()
    kept, mass = [], 0.0
    for token in order:
        if mass < sampling.top_p:
            kept.append(token)
            mass += probs[token]
    out = np.zeros_like(probs)
    out[kept] = probs[kept]
    out[out < sampling.min_p * out.max()] = 0.0
    return out / out.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1),
        Sampling(1, 0.5),
        Sampling(1, 1.5, top_k=4),
        Sampling(1, top_p=0.8),
        Sampling(1, 1.1, 5, 0.7),
        Sampling(1, min_p=0.2),
        Sampling(1, 1.3, 6, 0.9, 0.1),
    ],
)
def test_sampling_distribution(sampling: Sampling) -> None:
    """A hundred thousand evenly spread uniforms give each token its
    probability, and a cut token never.
    """
    logits = torch.tensor([0.3, -1.0, 2.0, 1.9, -4.0, 0.9, 0.0, -0.5])
    n = 100_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ids, logp = sample(logits.repeat(n, 1), uniform, sampling)
    expected = distribution(logits.double().numpy(), sampling)
    counts = np.bincount(ids.numpy(), minlength=8)
    assert np.abs(counts / n - expected).max() < 1e-4
    assert set(np.flatnonzero(counts)) == set(np.flatnonzero(expected))
    assert np.abs(logp.double().exp().numpy() - expected[ids.numpy()]).max() < 1e-6


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
def test_no_cut_token_at_the_ends_of_the_unit_interval(u: float) -> None:
    """The first and last tokens of the vocabulary are cut: rounding at the
    ends must not fall on them.
    """
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 2000, generator=draw)
    logits[:, :3], logits[:, -3:] = -9.0, -9.0
    uniform = torch.full((500,), u, dtype=torch.float64)
    for sampling in (Sampling(1, top_k=50), Sampling(1, top_p=0.9)):
        ids, logp = sample(logits.clone(), uniform, sampling)
        assert bool(((ids >= 3) & (ids < 1997)).all()) and bool(torch.isfinite(logp).all())
    assert sample(logits, uniform, Sampling(1))[0][0] == (0 if u == 0.0 else 1999)


def test_greedy_takes_the_largest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    ids, logp = sample(
        logits[:, :3].clone(), torch.tensor([0.99], dtype=torch.float64), Sampling(1, 0.0)
    )
    assert sample(logits, torch.tensor([0.99], dtype=torch.float64), Sampling(1, 0.0))[
        0
    ].tolist() == [1]  # of equals
    assert ids.tolist() == [1] and logp.item() == pytest.approx(
        2.0 - math.log(1 + math.e**2 + math.e)
    )


def test_stops_on_every_end_id_and_only_there() -> None:
    model, prompts = tiny.mistral(), tiny.prompts(12)
    keys = [str(i) for i in range(12)]
    free = generate_ids(model, prompts, keys, [], GREEDY, 0)
    assert all(r.finish_reason == "length" and len(r.ids) == 12 for r in free)
    ends = [free[0].ids[2], free[1].ids[4], free[2].ids[0]]
    stopped = generate_ids(model, prompts, keys, ends, GREEDY, 0)
    for whole, cut in zip(free, stopped, strict=True):
        first = next((i for i, token in enumerate(whole.ids) if token in ends), None)
        assert cut.ids == whole.ids[: None if first is None else first + 1]
        assert cut.finish_reason == ("length" if first is None else "stop")
    assert {r.ids[-1] for r in stopped} >= set(ends) and any(
        r.finish_reason == "length" for r in stopped
    )


def test_an_end_token_in_the_last_place_is_a_stop() -> None:
    model, (prompt,) = tiny.mistral(), tiny.prompts(1)
    (free,) = generate_ids(model, [prompt], ["0"], [], Sampling(3, 0.0), 0)
    (cut,) = generate_ids(model, [prompt], ["0"], [free.ids[-1]], Sampling(3, 0.0), 0)
    assert cut.finish_reason == "stop" and cut.ids[-1] == free.ids[-1]


def test_progress_counts_rows_and_tokens() -> None:
    seen: list[tuple[int, int]] = []
    out = generate_ids(
        tiny.mistral(),
        tiny.prompts(7),
        list("abcdefg"),
        [2, 5],
        Sampling(6),
        0,
        3,
        lambda *n: seen.append(n),
    )
    assert [rows for rows, _ in seen if rows] == [1] * 7
    assert sum(tokens for _, tokens in seen) == sum(len(r.ids) for r in out)
    assert generate_ids(tiny.mistral(), [], [], [2], Sampling(6), 0) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"stop": ("a", "")},
    ],
)
def test_bad_settings_are_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="bad sampling settings"):
        Sampling(**settings)


def test_generate_gives_texts_without_control_tokens(tmp_path: Any) -> None:
    folder = write_toy_model(tmp_path / "toy")
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    conversations = [
        [{"role": "user", "content": text}] for text in ("Hello there", "Add 2 and 3, please.")
    ]
    arguments: dict[str, Any] = {"max_new_tokens": 8, "seed": 3}
    texts = generate(model, tokenizer, conversations, **arguments)  # type: ignore[arg-type]
    assert texts == generate(model, tokenizer, conversations, batch_rows=1, **arguments)  # type: ignore[arg-type]
    assert len(texts) == 2 and all(texts) and not any("<|" in text for text in texts)
