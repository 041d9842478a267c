"""What stages share: data as the config asks, parents, files of several ranks,
and what --dry-run says.
"""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch
from kept import Meter
from runs import ROOT
from toy_context import open_toy, rows_file

from ldalign.data import rows
from ldalign.data.pairs import Pair
from ldalign.data.ragged import TokenLists
from ldalign.models import toy
from ldalign.models.mistral import MistralConfig
from ldalign.run import context, dry_run, methods, plan
from ldalign.run.folder import stage_names
from ldalign.run.settings import RunConfig
from ldalign.run.stages import data, evaluation, guide, reference
from ldalign.run.stages.responses import Responses
from ldalign.system import distributed, files
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.train.align import planned
from ldalign.training import memory_model
from ldalign.training.batches import Batch

# --------------------------------------------------------------------------------------------- data


def test_data_is_split_without_overlap_and_by_seed(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", 100)
    options = [f"data={path}", "heldout_fraction=0.2", "max_rows=null", "evaluation.rows=200"]

    def heldout(name: str, *more: str) -> list[str]:
        ctx = open_toy(tmp_path, *options, f"run={tmp_path / name}", *more)
        ids = {row.id for row in ctx.train.rows}, [row.id for row in ctx.heldout.rows]
        assert (len(ids[0]), len(ids[1])) == (80, 20) and not ids[0] & set(ids[1])
        return ids[1]

    assert heldout("one") == heldout("two", "beta=0.5") != heldout("three", "seed=1")


def test_no_more_rows_are_prepared_than_are_used(tmp_path: Path) -> None:
    def count(*overrides: str) -> int:
        run = tmp_path / "-".join(["run", *overrides])
        return len(open_toy(tmp_path, f"run={run}", *overrides).train.rows)

    assert count() == 64  # sft.rows
    assert count("sft.epochs=0", "continual_sft.epochs=0") == 48  # max_rows
    assert count("sft.rows=null") == 4000


def test_keys_of_rows_are_as_the_config_says(tmp_path: Path) -> None:
    """Training and held-out rows, by columns and ignore_columns; the hub's files by the cache."""
    path = tmp_path / "rows.jsonl"
    record = {"question": "q", "answer": "r", "system_prompt": "s", "tools": [1]}
    path.write_text(f"{json.dumps(record)}\n" * 80)
    other = tmp_path / "heldout.jsonl"
    other.write_text(json.dumps(record | {"question": "h"}) + "\n")
    options = [f"data={path}", f"heldout={other}", "columns={prompt: question, response: answer}"]
    with pytest.raises(InputError, match="rows.jsonl:1: system_prompt: carries meaning"):
        open_toy(tmp_path, *options, "ignore_columns=[tools]")
    options += ["columns.system=system_prompt", "ignore_columns=[tools]"]
    ctx = open_toy(tmp_path, *options)
    for split, asked in ((ctx.train, "q"), (ctx.heldout, "h")):
        (row, *_) = split.rows
        assert row.history[0] == {"role": "system", "content": "s"}
        assert (row.history[1]["content"], row.response) == (asked, "r")


def test_data_of_the_hub_are_kept_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetched(name: str, cache: Path, is_data: object) -> list[Path]:
        asked.append((name, cache))
        return [rows_file(tmp_path / "rows.jsonl", 40)]

    monkeypatch.setattr("ldalign.data.sources.hub_files", fetched)
    ctx = open_toy(tmp_path, "data=org/name:train", "evaluation.rows=0", "sft.rows=null")
    assert set(asked) == {("org/name:train", tmp_path)} and len(ctx.train.rows) == 40
    sources = json.loads((ctx.run.path / "data/sources.json").read_text())
    assert [(one["key"], one["path"]) for one in sources] == [
        ("data", str(tmp_path / "rows.jsonl"))
    ]
    distributed.stop()


def test_rows_without_a_checker_are_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = rows_file(tmp_path / "rows.jsonl", 100, kind="poetry")
    ctx = open_toy(tmp_path, f"data={path}")
    assert all(row.kind is None for row in ctx.heldout.rows)
    # not a warning, as rows of one's own seldom do
    assert "data: 10 of 10 held-out rows name no checker" in capfd.readouterr().err
    open_toy(tmp_path)
    assert "WARNING" not in capfd.readouterr().err


def test_dropped_rows_and_cut_responses_are_counted(tmp_path: Path) -> None:
    """A prompt that fills max_length costs the row; a sampled response too
    long for it loses its end.
    """
    path = rows_file(tmp_path / "rows.jsonl", 200)
    long = {"id": "long", "prompt": "Say it again. " * 100, "response": "no"}
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    ctx = open_toy(
        tmp_path,
        f"data={path}",
        "heldout_fraction=0",
        "max_rows=4",
        "sft.rows=null",
        "global_batch=2",
    )
    assert ctx.counts["rows/dropped"] == 1
    room = ctx.config.max_length - len(ctx.train.pairs[0].prompt)
    losers = Responses(TokenLists.of([[7] * n for n in (room + 1, 1, 2, 3)]), ["length"] * 4)
    with ctx.run as run:
        dropped = files.read_jsonl(run.path / "data/dropped.jsonl")
        assert [row["id"] for row in dropped] == ["long"]
        assert f"max_length={ctx.config.max_length}" in dropped[0]["reason"]
        against, cut = methods._against_own(ctx, losers)
        pairs = reference.reference_stage(ctx, 0, ctx.start, against, {}, cut)
        assert len(pairs[0].generated or ()) == room
        assert (
            json.loads((run.path / "iteration_0/reference/summary.json").read_text())["losers/cut"]
            == 1
        )
    distributed.stop()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.shard_ranks=2"], "training.shard_ranks=2: 1 ranks cannot be split so"),
        (["global_batch=49"], "48 usable rows are fewer than one batch of global_batch=49"),
        (["sft.global_batch=65"], "64 usable rows are fewer than one batch of sft.global_batch=65"),
        (["max_length=60", "max_new_tokens=8", "long_prompts=error"], "fills max_length=60"),
        (["data=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["policy=nowhere"], "no such folder"),
    ],
)
def test_what_cannot_work_is_refused_before_any_weights(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_toy(tmp_path, *overrides)


def test_a_gpt2_is_no_policy(tmp_path: Path) -> None:
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2/config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match="'gpt2' cannot be a policy"):
        open_toy(tmp_path, f"policy={tmp_path / 'gpt2'}")


# -------------------------------------------------------------------------------- parents and files


def test_named_keys() -> None:
    config = RunConfig()
    assert context.named_keys(config, "beta", "sampling.top_p") == {
        "beta": 0.1,
        "sampling.top_p": 1.0,
    }
    spread = context.named_keys(config, "guide")
    assert spread["guide.folder"] == "null" and spread["guide.latent_width"] == 256
    assert len(spread) == len(dataclasses.fields(config.guide))


PARENTS = {
    "data": {"files", "tokenizer", "template", "turns", "max_length", "seed", "shuffle"},
    "sft/policy": {
        "policy",
        "data",
        "template",
        "sft.epochs",
        "sft.learning_rate",
        "max_length",
        "seed",
        "dtype",
    },
    "iteration_1/responses": {
        "policy",
        "data",
        "template",
        "iteration",
        "max_new_tokens",
        "sampling.top_p",
        "seed",
    },
    "guide": {
        "data",
        "pairs",
        "towers",
        "frozen",
        "dtype",
        "guide.epochs",
        "guide.token_dropout",
        "guide.width",
        "guide.contrast",
        "seed",
    },
    "iteration_0/distances": {"guide", "responses", "data", "max_length", "distance", "weights"},
    "iteration_0/reference": {"policy", "responses", "data", "template", "max_length", "dtype"},
    "iteration_0/policy": {
        "policy",
        "reference",
        "responses",
        "weights",
        "method",
        "beta",
        "learning_rate",
        "global_batch",
        "seed",
        "training.epochs",
        "training.optimizer",
        "training.schedule",
        "policy_dtype",
        "dtype",
    },
    "iteration_0/evaluation": {
        "policy",
        "data (held-out rows)",
        "max_new_tokens",
        "evaluation.samples",
        "template",
    },
}


@pytest.mark.parametrize("stage", PARENTS)
def test_a_stage_names_what_it_depends_on(toy_run: Path, stage: str) -> None:
    parents = json.loads((toy_run / stage / "manifest.json").read_text())["parents"]
    assert PARENTS[stage] <= parents.keys(), PARENTS[stage] - parents.keys()
    moved_about = {"training.micro_tokens", "sampling.batch_rows", "training.checkpointing"}
    assert not moved_about & parents.keys()


def test_iterations_follow_each_other(toy_run: Path) -> None:
    """The second iteration samples from, and is measured against, the first
    one's policy, not the start.
    """

    def parent(stage: str) -> str:
        return str(json.loads((toy_run / stage / "manifest.json").read_text())["parents"]["policy"])

    from ldalign.run.manifest import hash_model_folder

    first = hash_model_folder(toy_run / "iteration_0/policy")
    start = hash_model_folder(toy_run / "sft/policy")
    assert first != start
    assert {parent(f"iteration_1/{stage}") for stage in ("responses", "reference", "policy")} == {
        first
    }
    assert {parent(f"iteration_0/{stage}") for stage in ("responses", "reference", "policy")} == {
        start
    }
    assert parent("continual_sft/policy") == start


def test_a_guide_is_known_by_all_its_files(toy_run: Path, tmp_path: Path) -> None:
    import shutil

    before = guide.guide_hash(toy_run / "guide")
    for name in ("latent.safetensors", "tokenizer.json", "guide.json", "encoder/model.safetensors"):
        copy = tmp_path / name.replace("/", "_")
        shutil.copytree(toy_run / "guide", copy)
        assert guide.guide_hash(copy) == before
        with (copy / name).open("ab") as file:
            file.write(b" ")
        assert guide.guide_hash(copy) != before, name


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    records = [{"text": "a\u2028b\nc\u0085"}, [1, {"x": "ü"}]]
    files.write_jsonl(tmp_path / "x.jsonl", records)
    assert files.read_jsonl(tmp_path / "x.jsonl") == records


def test_stage_names_are_in_the_order_of_the_method(tmp_path: Path) -> None:
    names = [
        "data",
        "sft/policy",
        "iteration_0/responses",
        "guide",
        "iteration_0/distances",
        "iteration_2/policy",
        "iteration_10/policy",
        "continual_sft/policy",
    ]
    for name in reversed(names):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "summary.json").write_text("{}")
    (tmp_path / "iteration_11").mkdir()
    (tmp_path / "iteration_old").mkdir()
    assert stage_names(tmp_path) == names


def test_every_stage_says_its_name_in_the_file_of_that_name_and_has_one_place() -> None:
    files = {path.stem for path in (ROOT / "ldalign/run/stages").glob("*.py")} - {"__init__"}
    said = {}
    for name in files:
        module = importlib.import_module(f"ldalign.run.stages.{name}")
        said[name] = getattr(module, f"{name.upper()}_STAGE")
    assert {name: stage.name for name, stage in said.items()} == {name: name for name in files}
    assert len(plan.ORDER) == len(said) and set(plan.ORDER) == set(said.values())


def test_folders_and_their_stages() -> None:
    assert guide.GUIDE_STAGE.folder(0) == "guide"
    assert guide.GUIDE_STAGE.folder(1) == "iteration_1/guide"
    assert reference.REFERENCE_STAGE.folder(0) == "iteration_0/reference"
    assert reference.REFERENCE_STAGE.folder("iteration_0") == "iteration_0/reference"
    assert data.DATA_STAGE.folder() == "data"
    for stage in plan.ORDER:
        assert all(plan.stage_of(stage.folder(group)) is stage for group in ("", "sft", 0, 12))
        # A task may be called as a stage is.
        assert plan.stage_of(f"{stage.folder('sft')}/policy") is stage
    names = ["sft/reward", "sft/benchmarks/b", "sft/policy", "sft/benchmarks/a", "sft/evaluation"]
    assert plan.in_order(names) == [names[i] for i in (2, 4, 1, 3, 0)]


def test_prompt_text() -> None:
    """Judges are not shown the system turn; a guide that reads text is."""
    turns: tuple[rows.Message, ...] = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "2+2"},
    )
    system: rows.Message = {"role": "system", "content": "Count."}
    for told in ((), (system,)):
        assert rows.prompt_text(rows.Row("1", (*told, turns[0]), "4")) == "Hi"
        asked = rows.prompt_text(rows.Row("1", (*told, *turns), "4"))
        assert asked == "user: Hi\n\nassistant: Yes?\n\nuser: 2+2"
    assert rows.history_text(turns[:1]) == "Hi"
    assert rows.history_text(turns) == "user: Hi\n\nassistant: Yes?\n\nuser: 2+2"
    assert rows.history_text((system, turns[0])) == "system: Count.\n\nuser: Hi"


# ------------------------------------------------------------------------------------------ dry run


def test_dry_run_counts_and_makes_nothing(tmp_path: Path) -> None:
    ctx = open_toy(tmp_path, write=False)
    text = dry_run.dry_run(ctx, planned(ctx.config))
    assert "0.2 million weights" in text and "training rows: 64; prompt" in text
    assert (
        "sft/policy: 8 optimizer steps"
    ) in text and "iteration_1/policy: 3 optimizer steps" in text
    for word in ("memory:", "disk:", "time, rough"):
        assert word in text
    assert not (tmp_path / "run").exists()


def test_dry_run_leaves_out_what_is_finished(tmp_path: Path) -> None:
    ctx = open_toy(tmp_path)
    names = planned(ctx.config)
    assert f"stages: {len(names)} to be made, 0 are there" in dry_run.dry_run(ctx, names)
    for name in names[:-1]:
        (ctx.run.path / name).mkdir(parents=True)
        (ctx.run.path / name / "manifest.json").touch()
    (ctx.run.path / "lock").touch()
    text = dry_run.dry_run(ctx, names)
    assert f"stages: 1 to be made, {len(names) - 1} are there" in text
    assert "memory:" not in text and "optimizer steps" not in text and " 0 policies" in text


def test_dry_run_compares_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is available, for all ranks of this machine together."""
    ctx = open_toy(tmp_path)
    monkeypatch.setattr(dry_run, "available_bytes", lambda device: 2**30)
    assert "WARNING: memory" not in dry_run.dry_run(ctx, planned(ctx.config))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    text = dry_run.dry_run(ctx, planned(ctx.config))
    assert (
        "WARNING: memory: does not fit: 1."
    ) in text and "4 ranks, of 1.0 available; lower training.micro" in text


def test_dry_run_reads_headers(tmp_path: Path) -> None:
    folder = toy.write_toy_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 161}))
    with pytest.raises(InputError, match="mlp"):
        dry_run.dry_run(open_toy(tmp_path, f"policy={folder}"), [])


def test_dry_run_looks_at_the_guide(tmp_path: Path, toy_run: Path) -> None:
    dry_run.dry_run(open_toy(tmp_path, f"guide={toy_run / 'guide'}"), ["guide"])
    for folder, message in (
        (tmp_path / "none", "no such folder"),
        (toy_run / "sft/policy", "is no gpt2"),
    ):
        with pytest.raises(InputError, match=message):
            dry_run.dry_run(open_toy(tmp_path, f"guide={folder}"), ["guide"])


def test_dry_run_looks_at_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = open_toy(tmp_path, write=False)
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(
        EnvironmentProblem,
        match=r"the run needs about \d+ bytes of disk .*, 1000 "
        r"bytes are free",
    ):
        dry_run.dry_run(ctx, planned(ctx.config))
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="is a file"):
        dry_run.dry_run(ctx, planned(ctx.config))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_estimated_within_a_tenth(dtype: torch.dtype, checkpointing: str) -> None:
    """Against a count of what is there between forward and backward."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "head_dim": 32,
        "num_hidden_layers": 3,
        "sliding_window": None,
    }
    config = MistralConfig.from_json(toy.CONFIG | sizes, "toy")
    model = toy.random_mistral(config, 0).to(dtype)
    for block in model.blocks:
        block.checkpointing = checkpointing
    batch = Batch.pack([Pair(str(i), list(range(3, 43)), list(range(3, 53))) for i in range(8)])
    with Meter() as meter:
        states = model(batch.ids, batch.layout, lambda hidden, weight: hidden)
        counted = (meter.alive() - states.untyped_storage().nbytes()) / len(batch.ids)
    estimated, _ = memory_model.activation_bytes(config, dtype.itemsize, checkpointing)
    assert 0.9 < estimated / counted < 1.1


@pytest.mark.parametrize(("answers", "asked"), [("checked", None), ("greedy", 0), ("all", 2)])
def test_held_out_rows_without_a_checker_are_asked_as_the_key_says(
    answers: str, asked: int | None, tmp_path: Path
) -> None:
    """Nothing, the greedy answer, or the samples too; what was asked is in the manifest."""
    path = rows_file(tmp_path / "rows.jsonl", 40)
    ctx = open_toy(
        tmp_path, f"data={path}", "heldout_fraction=0.1", f"evaluation.answers={answers}"
    )
    evaluation.evaluation_stage(ctx, "start", toy.toy_model(tmp_path))
    file = evaluation.answers_file(Path(ctx.config.run) / "start")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == 4
    assert {len(r["sampled"]) if "greedy" in r else None for r in records} == {asked}
    parents = json.loads((file.parent / "manifest.json").read_text())["parents"]
    assert ("answers" in parents) == (answers != "checked")
