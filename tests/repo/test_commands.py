"""The commands that README and the pages print: every one resolves, and those that call one of our
programs are run, on a toy: what trains with --dry-run, the rest as it stands.
"""

import importlib
import io
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from doc_commands import Command, commands, script_call, wrong
from made_bert import write_bert
from runs import ROOT
from toy_context import rows_file

from ldalign.train import align, inspect_data, presets

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
FOUND = {page: commands(page) for page in PAGES}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if FOUND[page]], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_resolve(page: Path) -> None:
    problems = [(one, wrong(one.text)) for one in FOUND[page]]
    found = [f"{one.page}:{one.line}: {one.text}: {what}" for one, what in problems if what]
    assert not found, "\n".join(found)


def test_commands_are_found() -> None:
    texts = [one.text for page in PAGES for one in FOUND[page]]
    assert len(texts) > 40
    assert {"make align", "make test", "make setup", "make lint"} <= set(texts)
    kinds = {program: sum(program in text for text in texts) for program in ("torchrun", "python")}
    assert all(kinds.values()), kinds


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("make aligned", "no target aligned"),
        ('make align ARGS="polcy=x"', "polcy: unknown key"),
        ("make align CONFIG=configs/none.yaml", "no file configs/none.yaml"),
        ('make align CONFIG=configs/toy.yaml ARGS="iterations=-1"', "iterations"),
        ('make align ARGS="method=spin guide.epochs=3"', "method=spin does not read"),
        ('make compare ARGS="compare.seds=[0]"', "compare.seds"),
        ('make test ARGS="tests/none -k x"', "no file tests/none"),
        ('make bench ARGS="--onyl step"', "no option --onyl"),
        (".venv/bin/python train/sft.py sft.epoch=1", "sft.epoch"),
        ("python train/none.py", "no file train/none.py"),
        ("python -m ldalign.none", "no module ldalign.none"),
        ("PYTHONSAFEPATH=1 .venv/bin/python -m pytest tests/test_{a,objective}.py", "test_a.py"),
        (".venv/bin/torchrun --nproc-per-node 2 train/align.py max_length=1", "max_length"),
        ("ldalign align --config smollm3", "no file smollm3"),
        ("ldalign aline run=x", "no command aline"),
        ("ldalign chat polcy=x", "polcy"),
        ("pip install 'ldalign[hubb]'", "no extra hubb"),
        ("curl x", "does not know"),
    ],
)
def test_a_wrong_command_is_found(command: str, what: str) -> None:
    assert what in (wrong(command) or "")


@pytest.mark.parametrize(
    "command",
    [
        "ldalign align --config smollm2-135m-spin run=runs/x --ranks 2 --dry-run",
        "ldalign chat policy=runs/mine",
        "ldalign inspect policy=toy data=rows.jsonl rows=3",
        "ldalign export gguf FOLDER",
        "ldalign presets smollm2-135m > mine.yaml",
        "make align CONFIG=smollm2-135m-spin 2>&1 | tee log",
        "make align CONFIG=configs/toy.yaml GPUS=2",
        "pip install 'ldalign[hub,reward]'",
    ],
)
def test_a_right_command_passes(command: str) -> None:
    assert wrong(command) is None


def test_a_page_is_read_by_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```\nmake a && make b  # both\npython x.py \\\n    k=1\n# alone\n```\n\n"
        "```python\nmake = 1\n```\n\n```\nlog: make\n```\n\n"
        "    torchrun y.py k=[1, 2]\n\n    d = 1\n"
    )
    assert commands(page) == [
        Command("page.md", 2, "make a"),
        Command("page.md", 2, "make b"),
        Command("page.md", 3, "python x.py k=1"),
        Command("page.md", 16, "torchrun y.py k=[1, 2]"),
    ]


def test_the_first_steps_with_data_of_ones_own(
    tmp_path: Path, toy_cache: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """start.md's steps 1 to 3 with the row that it shows, and the toy model in the place of its."""
    page = (ROOT / "docs/start.md").read_text(encoding="utf-8")
    row = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])  # type: ignore[index]
    rows = tmp_path / "rows.jsonl"
    asked = ({**row, "prompt": row["prompt"].replace("7", str(i))} for i in range(60))
    rows.write_text("".join(json.dumps(one) + "\n" for one in asked))
    inspect_data.main(["policy=toy", f"data={rows}", "rows=3", f"cache={toy_cache}"])
    assert "rows.jsonl" in capsys.readouterr().out
    run = tmp_path / "mine"
    keys = [f"data={rows}", f"run={run}", "policy=toy", f"cache={toy_cache}"]
    config = str(ROOT / "configs/own-data-cpu.yaml")
    align.main(["--config", config, *keys, "--dry-run"])
    said = capsys.readouterr()
    assert "GiB" in said.out + said.err and not run.exists()


# ----------------------------------------------------------------------------------- they are run

# What the pages let a reader put in, and what stands here in its place: a toy's, in seconds.
PUT_IN = {
    "/path/to/model": "toy",
    "/path/to/rows.jsonl": "rows.jsonl",
    "FILE:17,some-id": "rows.jsonl:17,rows.jsonl:2",
    "FILE.jsonl": "rows.jsonl",
    "roleplay_gpt4.jsonl": "rows.jsonl",
    "gsm8k_train.jsonl": "rows.jsonl",
    "FILE.yaml": "toy",
    "policy=MODEL": "policy=toy",
    "policy=FOLDER": "policy=toy",
    "smollm2-135m-instruct": "toy",
    "benchmarks.data=FOLDER": "benchmarks.data=bench",
    "data=FILE ": "data=rows.jsonl ",
    "runs/align/iteration_2/policy": "RUN/iteration_1/policy",
    "policy=runs/mine": "policy=RUN",
}
# What a command of these presets needs beside the toy, where its own models and data are far.
ZEPHYR = (
    "data=rows.jsonl guide.folder=null guide.backbone=policy guide.towers=auto "
    "guide.latent_map=null guide.learning_rate=null max_length=256 max_new_tokens=64 "
    "training.micro_tokens=512 guide.max_tokens=128"
)
INSTEAD = {
    "configs/zephyr-7b-ld-align.yaml": ZEPHYR,
    "configs/zephyr-7b-ld-align-nodes.yaml": f"{ZEPHYR} training.shard_ranks=1",  # of one process
    "zephyr-7b-spin": "data=rows.jsonl max_length=256 max_new_tokens=64",
}
DRY = ("align", "sft", "guide", "evaluate", "judge", "compare")  # scripts that know --dry-run
NOT_RUN = ("tour", "push")  # tests/repo/test_tour.py runs it; sends files into the world
CALLS = {one.text: script_call(one.text) for page in PAGES for one in FOUND[page]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, toy_run: Path) -> Path:
    """Where a reader may stand: rows, prompts, a finished run, an embedding model, benchmarks."""
    folder = tmp_path_factory.mktemp("reader")
    rows_file(folder / "rows.jsonl", 800)
    (folder / "prompts.jsonl").write_text('{"prompt": "Say 1."}\n{"prompt": "Say 2."}\n')
    shutil.copytree(toy_run, folder / "RUN")
    shutil.copytree(ROOT / "configs", folder / "configs")
    write_bert(folder / "minilm")
    return folder


def write_benchmarks(folder: Path) -> None:
    """Rows of every benchmark that a page names."""
    from benchmark_data import TASKS, file_of, make_row  # here: it needs lm_eval

    folder.mkdir(exist_ok=True)
    for task in TASKS:
        rows = (make_row(task, i, random.Random(i)) for i in range(40))
        (folder / file_of(task)).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "text",
    [text for text, call in CALLS.items() if call is not None and call[0] not in NOT_RUN],
)
def test_commands_run(
    text: str,
    place: Path,
    toy_cache: Path,
    in_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each that calls one of our programs, on the toy; what trains is tried with --dry-run."""
    for there, here in PUT_IN.items():
        text = text.replace(there, here)
    call = script_call(text)
    assert call is not None
    name, arguments = call
    for config in {*arguments} & {*INSTEAD}:
        arguments += INSTEAD[config].split()
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO("Say 3.\n"))
    if "benchmarks=" in text:
        pytest.importorskip("lm_eval", reason="the extra eval is not installed")
        write_benchmarks(place / "bench")
        arguments.append("benchmarks.data=bench")
    Path("my.yaml").unlink(missing_ok=True)
    if "--config my.yaml" in text:
        presets.main(["copy", "toy", "my.yaml"])
    if name in DRY:
        if not any(word.startswith("policy=") for word in arguments):
            arguments.append("policy=toy")
        arguments += ["--dry-run"] * ("--dry-run" not in arguments)
    if name not in ("presets", "export", "report"):
        arguments.append(f"cache={toy_cache}")
    importlib.import_module(f"ldalign.train.{name}").main(arguments)
