"""The stage guide in runs: which guide is trained, on which tokens, and the gate; and the weights
that need none.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_bert import write_bert
from runs import ROOT, run_script
from tiny_guides import policy_guide, text_guide
from toy_context import config_of, open_toy

from ldalign.data.pairs import Pair, with_losers
from ldalign.evaluation.embedding import EmbeddingModel
from ldalign.models.guide import END, Guide
from ldalign.models.guide_folder import save_guide
from ldalign.models.toy import write_toy_model
from ldalign.models.weights import load_model
from ldalign.run.context import Context
from ldalign.run.folder import stage_names
from ldalign.run.stages import guide as stage
from ldalign.run.stages.guide import (
    GUIDE_STAGE,
    guide_config,
    guide_pairs,
    guide_plan,
    guide_stage,
    train_settings,
)
from ldalign.system import distributed
from ldalign.system.errors import InputError, NumericsError
from ldalign.system.files import read_jsonl
from ldalign.train import align
from ldalign.train import guide as guide_script

CONFIG = ROOT / "configs/toy.yaml"
SMALL = (
    "max_rows=24",
    "max_new_tokens=8",
    "global_batch=8",
    "sft.epochs=0",
    "iterations=1",
    "continual_sft.epochs=0",
    "evaluation.rows=0",
    "report=table",
)
# Steps that move nothing: the latent stays without use, to the bit.
USELESS = ("guide.learning_rate=1e-12", "guide.contrast=0", "guide.latent_dropout=0.9")


def arguments(run: Path, cache: Path, *more: str) -> list[str]:
    return ["--config", str(CONFIG), f"run={run}", f"cache={cache}", *SMALL, *more]


# ------------------------------------------------------------------------------------ which guide


@pytest.fixture
def ctx(toy_cache: Path, in_process: None) -> Context:
    """The toy run, without what its config says of the guide's size."""
    return open_toy(toy_cache, "guide.backbone=auto", *SMALL)


def with_keys(ctx: Context, **keys: Any) -> Context:
    guide = replace(ctx.config.guide, **keys)
    return replace(ctx, config=replace(ctx.config, guide=guide))


def test_which_guide_is_trained(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto: the policy, frozen; a new one where rows are many and the policy is large; what is
    given, where a folder is.
    """
    plans = {
        (): ("policy", True),
        (("towers", "trained"),): ("policy", False),
        (("backbone", "policy"),): ("policy", True),
        (("backbone", "gpt2"),): ("new", False),
        (("folder", "some/gpt2"),): ("gpt2", True),
        (("folder", "some/gpt2"), ("towers", "trained")): ("gpt2", False),
    }
    for keys, (towers, frozen) in plans.items():
        plan = guide_plan(with_keys(ctx, **dict(keys)))
        assert (plan.towers, plan.frozen) == (towers, frozen), keys
        assert plan.reads_ids == (towers == "policy")
    monkeypatch.setattr(stage, "MANY", 23)
    assert guide_plan(ctx).towers == "policy"  # not large
    monkeypatch.setattr(stage, "LARGE", 1e3)
    assert guide_plan(ctx).towers == "new" and not guide_plan(ctx).frozen
    assert "24 rows suffice for a new one" in guide_plan(ctx).why
    assert guide_plan(with_keys(ctx, backbone="policy")).towers == "policy"
    assert guide_plan(with_keys(ctx, towers="frozen")).towers == "policy"  # new ones are trained
    monkeypatch.setattr(stage, "MANY", 24)
    assert guide_plan(ctx).towers == "policy"  # not many


def test_what_the_config_leaves_to_the_towers(ctx: Context) -> None:
    """Token dropout, learning rate and the latent's map and norm: by what is trained."""

    def found(**keys: Any) -> tuple[float, float, str, str]:
        asked = with_keys(ctx, **keys)
        plan = guide_plan(asked)
        settings, norm = train_settings(asked, plan), guide_config(asked, plan).latent_norm
        assert settings.loss.contrast == 10.0 and settings.epochs == asked.config.guide.epochs
        return settings.loss.token_dropout, settings.learning_rate, settings.latent_map, norm

    assert found() == (0.0, 4e-3, "fitted", "rms")
    assert found(towers="trained") == (1.0, 1e-4, "tuned", "rms")
    assert found(backbone="gpt2") == (1.0, 1e-3, "drawn", "none")
    assert found(readout="queries") == (0.0, 2e-3, "drawn", "rms")
    assert found(injection="prefix")[2] == found(injection="both")[2] == "drawn"
    assert found(latent_map="tuned", latent_norm="none")[2:] == ("tuned", "none")
    assert found(backbone="gpt2", latent_map="fitted", latent_norm="rms")[2:] == (
        "fitted",
        "rms",
    )
    assert found(token_dropout=0.3, learning_rate=0.01)[:2] == (0.3, 0.01)
    assert found(towers="trained", token_dropout=0.0)[0] == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("distance=pooled",), "distance: 'pooled' is written otherwise; give weights=pooled"),
        (("weights=pooled", "guide.retrain=true"), "weights=pooled come of no guide"),
        (("weights=pooled", "guide=some/guide"), "weights=pooled come of no guide"),
        (("weights=oracle", "distance=cosine"), "weights=oracle has a distance of its own"),
        (("oracle_contrast=0.5",), "oracle_contrast=0.5: is read by weights=oracle alone"),
        (("weights=oracle", "oracle_contrast=0"), "must be greater than 0, at most 1"),
        (("sft_prompts=pairs",), "sft_prompts=pairs: is for method=sft, not ld_align"),
        (("method=sft", "iterations=2"), "has the same pairs in each"),
        (("weights=semantic", "judge.folder=x", "distance=cosine"), "a distance of its own"),
        (("weights=semantic",), "weights=semantic.*judge.folder"),
        (("guide.bag_of_words=1", "guide.injection=prefix"), "guide.injection=both"),
        (("guide.readout=queries", "guide.latent_map=tuned"), "tuned: is fitted to mean states"),
        (
            ("guide.injection=both", "guide.latent_map=fitted"),
            "guide.injection=output, or leave it",
        ),
        (
            ("guide.latent_width=1",),
            "one number has no direction; the nearest: guide.latent_width=2",
        ),
        (("guide.latent_dropout=1",), "guide.latent_dropout"),
        (("guide.towers=frozen", "guide.backbone=gpt2"), "must be trained; give guide.folder or"),
    ],
)
def test_what_contradicts_itself_is_refused(
    given: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        config_of(tmp_path, *given)


def test_none_is_a_value_where_it_is_one(tmp_path: Path) -> None:
    """On the command line, where `none` is else what Python users write for null."""
    assert config_of(tmp_path, "guide.latent_norm=none").guide.latent_norm == "none"
    assert config_of(tmp_path, "guide.latent_norm=null").guide.latent_norm is None
    assert config_of(tmp_path, "guide.latent_map=none").guide.latent_map is None


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_a_guide_that_cannot_read_so_much_is_refused_before_any_stage(
    tmp_path: Path, toy_cache: Path, in_process: None, flags: tuple[str, ...]
) -> None:
    """The toy reads 512 tokens."""
    run = tmp_path / "run"
    words = arguments(run, toy_cache, "guide.backbone=policy", "guide.max_tokens=513", *flags)
    with pytest.raises(InputError, match=r"guide.max_tokens=513: .* has room for 512; lower it"):
        align.main(words)
    assert not (run / "iteration_0").exists()


def test_no_guide_is_planned_where_none_is_read(tmp_path: Path, toy_cache: Path) -> None:
    kinds = [(f"weights={name}",) for name in ("pooled", "oracle", "uniform", "length")]
    for given in (*kinds, ("weights=semantic", "judge.folder=x")):
        config = config_of(tmp_path, *given)
        assert not config.needs_guide and "guide" not in align.planned(config)
        assert "iteration_0/distances" in align.planned(config)
        with pytest.raises(InputError, match="no guide is read; leave it out"):
            guide_script.main(arguments(tmp_path / "run", toy_cache, *given))
    config = config_of(tmp_path, "distance=cosine", "weights=shuffled")
    assert config.needs_guide and "guide" in align.planned(config)


# ----------------------------------------------------------------------------------- what it reads


def losers(ctx: Context) -> list[Pair]:
    """The pairs against other rows' responses, spelled letter by letter as a sampled response may
    be: every third is empty, or has lost its end.
    """
    rows, pairs = ctx.used
    made = []
    for i, row in enumerate([*rows[1:], rows[0]]):
        ids = [token for letter in row.response for token in ctx.tokenizer.encode(letter)]
        made.append([[*ids, ctx.tokenizer.end_ids[0]], ids, []][i % 3])
    return with_losers(pairs, made, ctx.config.max_length)


def test_a_guide_of_the_policy_reads_the_ids_that_dpo_trains_on(ctx: Context) -> None:
    """It used to be given texts, decoded and encoded again, with the user's turn alone and an end
    token after every response: it measured other tokens than the loss is made of.
    """
    chosen = losers(ctx)
    guide = policy_guide(ctx.start, max_tokens=None)
    read = guide_pairs(ctx, guide, ctx.used[0], chosen)
    for pair, given in zip(read, chosen, strict=True):
        assert (pair.id, pair.prompt, pair.real) == (given.id, given.prompt, given.real)
        assert pair.generated == (given.generated or [guide.end_id])
    ends = [bool(p.generated) and p.generated[-1] == guide.end_id for p in read]
    assert ends == [True, False, True] * 8  # an empty one is an end token alone
    asked = "Be brief."
    assert all(asked in ctx.tokenizer.decode(pair.prompt) for pair in read)
    cut = guide_pairs(ctx, policy_guide(ctx.start, max_tokens=20), ctx.used[0], chosen)
    for pair, given in zip(cut, chosen, strict=True):
        assert pair.prompt == given.prompt[-len(pair.prompt) :]
        assert len(pair.prompt) + max(map(len, pair.responses)) <= 20
        assert pair.real == given.real[: len(pair.real)]


def shown(guide: Guide, ids: Sequence[int]) -> str:
    return guide.tokenizer.decode(list(ids), skip_special_tokens=False)


def test_a_text_guide_reads_the_history_and_the_ends(ctx: Context) -> None:
    """The system turn, which was left out, and an end token where the policy's ids have one."""
    chosen, (rows, _) = losers(ctx), ctx.used
    guide = text_guide(texts=[row.response for row in rows], max_tokens=None)
    read = guide_pairs(ctx, guide, rows, chosen)
    decode = ctx.tokenizer.decode
    for row, pair, given in zip(rows, read, chosen, strict=True):
        question = row.history[-1]["content"]
        assert shown(guide, pair.prompt) == f"system: Be brief.\n\nuser: {question}\n\n"
        assert shown(guide, pair.real) == row.response + END
        ended = not given.generated or given.generated[-1] == ctx.tokenizer.end_ids[0]
        text = decode(given.generated or [])
        assert shown(guide, pair.generated or []) == text + (END if ended else "")
        assert [y.count(guide.end_id) for y in pair.responses] == [1, int(ended)]


def test_a_guide_with_another_chat_tokenizer_reads_its_own_template(
    ctx: Context, tmp_path: Path
) -> None:
    """A trained guide of another policy: the text of the responses, in its own ids."""
    folder = write_toy_model(tmp_path / "other")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocabulary["model"]["merges"] = vocabulary["model"]["merges"][:-40]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    guide = policy_guide(folder, max_tokens=None)
    chosen, (rows, _) = losers(ctx), ctx.used
    read = guide_pairs(ctx, guide, rows, chosen)
    assert any(pair.real != given.real for pair, given in zip(read, chosen, strict=True))
    for row, pair, given in zip(rows, read, chosen, strict=True):
        assert shown(guide, pair.prompt) == ctx.tokenizer.decode(given.prompt, False)
        assert shown(guide, pair.real) == f"{row.response}<|im_end|>"
        ended = not given.generated or given.generated[-1] == guide.end_id
        assert (pair.responses[1][-1] == guide.end_id) == ended
        assert sum(y.count(guide.end_id) for y in pair.responses) == 1 + ended


# -------------------------------------------------------------------------------------------- gate


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        (
            {"differing": 9.0, "sibling_gain": 0.1, "sibling_gain_se": 0.2},
            "tell a row's two responses",
        ),
        ({"differing": 0.0, "sibling_gain": 0.0, "sibling_gain_se": 0.0}, "of 0 differ"),
        ({"differing": 9.0, "sibling_gain": 1.0, "sibling_gain_se": 0.2}, None),
    ],
)
def test_a_trained_guide_that_is_given_meets_the_gate(
    ctx: Context,
    tmp_path: Path,
    figures: dict[str, float],
    message: str | None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By the figures beside it; without them it is said that nothing is known."""
    save_guide(text_guide(), tmp_path)
    given = with_keys(ctx, folder=str(tmp_path), gate="stop")
    pairs = losers(ctx)
    assert guide_stage(given, 0, ctx.start, pairs) == tmp_path
    assert "no held-out figures (summary.json)" in capfd.readouterr().err
    (tmp_path / "summary.json").write_text(json.dumps({"rows": 9, **figures}))
    if message is None:
        assert guide_stage(given, 0, ctx.start, pairs) == tmp_path
        assert "WARNING" not in capfd.readouterr().err
        return
    with pytest.raises(NumericsError, match=message):
        guide_stage(given, 0, ctx.start, pairs)
    assert guide_stage(with_keys(given, gate="warn"), 0, ctx.start, pairs) == tmp_path
    assert message in capfd.readouterr().err


def test_a_guide_that_tells_nothing_apart_stops_the_run(
    tmp_path: Path, toy_cache: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 4 and one line, before a policy is trained; the guide stays. Then a warning."""
    run = tmp_path / "run"
    stop = arguments(run, toy_cache, *USELESS, "guide.gate=stop")
    done = run_script(ROOT / "train/align.py", *stop)
    assert done.returncode == 4, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("ldalign: error")]
    assert line.startswith(
        "ldalign: error: guide: the guide does not tell a row's two responses apart: its own "
        "latent over the other's is worth +0.000 +- 0.000 nats a response, on 2 held-out rows"
    )
    assert "max_rows" in line and "guide.gate=warn goes on" in line and "Traceback" not in line
    assert stage_names(run) == ["data", "iteration_0/responses", "guide"]
    figures = json.loads((run / "guide/summary.json").read_text())
    assert figures["sibling_gain"] == 0.0 and figures["differing"] == 2
    made = (run / "guide/manifest.json").stat().st_mtime_ns
    with pytest.raises(NumericsError, match="does not tell a row's two responses apart") as raised:
        align.main(stop)  # the finished guide is looked at again
    assert raised.value.exit_code == 4 and "\n" not in str(raised.value)
    capfd.readouterr()
    align.main([*stop[:-1], "guide.gate=warn"])
    said = capfd.readouterr().err
    assert said.count("WARNING: guide: the guide does not tell a row's two responses apart") == 1
    assert stage_names(run)[-1] == "iteration_0/policy"
    assert (run / "guide/manifest.json").stat().st_mtime_ns == made


def test_a_guide_that_tells_them_apart_passes(
    tmp_path: Path, toy_cache: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """The policy's own tower, on samples of a random policy, which anything tells from the data."""
    run = tmp_path / "run"
    keys = ("guide.backbone=auto", "guide.gate=stop", "guide.epochs=8", "guide.global_batch=4")
    more = ("guide.learning_rate=1e-2", "guide.heldout_fraction=0.3", "max_rows=48")
    align.main(arguments(run, toy_cache, *keys, *more))
    assert stage_names(run)[-1] == "iteration_0/policy"
    figures = json.loads((run / "guide/summary.json").read_text())
    assert figures["sibling_gain"] >= 2 * figures["sibling_gain_se"] > 0
    said = capfd.readouterr().err
    assert "the guide does not tell" not in said
    assert "its towers are the policy that self-play starts from" in said
    assert f"own latent over the sibling's {figures['sibling_gain']:+.3f} +-" in said
    rows = read_jsonl(run / "iteration_0/distances/distances.jsonl")
    assert len(rows) == 48 and len({r["distance"] for r in rows}) > 40
    last = read_jsonl(run / "guide/metrics.jsonl")[-1]
    assert last["sibling_gain"] == figures["sibling_gain"]


def test_a_trained_guide_that_is_given_is_taken_as_it_is(
    tmp_path: Path, toy_cache: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """No guide is trained, so there is nothing to stop at."""
    save_guide(text_guide(), tmp_path / "given")
    run = tmp_path / "run"
    align.main(arguments(run, toy_cache, f"guide={tmp_path / 'given'}", "guide.gate=stop"))
    assert f"guide: the trained one in {tmp_path / 'given'}, as it is" in capfd.readouterr().err
    assert GUIDE_STAGE.folder(0) not in stage_names(run)
    assert stage_names(run)[-1] == "iteration_0/policy"


# ------------------------------------------------------------------------------- without any guide


def of_run(run: Path, cache: Path, given: Sequence[str]) -> tuple[Context, list[Pair]]:
    """The context of a finished run, and its first iteration's pairs."""
    ctx = open_toy(cache, *SMALL, *given)
    sampled = read_jsonl(run / "iteration_0/responses/responses.jsonl")
    ids = [r["token_ids"] for r in sampled]
    return ctx, with_losers(ctx.used[1], ids, ctx.config.max_length)


def check_weights(run: Path, expected: Sequence[float]) -> None:
    """The distances of a run are these, and its weights are they over their mean."""
    rows = read_jsonl(run / "iteration_0/distances/distances.jsonl")
    assert [r["distance"] for r in rows] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert max(expected) > 1.2 * sorted(expected)[2]
    mean = sum(r["distance"] for r in rows) / len(rows)
    assert [r["weight"] for r in rows] == pytest.approx([r["distance"] / mean for r in rows])
    assert "guide" not in stage_names(run) and not list(run.glob("**/guide"))


def test_pooled_distances_need_no_guide(tmp_path: Path, toy_cache: Path, in_process: None) -> None:
    """They are those of the start policy's mean states, in the second iteration too."""
    sft = ("sft.epochs=1", "sft.rows=16", "sft.global_batch=8")
    run, given = tmp_path / "run", ("weights=pooled", "iterations=2", "dtype=float32", *sft)
    align.main(arguments(run, toy_cache, *given))
    _, pairs = of_run(run, toy_cache, given)
    model = load_model(run / "sft/policy", torch.float32)

    def mean_state(prompt: list[int], response: list[int]) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            states = model(ids, head=lambda hidden, weight: hidden)
        assert isinstance(states, torch.Tensor)
        return states[len(prompt) :].double().mean(0)

    expected = [
        float((mean_state(p.prompt, p.real) - mean_state(p.prompt, p.responses[1])).norm())
        for p in pairs
    ]
    check_weights(run, expected)
    parents = [
        json.loads((run / f"iteration_{t}/distances/manifest.json").read_text())["parents"]
        for t in (0, 1)
    ]
    assert "guide" not in parents[0] and parents[0]["weights"] == "pooled"
    assert parents[0]["policy"] == parents[1]["policy"]  # both measured by the start
    distributed.stop()


def test_semantic_weights_need_no_guide(tmp_path: Path, toy_cache: Path, in_process: None) -> None:
    """They are those of the sentence embeddings of both texts."""
    bert, run = write_bert(tmp_path / "bert"), tmp_path / "run"
    given = ("weights=semantic", f"judge.folder={bert}")
    align.main(arguments(run, toy_cache, *given))
    ctx, pairs = of_run(run, toy_cache, given)
    model = EmbeddingModel(bert, torch.device("cpu"))
    texts = [[ctx.tokenizer.decode(p.responses[side]) for p in pairs] for side in (0, 1)]
    a, b = (model.embed(column).double() for column in texts)
    check_weights(run, (1 - torch.cosine_similarity(a, b)).tolist())
    parents = json.loads((run / "iteration_0/distances/manifest.json").read_text())["parents"]
    assert {"judge.folder", "weights", "responses", "data"} <= parents.keys()
    assert "guide" not in parents and "policy" not in parents
    distributed.stop()
