"""Names from elsewhere, of benchmarks and runs, are plain text in tables, drawings and commands."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from made_run import made_run, seal
from matplotlib.figure import Figure
from test_comparison_page import summary_of

from ldalign.report.chart import Chart, chart, write_chart
from ldalign.report.comparison_page import render
from ldalign.report.notation import plain
from ldalign.report.table import write_report
from ldalign.report.words import command
from ldalign.system.visible import visible
from ldalign.train import report as script

NAMES = ("cost$_{1}$ and $x^2$", "<b>|`a`", "[a](b) *c* & d", "\\frac{1}{2}")
ACTING = "\x1b]0;pwned\x07\x1b[2J\u202ered\u2066\x9b"


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


def test_a_strangers_control_characters_are_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the terminal, in table.md, on the page and in a drawing, which stays XML; texts in other
    scripts, emoji of several parts, tabs and lines of a response are as they were.
    """
    run = made_run(tmp_path / "run", "align")
    scores = {"acc": 0.5, "acc_se": 0.1, "rows": 4, "shots": 0, "chat_template": 0, "seconds": 1.0}
    for name in (ACTING, "caf\udce9"):
        task = run / "iteration_1/benchmarks" / name
        task.mkdir(parents=True)
        (task / "summary.json").write_text(json.dumps(scores))
    chosen = json.loads((run / "selected.json").read_text()) | {"why": ACTING}
    (run / "selected.json").write_text(json.dumps(chosen))
    readable = (
        "\u0633\u0644\u0627\u0645, \u05e9\u05dc\u05d5\u05dd\n\tof \U0001f468\u200d\U0001f469\u200c."
    )
    path = run / "iteration_0/responses/responses.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | {"response": f"{readable}{ACTING}"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seal(run)
    script.main([f"run={run}"])
    written = [run / "report" / name for name in ("table.md", "report.html", "figures/budget.svg")]
    for text in (capsys.readouterr().err, *(path.read_text(encoding="utf-8") for path in written)):
        assert "x1b" in text and visible(text) == text
    page, drawing = (path.read_text(encoding="utf-8") for path in written[1:])
    assert f"{readable}\\x1b]0;pwned\\x07" in page and ElementTree.fromstring(drawing) is not None
    assert "iteration_1/benchmarks/caf\\udce9" in drawing


def test_plain() -> None:
    assert plain("a\x1b[1mb\u202e") == r"a\\x1b\[1mb\\u202e"
    assert plain("_a_ b_c") == r"\_a\_ b_c"
    for mark in ("#", "##", "-", "+", "---", "==="):
        assert plain(f"{mark} a") == f"\\{mark} a"
    assert plain("12. a") == r"12\. a" and plain("-2.3 to 1.5") == "-2.3 to 1.5"
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
