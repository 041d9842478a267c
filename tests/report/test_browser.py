"""The report and the live page in a real browser: at three widths, light and dark, and on paper.

Skipped where no Chromium is on the PATH. What needs no browser of the same is in test_report.py.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import NAMES, Browser, find_browser
from made_run import made_run

from ldalign.report.live import LIVE, LivePage
from ldalign.report.page import write_page
from ldalign.run.plan import ORDER
from ldalign.run.stage import Cost

KINDS = ("align", "evaluate", "judge", "sft", "guide")
STATES = ("begun", "under way", "done", "failed")
LONG = "a_long_name_that_nothing_breaks/" * 4
WIDTHS = (360, 768, 1280)
PAPER = 658  # CSS pixels between the margins of A4
# What reaches beyond the window and cannot be scrolled to within a box of its own.
BEYOND = """
[...document.querySelectorAll("body *")].filter(one => {
  if (one.closest("svg") && one.tagName !== "svg") return false
  for (let box = one.parentElement; box; box = box.parentElement)
    if (getComputedStyle(box).overflowX === "auto") return false
  return one.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
}).map(one => one.outerHTML.slice(0, 120))
"""
CUT = """
[...document.querySelectorAll(".wide, .drawing")].filter(one =>
  one.scrollWidth > one.clientWidth).map(one => one.outerHTML.slice(0, 120))
"""
# The size of the smallest text, in pixels; a drawing's texts shrink with it.
SMALLEST = """
Math.min(...[...document.querySelectorAll("body *")].filter(one =>
  [...one.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(one => {
    const box = one.closest("svg")
    const scale = box ? box.getBoundingClientRect().width / box.viewBox.baseVal.width : 1
    return scale * parseFloat(getComputedStyle(one).fontSize)
  }))
"""
CURVE = "document.querySelector('.curve svg').getBoundingClientRect().width"
# Texts whose contrast with what is behind them is below 4.5 (WCAG AA).
FAINT = """
(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number)
  const light = colour => {
    const [r, g, b] = parts(colour).map(x => x / 255).map(x =>
      x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const behind = one => {
    for (let box = one; box; box = box.parentElement) {
      const colour = getComputedStyle(box).backgroundColor
      if ((parts(colour)[3] ?? 1) > 0) return colour
    }
    return "rgb(255, 255, 255)"
  }
  const own = one => [...one.childNodes].some(n => n.nodeType === 3 && n.data.trim())
  return [...document.querySelectorAll("body *:not(svg *)")].filter(own).filter(one => {
    const pair = [light(getComputedStyle(one).color), light(behind(one))].sort((a, b) => a - b)
    return (pair[1] + 0.05) / (pair[0] + 0.05) < 4.5
  }).map(one => one.outerHTML.slice(0, 120))
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH")
    with Browser(path) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {kind: write_page(made_run(folder / kind, kind)) for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_sticks_out_at_any_width(
    browser: Browser, pages: dict[str, Path], kind: str
) -> None:
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            browser.show(pages[kind], width, scheme=scheme)
            assert browser.evaluate("innerWidth") == width
            assert browser.evaluate(BEYOND) == [], (width, scheme)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate(FAINT) == [], (width, scheme)
    assert not browser.errors


def live_page(run: Path, state: str) -> Path:
    """The live page of a run that trains its first policy, or has ended."""
    run.mkdir()
    costs = {f"iteration_{t}/{stage.name}": Cost() for t in range(12) for stage in ORDER}
    page = LivePage(run, costs, clock=lambda: 0.0)
    page.begins("iteration_0/policy")
    if state != "begun":
        for step in range(1, 100):
            loss = 1e5 * math.exp(-step / 20) * (1 + 0.3 * math.sin(step))
            line = f"iteration_0/policy: step {step}/100  loss {loss}  {LONG}"
            page.record("iteration_0/policy", {"global_step": step, "loss": loss}, line)
        page.ends("iteration_0/policy", {"seconds": 12345.0}, True)
    if state == "under way":
        page.begins("iteration_0/evaluation")
    elif state != "begun":
        page.finish(state, f"{LONG}: no such file; give another" if state == "failed" else "")
    return run / LIVE


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_a_live_page_fits_any_width(browser: Browser, tmp_path: Path, state: str) -> None:
    """With a long name, a long line and a long error; the curve's numbers can be read."""
    page = live_page(tmp_path / ("a-folder-with-a-long-name-" * 3), state)
    drawn = state != "begun"
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            browser.show(page, width, scheme=scheme)
            assert browser.evaluate(BEYOND) == [], (width, scheme)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate(FAINT) == [], (width, scheme)
            assert browser.evaluate("document.querySelectorAll('.curve span').length") == 4 * drawn
            assert browser.evaluate(SMALLEST) >= 12, (width, scheme)
            assert not drawn or browser.evaluate(CURVE) > 0.6 * min(width, 700), width
    assert not browser.errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_on_paper_no_table_is_cut(browser: Browser, pages: dict[str, Path], kind: str) -> None:
    """Also from a dark screen; nothing scrolls on paper, so all must fit."""
    browser.show(pages[kind], PAPER, scheme="dark", media="print")
    assert browser.evaluate(CUT) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= PAPER
    assert (
        browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    )
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.printed().startswith(b"%PDF-")


@pytest.mark.slow
def test_the_checks_can_fail(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """A page with a wide row, a faint text and a broken script, of which each is found."""
    page = tmp_path / "page.html"
    bad = "<p style='width: 900px'>wide</p><p style='color: #bbb'>faint</p><script>oh no</script>"
    page.write_text(pages["guide"].read_text().replace("<main>", f"<main>{bad}"))
    before = len(browser.errors)
    browser.show(page, 360)
    assert any("wide" in one for one in browser.evaluate(BEYOND))
    assert any("faint" in one for one in browser.evaluate(FAINT))
    assert len(browser.errors) == before + 1
    del browser.errors[before:]
