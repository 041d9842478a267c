"""The matrix of `make test-options`: it has every choice, and what it leaves out is refused."""

import json
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path

import option_matrix
import pytest
from option_matrix import (
    LEFT_OUT,
    MORE,
    NOT_READ,
    RULES,
    Row,
    Rule,
    arguments,
    check_run,
    choices,
    completed,
    enumerated,
    idle,
    make_inputs,
    matrix,
    pairs,
    refusal,
    run_row,
    said,
)

from ldalign.run.settings import RunConfig
from ldalign.system.config import load_config
from ldalign.system.errors import InputError
from ldalign.train import align
from ldalign.train.command import check_method_reads

ROWS = matrix()


def read(keys: list[str]) -> RunConfig:
    """Settings as `train/align.py` reads them from the command line."""
    config = load_config(RunConfig, None, keys)
    check_method_reads(keys, config)
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


# ------------------------------------------------------------------------------------- the choices


def test_every_enumerated_key_is_in_the_matrix_or_left_out_with_a_reason() -> None:
    found = enumerated()
    assert found["weights"][:2] == ("latent", "uniform") and found["shuffle"] == (False, True)
    assert found["select"] == ("last", "best", None) and "wandb" in found["log"]
    assert found["guide.latent_map"][-1] is None and "beta" not in found
    assert LEFT_OUT.keys() <= found.keys() and all(LEFT_OUT.values())
    assert not MORE.keys() & found.keys(), "an enumeration has its values from the settings"
    assert choices().keys() == (found.keys() - LEFT_OUT.keys()) | MORE.keys()


def test_every_choice_is_in_a_row() -> None:
    for key, values in choices().items():
        assert {row[key] for row in ROWS} == {*values}, key


def test_a_new_choice_comes_into_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = {**choices(), "distance": ("euclidean", "cosine", "manhattan")}
    monkeypatch.setattr(option_matrix, "choices", lambda: grown)
    assert "manhattan" in {row["distance"] for row in matrix()}


def test_every_allowed_pair_of_choices_is_in_a_row() -> None:
    covered = {pair for row in ROWS for pair in pairs(row)}
    items = [(key, value) for key, values in choices().items() for value in values]
    both = [pair for pair in combinations(items, 2) if pair[0][0] != pair[1][0]]
    missing = [pair for pair in both if completed(dict(pair)) and frozenset(pair) not in covered]
    assert not missing
    assert len(covered) > 0.85 * len(both) and len(ROWS) < 100


def test_a_pair_in_no_row_is_refused_for_itself() -> None:
    """By each method, which does not read one of the keys, or for a rule about them: not because
    `completed` did not try what would have made it right.
    """
    items = [(key, value) for key, values in choices().items() for value in values]
    methods = list(product(choices()["method"], choices()["sft_prompts"]))
    usual = {key: values[0] for key, values in choices().items()}
    for a, b in combinations(items, 2):
        given = dict((a, b))
        if a[0] == b[0] or completed(given):
            continue
        for method, sft_prompts in methods:
            row: Row = {**usual, "method": method, "sft_prompts": sft_prompts, **given}
            own = {*given, "method", "sft_prompts"}
            why = [key for key in given if key in idle(row)]
            why += [rule.says for rule in RULES if rule.when.keys() <= own and rule.holds(row)]
            assert why, given


# ------------------------------------------------------------------------- what the product says


def test_the_product_reads_every_row(made: Path) -> None:
    for row in ROWS:
        assert refusal(row) is None
        config = read(arguments(row, made))
        assert (config.method, config.dtype) == (row["method"], row["dtype"])


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.at == "settings"], ids=str)
def test_a_rule_is_the_products(rule: Rule) -> None:
    """Every combination that it names, with no other unusual value than a method that reads it."""
    for values in product(*rule.when.values()):
        given = dict(zip(rule.when, values, strict=True))
        keys = [f"{key}={said(value)}" for key, value in given.items()]
        with pytest.raises(InputError, match=rule.says):
            load_config(RunConfig, None, keys)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.at == "start"], ids=str)
def test_a_rule_about_data_is_the_products(
    rule: Rule, made: Path, tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    row = {key: values[0] for key, values in choices().items()}
    row |= {"validation.rows": 8} | {key: values[0] for key, values in rule.when.items()}
    keys = ["policy=toy", f"run={tmp_path / 'run'}", f"cache={toy_cache}", *arguments(row, made)]
    with pytest.raises(InputError, match=rule.says):
        align.main([*keys, "--dry-run"])


@pytest.mark.parametrize("method", NOT_READ)
def test_a_key_that_a_method_does_not_read_is_refused(method: str) -> None:
    name, _, sft_prompts = method.partition("/")
    given = [f"method={name}", f"sft_prompts={sft_prompts or 'all'}"]
    for key in sorted(NOT_READ[method] - {"sft_prompts"}):
        for value in choices()[key][1:]:  # all but the usual one
            with pytest.raises(InputError):
                read([*given, f"{key}={said(value)}"])
    assert NOT_READ[method]


# ---------------------------------------------------------------------------------------- a run


@pytest.mark.slow
def test_a_row_of_the_toy_holds(made: Path, tmp_path: Path, toy_cache: Path) -> None:
    """Of the method itself, with a guide; and a run that the product ends is one that fails."""

    def wanted(row: Row) -> bool:
        return row["method"] == "ld_align" and row["weights"] == "latent" and row["sft.epochs"] == 1

    row = next(filter(wanted, ROWS))
    assert run_row(row, tmp_path / "row", "toy", made, f"cache={toy_cache}") == []
    (end,) = run_row(row, tmp_path / "no", "toy", made, f"cache={toy_cache}", "iterations=-1")
    assert end.startswith("exit code 2: ") and "iterations" in end
    assert "iterations=-1" in (tmp_path / "no/log").read_text()


@pytest.fixture
def left(tmp_path: Path) -> Callable[[float, float], list[str]]:
    """What `check_run` says of a run with a loss and a figure of a summary."""

    def check(loss: float, figure: float) -> list[str]:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data/summary.json").write_text(json.dumps({"distance/mean": figure}))
        lines = [json.dumps({"stage": "data", "seconds": 1}), json.dumps({"loss": loss})]
        (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return check_run(tmp_path)

    return check


def test_numbers_that_are_not_finite_are_found(left: Callable[[float, float], list[str]]) -> None:
    assert left(0.5, 1.0) == []
    assert left(float("nan"), 1.0) == ["metrics.jsonl:2: loss is nan"]
    assert left(0.5, float("inf")) == ["data/summary.json: distance/mean is inf"]


def test_a_run_without_a_step_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "data", "seconds": 1.0}\n')
    assert check_run(tmp_path) == ["metrics.jsonl: no step was trained"]
