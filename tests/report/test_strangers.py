"""The report of a run folder that is a stranger's, or damaged: each file that it reads, each way.

Expected of every damage: one line that names the file, and exit code 2; where the report does not
read the file, the report that an undamaged folder gives.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_run import made_run, seal
from matplotlib.figure import Figure
from test_comparison_page import summary_of

from ldalign.report.chart import Chart, write_chart
from ldalign.report.comparison_page import write_comparison
from ldalign.report.table import write_report
from ldalign.run.settings import RunConfig
from ldalign.system.config import read_written, to_yaml
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.train import report as script

Damage = Callable[[Path], Any]
REPORTS = ("report/table.md", "report/table.json")
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("strangers") / "run", "align")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run", symlinks=True)


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Drawing takes seconds, and comes after all that is read here was refused."""
    monkeypatch.setattr(script, "write_page", lambda run: run / "report/report.html")
    yield


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes()[2:])


def huge(path: Path) -> None:
    os.truncate(path, 10**12)  # a hole: no room on the disk


def link_out(path: Path) -> None:
    outside = path.parents[len(path.parents) - 1 - path.parts.index("run")].parent / "outside"
    outside.write_text("theirs")
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside)


def with_text(text: str) -> Damage:
    return lambda path: path.write_text(text)


def with_key(key: str, value: Any) -> Damage:
    """Another value in a JSON file, under a manifest that says so."""

    def damage(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        seal(path.parents[len(path.parents) - 1 - path.parts.index("run")])

    return damage


DAMAGES: list[tuple[str, Damage]] = [
    ("config.yaml", cut),
    ("config.yaml", no_text),
    ("config.yaml", huge),
    ("config.yaml", folder),
    ("config.yaml", link_out),
    ("config.yaml", with_text(BOMB)),
    ("config.yaml", with_text("a: " + "[" * 5000 + "]" * 5000)),
    ("config.yaml", with_text("- a list")),
    ("config.yaml", with_text("continual_sft: 3\n")),
    ("config.yaml", with_text("method: [a]\n")),
    ("config.yaml", with_text("learning_rate: .nan\n")),
    ("config.yaml", with_text("seed: !!python/object/apply:os.getpid []\n")),
    ("config.yaml", with_text("other: !!python/object/apply:os.getpid []\n")),
    ("environment.json", cut),
    ("environment.json", no_text),
    ("environment.json", huge),
    ("environment.json", folder),
    ("environment.json", link_out),
    ("environment.json", with_text("[" * 10**5)),
    ("environment.json", with_key("gpus", [1])),
    ("environment.json", with_key("git_commit", "$(touch x)")),
    ("selected.json", cut),
    ("selected.json", folder),
    ("selected.json", with_key("policy", ["iteration_1"])),
    ("selected.json", with_key("why", None)),
    ("sft/policy/summary.json", cut),
    ("sft/policy/summary.json", flip),
    ("sft/policy/summary.json", os.unlink),
    ("sft/policy/summary.json", folder),
    ("sft/policy/summary.json", with_key("loss", "0.2")),
    ("sft/policy/summary.json", with_key("loss", None)),
    ("sft/policy/manifest.json", cut),
    ("sft/policy/manifest.json", huge),
    ("sft/policy/manifest.json", folder),
    ("sft/policy/manifest.json", with_text('{"parents": {}, "files": {"../../x": {}}}')),
    ("sft/policy/metrics.jsonl", cut),
    ("sft/evaluation/answers.jsonl", flip),
    ("sft/evaluation/answers.jsonl", os.unlink),
    ("sft/evaluation/answers.jsonl", link_out),
    ("sft/evaluation/answers.jsonl", huge),
    ("iteration_0/responses/responses.jsonl", folder),
    ("iteration_0/distances/distances.jsonl", no_text),
    ("iteration_0/reference/reference.safetensors", flip),
    ("report/table.md.partial", link_out),
    ("report/figures/held_out.svg", link_out),
    ("report/report.html", link_out),
    ("lock", link_out),
    ("report/table.json.partial", os.mkfifo),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_file_is_named(run: Path, name: str, damage: Damage) -> None:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    damage(run / name)
    with pytest.raises(InputError, match=re.escape(name)) as refused:
        script.main([f"run={run}"])
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)
    if (run.parent / "outside").exists():
        assert (run.parent / "outside").read_text() == "theirs"


def test_a_stage_without_manifest_is_named(run: Path) -> None:
    (run / "sft/policy/manifest.json").unlink()
    with pytest.raises(InputError, match="sft/policy: has no manifest.json"):
        script.main([f"run={run}"])


@pytest.mark.parametrize(
    "name", ["lock", "started.json", "metrics.jsonl", "judge.jsonl", "sft/policy/README.md"]
)
def test_what_no_report_reads_may_be_anything(made: Path, run: Path, name: str) -> None:
    write_report(made)
    (run / name).write_bytes(b"\xff\x00{")
    script.main([f"run={run}"])
    for report in REPORTS:
        assert (run / report).read_bytes() == (made / report).read_bytes()


def test_a_link_within_the_run_and_a_sinks_links_may_stay(run: Path) -> None:
    (run / "latest").symlink_to("iteration_1")
    (run / "wandb").mkdir()
    (run / "wandb/debug-core.log").symlink_to("/var/log/elsewhere")
    script.main([f"run={run}"])
    assert (run / REPORTS[0]).is_file()


@pytest.mark.parametrize("sink", ["wandb", "trackio", "tensorboard"])
@pytest.mark.parametrize("folder", ["iteration_1/benchmarks", "data", "iteration_0/policy/a"])
def test_a_folder_of_a_sinks_name_further_in_is_no_sinks(run: Path, folder: str, sink: str) -> None:
    """A benchmark may have such a name, and a manifest may list files in such a folder."""
    link_out(run / folder / sink / "summary.json")
    (run / folder / sink / "manifest.json").write_text('{"parents": {}, "files": {}}')
    named = re.escape(f"{folder}/{sink}/summary.json: is a link out of the run folder")
    with pytest.raises(InputError, match=named):
        script.main([f"run={run}"])


def test_a_link_to_a_sinks_folder_is_refused(run: Path) -> None:
    """By way of it, the links there, which may lead anywhere, would be followed."""
    link_out(run / "wandb/benchmarks/arc/summary.json")
    (run / "iteration_1/benchmarks").symlink_to("../wandb/benchmarks")
    with pytest.raises(
        InputError, match="iteration_1/benchmarks: is a link to what a library of the key log keeps"
    ):
        script.main([f"run={run}"])


def test_a_link_within_the_run_is_not_written_through(run: Path) -> None:
    """Where a report is half written, a link to a stage's file would be."""
    (run / "report").mkdir(exist_ok=True)
    (run / "report/table.md.partial").symlink_to("../sft/policy/summary.json")
    before = (run / "sft/policy/summary.json").read_bytes()
    script.main([f"run={run}"])
    assert (run / "sft/policy/summary.json").read_bytes() == before
    assert not (run / "report/table.md").is_symlink()


@pytest.mark.parametrize(
    "lines", ["[1]\n", '{"id": "a", "correct": [NaN], "logp": "x", "n_tokens": 1}\n']
)
def test_rows_of_another_kind_under_a_fitting_manifest(run: Path, lines: str) -> None:
    for path in run.glob("*/evaluation/answers.jsonl"):
        path.write_text(lines)
    seal(run)
    with pytest.raises(InputError, match=re.escape(str(run))):
        script.main([f"run={run}"])


REFERENCE = "iteration_0/reference/reference.safetensors"


def junk(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


@pytest.mark.parametrize("damage", [junk, os.unlink, folder])
def test_tensors_of_another_kind_under_a_fitting_manifest(run: Path, damage: Damage) -> None:
    damage(run / REFERENCE)
    seal(run)
    with pytest.raises(InputError, match=re.escape(str(run))):
        script.main([f"run={run}"])


def test_a_manifest_with_a_path_that_no_system_takes(run: Path) -> None:
    """Within the bound itself, and beyond it below the run's own folder."""
    name = "a/" * 1990 + "b"
    (run / "data/manifest.json").write_text(
        json.dumps({"parents": {}, "files": {name: {"size": 1, "sha256": "0" * 64}}})
    )
    with pytest.raises(InputError, match=r"data/manifest\.json: damaged: not a manifest"):
        script.main([f"run={run}"])


def test_folders_deeper_than_a_path_can_say(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    for _ in range(45):
        os.mkdir("d" * 100)
        os.chdir("d" * 100)
    with pytest.raises(InputError, match="run/d{100}.*: cannot be read: File name too long"):
        script.main([f"run={run}"])


def test_a_comparison_without_a_known_figure(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends a generator early is no error of ours either."""
    (run / "report").mkdir(exist_ok=True)
    (run / "report/comparison.json").write_text("{}")
    monkeypatch.setattr(script, "write_comparison", lambda run, summary: next(iter(())))
    with pytest.raises(InputError, match=r"report/comparison\.json: holds what no report"):
        script.main([f"run={run}"])


@pytest.mark.parametrize(
    "damage", [cut, no_text, folder, huge, with_text("[]"), with_text('{"primary": 3}')]
)
def test_a_damaged_comparison_is_named(tmp_path: Path, damage: Damage) -> None:
    (tmp_path / "config.yaml").touch()
    write_comparison(tmp_path, summary_of())
    damage(tmp_path / "report/comparison.json")
    with pytest.raises(InputError, match=r"report/comparison\.json"):
        script.main([f"run={tmp_path}"])


@pytest.mark.parametrize("drawn", [True, False])
def test_a_folder_in_the_place_of_a_drawing_is_named(tmp_path: Path, drawn: bool) -> None:
    """Where a drawing is written, and where one of an earlier report is removed."""
    (tmp_path / "one.svg").mkdir()
    with pytest.raises(EnvironmentProblem, match=r"one\.svg: cannot be written: Is a directory"):
        write_chart(Chart("one", "One", "", Figure() if drawn else None), tmp_path)


def test_what_ldalign_writes_is_read(tmp_path: Path) -> None:
    """And a key of another version, and a value that is written otherwise now, are no damage."""
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(RunConfig(run="a", data=["b", "*c"])) + "a_key_of_old: {x: 1}\n")
    found = read_written(RunConfig, path)
    assert found["data"] == ["b", "*c"] and found["a_key_of_old"] == {"x": 1}
