"""Names from elsewhere, of benchmarks and runs, are plain text in tables, drawings and commands."""

import json
import re
from pathlib import Path

import pytest
from made_run import made_run, seal
from matplotlib.figure import Figure
from test_comparison_page import summary_of

from ldalign.report.chart import Chart, chart, write_chart
from ldalign.report.comparison_page import render
from ldalign.report.notation import plain
from ldalign.report.table import write_report
from ldalign.report.words import command

NAMES = ("cost$_{1}$ and $x^2$", "<b>|`a`", "[a](b) *c* & d", "\\frac{1}{2}")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_plain_text_in_a_drawing(name: str, tmp_path: Path) -> None:
    def draw() -> tuple[Figure, str]:
        figure = Figure()
        axes = figure.add_subplot()
        axes.plot([0, 1], label=name)
        axes.set_title(f"{name} $")
        axes.set_yticks([0], [name])
        figure.legend()
        return figure, ""

    drawn: Chart = chart("one", "a title", draw)
    shown = write_chart(drawn, tmp_path)
    escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert shown.count(f">{escaped}<") == 2 and f">{escaped} $<" in shown
    assert (tmp_path / "one.svg").is_file() and (tmp_path / "one.png").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_plain_text_in_a_table(name: str, tmp_path: Path) -> None:
    """A benchmark's name is that of a folder."""
    run = made_run(tmp_path / "run", "sft")
    task = run / "sft/benchmarks" / name.replace("/", "")
    task.mkdir(parents=True)
    scores = {"acc": 0.5, "acc_se": 0.1, "rows": 4, "shots": 0, "chat_template": 0, "seconds": 1.0}
    (task / "summary.json").write_text(json.dumps(scores))
    seal(run)
    write_report(run)
    text = (run / "report/table.md").read_text()
    (head,) = [line for line in text.split("\n") if " acc, %" in line]
    assert f"{plain(name)} acc, %" in head
    bars = re.sub(r"\\.", "", head).count("|")
    assert re.sub(r"\\.", "", text.split(head)[1].split("\n")[2]).count("|") == bars


def test_plain() -> None:
    assert plain("a\nb |$x$| <i> `c`") == r"a b \|\$x\$\| \<i\> \`c\`"
    assert plain("LD-Align (iteration 1): 49.5 +- 3.5 % of max_new_tokens.") == (
        "LD-Align (iteration 1): 49.5 +- 3.5 % of max_new_tokens."
    )


def test_a_comparisons_settings_stay_in_their_block() -> None:
    summary = summary_of()
    summary["again"]["settings"] = "run: |\n  ```\n  <script>"
    page = render(summary)
    assert page.rstrip().endswith("````") and "````yaml" in page


def test_a_command_to_paste_is_one_command() -> None:
    said = command({"run": "runs/x; rm -rf ~"}, {})
    assert said.endswith("run='runs/x; rm -rf ~-again'")
