"""Held-out figures: a model that is always right, one that never is, and the standard error."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from ldalign.data import embedded, problems
from ldalign.data.encoding import Fitting, encode_rows
from ldalign.data.pairs import Pair
from ldalign.data.rows import Row
from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.evaluation.held_out import EvaluationSettings, evaluate
from ldalign.evaluation.statistics import standard_error
from ldalign.generation.engine import Engine, Request
from ldalign.generation.sampling import Response, Sampling
from ldalign.models.toy import write_toy_model
from ldalign.models.weights import load_model

SETTINGS = EvaluationSettings(
    samples=3, sampling=Sampling(24), batch_rows=8, micro_tokens=2000, seed=0
)
Answer = Callable[[str, str], tuple[str, str]]  # (key, right answer) -> (text, finish reason)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer, list[Row], list[Pair]]:
    folder: Path = write_toy_model(tmp_path_factory.mktemp("toy") / "model")
    rows = [
        Row(
            r["id"],
            (r["messages"][0],),
            r["messages"][1]["content"],
            kind=r["kind"],
            answer=r["answer"],
        )
        for r in embedded.make_rows(0, "heldout", 26)
    ]
    tokenizer = load_tokenizer(folder)
    prepared = encode_rows(rows, tokenizer, Fitting(4096))
    return load_model(folder, torch.float32), tokenizer, prepared.rows, prepared.pairs


@pytest.fixture
def measure(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Answer], dict[str, float]]:
    """Evaluates a stand-in for generation that answers as it is told."""
    model, tokenizer, rows, pairs = toy
    right = {row.id: row.response for row in rows}

    def run(answer: Answer) -> dict[str, float]:
        def make_answers(
            path: Path,
            requests: Sequence[Request],
            decoder: Any,
            new_engine: Callable[[Any], Engine],
            *rest: Any,
        ) -> list[dict[str, Any]]:
            assert [r.index for r in requests] == list(range(len({r.key for r in requests})))
            greedy = new_engine(decoder).sampling.temperature == 0
            out = []
            for key in (r.key for r in requests):
                assert key.startswith("greedy/") == greedy == (path.name == "greedy")
                text, reason = answer(key, right[key.split("/")[1]])
                end = [tokenizer.end_ids[0]] if reason == "stop" else []
                out.append(asdict(Response([*tokenizer.encode(text), *end], reason, -1.0)))
            return out

        monkeypatch.setattr(
            sys.modules["ldalign.evaluation.held_out"], "make_answers", make_answers
        )
        metrics, records = evaluate(
            model, tokenizer, rows, pairs, SETTINGS, torch.device("cpu"), tmp_path
        )
        assert [r["id"] for r in records] == [row.id for row in rows]
        return metrics

    return run


def test_a_perfect_model(measure: Callable[[Answer], dict[str, float]]) -> None:
    metrics = measure(lambda key, right: (right, "stop"))
    assert metrics["accuracy/greedy"] == metrics["accuracy/sampled"] == 1.0
    assert (
        metrics["accuracy/greedy_se"]
        == metrics["accuracy/sampled_se"]
        == metrics["truncated_frac"]
        == 0.0
    )
    kinds = {
        name.removeprefix("accuracy/greedy/")
        for name in metrics
        if name.startswith("accuracy/greedy/")
    }
    assert kinds == set(problems.PROBLEMS) and all(
        metrics[f"accuracy/sampled/{kind}"] == 1.0 for kind in kinds
    )


def test_a_hopeless_model(measure: Callable[[Answer], dict[str, float]]) -> None:
    metrics = measure(lambda key, right: ("I do not know.", "stop"))
    assert metrics["accuracy/greedy"] == metrics["accuracy/sampled"] == 0.0


def test_a_right_answer_that_never_ends_is_wrong(
    measure: Callable[[Answer], dict[str, float]],
) -> None:
    metrics = measure(lambda key, right: (right, "length"))
    assert (
        metrics["accuracy/greedy"] == metrics["accuracy/sampled"] == 0.0
        and metrics["truncated_frac"] == 1.0
    )


def test_greedy_and_samples_are_kept_apart(measure: Callable[[Answer], dict[str, float]]) -> None:
    """Greedy wrong, the first sample of three right, on every prompt: a third, without spread
    between prompts.
    """
    metrics = measure(lambda key, right: (right if key.endswith("/0") else "no", "stop"))
    assert metrics["accuracy/greedy"] == 0.0
    assert (
        metrics["accuracy/sampled"] == pytest.approx(1 / 3)
        and metrics["accuracy/sampled_se"] < 1e-9
    )


def test_standard_error_is_over_prompts(measure: Callable[[Answer], dict[str, float]]) -> None:
    """Half of the prompts always right: as many independent values as prompts, not as samples."""
    lucky: dict[str, bool] = {}
    metrics = measure(
        lambda key, right: (right if lucky.setdefault(right, len(lucky) % 2 == 0) else "no", "stop")
    )
    assert metrics["rows"] == 26 and metrics["accuracy/sampled"] == 0.5
    assert metrics["accuracy/sampled_se"] == pytest.approx(math.sqrt(0.25 / 25))
    assert standard_error(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(
        np.std([1, 2, 3, 4], ddof=1) / 2
    )
    assert standard_error(np.array([1.0])) == 0.0


def test_a_real_model(toy: Any, tmp_path: Path) -> None:
    """Nothing stubbed: nll against whole logits, tokens counted, rows without
    a kind not generated for.
    """
    model, tokenizer, rows, pairs = toy
    plain = [*rows[:3], Row("x", rows[3].history, rows[3].response)]
    metrics, records = evaluate(
        model, tokenizer, plain, pairs[:4], SETTINGS, torch.device("cpu"), tmp_path / "four"
    )
    nll = -sum(float(tiny.logps(model, p.prompt, p.real).detach().sum()) for p in pairs[:4])
    assert metrics["nll/real"] == pytest.approx(nll / sum(len(p.real) for p in pairs[:4]), rel=1e-5)
    assert len(records) == 4 and len(records[0]["sampled"]) == 3  # type: ignore[arg-type]
    assert "sampled" not in records[3] and sum(r["logp"] for r in records) == pytest.approx(
        -nll, rel=1e-5
    )
    assert [r["n_tokens"] for r in records] == [len(p.real) for p in pairs[:4]]
    assert 12 <= metrics["tokens_generated"] <= 12 * 24
    none, nothing = evaluate(
        model, tokenizer, plain[3:], pairs[3:4], SETTINGS, torch.device("cpu"), tmp_path / "one"
    )
    assert len(nothing) == 1 and none.keys() == {"rows", "nll/real"}


@pytest.mark.parametrize(("unchecked", "samples"), [("greedy", 0), ("samples", 3)])
def test_rows_without_a_checker_are_answered_where_asked(
    unchecked: Any, samples: int, toy: Any, tmp_path: Path
) -> None:
    """Between two rows that a program checks: nobody gets another row's answers."""
    model, tokenizer, rows, pairs = toy
    mixed = [rows[0], Row("x", rows[1].history, rows[1].response), rows[2]]
    settings = replace(SETTINGS, unchecked=unchecked)
    assert [settings.answers(row) for row in mixed] == [4, 1 + samples, 4]
    cpu = torch.device("cpu")
    metrics, records = evaluate(
        model, tokenizer, mixed, pairs[:3], settings, cpu, tmp_path / "mixed"
    )
    _, alone = evaluate(model, tokenizer, rows[:3], pairs[:3], SETTINGS, cpu, tmp_path / "checked")
    assert [records[0], records[2]] == [alone[0], alone[2]]
    assert records[1]["correct"] == [] and len(records[1]["sampled"]) == samples  # type: ignore[arg-type]
    assert len(str(records[1]["greedy"])) > 0 and metrics["rows"] == 3
