"""The guide: what its distance obeys, what it reads, how it begins, and what its folder keeps."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_weights import GPT2_, write_folder
from runs import ROOT
from tiny_guides import CPU, SIZE, TEXTS, config_of, own, pairs, policy_guide, stir, text_guide
from tokenizers.processors import TemplateProcessing

from ldalign.data.pairs import Pair
from ldalign.models.gpt2 import GPT2
from ldalign.models.guide import NO_LATENT, Guide, GuideConfig, Reading, States, runs
from ldalign.models.guide_folder import (
    check_trained_guide,
    is_trained_guide,
    load_guide,
    new_guide,
    pretrained_guide,
    redrawn,
    save_guide,
)
from ldalign.models.toy import write_toy_model
from ldalign.models.weights import load_model
from ldalign.objective import cosine_distance
from ldalign.system.errors import InputError, NumericsError

# Every way into the latent and out of it.
KINDS: list[dict[str, Any]] = [
    {},
    {"readout": "queries"},
    {"injection": "prefix", "latent_tokens": 3},
    {"readout": "queries", "injection": "both", "latent_norm": "rms", "latent_tokens": 3},
]


@pytest.fixture(scope="module")
def guide() -> Guide:
    return stir(text_guide())


@pytest.fixture(scope="module")
def gpt2(guide: Guide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 folder whose tokenizer is the guide's."""
    folder = tmp_path_factory.mktemp("gpt2")
    write_folder(
        folder,
        GPT2_ | {"vocab_size": guide.tokenizer.get_vocab_size(), "n_positions": 80},
        dtype=torch.float32,
    )
    guide.tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("policy") / "model", seed=3)


# ---------------------------------------------------------------------------------------- distances


def test_distance_is_a_distance(guide: Guide) -> None:
    x, y, z = (
        [TEXTS[0], TEXTS[2], TEXTS[2]],
        [TEXTS[1], TEXTS[3], TEXTS[4]],
        [TEXTS[4], TEXTS[1], TEXTS[1]],
    )
    d = guide.distance(x, y, z)
    assert d.dtype == torch.float32 and d.shape == (3,) and bool((d > 1e-3).all())
    assert torch.allclose(guide.distance(x, z, y), d, rtol=1e-4)
    assert bool((guide.distance(x, y, y) < 1e-5).all())
    assert guide.distance([], [], []).shape == (0,)


def latents(guide: Guide, prompt: str, *responses: str) -> torch.Tensor:
    with torch.no_grad():
        return guide.encode([guide.pair("x", prompt, *responses)])


def test_distance_is_the_euclidean_norm_over_the_whole_latent(guide: Guide) -> None:
    a, b = latents(guide, TEXTS[0], TEXTS[1], TEXTS[4])
    assert a.shape == (24,)  # 2 tokens of 12
    expected = float((a - b).square().sum().sqrt())
    assert guide.distance([TEXTS[0]], [TEXTS[1]], [TEXTS[4]]).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_cosine_distance_is_one_minus_the_cosine(guide: Guide) -> None:
    x, y, z = (
        [TEXTS[0], TEXTS[2], TEXTS[2]],
        [TEXTS[1], TEXTS[3], TEXTS[4]],
        [TEXTS[4], TEXTS[1], TEXTS[4]],
    )
    both = torch.stack([latents(guide, *texts) for texts in zip(x, y, z, strict=True)])
    a, b = both.double().numpy().swapaxes(0, 1)
    expected = 1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    d = guide.distance(x, y, z, metric="cosine")
    assert d.dtype == torch.float32 and bool((d[:2] > 1e-4).all()) and d[2] < 1e-9
    np.testing.assert_allclose(d.numpy(), expected, rtol=1e-3, atol=1e-9)


def test_cosine_distance_at_its_limits() -> None:
    """Defined for zero vectors, never negative, exact where 1 - cos would be
    rounding, whatever the lengths.
    """
    v = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(6, 9)
    assert torch.equal(cosine_distance(v, v), zero[:, 0]) and torch.equal(
        cosine_distance(zero, zero), zero[:, 0]
    )
    assert torch.equal(cosine_distance(v, zero), torch.ones(6)) and torch.equal(
        cosine_distance(zero, v), torch.ones(6)
    )
    assert torch.equal(cosine_distance(v, -v), 2 * torch.ones(6))
    scaled = cosine_distance(v * 1e-30, v.flip(0) * 1e30)
    torch.testing.assert_close(
        scaled, 1 - torch.cosine_similarity(v, v.flip(0)), rtol=1e-5, atol=1e-6
    )
    near = v.double()
    near[:, 0] += 1e-5
    exact = (1 - torch.cosine_similarity(v.double(), near)).float()
    torch.testing.assert_close(cosine_distance(v, near), exact, rtol=1e-3, atol=0.0)
    assert bool(cosine_distance(v, torch.full_like(v, float("nan"))).isnan().all())


def test_distance_does_not_depend_on_the_batch(guide: Guide) -> None:
    draw = random.Random(0)
    x, y, z = ([draw.choice(TEXTS) * draw.randint(1, 3) for _ in range(11)] for _ in range(3))
    together, alone = guide.distance(x, y, z), guide.distance(x, y, z, batch_tokens=1)
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5) and together.std() > 1e-3
    assert torch.allclose(
        guide.distance(x[::-1], y[::-1], z[::-1]).flip(0), together, rtol=1e-4, atol=1e-5
    )


def test_a_batch_of_distances_has_no_more_tokens_than_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of pairs whose responses differ; the others are not read, and cost nothing."""
    guide = stir(text_guide())
    chosen = [*pairs(guide), *(guide.pair(f"same-{i}", "x", "y" * 90, "y" * 90) for i in range(3))]
    most = max(pair.tokens for pair in chosen[:5])
    read: list[int] = []
    states = guide.states

    def counted(batch: list[Pair]) -> Any:
        read.append(sum(pair.tokens for pair in batch))
        return states(batch)

    monkeypatch.setattr(guide, "states", counted)
    guide.pair_distances(chosen, most)
    assert len(read) > 1 and max(read) <= most
    assert sum(read) == sum(pair.tokens for pair in chosen[:5])


def test_a_prompt_has_no_tokens_that_its_text_has_not() -> None:
    """Whatever the tokenizer begins and ends a text with by itself."""
    guide = text_guide()
    plain = guide.pair("a", "What is 2 + 2?", "4", "5")
    end = guide.tokenizer.get_vocab()
    name = max(end, key=lambda token: end[token])
    guide.tokenizer.post_processor = TemplateProcessing(
        single=f"{name} $A {name}", special_tokens=[(name, end[name])]
    )
    assert guide.tokenizer.encode("a").ids[0] == end[name]
    assert guide.pair("a", "What is 2 + 2?", "4", "5") == plain


def test_the_guide_that_is_not_asked_for() -> None:
    assert GuideConfig() == GuideConfig("mean", 1, 256, "none", "output", 512, "<|endoftext|>")


def test_batches_are_filled_in_order_and_never_over_their_budget() -> None:
    assert runs([3, 0, 1, 2], [5, 4, 3, 9], 8) == [[3], [0], [1, 2]]
    assert runs([0, 1, 2], [3, 3, 2], 8) == [[0, 1, 2]] and runs([], [], 8) == []


def test_a_distance_that_is_not_finite_names_its_row(
    guide: Guide, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = guide.states

    def spoil(chosen: Any) -> States:
        states = plain(chosen)
        states.read[2 * [pair.id for pair in chosen].index("1")] = float("nan")
        return states

    monkeypatch.setattr(guide, "states", spoil)
    with pytest.raises(NumericsError, match="^row 1: the latent distance is nan"):
        guide.distance([TEXTS[0], TEXTS[2], TEXTS[0]], TEXTS[:3], TEXTS[1:4])


# ----------------------------------------------------------------------------------- what it reads


def test_both_responses_are_read_with_one_and_the_same_prompt(guide: Guide) -> None:
    """A long prompt, one short response and a long one.

    Each response used to be cut for itself, with a prompt that began elsewhere: the distance of two
    responses was then also that of two prompts.
    """
    ids = guide.tokenizer.encode("dog, " * 100 + "\n\n").ids
    cut = guide.pair("x", "dog, " * 100, TEXTS[1], TEXTS[1] + TEXTS[2])
    short, long = cut.responses
    assert len(short) < len(long) < 45 and short[-1] == long[-1] == guide.end_id
    assert cut.prompt == ids[-(60 - len(long)) :]
    both = guide.pair("x", "dog, " * 100, "dog, " * 100, "cat, " * 100)
    assert [len(part) for part in (both.prompt, *both.responses)] == [15, 45, 45]
    assert both.real == guide.tokenizer.encode("dog, " * 100).ids[:45]
    assert both.prompt == ids[-15:]
    whole = guide.pair("x", TEXTS[0], TEXTS[1], TEXTS[3])
    assert whole.prompt == guide.tokenizer.encode(f"{TEXTS[0]}\n\n").ids


@pytest.mark.parametrize("seed", range(4))
def test_fit_keeps_the_end_of_the_prompt_and_the_beginnings_of_responses(
    guide: Guide, seed: int
) -> None:
    draw = random.Random(seed)
    for _ in range(50):
        sizes = [draw.choice((0, 1, 5, 14, 15, 16, 44, 45, 46, 59, 60, 61, 200)) for _ in "xyy"]
        prompt, real, generated = (list(range(n)) for n in sizes)
        pair = Pair("x", [7, *prompt], real, generated)
        fitted = guide.fit(pair)
        assert len(fitted.prompt) + max(map(len, fitted.responses)) <= 60
        assert fitted.prompt == pair.prompt[-len(fitted.prompt) :]
        for whole, part in zip(pair.responses, fitted.responses, strict=True):
            assert part == (whole[: len(part)] if whole else [guide.end_id])
        if len(pair.prompt) + max(len(real), len(generated), 1) <= 60:
            assert fitted.prompt == pair.prompt and fitted.real == (real or [guide.end_id])
    with_none = replace(pair, generated=None)
    assert guide.fit(with_none).generated == [guide.end_id]


def test_an_end_token_stands_where_a_response_ended_by_itself(guide: Guide) -> None:
    """And there alone: one that was cut at the most new tokens used to get one too, so that the
    guide could not tell a response without an end.
    """
    ended = guide.pair("x", TEXTS[0], TEXTS[1], TEXTS[3])
    assert [y.count(guide.end_id) for y in ended.responses] == [1, 1]
    assert [y[-1] for y in ended.responses] == [guide.end_id] * 2
    cut = guide.pair("x", TEXTS[0], TEXTS[1], TEXTS[3], (True, False))
    assert cut.real == ended.real and cut.generated == ended.responses[1][:-1]
    other = guide.pair("x", TEXTS[0], TEXTS[1], TEXTS[3], (False, True))
    assert other.real == ended.real[:-1] and other.generated == ended.generated
    assert guide.pair("x", TEXTS[0], "", "", (False, True)).responses == [[guide.end_id]] * 2
    assert guide.end_ids == (guide.end_id,)


def test_text_of_an_end_token_is_text(guide: Guide, tmp_path: Path) -> None:
    save_guide(guide, tmp_path)
    for one in (guide, load_guide(tmp_path)):
        response = one.pair("x", "x", "<|endoftext|>", "y").real
        assert response.count(one.end_id) == 1 and len(response) > 2


def test_the_system_turn_is_part_of_what_a_text_guide_reads(guide: Guide) -> None:
    """It used to be left out, though what a response should be depends on it."""
    user = {"role": "user", "content": "Hi"}
    system = {"role": "system", "content": "Rhyme."}
    turns = guide.pair("x", [system, user], "a", "b")
    assert guide.tokenizer.decode(turns.prompt) == "system: Rhyme.\n\nuser: Hi\n\n"
    alone = guide.pair("x", [user], "a", "b")
    assert guide.tokenizer.decode(alone.prompt) == "Hi\n\n" and alone == guide.pair(
        "x", "Hi", "a", "b"
    )
    assert turns.responses == alone.responses


# ----------------------------------------------------------------------------------- how it begins


def test_new_guide_is_a_function_of_its_seed() -> None:
    a, b, c = (text_guide(seed, injection="both").state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[n], b[n]) for n in a)
    for name in ("null", "mask", "to_latent.weight", "to_prefix.weight"):
        assert not torch.equal(a[f"latent.{name}"], c[f"latent.{name}"]), name
    first = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(a[f"encoder.{first}"], c[f"encoder.{first}"])
    assert not torch.equal(a[f"encoder.{first}"], a[f"decoder.{first}"])


def ratios(values: torch.Tensor) -> torch.Tensor:
    """(n - 7, 7): at every place, the seven values that follow over the one there."""
    windows = values.unfold(0, 8, 1)
    return windows[:, 1:] / windows[:, :1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["new", "frozen", "trained"])
def test_no_two_tensors_of_a_guide_share_a_stream(kind: str, seed: int, policy: Path) -> None:
    """No tensor begins with numbers that stand anywhere in another, whatever the scale of both.

    Tensors used to be drawn from generators that began alike: with seed 0 the query tokens were
    rows of the policy's embedding.
    """
    more: dict[str, Any] = {"readout": "queries", "injection": "both", "latent_tokens": 4}
    if kind == "new":
        made = text_guide(seed, **more)
    else:
        made = policy_guide(policy, kind == "frozen", seed, **more)
    tensors = {name: p.detach().flatten().double() for name, p in made.named_parameters()}
    if kind == "trained":  # by intention these are one model
        assert torch.equal(tensors["encoder.lm_head.weight"], tensors["decoder.lm_head.weight"])
        tensors = {n: p for n, p in tensors.items() if not n.startswith("decoder.")}
    drawn = {name: p for name, p in tensors.items() if p.unique().numel() > 8}
    assert {f"latent.{n}" for n in ("queries", "null", "mask", "to_prefix.weight")} <= drawn.keys()
    places = {name: ratios(p) for name, p in drawn.items()}
    for name in drawn:
        for other, all_of_it in places.items():
            # 2 %: the policy's files are bfloat16
            found = torch.isclose(all_of_it, places[name][0], rtol=0.02).all(dim=1)
            assert int(found.sum()) == (name == other), (name, other)


def test_nothing_is_drawn_from_a_generator_that_another_may_share() -> None:
    """`system.seeds` alone draws numbers, from a stream for each purpose."""
    for folder in ("ldalign", "kernels", "train"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"manual_seed|torch\.Generator|np\.random\.seed", text), path


@pytest.mark.parametrize("kind", ["new", "frozen", "trained"])
def test_soft_tokens_begin_as_large_as_token_embeddings(kind: str, policy: Path) -> None:
    """Prefixes, queries and the mask. Soft tokens were as large as the latent happened to be, and
    the mask was zero.
    """
    more: dict[str, Any] = {"readout": "queries", "injection": "prefix", "latent_tokens": 64}
    if kind == "new":
        guide = new_guide(config_of(**more), 0, TEXTS, replace(SIZE, n_positions=200))
    else:
        guide = policy_guide(policy, kind == "frozen", **more)
    wanted = float(guide.decoder.embedding.weight.detach().square().mean().sqrt())
    with torch.no_grad():
        z = guide.encode(pairs(guide))
        soft = guide.latent.soft_tokens(torch.cat([z, 100 * z, guide.latent.null[None]]))
        assert soft.shape[0] == 21 * 64
        queries, mask = guide.latent.query_tokens(), guide.latent.hidden_token()
    torch.testing.assert_close(
        soft.square().mean(1).sqrt(), torch.full((len(soft),), wanted), rtol=1e-3, atol=0.0
    )
    assert float(queries.square().mean().sqrt()) == pytest.approx(wanted, rel=0.1)
    assert float(mask.square().mean().sqrt()) == pytest.approx(wanted, rel=0.4)


@pytest.mark.parametrize("frozen", [True, False])
def test_guide_from_a_gpt2_folder(frozen: bool, gpt2: Path, guide: Guide) -> None:
    """Its towers start from the folder's weights, one for both or two, and its tokenizer reads."""
    start = load_model(gpt2, torch.float32).state_dict()
    made = pretrained_guide(config_of(), 0, gpt2, frozen, torch.bfloat16)
    assert made.shared == frozen and made.chat is None
    dtype = torch.bfloat16 if frozen else torch.float32
    for tower in (made.encoder, made.decoder):
        assert all(p.requires_grad == (not frozen) for p in tower.parameters())
        assert all(torch.equal(p, start[n].to(dtype)) for n, p in tower.state_dict().items())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in made.latent.parameters())
    args = "x", TEXTS[0], TEXTS[1], TEXTS[2]
    assert made.pair(*args) == guide.pair(*args)
    assert not is_trained_guide(gpt2)


@pytest.mark.parametrize("kind", ["new", "gpt2", "frozen", "trained"])
def test_a_guide_drawn_again_is_as_it_was(kind: str, gpt2: Path, policy: Path) -> None:
    """Whatever training did to it; the frozen tower is the very same, not read again."""
    made: Callable[[], Guide] = {
        "new": lambda: text_guide(5, injection="both"),
        "gpt2": lambda: pretrained_guide(config_of(), 5, gpt2, False, torch.float32),
        "frozen": lambda: policy_guide(policy, True, 5, readout="queries"),
        "trained": lambda: policy_guide(policy, False, 5, injection="prefix"),
    }[kind]
    guide, before = made(), made()
    with torch.no_grad():
        for p in guide.parameters():
            if p.requires_grad:
                p.add_(1.0)
    again = redrawn(guide, 5, {"new": None, "gpt2": gpt2}.get(kind, policy))
    assert again.config == before.config and not again.training and again.shared == before.shared
    assert (again.encoder is guide.encoder) == (kind == "frozen")
    state = again.state_dict()
    assert state.keys() == before.state_dict().keys()
    for name, p in before.state_dict().items():
        assert torch.equal(state[name], p), name
    args = [TEXTS[0]], [TEXTS[1]], [TEXTS[2]]
    assert torch.equal(again.distance(*args), before.eval().distance(*args))


# -------------------------------------------------------------------------------- encode and decode


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_responses_of_a_batch_do_not_see_each_other(kind: dict[str, Any]) -> None:
    guide = stir(text_guide(**kind))
    chosen = pairs(guide)
    with torch.no_grad():
        together, z = guide(chosen, own(5))
        alone = [guide([p], own(1)) for p in chosen]
        single = torch.cat([guide.encode([replace(p, generated=[9])])[:1] for p in chosen])
    assert torch.allclose(together, torch.cat([logps for logps, _ in alone]), atol=1e-5)
    assert torch.allclose(z, torch.cat([latents for _, latents in alone]), atol=1e-5)
    assert torch.allclose(z[0::2], single, atol=1e-5)
    assert len(together) == sum(len(y) for p in chosen for y in p.responses)
    width = guide.config.latent_tokens * 12
    assert z.shape == (10, width) and z.dtype == torch.float32
    if guide.config.latent_norm == "rms":
        assert torch.allclose(z.square().mean(1), torch.ones(10), atol=1e-3)
    else:
        assert z.square().mean(1).std() > 1e-3


def changed_at(pair: Pair, place: int) -> Pair:
    """The pair with another token at a place of its real response."""
    assert pair.real[place] != 5
    return replace(pair, real=[*pair.real[:place], 5, *pair.real[place + 1 :]])


@pytest.mark.parametrize("kind", KINDS)
def test_decode_is_causal_and_predicts_the_right_token(kind: dict[str, Any]) -> None:
    """Changing token t of the response changes the log-probs of t and later ones, none before."""
    guide = stir(text_guide(**kind))
    (pair,) = pairs(guide, 1)
    with torch.no_grad():
        z = guide.encode([pair])
        a, b = (guide.decode([p], z, own(1)) for p in (pair, changed_at(pair, 3)))
    n = len(pair.real)
    assert torch.equal(a[:3], b[:3]) and bool((a[3:n] != b[3:n]).all())
    assert torch.equal(a[n:], b[n:])  # the sibling does not see it


@pytest.mark.parametrize("kind", KINDS)
def test_a_hidden_token_leaves_no_trace(kind: dict[str, Any]) -> None:
    """It may change without a change of the log-probs of those after it, with each latent that its
    response is read with; what stands for it is not zero.
    """
    guide = stir(text_guide(**kind))
    (pair,) = pairs(guide, 1)
    n = len(pair.real)
    hide = torch.zeros(n + len(pair.responses[1]), dtype=torch.bool)
    hide[3] = True
    readings = [Reading(0, 0), Reading(0, 1), Reading(1, 1)]
    with torch.no_grad():
        z = guide.encode([pair])
        a, b = (guide.decode([p], z, readings, hide) for p in (pair, changed_at(pair, 3)))
        seen = guide.decode([pair], z, readings)
        for start in (0, n):
            assert a[start + 3] != b[start + 3]  # it is still predicted
            own_ = slice(start, start + 3), slice(start + 4, start + n)
            assert torch.equal(a[own_[1]], b[own_[1]])
            torch.testing.assert_close(a[own_[0]], seen[own_[0]])
            assert bool((a[own_[1]] - seen[own_[1]]).abs().max() > 1e-4)
        assert torch.equal(a[2 * n :], seen[2 * n :])
        guide.latent.mask.zero_()
        assert (guide.decode([pair], z, readings, hide) - a).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_each_response_is_read_with_the_latent_it_is_told(kind: dict[str, Any]) -> None:
    """Another's, its sibling's, or the learned one that stands for none, one or more at a time."""
    guide = stir(text_guide(**kind))
    chosen = pairs(guide, 2)
    lengths = [len(y) for p in chosen for y in p.responses]
    table = [Reading(i, j) for i in range(4) for j in (0, 1, 2, 3, NO_LATENT)]
    with torch.no_grad():
        all_of_them, z = guide(chosen, table)
        assert torch.equal(all_of_them, guide.decode(chosen, z, table))
        parts = dict(
            zip(table, all_of_them.split([lengths[r.response] for r in table]), strict=True)
        )
        for order in ([2, 0, 3, 1], [NO_LATENT] * 4):
            latents_ = torch.stack([guide.latent.null if j < 0 else z[j] for j in order])
            expected = guide.decode(chosen, latents_, own(2))
            got = torch.cat([parts[Reading(i, j)] for i, j in enumerate(order)])
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for i in range(4):
        for j in (0, 1, 2, 3):
            gap = (parts[Reading(i, j)] - parts[Reading(i, NO_LATENT)]).abs().max()
            assert gap > 1e-4 and (i == j or not torch.equal(parts[i, j], parts[i, i]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_read_once(kind: dict[str, Any]) -> None:
    """By the encoder for both responses; by the decoder for all readings."""
    guide = stir(text_guide(**kind))
    chosen, read = pairs(guide, 3), {"encoder": 0, "decoder": 0}
    for name, tower in (("encoder", guide.encoder), ("decoder", guide.decoder)):

        def count(module: Any, given: Any, name: str = name) -> None:
            read[name] += len(given[0])

        tower.embedding.register_forward_pre_hook(count)
    readings = [Reading(i, j) for i in range(6) for j in (i, NO_LATENT)]
    with torch.no_grad():
        guide(chosen, readings)
    m = guide.config.latent_tokens
    queries = 6 * m if guide.config.readout == "queries" else 0
    assert read["encoder"] == sum(p.tokens for p in chosen) + queries
    prompts = sum(len(p.prompt) for p in chosen)
    responses = sum(p.tokens for p in chosen) - prompts
    anew = guide.config.injection != "output"  # soft tokens in front: a reading a latent
    assert read["decoder"] == prompts + (2 * responses + 12 * m if anew else responses)


# ------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_round_trip(kind: dict[str, Any], tmp_path: Path) -> None:
    guide = stir(text_guide(**kind))
    assert not is_trained_guide(tmp_path)
    save_guide(guide, tmp_path)
    assert is_trained_guide(tmp_path)
    check_trained_guide(tmp_path)
    again = load_guide(tmp_path)
    assert again.config == guide.config and not again.training and not again.shared
    state = again.state_dict()
    assert all(torch.equal(state[name], p) for name, p in guide.state_dict().items())
    args = [TEXTS[0], TEXTS[2]], [TEXTS[1], TEXTS[3]], [TEXTS[4], TEXTS[1]]
    assert torch.equal(again.distance(*args), guide.distance(*args))
    assert isinstance(again.encoder, GPT2)
    half = load_guide(tmp_path, CPU, torch.bfloat16)
    assert half.encoder.embedding.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in half.latent.parameters())
    torch.testing.assert_close(half.distance(*args), guide.distance(*args), rtol=0.2, atol=0.05)


def test_refusals(guide: Guide, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="guide.max_tokens=81: .* has room for 80; lower it"):
        new_guide(config_of(max_tokens=81, injection="output", readout="mean"), 0, TEXTS, SIZE)
    with pytest.raises(InputError, match="guide.json"):
        load_guide(tmp_path)
    save_guide(guide, tmp_path)
    described = json.loads((tmp_path / "guide.json").read_text())
    for changes, named in (
        ({"latent_width": 13}, "latent.safetensors: does not fit"),
        ({"injection": "prefix"}, "latent.safetensors: does not fit"),
        ({"readout": "mode"}, "guide.json: .*'mode' is none of mean, queries"),
        ({"latent_norm": None}, "guide.json: .*None is none of none, rms"),
        ({"latent_tokens": 0}, "guide.json: .*sizes"),
        ({"max_tokens": "many"}, "guide.json: .*sizes"),
    ):
        (tmp_path / "guide.json").write_text(json.dumps(described | changes))
        with pytest.raises(InputError, match=named):
            load_guide(tmp_path)
    # what folders of earlier versions lack
    for name in ("readout", "injection", "shared", "chat"):
        kept = {key: value for key, value in described.items() if key != name}
        (tmp_path / "guide.json").write_text(json.dumps(kept))
        with pytest.raises(InputError, match=f"guide.json: .*'{name}'.*train/guide.py"):
            check_trained_guide(tmp_path)
