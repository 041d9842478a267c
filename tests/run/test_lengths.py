"""Lengths from the data: chosen by quantiles, within what the policy reads, and kept."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from runs import ROOT
from toy_context import config_of, open_toy

from ldalign.models.toy import write_toy_model
from ldalign.run import lengths, prepared
from ldalign.run.compare_settings import CompareConfig
from ldalign.run.context import Context
from ldalign.run.lengths import choose
from ldalign.run.settings import RunConfig
from ldalign.system.config import load_config
from ldalign.system.errors import InputError
from ldalign.system.metrics import Bar
from ldalign.train import generate

OPTIONS = ("evaluation.rows=7", "heldout_fraction=0.2", "sft.epochs=0", "continual_sft.epochs=0")
OPTIONS += ("global_batch=4", "max_rows=null")
FROM_DATA = ("max_new_tokens=0", "max_length=0")


def counts(*numbers: int) -> lengths.Counts:
    return np.array(numbers, dtype=np.int64)


def test_lengths_are_quantiles_rounded_up() -> None:
    """100 rows, responses of 1 to 100 tokens after prompts of 50: 95 % have 96 at most, next
    multiple of 32; 99.5 % of prompt and the longer of response and 96 are 150, so 160.
    """
    responses = np.arange(1, 101)
    prompts = np.full(100, 50)
    assert choose((0, 0), prompts, responses, responses, 4096) == (96, 160)
    assert choose((0, 0), prompts, responses + 1, responses + 1, 4096) == (128, 192)
    # the rejected response is the longer one
    assert choose((0, 0), prompts, responses, responses * 3, 4096) == (96, 352)


def test_a_length_that_is_given_stays() -> None:
    responses, prompts = np.arange(1, 101), np.full(100, 50)
    assert choose((40, 0), prompts, responses, responses, 4096) == (40, 160)
    assert choose((300, 0), prompts, responses, responses, 4096) == (300, 352)
    assert choose((0, 512), prompts, responses, responses, 4096) == (96, 512)
    assert choose((0, 100), prompts, responses, responses, 4096) == (50, 100)  # room by prompts
    assert choose((7, 9), prompts, responses, responses, 4096) == (7, 9)


def test_the_policy_reads_no_more() -> None:
    prompts, responses = np.full(100, 50), np.full(100, 5000)
    assert choose((0, 0), prompts, responses, responses, 1000) == (950, 1000)
    # prompts that fill it leave a quarter
    assert choose((0, 0), prompts + 5000, responses, responses, 1000) == (250, 1000)
    assert choose((0, 0), counts(3), counts(2), counts(2), 8) == (5, 8)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(90):
            text = " and".join(["so"] * (1 + i % 30))
            file.write(json.dumps({"prompt": f"Say {i}.", "response": text}) + "\n")
    return path


def numbers(ctx: Context) -> tuple[int, int]:
    return ctx.config.max_new_tokens, ctx.config.max_length


def test_a_run_keeps_its_lengths(
    tmp_path: Path,
    rows: Path,
    in_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Said in one line; in config.yaml and in manifests as numbers; not measured again, and the
    same numbers written out are no other settings.
    """
    options = (f"data={rows}", *OPTIONS)
    ctx = open_toy(tmp_path, *options, *FROM_DATA)
    new, length = numbers(ctx)
    real, prompts = ctx.train.pairs.real.lengths, ctx.train.pairs.prompts.lengths
    assert new % 32 == 0 and np.quantile(real, 0.9) <= new < real.max() + 32
    assert prompts.max() + real.max() <= length < 2 * (prompts.max() + real.max())
    assert ctx.counts["rows/cut"] == 0
    said = capfd.readouterr().err
    assert said.count(f"data: max_new_tokens={new} and max_length={length}, by 90 rows: prom") == 1
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["max_length"] == length
    manifest = json.loads((run / "data/manifest.json").read_text())
    assert manifest["parents"]["max_length"] == length and lengths.FILE in manifest["files"]
    assert ctx.keys("max_new_tokens") == {"max_new_tokens": new}
    # what train/inspect_data.py shows
    looked = prepared.with_lengths(config_of(tmp_path, *options, *FROM_DATA), ctx.tokenizer)
    assert (looked.max_new_tokens, looked.max_length) == (new, length)

    (run / "iteration_0").mkdir()  # something was made of the rows
    monkeypatch.setattr(prepared, "measure", None)
    again = open_toy(tmp_path, *options, *FROM_DATA)
    assert numbers(again) == (new, length)
    assert numbers(open_toy(tmp_path, *options, *FROM_DATA, write=False)) == (new, length)
    given = open_toy(tmp_path, *options, f"max_new_tokens={new}", f"max_length={length}")
    assert numbers(given) == (new, length)
    assert numbers(open_toy(tmp_path, *options, *FROM_DATA)) == (new, length)
    monkeypatch.undo()
    with pytest.raises(InputError, match=f"max_length was {length}, now 160"):
        open_toy(tmp_path, *options)


@pytest.mark.parametrize(
    ("length", "advice"),
    [
        ("max_length=0", "; shorten the prompts"),
        ("max_length=512", "; shorten the prompts"),
        ("max_length=60", "; raise max_length"),
    ],
)
def test_a_prompt_longer_than_the_policy_reads(
    tmp_path: Path, rows: Path, in_process: None, capfd: pytest.CaptureFixture[str],
    length: str, advice: str,
) -> None:  # fmt: skip
    """No max_length helps it."""
    asked = [{"prompt": "Say it again. " * 300, "response": "no"}] * 3
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked) + rows.read_text())
    options = (f"data={rows}", *OPTIONS, "max_new_tokens=8", length)
    open_toy(tmp_path, *options, write=False)
    said = capfd.readouterr().err
    assert f"{advice}, or give long_prompts=truncate\n" in said
    assert said.count("and the policy reads 512 (max_position") == ("60" not in length)
    with pytest.raises(InputError) as refused:
        open_toy(tmp_path, *options, "long_prompts=error", write=False)
    found = re.search(r"has (\d+) tokens, and the policy reads 512; shorten", str(refused.value))
    assert found and int(found[1]) > 512


def test_other_data_have_other_lengths(tmp_path: Path, rows: Path, in_process: None) -> None:
    options = (f"data={rows}", *OPTIONS, *FROM_DATA)
    before = numbers(open_toy(tmp_path, *options))
    assert numbers(open_toy(tmp_path, *options, "seed=3", "max_rows=20")) == before
    rows.write_text(rows.read_text().replace("so and", "so much more and"))
    assert numbers(open_toy(tmp_path, *options))[0] > before[0]
    (tmp_path / "run/iteration_0").mkdir()
    rows.write_text(rows.read_text().replace("much more", ""))
    with pytest.raises(InputError, match=r"rows\.jsonl: changed since this run began"):
        open_toy(tmp_path, *options)


def test_reading_for_lengths_says_how_far_it_is(
    tmp_path: Path, rows: Path, in_process: None, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All of the data is read before anything is prepared: minutes of silence where it is large."""
    monkeypatch.setattr(Bar, "PLAIN_SECONDS", 0.0)
    open_toy(tmp_path, f"data={rows}", *OPTIONS, *FROM_DATA)
    assert "data: rows read for lengths: 90 rows\n" in capsys.readouterr().err


def test_many_rows_are_drawn_from_all(
    tmp_path: Path, rows: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, f"data={rows}", *OPTIONS, *FROM_DATA)
    ctx = open_toy(tmp_path, f"data={rows}", *OPTIONS, write=False)
    monkeypatch.setattr(lengths, "MEASURED", 40)
    data, _ = prepared._sources(config, prepared._listed(config))
    reading = prepared._reading(config)
    drawn = lengths._drawn(data, reading)
    asked = [row.history[-1]["content"] for row in drawn]
    assert len(set(asked)) == 40 and any(f"Say {i}." in asked for i in range(60, 90))
    assert drawn == lengths._drawn(data, reading)
    assert lengths.measure(config, data, reading, ctx.tokenizer).rows == 40


def test_lengths_are_within_the_policys_context(
    tmp_path: Path, rows: Path, in_process: None
) -> None:
    folder = write_toy_model(tmp_path / "short", max_position_embeddings=60)
    options = (f"data={rows}", *OPTIONS, f"policy={folder}", "max_length=0")
    ctx = open_toy(tmp_path, *options, "max_new_tokens=0")
    new, length = numbers(ctx)
    assert new < length == 60
    with pytest.raises(InputError, match=r"max_new_tokens=60: leaves no room .* reads 60 \(max_po"):
        open_toy(tmp_path, *options, "max_new_tokens=60", write=False)


def test_rows_that_cannot_be_measured_end_it(tmp_path: Path, in_process: None) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"\n')
    with pytest.raises(InputError, match=r"bad\.jsonl:1"):
        open_toy(tmp_path, f"data={bad}", *OPTIONS, *FROM_DATA)


def test_where_no_data_are_read_a_number_must_be_given(tmp_path: Path, toy_cache: Path) -> None:
    more = ["max_new_tokens=0", f"prompts={tmp_path / 'p.jsonl'}", f"output={tmp_path / 'out'}"]
    with pytest.raises(InputError, match="max_new_tokens=0: is taken from the run's data"):
        generate.main(["policy=toy", f"cache={toy_cache}", *more])


@pytest.mark.parametrize("value", ["max_length=1", "max_length=-1", "max_new_tokens=-1"])
def test_no_other_number_means_from_the_data(value: str) -> None:
    with pytest.raises(InputError, match="must be"):
        load_config(RunConfig, None, [value])


def test_a_comparison_needs_numbers() -> None:
    with pytest.raises(InputError, match="max_length: all trainings must have the same; give num"):
        load_config(CompareConfig, None, ["training.steps=2", "max_length=0"])


def test_the_preset_asks_for_policy_data_and_run_alone() -> None:
    own = load_config(RunConfig, ROOT / "configs/own-data.yaml")
    assert (own.max_new_tokens, own.max_length, own.max_rows, own.sft.epochs) == (0, 0, None, 0)
    assert own.evaluation.answers == "greedy"  # or its report has no answers before and after
    first = (ROOT / "configs/own-data.yaml").read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) <= 92
