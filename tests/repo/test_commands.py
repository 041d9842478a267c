"""The commands that README and the pages print: every one resolves, and those of the first steps
are run, as far as they make nothing.
"""

import json
import re
from pathlib import Path

import pytest
from doc_commands import Command, commands, wrong
from runs import ROOT

from ldalign.train import align, inspect_data

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
