"""Training the guide: what moves and what does not, on one rank and on two. Two run this file."""

import json
import math
import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_weights import edit
from runs import run_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_guides import CPU, config_of, own, pairs, policy_guide, settings_of, stir, text_guide
from torch import Tensor

from ldalign.data.pairs import Pair
from ldalign.evaluation.guide import heldout_figures, tells_apart
from ldalign.models.gpt2 import GPT2Config
from ldalign.models.guide import Guide, GuideConfig, GuideLoss, Latent
from ldalign.models.guide_folder import (
    load_guide,
    new_guide,
    pretrained_guide,
    save_guide,
)
from ldalign.models.layout import Packed
from ldalign.models.mistral import Mistral
from ldalign.models.toy import write_toy_model
from ldalign.models.weights import load_model
from ldalign.system import distributed, exits
from ldalign.system.errors import InputError, NumericsError
from ldalign.system.memory import OutOfMemory
from ldalign.training import guide as training
from ldalign.training.checkpoint import CheckpointPlan
from ldalign.training.guide import (
    GuideTrainSettings,
    accumulate_gradients,
    global_batch,
    keep_states,
    keeps_states,
    split,
    train_guide,
)
from ldalign.training.latent_map import fit, standardise

# Ways into the latent and out of it that two trained towers have, beside the plain one.
KINDS: list[dict[str, Any]] = [
    {"injection": "both", "latent_norm": "rms"},
    {"injection": "prefix", "latent_tokens": 3},
    {"readout": "queries", "injection": "prefix", "latent_tokens": 3, "latent_norm": "rms"},
    {"readout": "queries", "injection": "both"},
]


@pytest.fixture
def one_rank(in_process: None) -> Iterator[None]:
    distributed.start("cpu")
    yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("policy") / "model", seed=3)


def train(guide: Guide, chosen: list[Pair], **changes: Any) -> None:
    """One call of `train_guide` in float32; keys of its settings and of GuideLoss may change."""
    more = {k: changes.pop(k) for k in ("metrics_path", "checkpoints") if k in changes}
    train_guide(
        guide,
        chosen,
        settings_of(**changes),
        compute_dtype=torch.float32,
        device=CPU,
        seed=0,
        **more,
    )


# ------------------------------------------------------------------------- what the latent learns


WORDS = (
    "cat dog sun tree moon star fish milk rain snow book lamp door road hill lake bird ship king "
    "rose"
).split()


def secrets(guide: Guide, count: int) -> list[Pair]:
    """Prompts that say nothing: only the latent can tell the first of a response's two words."""
    draw = random.Random(0)
    return [
        guide.pair(str(i), "Two words.", *(" ".join(draw.choices(WORDS, k=2)) for _ in range(2)))
        for i in range(count)
    ]


def small_guide() -> Guide:
    config = GuideConfig(latent_width=16, max_tokens=24)
    return new_guide(config, 0, [f"Two words. {w}" for w in WORDS], GPT2Config(300, 32, 48, 1, 4))


LEARNERS: list[tuple[str, dict[str, Any]]] = [
    ("new", {"epochs": 6, "learning_rate": 3e-3, "token_dropout": 1.0}),
    ("frozen", {"epochs": 6, "learning_rate": 1e-2}),
]


@pytest.mark.parametrize(("kind", "changes"), LEARNERS)
def test_the_latent_is_used_where_the_prompt_says_nothing(
    kind: str, changes: dict[str, Any], one_rank: None, policy: Path
) -> None:
    """On rows it has not seen: the sibling's latent costs much, another row's, and none as well."""
    guide = small_guide() if kind == "new" else policy_guide(policy, latent_width=64)
    seen, unseen = split(secrets(guide, 240), 0.2, 0)
    before = heldout_figures(guide.eval(), unseen, 4000)
    assert before["sibling_gain"] == pytest.approx(0.0, abs=1e-6) and not tells_apart(before)
    train(guide, seen, global_batch=16, **changes)
    figures = heldout_figures(guide, unseen, 4000)
    assert tells_apart(figures)
    assert figures["sibling_gain"] > max(0.5, 4 * figures["sibling_gain_se"])
    assert figures["own_better"] > 0.8 and figures["none_gain"] > 1.0
    assert figures["other_gain"] > 0.7 and figures["latent_gain"] > 0.1
    assert figures["first_gain"] > 0.2


def test_a_latent_that_says_nothing_tells_nothing_apart(
    one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Latent, "read", lambda self, states: self.null.expand(len(states), -1))
    guide = small_guide()
    seen, unseen = split(secrets(guide, 24), 0.3, 0)
    train(guide, seen)
    figures = heldout_figures(guide, unseen, 4000)
    assert figures["sibling_gain"] == pytest.approx(0.0, abs=1e-5) and not tells_apart(figures)
    assert figures["own_better"] == pytest.approx(0.5, abs=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reaches_every_part(kind: dict[str, Any], one_rank: None) -> None:
    """Gradients in every weight of the latent part, and a step that moves every tensor of it."""
    guide = text_guide(**kind)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    bag = 0.5 if kind["injection"] == "both" else 0.0
    changes: dict[str, Any] = {"token_dropout": 1.0, "latent_dropout": 0.5, "bag_of_words": bag}
    settings = settings_of(latent_noise=0.1, tokens=5, **changes)
    chosen = pairs(guide, 6)
    loss = accumulate_gradients(
        guide, global_batch(guide, chosen, [p.id for p in chosen], settings, 0), settings, CPU
    )
    assert loss > 0
    for name, p in guide.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()), name
        # A shift that begins at zero: with the null latent no gradient passes it in this step.
        assert float(p.grad.abs().max()) > 1e-9, name
    guide.zero_grad()
    train(guide, chosen, epochs=2, latent_noise=0.1, tokens=5, **changes)
    for name, p in guide.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_a_frozen_guide_learns_its_queries_and_soft_tokens(one_rank: None, policy: Path) -> None:
    """Gradients pass through the tower that is not trained, both as encoder and as decoder."""
    guide = policy_guide(policy, readout="queries", injection="both")
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    train(guide, pairs(guide, 6), epochs=2, token_dropout=1.0)
    for name, p in guide.named_parameters():
        assert torch.equal(p, before[name]) == (not name.startswith("latent.")), name


# --------------------------------------------------------------------- the faults of the old guide


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of 30 tiny blocks, each with two RMSNorms, whose matrices keep the size of what they
    read, as those of trained models do.
    """
    folder = write_toy_model(
        tmp_path_factory.mktemp("deep") / "model",
        num_hidden_layers=30,
        hidden_size=32,
        intermediate_size=48,
        head_dim=8,
    )

    def scale(tensors: dict[str, Tensor]) -> None:
        for name, p in tensors.items():
            if "layers" in name and p.ndim == 2:
                p.mul_(8)  # 0.16 is about 1 / sqrt(32)

    edit(folder, scale)
    return folder


def deep_gradients(guide: Guide, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """The gradients of a step in which nearly all responses have no latent, and most of their
    tokens are hidden.
    """
    chosen = pairs(guide)
    distributed.shard(
        guide, guide.blocks, dtype, CPU, methods=("loss",), exact={guide.latent: Latent.METHODS}
    )
    settings = settings_of(latent_dropout=0.9, token_dropout=1.0)
    loss = accumulate_gradients(
        guide, global_batch(guide, chosen, [p.id for p in chosen], settings, 1), settings, CPU
    )
    assert 0 < loss < 100
    grads = {name: p.grad for name, p in guide.named_parameters() if p.grad is not None}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    return list(whole.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_through_many_norms(
    dtype: torch.dtype, deep: Path, one_rank: None
) -> None:
    """No soft token, and nothing that stands for a hidden token, is exactly zero.

    The latent for none and the mask used to be zeros. A stream of zeros stays zero, and its
    gradient grows by the root of each norm's epsilon: beyond float32 after fifteen norms.
    """
    guide = policy_guide(deep, False, injection="prefix", readout="queries")
    assert bool(guide.latent.null.abs().min() > 0) and bool(guide.latent.mask.abs().min() > 0)
    with torch.no_grad():
        soft = guide.latent.soft_tokens(guide.latent.null[None])
    assert float(soft.abs().max(dim=1).values.min()) > 1e-3
    grads = deep_gradients(guide, dtype)
    names = {name for name, _ in grads}
    assert {f"latent.{name}" for name in ("null", "mask", "queries", "to_prefix.weight")} <= names
    for name, grad in grads:
        assert bool(grad.isfinite().all()), name


def test_a_stream_of_zeros_has_no_finite_gradient(deep: Path) -> None:
    """What the test above guards against is there: the first token of a sequence, where the old
    guide's prefix stood.
    """
    model = load_model(deep, torch.float32)
    finite = []
    for size in (0.0, 0.02):
        x = torch.full((1, 32), size) * torch.linspace(-1, 1, 32)
        x.requires_grad_()
        assert isinstance(model, Mistral)
        model.hidden(x, Packed([1])).sum().backward()
        assert x.grad is not None
        finite.append(bool(x.grad.isfinite().all()))
    assert finite == [False, True]


# ------------------------------------------------------------------------------- what chance says


def told(guide: Guide, chosen: list[Pair], epoch: int, **changes: Any) -> dict[str, Any]:
    """What `Guide.loss` is told of one global batch in one micro-batch."""
    found: dict[str, Any] = {}
    plain = guide.loss

    def spy(pairs_: Any, kept: Any, tokens: Any, hidden: Any, noise: Any, *rest: Any) -> Tensor:
        found.update(kept=kept, tokens=tokens, hidden=hidden, noise=noise, counts=rest[1])
        found["responses"] = [y for p in pairs_ for y in p.responses]
        return plain(pairs_, kept, tokens, hidden, noise, *rest)

    guide.loss = spy  # type: ignore[method-assign]
    keys = [f"guide/{epoch}/{pair.id}" for pair in chosen]
    settings = settings_of(**changes)
    accumulate_gradients(guide, global_batch(guide, chosen, keys, settings, 0), settings, CPU)
    guide.loss = plain  # type: ignore[method-assign]
    return found


def test_a_response_counts_with_as_many_tokens_as_asked_for_drawn_anew() -> None:
    guide = text_guide()
    chosen = pairs(guide, 8)
    first, second = (told(guide, chosen, epoch, tokens=5) for epoch in (0, 1))
    responses = first["responses"]
    assert responses == second["responses"]
    for response, *drawn in zip(responses, first["tokens"], second["tokens"], strict=True):
        for places in drawn:
            assert len(places) == min(5, len(response)) and list(places) == sorted(set(places))
            assert places[0] >= 0 and places[-1] < len(response)
    long = [i for i, y in enumerate(responses) if len(y) > 7]
    assert len(long) > 4 and any(first["tokens"][i] != second["tokens"][i] for i in long)
    counts = first["counts"]
    assert (counts.real, counts.generated) == tuple(
        sum(min(5, len(y)) for y in responses[side::2]) for side in (0, 1)
    )
    every = told(guide, chosen, 0)["tokens"]
    assert [list(places) for places in every] == [list(range(len(y))) for y in responses]


def test_dropout_has_the_shares_that_are_asked_for() -> None:
    """Of responses without a latent; of hidden tokens, between none and all of a response's."""
    guide = text_guide()
    chosen = [
        guide.pair(str(i), "x", "a b c d e f g h i j", "k l m n o p q r s") for i in range(99)
    ]
    found = told(guide, chosen, 0, latent_dropout=0.3, token_dropout=0.8, latent_noise=0.2)
    assert 0.6 < sum(found["kept"]) / 198 < 0.8
    lengths = [len(y) for y in found["responses"]]
    shares = torch.stack([part.double().mean() for part in found["hidden"].split(lengths)])
    assert 0.35 < float(shares.mean()) < 0.45 and shares.min() == 0 and shares.max() > 0.75
    assert found["noise"].shape == (198, 24) and 0.19 < float(found["noise"].std()) < 0.21
    none = told(guide, chosen[:9], 0, latent_dropout=0.0)
    assert all(none["kept"]) and none["hidden"] is None and none["noise"] is None
    assert none["counts"].contrasted == sum(len(y) for p in chosen[:9] for y in p.responses)
    same = [replace(p, generated=p.real) for p in chosen[:9]]
    assert told(guide, same, 0, latent_dropout=0.0)["counts"].contrasted == 1  # a divisor


def test_every_row_draws_for_itself_in_every_epoch(
    one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    plain = training.global_batch

    def spy(guide: Any, chosen: Any, keys: Any, *rest: Any) -> training.GlobalBatch:
        asked.extend(keys)
        return plain(guide, chosen, keys, *rest)

    monkeypatch.setattr(training, "global_batch", spy)
    guide = text_guide()
    train(guide, pairs(guide, 9), epochs=3)
    assert len(asked) == 27 and set(asked) == {
        f"guide/{epoch}/row-{i}" for epoch in range(3) for i in range(9)
    }


@pytest.mark.parametrize("kind", [{}, {"readout": "queries", "latent_tokens": 3}])
def test_latents_begin_centred_and_of_size_one(kind: dict[str, Any]) -> None:
    """Of the first pairs, over all that a latent has: only differences of responses are large."""
    guide = text_guide(latent_norm="none", **kind)
    chosen = pairs(guide, 12)
    with torch.no_grad():
        before = guide.encode(chosen)
        standardise(guide, chosen)
        z = guide.encode(chosen)
    assert before.mean(0).abs().max() > 0.1
    middle = z.mean(0) if not kind else z.mean(0).unflatten(0, (3, -1)).mean(0)
    assert middle.abs().max() < 1e-5
    deviation = (z - z.mean(0)).square().mean().sqrt()
    assert float(deviation) == pytest.approx(1.0, rel=1e-4)
    moved = (before - before.mean(0)) / (before - before.mean(0)).square().mean().sqrt()
    torch.testing.assert_close(z - z.mean(0), moved, rtol=1e-3, atol=1e-4)


def test_the_map_is_left_as_it_was_fitted_or_trained_from_there(
    one_rank: None, policy: Path
) -> None:
    maps: dict[str, Tensor] = {}
    for how in ("fitted", "tuned", "drawn"):
        guide = policy_guide(policy)
        chosen = pairs(guide, 9)
        train(guide, chosen, epochs=2, learning_rate=1e-2, latent_map=how)
        maps[how] = guide.latent.to_latent.weight.detach().clone()
        assert float(guide.latent.to_output.weight.detach().abs().max()) > 0
        fit(guide, chosen)
        maps["fit"] = guide.latent.to_latent.weight.detach()
    torch.testing.assert_close(maps["fitted"], maps["fit"], rtol=1e-3, atol=1e-3)
    size = maps["fit"].abs().mean()
    assert 0.001 * size < (maps["tuned"] - maps["fit"]).abs().mean() < 0.5 * size
    assert (maps["drawn"] - maps["fit"]).abs().mean() > 0.5 * size


@pytest.mark.parametrize("how", ["fitted", "drawn"])
def test_what_to_lower_where_memory_does_not_hold_the_states(
    how: str, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def states(self: Guide, pairs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    guide = text_guide()
    chosen = pairs(guide)
    monkeypatch.setattr(Guide, "states", states)
    with pytest.raises(OutOfMemory, match="lower training.micro_tokens or guide.max_tokens"):
        train(guide, chosen, latent_map=how)


def test_the_guides_optimizer(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW with the betas of arXiv 1706.03762; the policy has others."""
    made = []
    make = training.make_optimizer

    def kept(*given: Any, **more: Any) -> Any:
        made.append(make(*given, **more))
        return made[-1]

    monkeypatch.setattr(training, "make_optimizer", kept)
    guide = text_guide()
    train(guide, pairs(guide), learning_rate=3e-4)
    (optimizer,) = made
    assert optimizer.name == "adamw" and optimizer.defaults["betas"] == (0.9, 0.98)


def test_checkpoints_and_records_lie_where_they_are_asked_for(
    one_rank: None, tmp_path: Path
) -> None:
    """Of two steps; after the last no checkpoint is made."""
    guide, kept = text_guide(), tmp_path / "checkpoint"
    plan = CheckpointPlan(kept, minutes=None, steps=1)
    train(guide, pairs(guide), metrics_path=tmp_path / "metrics.jsonl", checkpoints=plan)
    assert [path.name for path in kept.iterdir()] == ["step_00000001"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["global_step"] for line in lines] == [1, 2]


def test_progress_counts_steps(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step once; those of an earlier start at once with the first of the next."""
    moved: list[int] = []
    monkeypatch.setattr(
        training, "Bar", lambda *_: nullcontext(lambda steps, tokens: moved.append(steps))
    )
    guide = text_guide()
    chosen, plan = pairs(guide), CheckpointPlan(tmp_path / "checkpoint", minutes=None, steps=3)
    train(guide, chosen, epochs=3, checkpoints=plan)
    assert moved == [1] * 6
    moved.clear()
    train(text_guide(), chosen, epochs=3, checkpoints=plan)
    assert moved == [4, 1, 1]


def test_micro_batches_add_up_and_the_last_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one, of a rank that has fewer pairs, adds nothing; only after the last gradients may
    be summed over the ranks.
    """
    last: list[bool] = []
    monkeypatch.setattr(distributed, "last_micro", lambda model, is_last: last.append(is_last))
    settings, found, after = settings_of(), [], [0]

    def after_micro() -> None:
        after[0] += 1

    for micros in ([[0, 1, 2, 3, 4]], [[3, 1], [0, 2, 4], []], [[]]):
        guide = stir(text_guide())
        chosen = pairs(guide)
        batch = global_batch(guide, chosen, [pair.id for pair in chosen], settings, 0)
        total = accumulate_gradients(
            guide, batch._replace(micros=micros), settings, CPU, after_micro=after_micro
        )
        found.append([total, *(p.grad for p in guide.parameters() if p.grad is not None)])
    assert last == [True, False, False, True, True] and after == [5]
    assert len({len(one) for one in found}) == 1 and len(found[0]) > 20 and found[0][0] > 0
    for whole, added_up, nothing in zip(*found, strict=True):
        assert torch.allclose(added_up, whole, rtol=1e-3, atol=1e-6)
        assert not nothing.any()


def test_rows_are_held_out_by_seed_and_stage() -> None:
    rows = [Pair(str(i), [1], [2], [3]) for i in range(40)]
    seen, unseen = map(list, split(rows, 0.2, 0))
    assert len(unseen) == 8 and sorted(int(p.id) for p in seen + unseen) == list(range(40))
    assert list(split(rows, 0.2, 0)[1]) == unseen != list(split(rows, 0.2, 1)[1])
    assert list(split(rows, 0.2, 0, "iteration_1/guide")[1]) != unseen
    assert len(split(rows[:3], 0.01, 0)[1]) == 2
    with pytest.raises(InputError, match="2 rows are too few to hold any out; use at least 3"):
        split(rows[:2], 0.5, 0)


def test_a_non_finite_step_stops(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = torch.tensor(math.nan, dtype=torch.float64)
    monkeypatch.setattr(training, "accumulate_gradients", lambda *_: nan)
    monkeypatch.setattr(
        distributed, "clip_grad_norm", lambda *_: (torch.tensor(1.0), torch.tensor(1.0))
    )
    guide = text_guide()
    with pytest.raises(NumericsError, match="guide: step 1"):
        train(guide, pairs(guide))


# --------------------------------------------------------------------------------- a frozen tower


def frozen_state(guide: Guide) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in guide.named_parameters() if not p.requires_grad}


def test_a_frozen_tower_is_as_it_was_to_the_bit(
    one_rank: None, policy: Path, tmp_path: Path
) -> None:
    """After training; it is in no checkpoint, and the folder has it once, with the distances that
    the guide had before it was saved.
    """
    guide = pretrained_guide(config_of(), 0, policy, True, torch.bfloat16)
    start, chosen = frozen_state(guide), pairs(guide, 9)
    plan = CheckpointPlan(tmp_path / "checkpoint", steps=1, keep=9)
    train_guide(
        guide,
        chosen,
        settings_of(epochs=2),
        compute_dtype=torch.bfloat16,
        device=CPU,
        seed=0,
        checkpoints=plan,
    )
    after = frozen_state(guide)
    assert len(start) > 10 and start.keys() == after.keys()
    assert all(torch.equal(start[n], p) and p.dtype == torch.bfloat16 for n, p in after.items())
    kept = list((tmp_path / "checkpoint").glob("*/*.safetensors"))
    assert len(kept) == 5
    for path in kept:
        with safe_open(path, framework="pt") as file:
            names = {name.partition("/")[2] for name in file.keys()}
        assert names and all(name.startswith("latent.") for name in names)
    state = distributed.full_state(guide, None)
    save_guide(guide, tmp_path / "guide", state)
    assert (tmp_path / "guide/encoder").is_dir() and not (tmp_path / "guide/decoder").exists()
    stored = load_file(tmp_path / "guide/encoder/model.safetensors")
    assert {p.dtype for p in stored.values()} == {torch.bfloat16}
    again = load_guide(tmp_path / "guide", CPU, torch.bfloat16)
    assert torch.equal(again.pair_distances(chosen), guide.pair_distances(chosen))
    assert all(p.dtype == torch.float32 for p in again.latent.parameters())


def test_states_of_a_frozen_tower_are_made_once(
    one_rank: None, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pair is read once, not once an epoch, where the states fit; the result is the same."""
    results = []
    for most in (training.KEPT_BYTES, 0):
        monkeypatch.setattr(training, "KEPT_BYTES", most)
        guide = policy_guide(policy)
        chosen, read = pairs(guide, 7), [0]
        standardise(guide, chosen)
        guide.encoder.embedding.register_forward_pre_hook(
            lambda module, given, read=read: read.__setitem__(0, read[0] + len(given[0]))
        )
        train(guide, chosen, epochs=4, learning_rate=1e-2, micro_tokens=80)
        tokens = sum(p.tokens for p in chosen)
        assert read[0] == tokens * (2 if most else 5)  # one of them: standardise
        results.append(guide)
    for (name, one), other in zip(
        results[0].named_parameters(), results[1].parameters(), strict=True
    ):
        assert (one - other).norm() <= 1e-3 * one.norm(), name
    figures = [heldout_figures(guide, chosen, 4000) for guide in results]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3, abs=1e-3)


def test_kept_states_are_those_of_the_pairs(policy: Path) -> None:
    """Whatever batches they are made in, in the order of the pairs; what they give is what reading
    gives. Where the tower is trained, or a token hidden, none are kept.
    """
    guide = stir(policy_guide(policy))
    chosen = pairs(guide, 7)
    kept = keep_states(guide, chosen, 80)
    with torch.no_grad():
        for pair, states in zip(chosen, kept, strict=True):
            known, z = guide([pair], own(1), states)
            read, z_read = guide([pair], own(1))
            torch.testing.assert_close(known, read, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(z, z_read, rtol=1e-5, atol=1e-5)
    settings = settings_of(epochs=2)
    assert keeps_states(guide, chosen, settings, torch.float32)
    # it is read in the dtype that it computes in
    assert not keeps_states(guide, chosen, settings, torch.bfloat16)
    for without in (settings_of(epochs=1), settings_of(epochs=2, token_dropout=0.5)):
        assert not keeps_states(guide, chosen, without, torch.float32)
    for other in (
        policy_guide(policy, False),
        policy_guide(policy, injection="both"),
        policy_guide(policy, readout="queries"),
    ):
        assert not keeps_states(other, chosen, settings, torch.float32)
    figures = heldout_figures(guide, chosen, 200)
    assert heldout_figures(guide, chosen, 200, kept) == pytest.approx(figures, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["kept", "frozen", "trained"])
def test_gone_on_with_after_a_cut_it_ends_in_the_same_bits(
    kind: str, one_rank: None, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the frozen tower's states are kept: they are made again."""

    def made() -> Guide:
        injection = "output" if kind == "kept" else "both"
        return policy_guide(policy, kind != "trained", injection=injection)

    plan = CheckpointPlan(tmp_path / "checkpoint", steps=1)
    whole, cut = made(), made()
    chosen, more = pairs(whole, 9), {"epochs": 2, "latent_noise": 0.1, "latent_dropout": 0.5}
    if kind == "kept":
        more["latent_map"] = "fitted"
    else:
        more["token_dropout"] = 0.5
    assert keeps_states(whole, chosen, settings_of(**more), torch.float32) == (kind == "kept")
    train(whole, chosen, **more)
    plain, calls = training.accumulate_gradients, [0]

    def failing(*given: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyError("planted")
        return plain(*given)

    with monkeypatch.context() as patch:
        patch.setattr(training, "accumulate_gradients", failing)
        with pytest.raises(KeyError):
            train(cut, chosen, checkpoints=plan, **more)
    # What a fit gives on another machine differs in its last bits; the checkpoint has the map.
    monkeypatch.setattr(training, "fit", lambda guide, *_: stir(guide))
    resumed = made()
    train(resumed, chosen, checkpoints=plan, **more)
    for (name, a), b, c in zip(
        whole.named_parameters(), resumed.parameters(), cut.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        # the encoder predicts nothing, and without dropout nothing stands for a token
        unused = name == "encoder.lm_head.weight" or (kind == "kept" and name == "latent.mask")
        unused = unused or (kind == "kept" and name.startswith("latent.to_latent"))
        assert torch.equal(a, c) == (unused or not a.requires_grad), name


# ------------------------------------------------------------------------------------------- ranks


RANKS: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "frozen": (True, {}, {}),
    "frozen, fitted": (True, {}, {"latent_map": "fitted"}),
    "frozen, queries": (True, {"readout": "queries", "injection": "both"}, {"token_dropout": 0.5}),
    "trained": (False, {}, {"token_dropout": 1.0, "latent_noise": 0.1}),
    "trained, tuned": (False, {"latent_norm": "none"}, {"latent_map": "tuned"}),
    "trained, prefix": (
        False,
        {"readout": "queries", "injection": "prefix", "latent_tokens": 3},
        {"token_dropout": 1.0, "tokens": 5},
    ),
}


def work(folder: Path) -> None:
    """What every rank does: trains a guide of each kind, and says what came of it."""
    distributed.start("cpu")
    rank = distributed.rank()
    if rank == 0:
        write_toy_model(folder / "model", seed=3)
    distributed.barrier()
    found: dict[str, Any] = {}
    for name, (frozen, kind, changes) in RANKS.items():
        guide = policy_guide(folder / "model", frozen, **kind)
        # 6 pairs, then one, which leaves a rank of two without: micro-batches of one pair or two.
        chosen = pairs(guide, 7)
        train(
            guide,
            chosen,
            epochs=4,
            global_batch=6,
            micro_tokens=60,
            learning_rate=3e-3,
            metrics_path=folder / f"{name}.jsonl",
            **changes,
        )
        found[name] = heldout_figures(guide, chosen, 300)
        state = distributed.full_state(guide, None)
        assert bool(state) == (rank == 0)
        if rank == 0:
            save_file(state, folder / f"{name}.safetensors")
            save_guide(guide, folder / name, state)
        distributed.barrier()
        again = load_guide(folder / name)
        found[f"{name}: distances"] = again.pair_distances(chosen, 100).tolist()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.stop()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What one rank left, and what two did."""
    out = []
    for ranks in (1, 2):
        out.append(tmp_path_factory.mktemp(f"ranks{ranks}"))
        done = run_script(__file__, out[-1], ranks=ranks)
        assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("name", RANKS)
def test_two_ranks_are_one(name: str, folders: list[Path]) -> None:
    """Losses of all steps, weights, held-out figures and distances; the frozen tower to the bit."""
    one, two = ([json.loads(x) for x in open(f / f"{name}.jsonl")] for f in folders)
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-3)
    assert one[-2]["loss"] < one[0]["loss"]  # of six pairs both
    start = policy_guide(folders[0] / "model", RANKS[name][0], **RANKS[name][1])
    began = dict(start.named_parameters())
    left = [load_file(f / f"{name}.safetensors") for f in folders]
    assert left[0].keys() == left[1].keys() == began.keys()
    for key, p in left[0].items():
        if not began[key].requires_grad:
            assert torch.equal(p, began[key]) and torch.equal(left[1][key], p), key
            continue
        moved = (p - began[key].detach()).norm()
        # Adam divides by small gradients: where nearly nothing moves, rounding decides.
        assert (left[1][key] - p).norm() <= 2e-2 * moved + 1e-5, key
    found = [json.loads((f / "found.json").read_text()) for f in folders]
    assert found[1][name] == pytest.approx(found[0][name], rel=2e-2, abs=5e-3)
    distances = [f[f"{name}: distances"] for f in found]
    assert distances[1] == pytest.approx(distances[0], rel=1e-2) and min(distances[0]) > 0.1


def test_the_latent_part_is_float32_in_any_compute_dtype(
    one_rank: None, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trained towers that compute in bfloat16: a distance is a difference of close numbers."""
    guide = policy_guide(policy, False, injection="both")
    seen: set[tuple[torch.dtype, torch.dtype]] = set()
    plain = Latent.read

    def spy(self: Latent, states: Tensor) -> Tensor:
        seen.add((self.to_latent.weight.dtype, self.null.dtype))
        return plain(self, states)

    monkeypatch.setattr(Latent, "read", spy)
    towers: set[torch.dtype] = set()
    guide.encoder.embedding.register_forward_hook(lambda module, given, out: towers.add(out.dtype))
    train_guide(
        guide,
        pairs(guide),
        GuideTrainSettings(1, 4, 1e-3, 10_000, GuideLoss()),
        compute_dtype=torch.bfloat16,
        device=CPU,
        seed=0,
    )
    assert seen == {(torch.float32, torch.float32)} and torch.bfloat16 in towers
    state = distributed.full_state(guide, None)
    assert {p.dtype for p in state.values()} == {torch.float32}


if __name__ == "__main__":
    exits.run(lambda argv: work(Path(argv[0])))
