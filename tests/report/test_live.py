"""live.html: what is done, under way and left; and that it can neither stop a run nor leave it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ldalign.report.live import FEWEST_FOR_A_MEAN, LIVE, SAID, LivePage, curve_html, watched
from ldalign.run.plan import ORDER
from ldalign.run.settings import RunConfig
from ldalign.run.stage import Cost
from ldalign.system.errors import InputError
from ldalign.system.listeners import listening, tell
from ldalign.system.metrics import MetricsLog

COSTS = {
    "iteration_0/responses": Cost(generated=100),
    "iteration_0/policy": Cost(trained=1000, steps=20),
    "iteration_1/responses": Cost(generated=200),
    "iteration_1/policy": Cost(trained=1000, steps=20),
}


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def page(tmp_path: Path, clock: Clock) -> LivePage:
    (tmp_path / "a<b>run").mkdir()
    return LivePage(tmp_path / "a<b>run", COSTS, clock)


def text(page: LivePage) -> str:
    return (page.run / LIVE).read_text(encoding="utf-8")


def rows(page: LivePage) -> list[tuple[str, str, str]]:
    row = r"<td>([^<]*)(?:<small>[^<]+</small>)?</td><td>(.*?)</td><td>(.*?)</td>"
    found = re.findall(row, text(page))
    return [(name, state, time) for name, state, time in found]


def train(page: LivePage, clock: Clock, stage: str, steps: range, seconds: float) -> None:
    with listening([page]):
        for step in steps:
            clock.now += seconds
            record = {"global_step": step, "loss": 1 / step}
            MetricsLog(None, stage).write(record, f"step {step}/20 <i>")


def test_stages_and_the_time_left(page: LivePage, clock: Clock) -> None:
    page.begins("iteration_0/responses")
    assert "the time left is not known yet" in text(page)
    assert rows(page)[0] == ("iteration_0/responses", "under way", "under 1 s")
    page.ends("iteration_0/responses", {"seconds": 60.0}, True)
    # A token sampled for 4 scored: 60 s for 400, so 450 s each for twice 3 x 1000, and 120 s.
    assert page.left() == pytest.approx(450 + 450 + 120)
    page.begins("iteration_0/policy")
    train(page, clock, "iteration_0/policy", range(1, 6), 10.0)
    assert page.left() == pytest.approx(150 + 450 + 120)  # 15 steps of 10 s
    page.ends("iteration_0/policy", {"seconds": 200.0}, True)
    assert page.left() == pytest.approx(200 + 120)
    assert "2 of 4 stages are done" in text(page) and "\nabout 5 min left." in text(page)
    assert [state for _, state, _ in rows(page)] == ["done", "done", "to come", "to come"]


def test_it_loads_itself_again_until_the_end(page: LivePage) -> None:
    page.begins("iteration_0/responses")
    assert '<meta http-equiv="refresh"' in text(page) and "report.html" not in text(page)
    (page.run / "report/report.html").write_text("")
    page.ends("iteration_0/responses", {"seconds": 1.0}, True)
    assert "report.html" not in text(page)  # an earlier command's
    page.finish("done")
    assert "refresh" not in text(page) and '<a href="report.html">' in text(page)
    assert [state for _, state, _ in rows(page)] == ["done"]


def test_a_page_takes_nothing_from_elsewhere_and_escapes(page: LivePage, clock: Clock) -> None:
    page.begins("iteration_0/policy")
    train(page, clock, "iteration_0/policy", range(1, 10), 61.0)
    assert "<h1>Run a&lt;b&gt;run</h1>" in text(page)
    assert "iteration_0/policy: step 9/20 &lt;i&gt;" in text(page)
    assert not re.search(r"https?:|<script|<link|src=|url\(", text(page))
    assert "prefers-color-scheme: dark" in text(page) and "width=device-width" in text(page)
    assert text(page).count("<polyline") == 1 and "moving mean" not in text(page)


def test_many_steps_have_a_moving_mean(page: LivePage, clock: Clock) -> None:
    page.begins("iteration_0/policy")
    train(page, clock, "iteration_0/policy", range(1, FEWEST_FOR_A_MEAN + 1), 61.0)
    assert text(page).count("<polyline") == 2 and "a moving mean" in text(page)


def test_a_failure_says_why_and_what_to_do(page: LivePage) -> None:
    page.begins("iteration_0/responses")
    page.finish("failed", "rows.jsonl:3: <b> is no row; mend it" + "x" * 5000)
    assert "The run failed after\n0 of 4 stages" in text(page) and len(text(page)) < 9000
    assert '<pre class="why">rows.jsonl:3: &lt;b&gt; is no row; mend it' in text(page)
    assert "the same command goes on" in text(page) and "refresh" not in text(page)
    page.finish("stopped")
    assert "The run was stopped after" in text(page) and 'class="why"' not in text(page)


def test_a_run_that_fails_leaves_its_error(tmp_path: Path) -> None:
    ctx = SimpleNamespace(config=RunConfig(), run=SimpleNamespace(path=tmp_path))
    for error, said in ((InputError("a: b; do c"), "a: b; do c"), (KeyError("x"), "KeyError: ")):
        with pytest.raises(type(error)), watched(cast(Any, ctx), []):
            tell(lambda listener: listener.begins("guide"))
            raise error
        assert f'<pre class="why">{said}' in (tmp_path / LIVE).read_text()


def test_every_stage_is_said_in_words() -> None:
    assert SAID.keys() == {stage.name for stage in ORDER} - {"data"}


def test_it_is_written_now_and_then(page: LivePage, clock: Clock) -> None:
    page.begins("iteration_0/policy")
    train(page, clock, "iteration_0/policy", range(1, 6), 10.0)
    assert "step 5/20" not in text(page)
    train(page, clock, "iteration_0/policy", range(6, 7), 10.0)
    assert "step 6/20" in text(page)


def test_a_stage_that_goes_on_has_its_earlier_steps(page: LivePage, clock: Clock) -> None:
    folder = page.run / "iteration_0/policy.partial"
    folder.mkdir(parents=True)
    lines = [{"global_step": n, "loss": float(n)} for n in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page.begins("iteration_0/policy")
    page.record("iteration_0/policy", {"global_step": 3, "loss": 0.5}, "again")
    assert page.curves["iteration_0/policy"] == [(1, 1.0), (2, 2.0), (3, 0.5)]
    (folder / "metrics.jsonl").write_text("{torn")
    page.begins("iteration_0/policy")


def test_what_was_done_before_is_not_written_anew(page: LivePage) -> None:
    """A command that is refused leaves the page of the run as it is."""
    with listening([page]):
        tell(lambda listener: listener.ends("iteration_0/responses", {"seconds": 9.0}, False))
    page.finish("failed")
    assert not (page.run / LIVE).exists()
    page.finish("done")
    assert rows(page) == [("iteration_0/responses", "done", "9 s")]


def test_a_page_that_cannot_be_written_is_lost(
    page: LivePage, capsys: pytest.CaptureFixture[str]
) -> None:
    (page.run / "report").write_text("a file in its way")
    with listening([page]):
        tell(lambda listener: listener.begins("iteration_0/policy"))
    page.finish("done")
    assert capsys.readouterr().err == ""


def test_a_page_half_written_by_a_killed_run_is_replaced(page: LivePage) -> None:
    (page.run / "report").mkdir()
    (page.run / "report/live.html.partial").write_text("<!DOCTYPE")
    page.begins("iteration_0/policy")
    assert [path.name for path in (page.run / "report").iterdir()] == ["live.html"]


def test_no_link_is_followed_out_of_the_run(page: LivePage, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (page.run / "report").symlink_to(outside)
    page.begins("iteration_0/policy")
    assert not list(outside.iterdir())
    (page.run / "report").unlink()
    (page.run / "report").mkdir()
    for name in ("live.html", "live.html.partial"):
        (outside / name).write_text("kept")
        (page.run / "report" / name).symlink_to(outside / name)
    page.begins("iteration_0/policy")
    assert {path.read_text() for path in outside.iterdir()} == {"kept"}
    assert not (page.run / LIVE).is_symlink() and "under way" in text(page)


def test_a_curve_of_many_steps_and_of_odd_ones() -> None:
    points = [(float(n), float("nan") if n == 7 else 5.0) for n in range(1, 10_001)]
    drawn = curve_html(points)
    assert "nan" not in drawn and len(drawn) < 20_000
    assert curve_html(points[:1]) == "" and curve_html([]) == ""
    assert "nan" not in curve_html([(1.0, 1e300), (2.0, 1e300)])
    ends = re.findall("<span>(.*?)</span>", curve_html([(1.0, 1.67), (2.0, 0.2373), (8.0, 0.3)]))
    assert ends == ["1.67", "0.24", "step 1", "8"]


def test_a_run_leaves_its_page(toy_run: Path) -> None:
    left = (toy_run / LIVE).read_text()
    assert "The run is done: 15 stages, " in left and '<a href="report.html">The report</a>' in left
    for stage in ("sft/policy", "guide", "iteration_1/policy", "continual_sft/evaluation"):
        assert re.search(f"<td>{stage}<small>[^<]+</small></td><td>done</td>", left), stage
    assert "to come" not in left and left.count("<polyline") == 1
