"""Directions: a preference is planted, and whoever turns it round is seen. Swapped sides make a run
that works, trains and reports like any other.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
import torch
from caught import Caught, Run
from toy_context import config_of, open_toy

from ldalign.data.ragged import TokenLists
from ldalign.run import comparison, methods
from ldalign.run.compare_settings import CompareConfig
from ldalign.run.comparison import Arm, learning_rate
from ldalign.run.context import Context
from ldalign.run.stages import agreement, judged, pair_rewards, reward
from ldalign.run.stages.responses import Responses
from ldalign.system.config import load_config
from ldalign.system.files import read_jsonl, write_jsonl

ITERATION = 3


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return open_toy(tmp_path_factory.mktemp("directions"), "max_rows=16")


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Caught:
    return Caught(monkeypatch)


def context_of(toy: Context, folder: Path, *overrides: str) -> Context:
    config = config_of(folder, "max_rows=16", *overrides)
    return replace(toy, config=config, run=Run(folder))


def made(ctx: Context, caught: Caught, sampled: dict[int, list[list[int]]]) -> Namespace:
    """What an iteration of the method hands to its reference, when iteration t has sampled these
    responses (token ids).
    """

    def of(given: Namespace) -> Responses:
        tokens = TokenLists.of(sampled[given.t])
        return Responses(tokens, ["stop"] * len(tokens))

    caught(methods, "responses_stage", "read_responses", result=of)
    caught(methods, "reference_stage", result=lambda given: given.pairs)
    caught(methods, "file_hash", result=lambda given: given.name)
    return methods.SOURCES[ctx.config.method](ctx, ITERATION, Path("policy"), Path("start"))


def ids_of(responses: Sequence[Sequence[int]] | None) -> list[list[int]]:
    assert responses is not None
    return [list(response) for response in responses]


@pytest.mark.parametrize("method", ["ld_align", "spin"])
def test_the_real_response_wins(toy: Context, tmp_path: Path, caught: Caught, method: str) -> None:
    """Against the sample of its own row, under the iteration's policy; the guide and its distances
    see the same pairs, and weights and policy are made of what comes back.
    """
    ctx = context_of(toy, tmp_path, f"method={method}", "guide.retrain=false")
    samples = [[7, n] for n in range(16)]
    first = [[8, n] for n in range(16)]
    caught(methods, "guide_stage", result=Path("guide"))
    caught(methods, "distances_stage", result=lambda given: given.pairs)
    pairs = made(ctx, caught, {ITERATION: samples, 0: first}).pairs
    calls = caught.calls
    assert ids_of(pairs.real) == ids_of(ctx.used[1].real)
    assert ids_of(pairs.generated) == ids_of(calls.reference_stage.pairs.generated) == samples
    assert calls.reference_stage.policy == Path("policy")
    if method == "ld_align":
        assert ids_of(calls.distances_stage.pairs.generated) == samples
        assert calls.distances_stage.start == calls.guide_stage.start == Path("start")
        # the first iteration's guide was trained on the first iteration's samples
        assert calls.guide_stage.t == 0 and ids_of(calls.guide_stage.pairs.generated) == first


def test_the_previous_iteration_is_mixed_in(toy: Context, tmp_path: Path, caught: Caught) -> None:
    """Behind the iteration's own pairs, those of the iteration before it, and of no other."""
    ctx = context_of(toy, tmp_path, "method=spin", "mix_previous=true")
    sampled = {t: [[t + 1, n + 5] for n in range(16)] for t in range(ITERATION + 1)}
    found = made(ctx, caught, sampled)
    assert ids_of(found.pairs.generated) == sampled[ITERATION] + sampled[ITERATION - 1]
    assert found.pairs.ids[0] == ctx.used[0][0].id
    assert found.pairs.ids[16] == f"{ctx.used[0][0].id} of iteration {ITERATION - 1}"
    assert found.made_from["previous responses"] == "iteration_2/responses/responses.jsonl"


@pytest.mark.parametrize("method", ["self_reward", "rlaif"])
def test_what_the_judge_prefers_wins(
    toy: Context, tmp_path: Path, caught: Caught, method: str
) -> None:
    """The judge likes the second of the first row's samples, the first of the second's, and of the
    third row neither.
    """
    ctx = context_of(toy, tmp_path, f"method={method}", "judge=policy")
    samples = [[7, n] for n in range(32)]
    preferences = [0.1, 0.9, 0.5, math.nan] + [0.0, 1.0] * 6
    caught(methods, "judged_stage", result=preferences)
    pairs = made(ctx, caught, {ITERATION: samples}).pairs
    winners = [1, 2, *(n for i in range(4, 16, 2) for n in (2 * i + 1, 2 * i + 2))]
    losers = [n ^ 1 for n in winners]
    assert ids_of(pairs.real) == [[7, n] for n in winners]
    assert ids_of(pairs.generated) == [[7, n] for n in losers]
    assert caught.calls.responses_stage.samples == 2
    assert caught.calls.judged_stage.judge == ("policy" if method == "self_reward" else None)


def test_the_rejected_answer_loses(toy: Context, tmp_path: Path, caught: Caught) -> None:
    ctx = context_of(toy, tmp_path, "method=dpo", "iterations=1")
    rejected = TokenLists.of([[9, n] for n in range(len(ctx.train.rows))])
    ctx = replace(ctx, train=replace(ctx.train, rejected=rejected))
    pairs = made(ctx, caught, {}).pairs
    assert ids_of(pairs.real) == ids_of(ctx.used[1].real)
    assert ids_of(pairs.generated) == [[9, n] for n in range(16)]


class Longer:
    """A judge that likes the longer answer."""

    def prefer(
        self, rows: Any, first: Sequence[str], second: Sequence[str], path: Any = None
    ) -> Any:
        self.rows = [row.id for row in rows]
        return [
            math.nan if len(a) == len(b) else float(len(a) > len(b))
            for a, b in zip(first, second, strict=True)
        ]


def test_the_judge_reads_the_first_sample_first(
    toy: Context, tmp_path: Path, caught: Caught
) -> None:
    """The longer of two samples is preferred, wherever it stands; in the file as in the result."""
    ctx = context_of(toy, tmp_path, "method=rlaif", "judge=policy")
    texts = ["long one", "l"] * 8 + ["s", "short no more"] * 8
    caught(judged, "open_judge", result=Longer())
    caught(judged, "response_texts", result=texts)
    caught(judged, "file_hash", "hash_model_folder", result="")
    got = judged.judged_stage(ctx, 0, ctx.start, Responses(TokenLists.of([]), []), None)
    assert got == [1.0] * 8 + [0.0] * 8
    written = read_jsonl(tmp_path / "iteration_0/judged/judged.jsonl")
    assert [line["preference"] for line in written] == got
    assert [line["id"] for line in written] == [row.id for row in ctx.used[0]]


def test_the_farther_sample_is_held_against_the_judge(
    toy: Context, tmp_path: Path, caught: Caught
) -> None:
    """The first samples are the longer ones, which the judge likes, and are nearer: all agree; by
    the length of a sample, which calls the longer one worse, none does.
    """
    ctx = context_of(toy, tmp_path)
    count = len(ctx.heldout.rows)
    sides = (("a long answer", [3] * 6), ("no", [3] * 2))
    samples = [
        {"id": row.id, "response": text, "n_tokens": len(ids), "token_ids": ids}
        for row in ctx.heldout.rows
        for text, ids in sides
    ]
    near_and_far = torch.tensor([1.0, 2.0] * count)
    caught(agreement, "agreement_samples_stage", result=samples)
    caught(agreement, "open_judge", result=Longer())
    caught(agreement, "hash_file", "hash_model_folder", "guide_hash", result="")
    caught(agreement, "judge_parents", result={})
    lengths = torch.tensor([6.0, 2.0] * count)
    measured = [("distance", near_and_far), ("length", lengths)]
    caught(agreement, "_measured", result=measured)
    found = agreement.agreement_stage(ctx, ctx.start, None, ctx.start)
    assert found["agreement/rate"] == 1.0 and found["agreement/rows"] == count > 4
    assert found["agreement/length_rate"] == 0.0 and found["agreement/length_behind"] == 1.0


class Rewards:
    """A reward model that gives an answer its length."""

    def __init__(self, *_: Any) -> None:
        pass

    def score(
        self, questions: Sequence[str], answers: Sequence[str], ids: Any, path: Path
    ) -> torch.Tensor:
        assert len(questions) == len(answers) == len(ids)
        return torch.tensor([float(len(answer)) for answer in answers])


def test_the_rewards_of_pairs(toy: Context, tmp_path: Path, caught: Caught) -> None:
    """Of sampled and of real responses, each under its own name."""
    ctx = context_of(toy, tmp_path, "reward=one")
    answers = [{"response": "x" * n} for n in range(16)]
    (tmp_path / "iteration_0/responses").mkdir(parents=True)
    write_jsonl(tmp_path / "iteration_0/responses/responses.jsonl", answers)
    caught(pair_rewards, "find_model", "hash_model_folder", result="")
    caught.patch.setattr(pair_rewards, "RewardModel", Rewards)
    pair_rewards.pair_rewards_stage(ctx, 0)
    written = read_jsonl(tmp_path / "iteration_0/pair_rewards/rewards.jsonl")
    assert [line["generated"] for line in written] == list(range(16))
    assert [line["real"] for line in written] == [len(row.response) for row in ctx.used[0]]


def test_the_rewards_of_policies(toy: Context, tmp_path: Path, caught: Caught) -> None:
    """The second policy's answers are the longest of all, the first one's the shortest: it beats
    the real responses and the first policy on every row, and the first beats nobody.
    """
    ctx = context_of(toy, tmp_path, "reward=one")
    caught(reward, "find_model", "hash_model_folder", result="")
    caught.patch.setattr(reward, "RewardModel", Rewards)
    figures = {}
    for name, length in (("start", 0), ("iteration_0", 900)):
        (tmp_path / name / "evaluation").mkdir(parents=True)
        said = [{"greedy": "x" * length} for _ in ctx.heldout.rows]
        write_jsonl(tmp_path / name / "evaluation/answers.jsonl", said)
        figures[name] = reward.reward_stage(ctx, name, "start")
    first, second = figures["start"], figures["iteration_0"]
    assert (first["reward/mean"], first["reward/win_rate"]) == (0, 0)
    assert "reward/win_rate_first" not in first
    assert (second["reward/mean"], second["reward/win_rate"]) == (900, 1)
    assert second["reward/win_rate_first"] == 1 and second["reward/real"] == first["reward/real"]


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_best_learning_rate_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    """Of three, wherever it stands: the one whose policy answers most validation rows rightly."""
    rates = [1e-4, 2e-4, 3e-4]
    overrides = [f"compare.learning_rates={json.dumps(rates)}", "training.steps=3"]
    config = load_config(CompareConfig, None, overrides)
    folders = {
        comparison.last_iteration(
            comparison.arm_folder(config, Arm("spin", "spin"), 0, rate), config
        ): rate
        for rate in rates
    }
    assert len(folders) == 3
    right = {rate: 0.9 if i == best else 0.4 for i, rate in enumerate(rates)}

    def read(folder: Path) -> dict[str, dict[str, float]]:
        return {"row": {"sampled": right[folders[folder]], "greedy": 0.5, "nll": 1.0}}

    monkeypatch.setattr(comparison, "is_evaluated", lambda *_: True)
    monkeypatch.setattr(comparison, "validation_ids", lambda _: (["row"], []))
    monkeypatch.setattr(comparison, "read_answers", read)
    assert learning_rate(config, Arm("spin", "spin")) == rates[best]
