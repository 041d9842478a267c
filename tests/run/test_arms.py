"""What a comparison sets beside LD-Align, as runs of their own: SFT on the prompts that have pairs,
and weights by the checker's verdict.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from runs import ROOT
from toy_context import config_of, open_toy, rows_file

from ldalign.data.embedded import check
from ldalign.run.folder import stage_names
from ldalign.run.stages import distances
from ldalign.system import distributed
from ldalign.system.errors import InputError
from ldalign.system.files import read_jsonl
from ldalign.train import align

SMALL = (
    "sft.epochs=0",
    "max_rows=24",
    "global_batch=8",
    "iterations=1",
    "evaluation.rows=0",
    "continual_sft.epochs=0",
    "report=table",
)


def arguments(run: Path, cache: Path, *more: str) -> list[str]:
    config = str(ROOT / "configs/toy.yaml")
    return ["--config", config, f"run={run}", f"cache={cache}", *SMALL, *more]


def given(path: Path, rows: Sequence[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"responses={path}"


def first_rows(cache: Path) -> list[dict[str, str]]:
    """The rows that SMALL trains on: id, kind, answer and the data's response."""
    rows, _ = open_toy(cache, *SMALL).used
    distributed.stop()
    return [
        {"id": r.id, "kind": str(r.kind), "answer": str(r.answer), "response": r.response}
        for r in rows
    ]


def test_sft_on_the_prompts_that_have_pairs(
    tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    """Of 24 rows 10 are answered as the data does; it trains on the other 14, and so does SPIN."""
    rows = first_rows(toy_cache)
    texts = [r["response"] if i < 10 else f"Some answer {i}." for i, r in enumerate(rows)]
    responses = [{"id": r["id"], "response": t} for r, t in zip(rows, texts, strict=True)]
    file = given(tmp_path / "responses.jsonl", responses)
    trained = {}
    for name, keys in {
        "all": ("method=sft",),
        "pairs": ("method=sft", "sft_prompts=pairs", file),
        "spin": ("method=spin", file),
    }.items():
        run = tmp_path / name
        align.main(arguments(run, toy_cache, *keys))
        trained[name] = json.loads((run / "iteration_0/policy/summary.json").read_text())
    assert stage_names(tmp_path / "all") == ["data", "iteration_0/policy"]
    assert stage_names(tmp_path / "pairs") == [
        "data",
        "iteration_0/responses",
        "iteration_0/policy",
    ]
    assert [trained[name]["pairs"] for name in trained] == [24, 14, 14]
    lengths = [len(x["token_ids"]) for x in read_jsonl(tmp_path / "spin" / RESPONSES)]
    assert len(lengths) == 24
    # It is supervised training: of the same real responses as SPIN's, no losers.
    real = [
        json.loads((tmp_path / n / POLICY).read_text())["len/chosen"] for n in ("pairs", "spin")
    ]
    assert real[0] == real[1] != trained["all"]["len/chosen"]
    assert "nll" in trained["pairs"] and "rewards/margins" not in trained["pairs"]


RESPONSES, POLICY = "iteration_0/responses/responses.jsonl", "iteration_0/policy/summary.json"


def test_sft_on_pairs_may_have_iterations(tmp_path: Path) -> None:
    """Each samples from the policy before, so its prompts are not the same."""
    config = config_of(tmp_path, "method=sft", "sft_prompts=pairs", "iterations=2")
    planned = align.planned(config)
    assert "iteration_1/responses" in planned and "iteration_1/reference" not in planned
    assert "iteration_0/distances" not in planned and "guide" not in planned


def test_weights_of_the_checker(tmp_path: Path, toy_cache: Path, in_process: None) -> None:
    """Right losers in other words, wrong ones, and one as the data has it; c = 1 leaves those that
    are right without any weight, which harms nothing.
    """
    rows = first_rows(toy_cache)
    wordings = [
        r["response"]
        if i == 0
        else f"So it is.\nAnswer: {r['answer']}"
        if i % 3 == 0
        else "No idea."
        for i, r in enumerate(rows)
    ]
    verdicts = [check(r["kind"], r["answer"], text) for r, text in zip(rows, wordings, strict=True)]
    assert 3 < sum(verdicts) < 12 and verdicts[0]
    responses = [{"id": r["id"], "response": t} for r, t in zip(rows, wordings, strict=True)]
    file = given(tmp_path / "responses.jsonl", responses)
    for contrast in (0.5, 1.0):
        run = tmp_path / f"run-{contrast}"
        keys = ("weights=oracle", f"oracle_contrast={contrast}", file)
        align.main(arguments(run, toy_cache, *keys))
        assert "guide" not in stage_names(run)
        found = read_jsonl(run / "iteration_0/distances/distances.jsonl")
        far = [1 - contrast if right else 1 + contrast for right in verdicts]
        assert [r["distance"] for r in found] == pytest.approx(far)
        mean = sum(far[1:]) / 23
        assert [r["weight"] for r in found] == pytest.approx([0.0, *(d / mean for d in far[1:])])
        steps = read_jsonl(run / "iteration_0/policy/metrics.jsonl")
        assert len(steps) >= 2 and all(abs(step["loss"]) < 10 for step in steps)
        parents = json.loads((run / "iteration_0/distances/manifest.json").read_text())["parents"]
        assert parents["oracle_contrast"] == contrast and "guide" not in parents


def test_what_did_not_end_is_no_right_answer(
    tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    ctx = open_toy(toy_cache, *SMALL, f"run={tmp_path / 'run'}")
    path = ctx.run.path / RESPONSES
    path.parent.mkdir(parents=True)
    records = [
        {"response": row.response, "finish_reason": "length" if i % 2 else "stop"}
        for i, row in enumerate(ctx.used[0])
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert distances.right_losers(ctx, 0) == [True, False] * 12


def test_the_oracle_needs_a_checker(tmp_path: Path, toy_cache: Path, in_process: None) -> None:
    file = rows_file(tmp_path / "rows.jsonl", 60)
    with pytest.raises(InputError, match="weights=oracle: 24 of 24 rows name no checker") as raised:
        open_toy(toy_cache, *SMALL, f"run={tmp_path / 'run'}", f"data={file}", "weights=oracle")
    assert "\n" not in str(raised.value) and "data=embedded" in str(raised.value)
    open_toy(toy_cache, *SMALL, f"run={tmp_path / 'other'}", f"data={file}", "weights=length")
