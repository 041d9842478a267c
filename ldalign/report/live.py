"""live.html: what a run is doing, while it does it, in a page that loads itself again.

A static file beside the report, with no script and nothing from the network: written anew as a
stage begins and ends, and every `MINUTES` of training. Like a line for the terminal it can never
stop a run: what cannot be written is lost.
"""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ldalign.report.page import PAGE
from ldalign.run.context import Context
from ldalign.run.plan import stage_of
from ldalign.run.stage import Cost
from ldalign.system import distributed
from ldalign.system.config import to_dict
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.files import PARTIAL, make_folder, read_jsonl, write_text
from ldalign.system.listeners import listening
from ldalign.system.metrics import in_words
from ldalign.system.sinks import finish_sinks, open_sinks

LIVE = "report/live.html"
MINUTES = 1.0  # of training between two writes
RELOAD_SECONDS = 20
POINTS = 400  # of a curve: of more steps every so many are drawn
# A token sampled takes about as long as so many that are scored, until a run has shown its own.
SAMPLED = 4.0


@contextlib.contextmanager
def watched(ctx: Context, planned: Sequence[str]) -> Iterator[None]:
    """Keeps the live page (with report=page) and the sinks that the key `log` names up to date
    while the planned stages are made in the block. Neither can stop the run.
    """
    if distributed.rank() > 0:
        yield
        return
    config, run = ctx.config, ctx.run.path
    page = LivePage(run, _costs(ctx, planned)) if config.report == "page" else None
    sinks = open_sinks(config.log, run, to_dict(config))
    ended = "stopped"
    try:
        with listening([*([page] if page else []), *sinks]):
            yield
        ended = "done"
    except Exception:
        ended = "failed"
        raise
    finally:
        if page is not None:
            page.finish(ended)
        report = _report(run) if ended == "done" else ("", [])
        finish_sinks(sinks, ended != "done", *report)


def _costs(ctx: Context, planned: Sequence[str]) -> dict[str, Cost]:
    """What the planned stages take; of one that cannot be told, nothing."""
    costs = {}
    for name in planned:
        costs[name] = Cost()
        with contextlib.suppress(Exception):  # it is said where the stage itself is planned
            costs[name] = stage_of(name).cost(ctx, name)
    return costs


def _report(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """The run's table, as Markdown and the policies' numbers; nothing where it cannot be read."""
    try:
        table = json.loads((run / "report/table.json").read_text(encoding="utf-8"))
        return (run / "report/table.md").read_text(encoding="utf-8"), table["policies"]
    except (OSError, ValueError, KeyError):
        return "", []


# ------------------------------------------------------------------------------------- the page


@dataclass
class LivePage:
    """A listener (`ldalign.system.listeners`) that writes RUN/report/live.html.

    costs: of every planned stage, in their order. clock: seconds, from anywhere.
    """

    run: Path
    costs: Mapping[str, Cost]
    clock: Callable[[], float] = time.monotonic
    name: str = "live page"
    seconds: dict[str, float] = field(default_factory=dict)  # of the stages that are there
    stage: str | None = None  # that is being made
    began: float = 0.0
    step: int = 0  # of the stage that is being made
    line: str = ""
    written: float = -math.inf
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def begins(self, stage: str) -> None:
        """Writes the page, with this stage as the one under way."""
        self.stage, self.began, self.step, self.line = stage, self.clock(), 0, ""
        self._read(stage, self.run / (stage + PARTIAL))  # what an earlier start has done of it
        self._write()

    def record(self, stage: str, record: Mapping[str, Any], line: str) -> None:
        """Keeps a step's line and loss; writes the page now and then."""
        self.line, self.step = line, record.get("global_step", self.step)
        self._add(stage, record)
        if self.clock() - self.written >= 60 * MINUTES:
            self._write()

    def ends(self, stage: str, summary: Mapping[str, float], made: bool) -> None:
        """Keeps the stage's time; writes the page, where it was made now."""
        self.seconds[stage] = float(summary.get("seconds", 0.0))
        if not made:
            self._read(stage, self.run / stage)
            return
        self.stage = None
        self._write()

    def finish(self, ended: str) -> None:
        """Writes the page for the last time. ended: done, stopped or failed."""
        if self.written > -math.inf or ended == "done":  # a command that is refused leaves it
            self._write(ended)

    # --------------------------------------------------------------------------------------- curves

    def _read(self, stage: str, folder: Path) -> None:
        path = folder / "metrics.jsonl"
        self.curves.pop(stage, None)
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            if path.is_file() and not path.is_symlink():
                for record in read_jsonl(path):
                    self._add(stage, record)

    def _add(self, stage: str, record: Mapping[str, Any]) -> None:
        step, loss = record.get("global_step"), record.get("loss")
        if not isinstance(step, int) or not isinstance(loss, int | float):
            return
        curve = self.curves.setdefault(stage, [])
        while curve and curve[-1][0] >= step:  # done again, from a checkpoint
            curve.pop()
        curve.append((step, float(loss)))

    # ------------------------------------------------------------------------------------ time left

    def left(self) -> float | None:
        """Seconds that the stages not yet there take, about; None where nothing tells yet."""
        total = 0.0
        for name, cost in self.costs.items():
            if name in self.seconds:
                continue
            expected = self._expected(name, cost)
            if name == self.stage:
                gone = self.clock() - self.began
                if self.step and cost.steps:  # its own speed tells best
                    expected = gone * cost.steps / min(self.step, cost.steps)
                expected = None if expected is None else max(0.0, expected - gone)
            if expected is None:
                return None
            total += expected
        return total

    def _expected(self, name: str, cost: Cost) -> float | None:
        """Seconds that a stage takes by those of its kind that are there, else by all."""
        kind = stage_of(name).name
        there = [n for n in self.seconds if n in self.costs]
        same = [n for n in there if stage_of(n).name == kind]
        size = _size(cost)
        for known in (same, there):
            sizes = sum(_size(self.costs[n]) for n in known)
            if sizes and size:
                return sum(self.seconds[n] for n in known) * size / sizes
        if same:
            return sum(self.seconds[n] for n in same) / len(same)
        return 0.0 if there and not size else None

    # -------------------------------------------------------------------------------------- writing

    def _write(self, ended: str = "") -> None:
        self.written = self.clock()
        with contextlib.suppress(OSError, EnvironmentProblem):
            folder = (self.run / LIVE).parent
            make_folder(folder)
            if not folder.resolve().is_relative_to(self.run.resolve()):
                return  # a link out of the run folder
            partial = folder / f"live.html{PARTIAL}"
            if partial.is_symlink():
                partial.unlink()
            write_text(self.run / LIVE, _TEMPLATE.render(self._shown(ended)) + "\n")

    def _shown(self, ended: str) -> dict[str, Any]:
        left = self.left() if not ended else None
        rows = []
        under_way = [] if self.stage is None else [self.stage]
        for name in dict.fromkeys([*self.costs, *self.seconds, *under_way]):
            if name in self.seconds:
                rows.append((name, "done", in_words(self.seconds[name])))
            elif name == self.stage:
                state = "under way" if not ended else ended
                rows.append((name, state, in_words(self.clock() - self.began)))
            elif ended != "done":
                rows.append((name, "to come", ""))
        trained = [name for name in self.curves if len(self.curves[name]) > 1]
        shown = self.stage if self.stage in trained else trained[-1] if trained else None
        return {
            "title": self.run.resolve().name,
            "ended": ended,
            "reload": None if ended else RELOAD_SECONDS,
            "at": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
            "left": None if left is None else in_words(left),
            "rows": rows,
            "done": sum(state == "done" for _, state, _ in rows),
            "line": self.line,
            "curve": None if shown is None else Markup(curve_svg(self.curves[shown])),
            "curve_of": shown,
            "report": Path(PAGE).name if ended and (self.run / PAGE).is_file() else None,
        }


def _size(cost: Cost) -> float:
    """What a stage takes, in tokens scored: training one costs three of them."""
    return 3 * cost.trained + cost.scored + SAMPLED * cost.generated


def curve_svg(points: Sequence[tuple[float, float]]) -> str:
    """A loss by step as an SVG: what was measured, pale, and its moving mean."""
    width, height, left, bottom = 640, 220, 52, 24
    every = -(-len(points) // POINTS)
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if len(finite) < 2:
        return ""
    shown = [*finite[:-1:every], finite[-1]]
    span = max(2, len(shown) // 20)
    sums = [0.0, *itertools.accumulate(y for _, y in shown)]
    means = [
        (x, (sums[i + 1] - sums[max(0, i + 1 - span)]) / (i + 1 - max(0, i + 1 - span)))
        for i, (x, _) in enumerate(shown)
    ]
    x0, x1 = shown[0][0], max(shown[-1][0], shown[0][0] + 1)
    y0, y1 = min(y for _, y in shown), max(y for _, y in shown)
    y1 = y1 if y1 > y0 else y0 + 1e-6

    def path(line: Sequence[tuple[float, float]]) -> str:
        return " ".join(
            f"{left + (x - x0) / (x1 - x0) * (width - left - 8):.1f},"
            f"{8 + (y1 - y) / (y1 - y0) * (height - bottom - 16):.1f}"
            for x, y in line
        )

    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss by step">'
        f'<text x="{left - 6}" y="14" text-anchor="end">{y1:.4g}</text>'
        f'<text x="{left - 6}" y="{height - bottom - 4}" text-anchor="end">{y0:.4g}</text>'
        f'<text x="{left}" y="{height - 6}">step {x0:.0f}</text>'
        f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">{x1:.0f}</text>'
        f'<polyline class="each" points="{path(shown)}"/>'
        f'<polyline class="mean" points="{path(means)}"/></svg>'
    )


_TEMPLATE = Environment(autoescape=True, undefined=StrictUndefined).from_string(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{% if reload %}<meta http-equiv="refresh" content="{{ reload }}">
{% endif %}<title>{{ title }}: {{ ended or "under way" }}</title>
<style>
:root { --ink: #1b1f24; --soft: #59626d; --rule: #d5d9de; --page: #fff; --accent: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --rule: #3a424c; --page: #14171b; --accent: #56b4e9 }
}
body { margin: 0 auto; padding: 1.25rem; max-width: 44rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere }
p { margin: .5rem 0 } a { color: var(--accent) } .soft { color: var(--soft); font-size: .875rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8125rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
td { padding: .3rem .5rem .3rem 0; border-bottom: 1px solid var(--rule) }
td:first-child { overflow-wrap: anywhere } td:last-child { text-align: right; white-space: nowrap }
.now td { font-weight: 600 } .later td { color: var(--soft) }
svg { width: 100%; height: auto } svg text { font-size: 11px; fill: var(--soft) }
polyline { fill: none; stroke: var(--accent) }
.each { stroke-opacity: .35 } .mean { stroke-width: 2 }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{% if ended %}The run {{ {"done": "is done", "stopped": "was stopped", "failed": "failed"}[ended]
}}.{% if report %} <a href="{{ report }}">The report</a>.{% endif %}
{%- else %}Under way: {{ done }} of {{ rows|length }} stages are done; about
{{ left or "an unknown time" }} left.{% endif %}</p>
<p class="soft">Written {{ at }}.{% if not ended %} Where that is long ago, the run has ended; the
same command goes on.{% endif %}</p>
{% if line and not ended %}<pre>{{ line }}</pre>
{% endif %}{% if curve %}<figure style="margin: 1rem 0">{{ curve }}
<figcaption class="soft">Loss of {{ curve_of }}, and its moving mean.</figcaption></figure>
{% endif %}<table>
{% for name, state, time in rows %}<tr class="{{ {"under way": "now", "to come": "later"}[state]
if state in ("under way", "to come") else "" }}"><td>{{ name }}</td><td>{{ state }}</td>
<td>{{ time }}</td></tr>
{% endfor %}</table>
</body>
</html>"""
)
