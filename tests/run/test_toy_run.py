"""A whole run on a tiny model: what it leaves, and that it continues, refuses and
splits over ranks as promised.
"""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Set
from pathlib import Path

import pytest
import torch
from runs import ROOT, one_thread, run_script, script_command
from safetensors.torch import load_file

from ldalign.run.folder import stage_names
from ldalign.run.manifest import check_stage
from ldalign.system.errors import InputError
from ldalign.system.files import read_jsonl
from ldalign.train.align import main, planned

ONE_ITERATION = ("iterations=1", "continual_sft.epochs=0")
ALIGN, CONFIG = ROOT / "train/align.py", ROOT / "configs/toy.yaml"
STAGES = [
    "data",
    "sft/policy",
    "sft/evaluation",
    "iteration_0/responses",
    "guide",
    "iteration_0/distances",
    "iteration_0/reference",
    "iteration_0/policy",
    "iteration_0/evaluation",
    "iteration_1/responses",
    "iteration_1/distances",
    "iteration_1/reference",
    "iteration_1/policy",
    "iteration_1/evaluation",
    "continual_sft/policy",
    "continual_sft/evaluation",
]
MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
OUR_FILES = {"manifest.json", "metrics.jsonl", "summary.json", "README.md"}


def align(run: Path, cache: Path, *arguments: str) -> None:
    main(["--config", str(CONFIG), f"run={run}", f"cache={cache}", "report=table", *arguments])


def metrics(run: Path, stage: str) -> list[dict[str, float]]:
    return [record for record in read_jsonl(run / stage / "metrics.jsonl") if "loss" in record]


def state_of(
    run: Path, skip: Set[str] = frozenset({"config.yaml", "environment.json", "lock"})
) -> dict[str, tuple[int, str]]:
    """(time of change, sha256) of every file, but for those written on each start."""
    files = [
        p for p in run.rglob("*") if p.is_file() and p.name not in skip and "report" not in p.parts
    ]
    return {
        str(p.relative_to(run)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in files
    }


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run / stage / "model.safetensors")


def responses(run: Path, t: int) -> list[list[int]]:
    return [r["token_ids"] for r in read_jsonl(run / f"iteration_{t}/responses/responses.jsonl")]


# ----------------------------------------------------------------------------------- what it leaves


def test_layout(toy_run: Path) -> None:
    assert stage_names(toy_run) == STAGES
    for name in STAGES:
        check_stage(toy_run / name)
    files = {
        "config.yaml",
        "environment.json",
        "started.json",
        "metrics.jsonl",
        "lock",
        "report/table.md",
        "report/table.json",
        "report/report.html",
    }
    assert all((toy_run / name).is_file() for name in files)
    for name in (name for name in STAGES if name.endswith("/policy")):
        assert {path.name for path in (toy_run / name).iterdir()} == MODEL_FILES | OUR_FILES
    assert not list(toy_run.rglob("*.partial")) and not list(toy_run.rglob("*.rank*"))


def test_plan_names_what_is_made(toy_run: Path) -> None:
    from ldalign.run.settings import RunConfig
    from ldalign.system.config import load_config

    assert ["data", *planned(load_config(RunConfig, CONFIG))] == STAGES


def test_records(toy_run: Path) -> None:
    rows = read_jsonl(toy_run / "data/train.jsonl")
    sampled = read_jsonl(toy_run / "iteration_0/responses/responses.jsonl")
    distances = read_jsonl(toy_run / "iteration_0/distances/distances.jsonl")
    assert (
        [r["id"] for r in sampled] == [r["id"] for r in distances] == [r["id"] for r in rows[:48]]
    )
    assert all(r["n_tokens"] == len(r["token_ids"]) and r["logp"] < 0 for r in sampled)
    assert {r["finish_reason"] for r in sampled} <= {"stop", "length"}
    # A cut response never has an end token, a finished one ends with it.
    assert all((r["token_ids"][-1] == 2) == (r["finish_reason"] == "stop") for r in sampled)
    weight = [r["weight"] for r in distances if r["weight"] > 0]
    assert math.isclose(sum(weight) / len(weight), 1.0, abs_tol=1e-9)
    answers = read_jsonl(toy_run / "iteration_1/evaluation/answers.jsonl")
    assert len(answers) == 26 and all(len(a["correct"]) == 3 for a in answers)


def test_step_0_is_ln_2_and_metrics_have_their_names(toy_run: Path) -> None:
    names = {
        "loss",
        "learning_rate",
        "grad_norm",
        "epoch",
        "global_step",
        "num_tokens",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "logits/chosen",
        "logits/rejected",
        "entropy",
        "mean_token_accuracy",
        "logps/ref_chosen",
        "logps/ref_rejected",
        "tokens_per_second",
    }
    for t in (0, 1):
        first, *_, last = metrics(toy_run, f"iteration_{t}/policy")
        assert abs(first["loss/unweighted"] - math.log(2)) < 1e-4
        assert abs(first["rewards/margins"]) < 1e-3 and last["rewards/margins"] > 0.01
        assert names <= first.keys()
    whole = read_jsonl(toy_run / "metrics.jsonl")
    assert list(dict.fromkeys(record["stage"] for record in whole)) == STAGES
    assert any("eval_nll/real" in record for record in whole)


def test_table(toy_run: Path) -> None:
    table = json.loads((toy_run / "report/table.json").read_text())
    assert [row["policy"] for row in table["policies"]] == [
        "sft",
        "iteration_0",
        "iteration_1",
        "continual_sft",
    ]
    for row in table["policies"]:
        assert row["nll/real"] > 0 and 0 <= row["accuracy/greedy"] <= 1
    assert set(table["seconds"]) == set(STAGES)
    text = (toy_run / "report/table.md").read_text()
    shown = (
        "sampled accuracy, latent distance, weight spread, reward margin, tokens generated, tokens "
        "trained, wall time"
    )
    for wanted in shown.split(", "):
        assert wanted in text
    assert "nan" not in text.lower().replace("nats", "")


# ------------------------------------------------------------------------------------ running again


def test_again_does_nothing(
    toy_run: Path, toy_cache: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    before, report = state_of(toy_run), (toy_run / "report/table.json").read_text()
    align(toy_run, toy_cache)
    said = capfd.readouterr().err
    assert [
        name for name in STAGES if f"{name}: already done" not in said
    ] == [] and "done (" not in said
    assert state_of(toy_run) == before and (toy_run / "report/table.json").read_text() == report


def test_a_deleted_stage_is_made_again_and_no_other(
    tmp_path: Path,
    toy_run: Path,
    toy_cache: Path,
    in_process: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    before = state_of(run)
    for name in ("iteration_1/policy", "iteration_0/reference"):
        shutil.rmtree(run / name)
    align(run, toy_cache)
    made = re.findall(r"^(\S+): done \(", capfd.readouterr().err, flags=re.MULTILINE)
    assert made == ["iteration_0/reference", "iteration_1/policy"]
    after = state_of(run)
    remade = {
        name
        for name in before
        if name.startswith(("iteration_1/policy/", "iteration_0/reference/"))
    }
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= remade | {"metrics.jsonl"}
    # Made again from the same parents, it is the same policy: everything after it still fits.
    assert (
        before["iteration_1/policy/model.safetensors"][1]
        == after["iteration_1/policy/model.safetensors"][1]
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("learning_rate=2e-3", "iteration_0/policy.*learning_rate was 0.001, now 0.002"),
        ("sft.epochs=1", "sft/policy.*sft.epochs was 2, now 1"),
        (
            "sampling.temperature=0.5",
            "iteration_0/responses.*sampling.temperature was 1.0, now 0.5",
        ),
        ("loss.nll=0.5", "iteration_0/policy.*loss.nll was 'absent', now 0.5"),
        ("loss.kind=ipo", "iteration_0/policy.*loss.kind was 'absent', now 'ipo'"),
        ("guide.latent_width=8", "guide/.*guide.latent_width was 16, now 8"),
        ("seed=1", "toy/data: its rows were prepared otherwise, and used: seed was 0, now 1"),
        ("max_rows=40", "iteration_0/responses.*data was"),
        ("evaluation.samples=3", "sft/evaluation.*evaluation.samples was 2, now 3"),
    ],
)
def test_a_changed_setting_is_refused_by_name(
    toy_run: Path, toy_cache: Path, in_process: None, change: str, named: str
) -> None:
    before = state_of(toy_run, skip={"lock"})
    with pytest.raises(InputError, match=named) as raised:
        align(toy_run, toy_cache, change)
    assert raised.value.exit_code == 2
    assert state_of(toy_run, skip={"lock"}) == before


def test_what_only_moves_work_about_may_change(
    toy_run: Path, toy_cache: Path, in_process: None
) -> None:
    before = state_of(toy_run)
    align(
        toy_run,
        toy_cache,
        "training.micro_tokens=512",
        "sampling.batch_rows=7",
        "training.checkpointing=full",
    )
    assert state_of(toy_run) == before


def test_killed_in_the_middle(
    tmp_path: Path, toy_run: Path, toy_cache: Path, in_process: None
) -> None:
    run = tmp_path / "run"
    # The same command as the one that goes on: another kind of report leaves a half-written page.
    arguments = [ALIGN, "--config", CONFIG, f"run={run}", f"cache={toy_cache}", "report=table"]
    process = subprocess.Popen(
        script_command(*arguments, *ONE_ITERATION), env=one_thread(), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    # Caught while it trains the guide, with finished stages before and a half-made one around it.
    while not (run / "guide.partial").exists():
        assert process.poll() is None and time.monotonic() < deadline, (
            "ended before it could be killed"
        )
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (run / "iteration_0/responses/manifest.json").is_file() and not (run / "guide").exists()
    align(run, toy_cache, *ONE_ITERATION)
    assert not list(run.rglob("*.partial"))
    # The undisturbed run and this one are the same to the bit.
    whole, resumed = weights(toy_run, "iteration_0/policy"), weights(run, "iteration_0/policy")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# -------------------------------------------------------------------------------- ranks and methods


def test_two_ranks_are_one_rank(tmp_path: Path, toy_run: Path, toy_cache: Path) -> None:
    run = tmp_path / "run"
    arguments = [ALIGN, "--config", CONFIG, f"run={run}", f"cache={toy_cache}", *ONE_ITERATION]
    done = run_script(*arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    assert responses(run, 0) == responses(toy_run, 0)
    starts = {
        "sft/policy": load_file(toy_cache / "toy-2/model.safetensors"),
        "iteration_0/policy": weights(run, "sft/policy"),
    }
    for stage, start in starts.items():
        one, two = weights(toy_run, stage), weights(run, stage)
        for name in one:
            # Sums over ranks round differently, and Adam divides by small gradients: single weights
            # may differ more.
            moved = (one[name] - start[name].float()).norm()
            assert moved > 0 and (two[name] - one[name]).norm() <= 1e-2 * moved, name
        losses = [
            [record["loss"] for record in metrics(folder, stage)] for folder in (toy_run, run)
        ]
        assert all(abs(a - b) < 1e-4 for a, b in zip(*losses, strict=True))
    summaries = [
        json.loads((folder / "iteration_0/distances/summary.json").read_text())
        for folder in (toy_run, run)
    ]
    assert math.isclose(summaries[0]["distance/mean"], summaries[1]["distance/mean"], rel_tol=1e-3)


def test_spin_has_no_guide_and_weights_of_one(
    tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    align(tmp_path / "run", toy_cache, *ONE_ITERATION, "method=spin", "sft.epochs=0", "max_rows=16")
    assert stage_names(tmp_path / "run") == [
        "data",
        "start/evaluation",
        "iteration_0/responses",
        "iteration_0/reference",
        "iteration_0/policy",
        "iteration_0/evaluation",
    ]
    first = metrics(tmp_path / "run", "iteration_0/policy")[0]
    assert first["weight/mean"] == 1.0 and first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert "latent distance" not in (tmp_path / "run/report/table.md").read_text()


def test_T14_weights_of_one_are_spin_bit_by_bit(
    toy_run: Path, tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    """ld_align with all weights 1, and spin.

    Expected: the same policy, bit by bit, after two iterations.
    """
    options = ["sft.epochs=0", "max_rows=16", "evaluation.rows=0", "continual_sft.epochs=0"]
    align(tmp_path / "spin", toy_cache, *options, "method=spin")
    align(tmp_path / "ones", toy_cache, *options, "weights=uniform")
    align(tmp_path / "latent", toy_cache, *options)
    for t in range(2):
        spin, ones, latent = (
            weights(tmp_path / name, f"iteration_{t}/policy") for name in ("spin", "ones", "latent")
        )
        assert all(torch.equal(spin[name], ones[name]) for name in spin)
        assert not all(torch.equal(spin[name], latent[name]) for name in spin)
    distances = read_jsonl(tmp_path / "ones/iteration_0/distances/distances.jsonl")
    assert {r["weight"] for r in distances} <= {0.0, 1.0}
    assert {r["distance"] for r in distances} == {1.0}


def test_spin_mixes_the_previous_pairs_in(
    tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    """Its second iteration has both iterations' pairs, all under one reference,
    and starts at ln 2.
    """
    options = [
        "sft.epochs=0",
        "max_rows=16",
        "evaluation.rows=0",
        "continual_sft.epochs=0",
        "learning_rate=[1e-3, 5e-4]",
    ]
    align(tmp_path / "run", toy_cache, *options, "method=spin", "mix_previous=true")
    ids = json.loads((tmp_path / "run/iteration_1/reference/rows.json").read_text())
    older = [name for name in ids if name.endswith(" of iteration 0")]
    assert len(ids) == len(set(ids)) and 2 * len(older) >= len(ids) - 2 > 16
    first = metrics(tmp_path / "run", "iteration_1/policy")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert max(r["learning_rate"] for r in metrics(tmp_path / "run", "iteration_1/policy")) <= 5e-4


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_methods_without_sampling(
    method: str, tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    """A preference file, and the same rows as plain SFT: chosen responses get likelier, against the
    rejected ones.
    """
    rows = [
        {"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": "no " * (1 + i % 3)}
        for i in range(32)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        f"data={path}",
        f"method={method}",
        "iterations=1",
        "sft.epochs=0",
        "continual_sft.epochs=0",
        "heldout_fraction=0.25",
        "training.epochs=6",
        "global_batch=8",
    ]
    align(tmp_path / "run", toy_cache, *options)
    made = [name for name in stage_names(tmp_path / "run") if name.startswith("iteration_0")]
    assert made == [
        *(["iteration_0/reference"] if method == "dpo" else []),
        "iteration_0/policy",
        "iteration_0/evaluation",
    ]
    steps = metrics(tmp_path / "run", "iteration_0/policy")
    if method == "dpo":
        assert (
            steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
            and steps[-1]["rewards/margins"] > 0
        )
    else:
        assert steps[-1]["nll"] < steps[0]["nll"] and "rewards/margins" not in steps[0]


@pytest.mark.parametrize(
    ("method", "judge"), [("self_reward", None), ("rlaif", "checker"), ("rlaif", "toy")]
)
def test_methods_of_two_samples(
    method: str, judge: str | None, tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    """Two samples a prompt, one of them the winner where the judge has a preference;
    ties are not trained on.
    """
    options = [
        f"method={method}",
        "iterations=1",
        "continual_sft.epochs=0",
        "sft.epochs=0",
        "max_rows=16",
        "evaluation.rows=0",
        "max_new_tokens=8",
        *([f"judge.model={judge}"] if judge else []),
    ]
    run = tmp_path / "run"
    arguments = [f"run={run}", f"cache={toy_cache}", "--config", str(CONFIG), *options]
    if (method, judge) == ("rlaif", "checker"):  # a random model is never right: all ties
        with pytest.raises(InputError, match="iteration 0: there is no pair left to learn from"):
            main(arguments)
        assert {r["preference"] for r in read_jsonl(run / "iteration_0/judged/judged.jsonl")} == {
            0.5
        }
        return
    main(arguments)
    samples = read_jsonl(run / "iteration_0/responses/responses.jsonl")
    assert len(samples) == 32 and [r["id"] for r in samples[0::2]] == [
        r["id"] for r in samples[1::2]
    ]
    assert (
        sum(
            a["token_ids"] != b["token_ids"]
            for a, b in zip(samples[0::2], samples[1::2], strict=True)
        )
        > 12
    )
    judged = read_jsonl(run / "iteration_0/judged/judged.jsonl")
    assert (
        all(0 < r["preference"] < 1 for r in judged) and len({r["preference"] for r in judged}) > 8
    )
    first = metrics(run, "iteration_0/policy")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_no_iterations_is_sft_and_evaluation(
    tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    align(tmp_path / "run", toy_cache, "iterations=0", "continual_sft.epochs=0", "sft.epochs=1")
    assert stage_names(tmp_path / "run") == ["data", "sft/policy", "sft/evaluation"]


def test_reference_initial(
    tmp_path: Path, toy_run: Path, toy_cache: Path, in_process: None
) -> None:
    """Against the run's start as reference, the second iteration does not begin at ln
    2, and that is no error.
    """
    run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    for name in ("iteration_1/reference", "iteration_1/policy", "iteration_1/evaluation"):
        shutil.rmtree(run / name)
    align(run, toy_cache, "reference=initial", "continual_sft.epochs=0")
    first = metrics(run, "iteration_1/policy")[0]
    assert abs(first["loss/unweighted"] - math.log(2)) > 1e-3
