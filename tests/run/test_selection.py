"""Which weights a stage writes, which iteration is a run's result, and by which rows that is."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import ROOT, run_script
from safetensors.torch import load_file
from toy_context import config_of, open_toy, rows_file

from ldalign.data.rows import Row
from ldalign.evaluation import held_out
from ldalign.generation.sampling import Response, Sampling
from ldalign.models.toy import toy_model
from ldalign.models.weights import load_model
from ldalign.run import dry_run, selection
from ldalign.run.compare_settings import CompareConfig
from ldalign.run.context import find_model, open_policy
from ldalign.run.disk import at_worst, check_disk
from ldalign.run.manifest import CHECKPOINTS
from ldalign.run.settings import RunConfig
from ldalign.run.stages.policy import POLICY_STAGE
from ldalign.system.config import load_config
from ldalign.system.errors import InputError
from ldalign.system.files import PARTIAL, read_jsonl
from ldalign.system.metrics import MetricsLog
from ldalign.train import align, evaluate
from ldalign.training.scoring import response_logps

CPU = torch.device("cpu")
# One iteration without SFT, of 6 steps; with FAST they overshoot: the NLL falls, then rises.
SHORT = (
    "method=sft",
    "sft.epochs=0",
    "continual_sft.epochs=0",
    "iterations=1",
    "training.epochs=2",
    "max_rows=48",
    "evaluation.samples=0",
    "validation.every=1",
)
FAST = ("learning_rate=0.05", "training.schedule=constant")
TIMES = re.compile(r"seconds|tokens_per_second|time/step|memory/peak_gib")


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def one_rank(in_process: None) -> Iterator[None]:
    yield


def run(folder: Path, cache: Path, *arguments: str) -> Path:
    config = ROOT / "configs/toy.yaml"
    where = [f"run={folder}", f"cache={cache}", "report=table"]
    align.main(["--config", str(config), *where, *arguments])
    return folder


def summary(folder: Path, name: str = "iteration_0") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name / "policy/summary.json").read_text())
    return found


def weights(folder: Path, name: str = "iteration_0") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "policy/model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def selected(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "selected.json").read_text())
    return found


def now_and_then(row: Row, text: str, response: Response) -> bool:
    """A verdict that depends on row and answer; a random model is never really right."""
    return (sum(map(ord, row.id)) + sum(response.ids)) % 3 == 0


def nll(policy: Path, pairs: Any) -> float:
    """Nats a token of a policy folder on real responses, by the scoring path."""
    logps = response_logps(load_model(policy, torch.float32), pairs, 2048, CPU)[:, 0]
    return float(-logps.sum() / pairs.real.lengths.sum())


# ----------------------------------------------------------------------------------------- the rows


def test_the_reported_rows_stay_what_they_are(tmp_path: Path) -> None:
    """Of the embedded data and of a file: rows for validation come beside evaluation.rows, and are
    neither reported nor trained on.
    """
    path = rows_file(tmp_path / "rows.jsonl", 400)
    for data in ("embedded", str(path)):
        options = [f"data={data}", "heldout_fraction=0.2", "evaluation.rows=20"]
        plain = open_toy(tmp_path, *options, "validation.rows=0", f"run={tmp_path / 'a'}{data[:1]}")
        ctx = open_toy(tmp_path, *options, f"run={tmp_path / 'b'}{data[:1]}")
        reported, aside = ([r.id for r in s.rows] for s in (ctx.heldout, ctx.validation))
        assert reported == [row.id for row in plain.heldout.rows] and not plain.validation.rows
        assert (len(reported), len(aside)) == (20, 32)
        trained = {row.id for row in ctx.train.rows}
        assert not set(reported) & set(aside) and not trained & {*reported, *aside}


def test_the_dry_run_counts_the_copy_that_answers(tmp_path: Path) -> None:
    def said(*keys: str) -> bool:
        ctx = open_toy(tmp_path, *SHORT, *keys, write=False)
        page = dry_run.dry_run(ctx, ["iteration_0/policy"])
        assert "validation rows: 32" in page
        return "whole copy that answers in validation" in page

    assert said("validation.metric=accuracy") and not said()


def test_too_few_rows_are_refused_where_they_are_asked_for(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", 100)
    options = [f"data={path}", "heldout_fraction=0.2", "max_rows=40", "sft.rows=40"]
    ctx = open_toy(tmp_path, *options, f"run={tmp_path / 'a'}")
    assert len(ctx.heldout.rows) == 20 and not ctx.validation.rows and ctx.select == "last"
    with pytest.raises(
        InputError, match=r"^validation.rows=12: of 20 rows that can be held out 8 "
    ):
        open_toy(tmp_path, *options, f"run={tmp_path / 'b'}", "validation.rows=12")
    ctx = open_toy(tmp_path, *options, f"run={tmp_path / 'c'}", "validation.rows=10")
    assert len(ctx.heldout.rows) == len(ctx.validation.rows) == 10 and ctx.select == "best"
    for key in ("select=best", "validation.early_stop=2", "validation.metric=accuracy"):
        with pytest.raises(InputError, match=f"^{key}: no rows are set aside.* only 20 are held"):
            open_toy(tmp_path, *options, f"run={tmp_path / 'd'}", key)
    with pytest.raises(InputError, match="validation.metric=accuracy: a program can check none of"):
        more = ["validation.rows=10", "validation.metric=accuracy"]
        open_toy(tmp_path, *options, f"run={tmp_path / 'e'}", *more)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["evaluation.rows=0", "validation.rows=8"], "validation.rows=8: evaluation.rows=0 holds"),
        (["validation.rows=0", "select=best"], "select=best: no rows are set aside"),
        (["validation.rows=0", "validation.every=3"], "validation.every=3: no rows are set aside"),
        (["evaluation.rows=0", "validation.early_stop=1"], "validation.early_stop=1: no rows"),
    ],
)
def test_keys_that_contradict_each_other(tmp_path: Path, keys: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        config_of(tmp_path, *keys)


def test_a_comparison_takes_the_last(tmp_path: Path) -> None:
    compare = ROOT / "configs/compare-wordings.yaml"
    with pytest.raises(InputError, match="validation, select: all methods take the same steps"):
        load_config(CompareConfig, compare, ["validation.early_stop=2"])


def test_the_last_iteration_alone_is_measured(tmp_path: Path, toy_cache: Path) -> None:
    """The policies are those of a run that measures all, and the report leads with the last."""
    keys = [*SHORT, "method=spin", "iterations=2", "select=last"]
    every = run(tmp_path / "every", toy_cache, *keys)
    last = run(tmp_path / "last", toy_cache, *keys, "evaluation.iterations=last")
    assert not (last / "iteration_0/evaluation").exists()
    for name in ("iteration_0", "iteration_1"):
        one, two = weights(every, name), weights(last, name)
        assert all(torch.equal(one[key], two[key]) for key in one)
    found, whole = (
        json.loads((folder / "report/table.json").read_text())["result"] for folder in (last, every)
    )
    assert found["policy"] == "iteration_1" and found["sentence"] == whole["sentence"]
    config = config_of(tmp_path, *keys, "evaluation.iterations=last")
    names = [name for name in align.planned(config) if name.endswith("/evaluation")]
    assert names == ["start/evaluation", "iteration_1/evaluation"]
    with pytest.raises(InputError, match="evaluation.iterations=last: the best iteration by"):
        config_of(tmp_path, "iterations=2", "evaluation.iterations=last")


# ------------------------------------------------------------------------------ within an iteration


def test_a_stage_writes_its_best_weights(tmp_path: Path, toy_cache: Path) -> None:
    """The policy's own NLL on the validation rows is the best that was measured; with select=last
    it is the last, and the policy that of a run without validation.
    """
    folder = run(tmp_path / "best", toy_cache, *SHORT, *FAST)
    found = summary(folder)
    measured = {
        r["global_step"]: r["validation/nll"]
        for r in read_jsonl(folder / "iteration_0/policy/metrics.jsonl")
        if "validation/nll" in r
    }
    assert list(measured) == [*range(7)] and found["steps"] == 6
    step = min(range(1, 7), key=lambda s: measured[s])
    assert found["validation/step"] == step < 6 and found["validation/nll"] == measured[step]
    ctx = open_toy(toy_cache, *SHORT, *FAST, f"run={tmp_path / 'other'}")
    own = nll(folder / "iteration_0/policy", ctx.validation.pairs)
    assert own == pytest.approx(measured[step], abs=1e-5)
    assert not list(folder.rglob("best_*")) and not list(folder.rglob("answers"))
    last = run(tmp_path / "last", toy_cache, *SHORT, *FAST, "select=last")
    plain = tmp_path / "plain"
    run(plain, toy_cache, *(k for k in SHORT if "every" not in k), *FAST, "validation.rows=0")
    assert equal(weights(last), weights(plain)) and not equal(weights(last), weights(folder))
    assert summary(last)["validation/step"] == 6
    assert "validation/step" not in summary(plain)
    assert selected(last)["why"] == "the only iteration (select=last)"
    assert selected(plain)["why"] == "the only iteration (no rows are set aside for validation)"
    assert selected(plain)["validation"] == {}
    with pytest.raises(InputError, match="select was 'best', now 'last'"):
        run(folder, toy_cache, *SHORT, *FAST, "select=last")


@pytest.mark.parametrize("metric", ["nll", "accuracy"])
def test_killed_after_the_best_were_kept(
    tmp_path: Path, toy_cache: Path, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    """With a checkpoint a step, killed after each evaluation: every file of the stage is that of a
    run that nobody disturbed, but for its times.
    """
    keys = [*SHORT, *FAST, f"validation.metric={metric}", "checkpoint.steps=1"]
    if metric == "accuracy":  # of a random model, made to be right at times
        monkeypatch.setattr(held_out, "_correct", now_and_then)

    def content(folder: Path) -> dict[str, Any]:
        stage = folder / "iteration_0/policy"
        files = {p.name: p.read_bytes() for p in stage.iterdir() if p.suffix not in (".json",)}
        lines = read_jsonl(stage / "metrics.jsonl")
        timeless = [{k: v for k, v in r.items() if not TIMES.fullmatch(k)} for r in lines]
        own = {k: v for k, v in summary(folder).items() if k != "seconds"}
        return files | {"metrics.jsonl": timeless, "summary.json": own}

    expected = content(run(tmp_path / "whole", toy_cache, *keys))
    assert expected["summary.json"]["validation/step"] < 6
    write = MetricsLog.write
    for step in (1, 2, 4, 6) if metric == "nll" else (2,):

        def writing(log: MetricsLog, record: dict[str, Any], text: str, step: int = step) -> None:
            write(log, record, text)
            if record["global_step"] == step and "validation/nll" in record:
                raise Killed

        folder = tmp_path / f"killed_{step}"
        with monkeypatch.context() as patch:
            patch.setattr(MetricsLog, "write", writing)
            with pytest.raises(Killed):
                run(folder, toy_cache, *keys)
        assert list((folder / f"iteration_0/policy{PARTIAL}" / CHECKPOINTS).glob("best_*"))
        assert content(run(folder, toy_cache, *keys)) == expected, step


def test_accuracy_is_that_of_the_policy_written(
    tmp_path: Path, toy_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers in training are those of the finished policy, and the likelihood decides ties."""
    monkeypatch.setattr(held_out, "_correct", now_and_then)
    keys = [*SHORT, "validation.metric=accuracy", "learning_rate=3e-3"]
    folder = run(tmp_path / "run", toy_cache, *keys)
    found = [
        (-r["validation/accuracy"], r["validation/nll"], r["global_step"])
        for r in read_jsonl(folder / "iteration_0/policy/metrics.jsonl")
        if "validation/nll" in r and r["global_step"]
    ]
    best = summary(folder)
    assert min(found)[2] == best["validation/step"]
    ctx = open_toy(toy_cache, *keys, f"run={tmp_path / 'other'}")
    model = load_model(folder / "iteration_0/policy", torch.float32)
    settings = held_out.EvaluationSettings(0, Sampling(24), 24, 2048, 0)
    rows, pairs = ctx.validation.rows, ctx.validation.pairs
    metrics, _ = held_out.evaluate(
        model,
        ctx.tokenizer,
        rows,
        pairs,
        settings,
        CPU,
        tmp_path / "parts",  # type: ignore[arg-type]
    )
    assert 0 < metrics["accuracy/greedy"] == best["validation/accuracy"] < 1


def test_two_ranks_measure_what_one_does(tmp_path: Path, toy_cache: Path) -> None:
    """Likelihood by the sharded model, answers by a whole copy on each rank."""
    keys = [*SHORT, *FAST, "validation.metric=accuracy", "report=table"]
    one = run(tmp_path / "one", toy_cache, *keys)
    two, script, config = tmp_path / "two", ROOT / "train/align.py", ROOT / "configs/toy.yaml"
    done = run_script(
        script, "--config", config, f"run={two}", f"cache={toy_cache}", *keys, ranks=2
    )
    assert done.returncode == 0, done.stderr
    a, b = (
        [
            (r["global_step"], r["validation/nll"], r["validation/accuracy"])
            for r in read_jsonl(folder / "iteration_0/policy/metrics.jsonl")
            if "validation/nll" in r
        ]
        for folder in (one, two)
    )
    np.testing.assert_allclose(a, b, rtol=2e-3)
    assert summary(one)["validation/step"] == summary(two)["validation/step"] == 2
    ends = [weights(folder) for folder in (one, two)]
    assert all((ends[0][name] - p).norm() <= 0.05 * p.norm() for name, p in ends[1].items())


def test_a_stage_that_gains_nothing_ends_early(tmp_path: Path, toy_cache: Path) -> None:
    folder = run(tmp_path / "run", toy_cache, *SHORT, *FAST, "validation.early_stop=1")
    found = summary(folder)
    assert found["validation/ended_early"] == 1
    assert found["steps"] == found["validation/step"] + 1 < 6


def test_room_for_the_best_weights_is_counted(tmp_path: Path) -> None:
    def need(*keys: str) -> tuple[int, int]:
        ctx = open_toy(tmp_path, *SHORT, f"run={tmp_path / '-'.join(keys)}", *keys)
        cost = POLICY_STAGE.cost(ctx, "iteration_0/policy")
        assert cost.best == (0 if "select=last" in keys else 4 * ctx.parameters)
        return check_disk(ctx, ["iteration_0/policy"], tmp_path).needed, 4 * ctx.parameters

    plain, _ = need("select=last")
    best, weight = need("select=best")
    # Seven evaluations: that before the first step keeps nothing, nor does the last; and there are
    # three checkpoints at a time, and two more weights than these can refer to.
    assert best == plain + 5 * weight
    few, _ = need("select=best", "checkpoint.minutes=null")
    none, _ = need("select=last", "checkpoint.minutes=null")
    assert few == none + 2 * weight and at_worst([]) == 0


# ---------------------------------------------------------------------------------- over iterations


def test_the_last_iteration_does_not_win_by_default(
    tmp_path: Path, toy_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["method=spin", "sft.epochs=0", "continual_sft.epochs=0", "evaluation.samples=0"]
    rates = "learning_rate=[1e-3, 0.3]"
    folder = run(tmp_path / "run", toy_cache, *keys, rates)
    found = selected(folder)
    assert found["policy"] == "iteration_0" and found["folder"] == "iteration_0/policy"
    scores = found["validation"]
    assert list(scores) == ["start", "iteration_0", "iteration_1"]
    assert scores["iteration_0"]["nll"] < scores["iteration_1"]["nll"]
    assert scores["iteration_0"]["nll"] == summary(folder)["validation/nll"]
    assert scores["start"]["nll"] == summary(folder)["validation/nll_start"]
    assert found["why"] == (
        f"the best of 2 iterations by validation NLL, {scores['iteration_0']['nll']:.4f} "
        "nats/token after step 3 of 3"
    )
    # A run folder is a policy: what it ended with.
    config = config_of(toy_cache, f"policy={folder}")
    assert open_policy(config) == folder / "iteration_0/policy"
    assert selection.read_selected(folder) == found
    # Its own settings changed, the choice is made anew.
    monkeypatch.setattr(selection, "better", lambda new, old: True)
    run(folder, toy_cache, *keys, rates)
    assert selected(folder)["policy"] == "iteration_1"
    assert selected(folder)["why"].endswith(
        f"; the start was better, {scores['start']['nll']:.4f} nats/token"
    )
    (folder / "selected.json").write_text("{}")
    with pytest.raises(InputError, match="selected.json: does not say which policy"):
        open_policy(config)


def test_a_start_that_was_better_is_said(tmp_path: Path, toy_cache: Path) -> None:
    folder = run(tmp_path / "run", toy_cache, *SHORT, "learning_rate=3")
    found = selected(folder)
    start, own = (found["validation"][name]["nll"] for name in ("start", "iteration_0"))
    assert start < own and found["why"].endswith(
        f"of 6; the start was better, {start:.4f} nats/token"
    )


def test_a_run_without_iterations_ends_with_its_start(tmp_path: Path, toy_cache: Path) -> None:
    keys = ["iterations=0", "continual_sft.epochs=0", "evaluation.samples=0"]
    folder = run(tmp_path / "sft", toy_cache, *keys, "sft.epochs=1")
    assert selected(folder)["folder"] == "sft/policy"
    config = config_of(toy_cache)
    assert find_model(config, str(folder)) == folder / "sft/policy"
    folder = run(tmp_path / "start", toy_cache, *keys, "sft.epochs=0")
    assert find_model(config, str(folder)) == toy_model(toy_cache)


def test_evaluation_alone_sets_no_rows_aside(tmp_path: Path, toy_cache: Path) -> None:
    """Nothing is chosen there: all rows are reported, whatever the config says of validation."""
    path = rows_file(tmp_path / "rows.jsonl", 60)
    evaluate.main(
        ["policy=toy", f"run={tmp_path / 'run'}", f"cache={toy_cache}", "dtype=float32",
         f"data={path}", f"heldout={rows_file(tmp_path / 'given.jsonl', 50, id='x')}",
         "report=table", "validation.early_stop=1", "max_length=200", "max_new_tokens=8"]
    )  # fmt: skip
    counts = json.loads((tmp_path / "run/data/summary.json").read_text())
    assert counts["rows/heldout"] == 50 and counts["rows/validation"] == 0
    assert RunConfig().validation.rows is None
