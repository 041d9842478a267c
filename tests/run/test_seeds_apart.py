"""A comparison with all its arms, whose seeds are trained by several processes: what they share,
whom they wait for, what they refuse, and the page that the last one writes.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_bert import write_bert
from runs import ROOT, one_thread, script_command

from ldalign.evaluation.statistics import superiority
from ldalign.report.analysis import read_pairs
from ldalign.run import lock
from ldalign.run.compare_settings import CompareConfig
from ldalign.run.comparison import Arm, arm_folder, hold, stages_to_make, validation_ids
from ldalign.run.folder import RunFolder
from ldalign.system import distributed
from ldalign.system.config import load_config
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.system.files import read_jsonl
from ldalign.train import align, compare

ARMS = [
    "sft",
    "sft/pairs",
    "spin",
    *(f"ld_align/{kind}" for kind in "uniform shuffled length inverse semantic pooled".split()),
    "ld_align/oracle",
    "ld_align",
    "ld_align/retrained",
]
OPTIONS = [
    "training.steps=2",
    "compare.seeds=[0, 1]",
    "compare.validation_rows=8",
    "max_rows=24",
    "global_batch=8",
    "evaluation.samples=2",
    "max_new_tokens=8",
    "sft.epochs=0",
]
AGAIN = "**Every number again**"
FEW = ["compare.methods=[sft, spin]", "iterations=1"]


def config_of(run: Path, *overrides: str) -> CompareConfig:
    return load_config(
        CompareConfig, ROOT / "configs/toy.yaml", [*OPTIONS, f"run={run}", *overrides]
    )


def arguments(run: Path, cache: Path, *more: str) -> list[str]:
    config = str(ROOT / "configs/toy.yaml")
    return ["--config", config, *OPTIONS, f"run={run}", f"cache={cache}", *more]


def made_at(run: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in run.glob("seed_*/*/iteration_*/policy/manifest.json")}


@pytest.mark.slow
def test_all_arms_in_two_iterations(tmp_path: Path, toy_cache: Path, in_process: None) -> None:
    """Two processes, a seed each, the second one first; what trainings share is made once, and the
    page is written by the last, with every arm in its tables.
    """
    run, bert = tmp_path / "run", write_bert(tmp_path / "bert")
    more = [f"compare.methods={ARMS}", "compare.learning_rates=[1e-3]", f"judge.folder={bert}"]
    compare.main(arguments(run, toy_cache, *more, "compare.only=[1]"))
    assert not (run / "report").exists() and not list(run.glob("seed_0/*/iteration_0/policy"))
    before = made_at(run)
    assert len(before) == 2 * len(ARMS)
    compare.main(arguments(run, toy_cache, *more, "compare.only=[0]"))
    assert {path: made_at(run)[path] for path in before} == before

    config = config_of(run, *more)
    folders = {name: arm_folder(config, Arm.of(name), 1, 1e-3) for name in ARMS}

    def same(stage: str, a: str, b: str) -> bool:
        return os.path.samefile(*(folders[name] / stage / "manifest.json" for name in (a, b)))

    for name in ARMS[1:]:  # the seed's samples; sft came first and needed none
        assert same("iteration_0/responses", "spin", name)
    assert same("guide", "ld_align", "ld_align/shuffled")
    # Trained again after the first iteration alone.
    for stage in ("guide", "iteration_0/policy", "iteration_0/evaluation"):
        assert same(stage, "ld_align", "ld_align/retrained")
    assert (folders["ld_align/retrained"] / "iteration_1/guide").is_dir()
    assert not (folders["ld_align"] / "iteration_1/guide").exists()
    # SFT on pairs: exactly the prompts that SPIN has pairs of, in the first iteration.
    spin = json.loads((folders["spin"] / "iteration_0/policy/summary.json").read_text())
    pairs = json.loads((folders["sft/pairs"] / "iteration_0/policy/summary.json").read_text())
    assert pairs["pairs"] == spin["pairs"] and "nll" in pairs
    # Weights of 1 are SPIN, through both iterations.
    answers = [
        read_jsonl(folders[name] / "iteration_1/evaluation/answers.jsonl")
        for name in ("spin", "ld_align/uniform", "ld_align")
    ]
    assert answers[0] == answers[1] != answers[2]

    summary = json.loads((run / "report/comparison.json").read_text())
    text = (run / "report/comparison.md").read_text()
    assert [*summary["policies"]] == ["start", *ARMS]
    assert [*summary["primary"]] == ["ld_align - spin", "ld_align - ld_align/shuffled"]
    gap = summary["others"]["ld_align/uniform - spin"]["nll"]
    assert gap["value"] == gap["se"] == 0
    assert [*summary["weights"]] == [a for a in ARMS if a.startswith("ld_align") and "re" not in a]
    correlations = summary["weights"]["ld_align/semantic"]["embedding"]
    assert [value["value"] for value in correlations] == pytest.approx([1, 1])
    for seed, found in enumerate(summary["weights"]["ld_align"]["wrong"]):
        own = read_pairs(arm_folder(config, Arm.of("ld_align"), seed, 1e-3), 0)
        assert own is not None
        kept = own.trained
        expected = superiority(
            own.weight[kept & (own.right == 0)], own.weight[kept & (own.right == 1)]
        )
        assert (found is None) == (expected is None)
        assert found is None or expected is None or found["value"] == expected.value
    assert "| ld_align/retrained | 0.001 |" in text and "**The search**" not in text
    assert (run / "report/comparison.svg").stat().st_size > 5000
    config_text = (run / "config.yaml").read_text()
    assert "only: []" in config_text  # whichever process wrote it


def test_the_first_seed_chooses_before_the_others(
    tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    run = tmp_path / "run"
    more = [*FEW, "compare.learning_rates=[1e-3, 4e-3]"]
    with pytest.raises(InputError, match=r"seed 0 has not tried all learning rates of sft yet"):
        compare.main(arguments(run, toy_cache, *more, "compare.only=[1]"))
    # It holds nothing after that, and the start is there for whoever comes next.
    compare.main(arguments(run, toy_cache, *more, "compare.only=[0]"))
    assert len(made_at(run)) == 4 and not (run / "report").exists()
    compare.main(arguments(run, toy_cache, *more, "compare.only=[1]"))
    assert len(made_at(run)) == 6
    summary = json.loads((run / "report/comparison.json").read_text())
    _, test = validation_ids(config_of(run, *more))
    assert summary["rows"]["test"] == len(test) and summary["seeds"] == [0, 1]
    for tried in summary["search"].values():
        below = [found["below"] for found in tried.values()]
        assert min(below) == 0 and len(tried) == 2
    assert "**The search** (seed 0" in (run / "report/comparison.md").read_text()


def test_weights_are_removed_when_no_training_needs_them(
    tmp_path: Path, toy_cache: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those of ld_align stay until ld_align/retrained, which begins with its first iteration, has
    them; then all are gone, and the same command again trains nothing and writes the same page.
    """
    run = tmp_path / "run"
    methods = "compare.methods=[ld_align, spin, ld_align/retrained]"
    more = ["compare.seeds=[0]", methods, "compare.learning_rates=[1e-3, 2e-3]"]
    removing = [*more, "compare.policies=remove"]
    compare.main(arguments(run, toy_cache, *removing))
    assert not list(run.glob("seed_*/*/iteration_*/policy/*.safetensors"))
    assert len(list(run.glob("seed_*/*/iteration_1/evaluation/answers.jsonl"))) == 6
    config = config_of(run, *more)
    first, second = (
        arm_folder(config, Arm.of(name), 0, 2e-3) / "iteration_0/policy/manifest.json"
        for name in ("ld_align", "ld_align/retrained")
    )
    assert os.path.samefile(first, second)
    page = (run / "report/comparison.md").read_text()
    (run / "report/comparison.md").unlink()
    before = made_at(run)
    capfd.readouterr()
    compare.main(arguments(run, toy_cache, *removing))
    said = capfd.readouterr().err
    assert made_at(run) == before and "policy: done" not in said
    assert "its weights are removed" in said
    assert (run / "report/comparison.md").read_text() == page
    # Kept, everything comes out the same.
    compare.main(arguments(tmp_path / "kept", toy_cache, *more))
    kept_page = (tmp_path / "kept/report/comparison.md").read_text()
    assert kept_page.partition(AGAIN)[0] == page.partition(AGAIN)[0]  # all but the settings
    kept = list((tmp_path / "kept").glob("seed_*/*/iteration_*/policy/*.safetensors"))
    assert len(kept) == 12
    # What cannot be measured any more is said.
    with pytest.raises(InputError, match="weights are removed .*, so benchmarks.tasks cannot be"):
        compare.run_benchmarks(
            config_of(run, *removing, "benchmarks=[piqa]"), tmp_path, Arm.of("spin"), 0, 1e-3
        )


def test_a_dry_run_counts_what_is_made_once(
    tmp_path: Path, toy_cache: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    more = [f"compare.methods={ARMS}", f"judge.folder={write_bert(tmp_path / 'bert')}"]
    more.append("compare.learning_rates=[1e-3, 2e-3]")
    compare.main([*arguments(run, toy_cache, *more), "--dry-run"])
    line = capfd.readouterr().err.splitlines()[-1]
    # 12 methods, at two rates with the first seed; two iterations, the first of ld_align/retrained
    # apart, which is that of ld_align at each rate.
    assert "36 trainings, of 12 methods, with 69 policies" in line and not run.exists()
    config = config_of(run, *more)
    stages = [name for _, name in stages_to_make(config, tmp_path, align.planned)]
    assert stages.count("guide") == stages.count("iteration_0/responses") == 2  # one a seed
    assert stages.count("iteration_0/distances") == 2 * 8
    assert stages.count("iteration_1/guide") == 3 and stages.count("start/evaluation") == 2
    only = stages_to_make(config_of(run, *more, "compare.only=[1]"), tmp_path, align.planned)
    assert len([name for _, name in only if name.endswith("policy")]) == 23


def test_a_seed_has_one_process(tmp_path: Path, toy_cache: Path, in_process: None) -> None:
    run = tmp_path / "run"
    config = config_of(run, *FEW)
    with hold(config, [0, 1]):
        with pytest.raises(EnvironmentProblem, match=r"seed_1/lock: this run is in use by host"):
            hold(config, [1])
        with hold(config, [2]):  # another
            pass
    with hold(config, [1]):
        pass
    # The whole command is refused while another process trains one of its seeds.
    (run / "lock").touch()
    with hold(config, [1]), pytest.raises(EnvironmentProblem, match="seed_1/lock"):
        compare.main(arguments(run, toy_cache, *FEW))
    assert not (run / "start").exists()
    with hold(config, [0, 1]):  # a refused command has let go of the seeds that it had
        pass


def test_who_finds_the_run_in_use_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It tries again and again, here three times, and says once that it waits."""
    distributed.start("cpu")
    first, real = contextlib.ExitStack(), time.sleep
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        if seconds != lock.WAIT_SECONDS:  # another thread's
            real(seconds)
            return
        slept.append(seconds)
        if len(slept) == 3:
            first.close()

    first.enter_context(RunFolder(tmp_path / "run", "a: 1\n"))
    with pytest.raises(EnvironmentProblem, match="in use by"), RunFolder(tmp_path / "run", ""):
        pass
    monkeypatch.setattr(lock.time, "sleep", sleep)
    with RunFolder(tmp_path / "run", "a: 1\n", wait=True):
        assert slept == [lock.WAIT_SECONDS] * 3
    assert capfd.readouterr().err.count("another process works here; waiting for it") == 1
    distributed.stop()


@pytest.mark.slow
def test_two_processes_at_once_one_of_them_stopped(tmp_path: Path, toy_cache: Path) -> None:
    """Both begin together; one makes the start, and the other waits. One is stopped in its seed and
    goes on with the same command; the page is there when both have ended, as one process has it.
    """
    run = tmp_path / "run"
    more = [*FEW, "compare.learning_rates=[1e-3]", "training.steps=8"]

    def begin(seed: int) -> subprocess.Popen[str]:
        command = script_command(
            ROOT / "train/compare.py", *arguments(run, toy_cache, *more, f"compare.only=[{seed}]")
        )
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_thread())

    processes = [begin(0), begin(1)]
    deadline = time.monotonic() + 120
    while not list(run.glob("seed_1/*/iteration_0/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate()[1] for process in processes]
    assert processes[0].returncode == 0, said[0]
    assert processes[1].returncode in (143, 0), said[1]
    again = begin(1)
    assert again.wait() == 0, again.communicate()[1]
    shared = json.loads((run / "report/comparison.json").read_text())
    alone = subprocess.run(
        [
            sys.executable,
            ROOT / "train/compare.py",
            *arguments(tmp_path / "alone", toy_cache, *more),
        ],
        env=one_thread(),
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    found = json.loads((tmp_path / "alone/report/comparison.json").read_text())
    assert found | {"again": None} == shared | {"again": None}  # which names the run's folder
