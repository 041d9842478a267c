"""The guide: what it stores, what its distance obeys, that its latent is used when needed."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldalign.models.gpt2 import GPT2, GPT2Config, init_weights
from ldalign.models.guide import NO_LATENT, Example, Guide, GuideConfig
from ldalign.models.guide_folder import is_trained_guide, load_guide, new_guide, save_guide
from ldalign.models.weights import stored_state, write_weights
from ldalign.objective import cosine_distance
from ldalign.system import distributed
from ldalign.system.errors import InputError, NumericsError
from ldalign.training import guide as training
from ldalign.training.guide import GuideTrainSettings, heldout_losses, train_guide

CPU = torch.device("cpu")
TEXTS = [
    "Add 2 and 3.",
    "The sum is 5.",
    "Write the words in reverse order: cat, dog.",
    "dog, cat",
    "No idea, sorry!",
]
CONFIG = GuideConfig(latent_tokens=2, latent_width=12, max_tokens=60)
SIZE = GPT2Config(300, 64, 32, 2, 4)


@pytest.fixture(scope="module")
def guide() -> Guide:
    return new_guide(CONFIG, 0, None, TEXTS, SIZE).eval()


def examples(guide: Guide, count: int = 5) -> list[Example]:
    return [guide.example(TEXTS[i % 5], TEXTS[(i + 1) % 5] + "!" * i) for i in range(count)]


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


def test_distance_is_the_euclidean_norm_over_the_whole_latent(guide: Guide) -> None:
    with torch.no_grad():
        a, b = (
            guide.encode([guide.example(TEXTS[0], TEXTS[1])]),
            guide.encode([guide.example(TEXTS[0], TEXTS[4])]),
        )
    assert a.shape == (1, 24)  # 2 tokens of 12
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
    with torch.no_grad():
        a, b = (
            guide.encode([guide.example(p, r) for p, r in zip(x, r, strict=True)]).double().numpy()
            for r in (y, z)
        )
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


def test_a_distance_that_is_not_finite_names_its_row(
    guide: Guide, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = guide.encode

    def spoil(chosen: Any) -> torch.Tensor:
        out = plain(chosen)
        out[2 * [len(e.prompt) for e in chosen][::2].index(max(len(e.prompt) for e in chosen))] = (
            float("nan")
        )
        return out

    monkeypatch.setattr(guide, "encode", spoil)
    with pytest.raises(NumericsError, match="^row 1: the latent distance is nan"):
        guide.distance([TEXTS[0], TEXTS[2], TEXTS[0]], TEXTS[:3], TEXTS[1:4])


# ---------------------------------------------------------------------------- tokens, folders, init


def test_truncation(guide: Guide) -> None:
    """At most max_tokens: the prompt loses its beginning, and a long response its end, its end
    token with it.
    """
    short = guide.example(TEXTS[0], TEXTS[1])
    assert short.prompt[-1] == short.response[-1] == guide.end_id and len(short.prompt) > 1
    ids = guide.tokenizer.encode("dog, " * 100).ids
    long_prompt = guide.example("dog, " * 100, TEXTS[1])
    assert long_prompt.response == short.response
    assert long_prompt.prompt == [*ids, guide.end_id][-(60 - len(short.response)) :]
    both = guide.example("dog, " * 100, "dog, " * 100)
    assert len(both.response) == 45 and both.response == ids[:45] and len(both.prompt) == 15
    assert both.prompt[-1] == guide.end_id


def test_text_of_an_end_token_is_text(guide: Guide, tmp_path: Path) -> None:
    save_guide(guide, tmp_path)
    for one in (guide, load_guide(tmp_path)):
        response = one.example("x", "<|endoftext|>").response
        assert response.count(one.end_id) == 1 and len(response) > 2


def test_save_and_load_round_trip(guide: Guide, tmp_path: Path) -> None:
    assert not is_trained_guide(tmp_path)
    save_guide(guide, tmp_path)
    assert is_trained_guide(tmp_path)
    again = load_guide(tmp_path)
    assert again.config == guide.config and not again.training
    state = again.state_dict()
    assert all(torch.equal(state[name], p) for name, p in guide.state_dict().items())
    args = [TEXTS[0], TEXTS[2]], [TEXTS[1], TEXTS[3]], [TEXTS[4], TEXTS[1]]
    assert torch.equal(again.distance(*args), guide.distance(*args))


def test_a_folder_from_before_there_was_an_end_token_key(guide: Guide, tmp_path: Path) -> None:
    save_guide(guide, tmp_path)
    description = json.loads((tmp_path / "guide.json").read_text())
    assert description.pop("end_token") == "<|endoftext|>"
    (tmp_path / "guide.json").write_text(json.dumps(description))
    args = [TEXTS[0]], [TEXTS[1]], [TEXTS[4]]
    assert torch.equal(load_guide(tmp_path).distance(*args), guide.distance(*args))


def test_new_guide_is_a_function_of_its_seed() -> None:
    a, b, c = (new_guide(CONFIG, seed, None, TEXTS, SIZE).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["queries"], c["queries"]) and not torch.equal(
        a["to_latent.weight"], c["to_latent.weight"]
    )
    first = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(a[f"encoder.{first}"], c[f"encoder.{first}"])
    assert not torch.equal(a[f"encoder.{first}"], a[f"decoder.{first}"])


def test_guide_from_a_gpt2_folder(guide: Guide, tmp_path: Path) -> None:
    """Both towers start from the folder's weights, and its tokenizer is used."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    model = GPT2(replace(SIZE, vocab_size=guide.tokenizer.get_vocab_size()))
    init_weights(model, 7)
    (folder / "config.json").write_text(json.dumps(model.config.to_json()))
    guide.tokenizer.save(str(folder / "tokenizer.json"))
    write_weights(stored_state(model, model.state_dict()), folder, torch.float32)
    made = new_guide(CONFIG, 0, folder, TEXTS, SIZE)
    for name, p in model.state_dict().items():
        assert torch.equal(made.encoder.state_dict()[name], p) and torch.equal(
            made.decoder.state_dict()[name], p
        )
    assert made.example(TEXTS[0], TEXTS[1]) == guide.example(TEXTS[0], TEXTS[1])
    assert not is_trained_guide(folder)


def test_refusals(guide: Guide, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_tokens=63"):
        new_guide(replace(CONFIG, max_tokens=63), 0, None, TEXTS, SIZE)
    with pytest.raises(InputError, match="guide.json"):
        load_guide(tmp_path)
    save_guide(guide, tmp_path)
    text = (tmp_path / "guide.json").read_text()
    (tmp_path / "guide.json").write_text(text.replace('"latent_width": 12', '"latent_width": 13'))
    with pytest.raises(InputError, match="latent.safetensors"):
        load_guide(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(InputError, match="gpt2"):
        new_guide(CONFIG, 0, tmp_path, TEXTS, SIZE)


# -------------------------------------------------------------------------------- encode and decode


def test_examples_of_a_batch_do_not_see_each_other(guide: Guide) -> None:
    chosen = examples(guide)
    with torch.no_grad():
        together = guide(chosen)
        alone = torch.cat([guide([e]) for e in chosen])
    assert torch.allclose(together, alone, atol=1e-5) and len(together) == sum(
        len(e.response) for e in chosen
    )


def test_decode_is_causal_and_predicts_the_right_token(guide: Guide) -> None:
    """Changing token t of the response changes the log-probs of t and later ones, none before."""
    (example,) = examples(guide, 1)
    changed = replace(example, response=[*example.response[:3], 5, *example.response[4:]])
    assert changed.response != example.response
    with torch.no_grad():
        z = guide.encode([example])
        a, b = guide.decode([example], z), guide.decode([changed], z)
    assert torch.equal(a[:3], b[:3]) and bool((a[3:] != b[3:]).all())


def test_word_dropout_hides_a_token(guide: Guide) -> None:
    """A hidden token may change without a trace in the log-probs of those after it."""
    (example,) = examples(guide, 1)
    changed = replace(example, response=[*example.response[:3], 5, *example.response[4:]])
    hide = torch.zeros(len(example.response), dtype=torch.bool)
    hide[3] = True
    with torch.no_grad():
        z = guide.encode([example])
        a, b = guide.decode([example], z, hide), guide.decode([changed], z, hide)
        seen = guide.decode([example], z)
    assert a[3] != b[3]  # it is still predicted
    assert (
        torch.equal(a[4:], b[4:])
        and torch.equal(a[:4], seen[:4])
        and bool((a[4:] != seen[4:]).all())
    )


def test_each_example_is_decoded_with_the_latent_it_is_told(guide: Guide) -> None:
    chosen = examples(guide, 3)
    with torch.no_grad():
        z = guide.encode(chosen)
        assert torch.equal(guide(chosen, latents_of=[0, 1, 2]), guide(chosen))
        assert torch.equal(guide(chosen, latents_of=[2, 0, 1]), guide.decode(chosen, z[[2, 0, 1]]))
        assert torch.equal(
            guide(chosen, latents_of=[NO_LATENT] * 3), guide.decode(chosen, torch.zeros_like(z))
        )
        assert not torch.allclose(guide(chosen, latents_of=[2, 0, 1]), guide(chosen), atol=1e-4)


def test_a_shared_prompt_is_read_once() -> None:
    """Latents of examples that share prompts, in any order, are those of each by
    itself; the batch is shorter.
    """
    guide = new_guide(CONFIG, 0, None, TEXTS, SIZE)
    texts = [
        ("a prompt", "one"),
        ("another", "two words"),
        ("a prompt", "three"),
        ("a prompt", "four"),
    ]
    chosen = [guide.example(x, y) for x, y in texts]
    tokens: list[int] = []
    guide.encoder.transformer.wte.register_forward_pre_hook(
        lambda module, inputs: tokens.append(len(inputs[0]))
    )
    with torch.no_grad():
        together, alone = guide.encode(chosen), torch.cat([guide.encode([e]) for e in chosen])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert tokens[0] == sum(tokens[1:]) - 2 * len(chosen[0].prompt)


def test_gradient_reaches_every_part() -> None:
    guide = new_guide(CONFIG, 0, None, TEXTS, SIZE)
    guide(examples(guide)).sum().backward()
    # a key's bias never changes a softmax: its gradient is 0 up to rounding, inside c_attn's
    for name, p in guide.named_parameters():
        assert p.grad is not None and float(p.grad.abs().max()) > 1e-7, name


# ----------------------------------------------------------------------------------------- training


@pytest.fixture
def one_rank(in_process: None) -> Iterator[None]:
    distributed.start("cpu")
    yield


def secret_rows(count: int) -> list[tuple[str, str, str]]:
    """Makes prompts that say nothing: only the latent can tell the first of a response's words.

    A response is two of twenty words.
    """
    words = (
        "cat dog sun tree moon star fish milk rain snow book lamp door road hill lake bird ship "
        "king rose"
    ).split()
    draw = random.Random(0)
    return [
        ("Two words.", *(" ".join(draw.choices(words, k=2)) for _ in range(2)))
        for _ in range(count)
    ]


def trained(rows: list[tuple[str, str, str]], **settings: Any) -> tuple[Guide, dict[str, float]]:
    config = GuideConfig(latent_tokens=1, latent_width=16, token_dropout=0.5, max_tokens=24)
    guide = new_guide(
        config, 0, None, [t for row in rows for t in row], GPT2Config(300, 32, 48, 1, 4)
    )
    pairs = [(guide.example(x, y), guide.example(x, z)) for x, y, z in rows]
    plan: dict[str, Any] = {
        "epochs": 8,
        "global_batch": 16,
        "learning_rate": 3e-3,
        "micro_tokens": 4000,
    }
    return guide, train_guide(
        guide, pairs, GuideTrainSettings(**(plan | settings)), device=CPU, seed=0
    )


def test_the_latent_is_used_where_the_prompt_says_nothing(
    one_rank: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """On rows it has not seen: another row's latent costs much, the own other
    response's too, none as well.
    """
    _, losses = trained(secret_rows(300))
    assert losses["latent_gain"] > 0.3 and losses["sibling_gain"] > 0.3
    assert losses["none"] > losses["true"]
    assert losses["latent_gain"] == pytest.approx(losses["other"] - losses["true"])
    assert "WARNING" not in capsys.readouterr().err


def test_a_latent_without_use_is_warned_of(
    one_rank: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Guide, "encode", lambda self, chosen: self.to_latent.bias.expand(len(chosen), -1)
    )
    _, losses = trained(secret_rows(20), epochs=1)
    assert losses["latent_gain"] == pytest.approx(0.0, abs=1e-6) and losses["latent_gain"] <= 0
    assert "WARNING: latent_gain" in capsys.readouterr().err


def test_dropout_is_a_function_of_the_rows_key(one_rank: None) -> None:
    """Whatever the micro-batches, the loss and the gradient of a batch are the same;
    another epoch draws anew.
    """
    rows = secret_rows(8)

    def step(budget: int, epoch: int) -> tuple[float, torch.Tensor]:
        guide = new_guide(CONFIG, 0, None, [t for row in rows for t in row], SIZE)
        distributed.shard(guide, guide.blocks, torch.float32, CPU)
        keyed = [
            ((guide.example(x, y), guide.example(x, z)), f"guide/{epoch}/{i}")
            for i, (x, y, z) in enumerate(rows)
        ]
        loss = training.accumulate_gradients(guide, keyed, budget, 0, CPU)
        return loss, guide.queries.grad  # type: ignore[return-value]

    whole, grad = step(10_000, 0)
    for budget in (1, 60):
        loss, other = step(budget, 0)
        assert loss == pytest.approx(whole, rel=1e-6) and (other - grad).norm() < 1e-4 * grad.norm()
    assert abs(step(10_000, 1)[0] - whole) > 1e-4


def test_heldout_losses_compare_with_the_right_latents(
    guide: Guide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`other` is never the row itself nor its sibling; runs do not change the sums; equal responses
    have no sibling.
    """
    rows = [
        (guide.example(TEXTS[0], f"word {i}"), guide.example(TEXTS[0], f"thing {i}!"))
        for i in range(7)
    ]
    rows[2] = (rows[2][0], rows[2][0])
    whole = heldout_losses(guide, rows, 100_000, CPU)
    parts = heldout_losses(guide, rows, 1, CPU)
    for name in ("true", "none", "sibling_gain"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-7)
    asked: list[tuple[int, list[int] | None]] = []
    plain = guide.forward

    def spy(chosen: Any, latents_of: Any = None) -> torch.Tensor:
        asked.append((len(chosen), latents_of))
        return plain(chosen, latents_of)

    monkeypatch.setattr(guide, "forward", spy)
    heldout_losses(guide, rows, 100_000, CPU)
    (size, true), (_, other), (_, none), (_, sibling) = asked
    assert size == 14 and true is None and none == [NO_LATENT] * 14
    assert other is not None and all(
        j not in (i, (i + 7) % 14) and (j < 7) == (i < 7) for i, j in enumerate(other)
    )
    assert sibling == [(i + 7) % 14 for i in range(14)]
    same = [(a, a) for a, _ in rows]
    assert heldout_losses(guide, same, 1000, CPU)["sibling_gain"] == 0.0


def test_too_few_rows_is_an_error(one_rank: None) -> None:
    with pytest.raises(InputError, match="too few"):
        trained(secret_rows(2))


def test_a_non_finite_step_stops(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "accumulate_gradients", lambda *_: float(np.nan))
    monkeypatch.setattr(distributed, "clip_grad_norm", lambda *_: torch.tensor(1.0))
    with pytest.raises(NumericsError, match="guide: step 1"):
        trained(secret_rows(20))
