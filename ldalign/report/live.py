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

from ldalign.report.notation import seen
from ldalign.report.page import PAGE
from ldalign.run.context import Context
from ldalign.run.plan import stage_of
from ldalign.run.stage import Cost
from ldalign.system import distributed
from ldalign.system.config import to_dict
from ldalign.system.errors import EnvironmentProblem, LdalignError
from ldalign.system.files import PARTIAL, make_folder, read_jsonl, write_text
from ldalign.system.listeners import listening
from ldalign.system.metrics import in_words
from ldalign.system.sinks import finish_sinks, open_sinks

LIVE = "report/live.html"
MINUTES = 1.0  # of training between two writes
RELOAD_SECONDS = 20
POINTS = 400  # of a curve: of more steps every so many are drawn
FEWEST_FOR_A_MEAN = 40  # points of a curve: of fewer a moving mean is no smoother, only late
MOST_OF_AN_ERROR = 2000  # characters
# What a stage does, in a reader's words, by its name.
SAID = {
    "responses": "the policy answers the prompts",
    "judged": "the judge compares the answers",
    "guide": "the guide is trained",
    "distances": "how far the answers are from the data's",
    "reference": "log-probabilities before training",
    "pair_rewards": "a reward model scores the pairs",
    "policy": "the policy is trained",
    "evaluation": "held-out prompts are answered",
    "reward": "a reward model scores the answers",
    "benchmarks": "a public benchmark",
    "agreement_samples": "two answers to each held-out prompt",
    "agreement": "guide and judge compared",
}
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
    ended, why = "stopped", ""
    try:
        with listening([*([page] if page else []), *sinks]):
            yield
        ended = "done"
    except Exception as error:
        ended = "failed"
        why = str(error) if isinstance(error, LdalignError) else f"{type(error).__name__}: {error}"
        raise
    finally:
        if page is not None:
            page.finish(ended, why)
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

    def finish(self, ended: str, why: str = "") -> None:
        """Writes the page for the last time. ended: done, stopped or failed; why: the error."""
        if self.written > -math.inf or ended == "done":  # a command that is refused leaves it
            self._write(ended, why[:MOST_OF_AN_ERROR])

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

    def _write(self, ended: str = "", why: str = "") -> None:
        self.written = self.clock()
        with contextlib.suppress(OSError, EnvironmentProblem):
            folder = (self.run / LIVE).parent
            make_folder(folder)
            if not folder.resolve().is_relative_to(self.run.resolve()):
                return  # a link out of the run folder
            write_text(self.run / LIVE, _TEMPLATE.render(self._shown(ended, why)) + "\n")

    def _shown(self, ended: str, why: str) -> dict[str, Any]:
        left = self.left() if not ended else None
        rows = []
        under_way = [] if self.stage is None else [self.stage]
        for name in dict.fromkeys([*self.costs, *self.seconds, *under_way]):
            if name in self.seconds:
                rows.append((name, "done", _time(self.seconds[name])))
            elif name == self.stage:
                state = "under way" if not ended else ended
                rows.append((name, state, _time(self.clock() - self.began)))
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
            "why": why,
            "rows": [(name, SAID.get(stage_of(name).name, ""), *rest) for name, *rest in rows],
            "done": sum(state == "done" for _, state, _ in rows),
            "all": _time(sum(self.seconds.values())),
            "line": self.line,
            "curve": None if shown is None else Markup(curve_html(self.curves[shown])),
            "curve_of": shown,
            "report": Path(PAGE).name if ended and (self.run / PAGE).is_file() else None,
        }


def _size(cost: Cost) -> float:
    """What a stage takes, in tokens scored: training one costs three of them."""
    return 3 * cost.trained + cost.scored + SAMPLED * cost.generated


def _time(seconds: float) -> str:
    return in_words(seconds) if seconds >= 0.5 else "under 1 s"


def curve_html(points: Sequence[tuple[float, float]]) -> str:
    """A loss by step: what was measured as a line, its moving mean where there are steps enough
    for one, and the ends of both axes. "" of fewer than two finite losses.

    The drawing stretches to its place and the texts do not, so that both suit any screen.
    """
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
    y1 = y1 if y1 > y0 else y0 + 1e-6 * max(1.0, abs(y0))

    digits = min(4, max(0, 2 - math.floor(math.log10(y1 - y0))))

    def drawn(line: Sequence[tuple[float, float]], look: str) -> str:
        at = " ".join(
            f"{100 * (x - x0) / (x1 - x0):.2f},{100 * (y1 - y) / (y1 - y0):.2f}" for x, y in line
        )
        return f'<polyline class="{look}" points="{at}"/>'

    lines = drawn(shown, "mean")
    if len(shown) >= FEWEST_FOR_A_MEAN:
        lines = drawn(shown, "each") + drawn(means, "mean")
    return (
        f'<div class="curve"><span>{y1:.{digits}f}</span><span>{y0:.{digits}f}</span>'
        '<svg viewBox="-0.5 -1 101 102" preserveAspectRatio="none" role="img" '
        f'aria-label="loss by step">{lines}</svg>'
        f"<span>step {x0:.0f}</span><span>{x1:.0f}</span></div>"
    )


_TEMPLATE = Environment(autoescape=True, finalize=seen, undefined=StrictUndefined).from_string(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{% if reload %}<meta http-equiv="refresh" content="{{ reload }}">
{% endif %}<title>{{ title }}: {{ ended or "under way" }}</title>
<style>
:root { --ink: #1b1f24; --soft: #59626d; --rule: #d5d9de; --page: #fff; --accent: #0072b2;
  --warn: #9a3b00 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --rule: #3a424c; --page: #14171b; --accent: #56b4e9;
    --warn: #f0a35e }
}
body { margin: 0 auto; padding: 1.25rem; max-width: 44rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere }
p { margin: .5rem 0 } a { color: var(--accent) } .soft { color: var(--soft); font-size: .875rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8125rem }
pre.why { padding-left: .75rem; border-left: 3px solid var(--warn) }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { padding: .3rem .5rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: baseline }
th { font-weight: 400; color: var(--soft); font-size: .8125rem }
:is(th, td):first-child { overflow-wrap: anywhere }
:is(th, td):nth-child(n + 2) { white-space: nowrap }
:is(th, td):last-child { text-align: right; padding-right: 0 }
td small { color: var(--soft); font-weight: 400; margin-left: .75rem }
.now td { font-weight: 600 } .later td { color: var(--soft) }
figure { margin: 1rem 0 1.5rem } figcaption { margin-top: .25rem }
.curve { display: grid; grid-template: auto 1fr auto / auto 1fr auto; column-gap: .5rem;
  color: var(--soft); font-size: .75rem; line-height: 1.2; font-variant-numeric: tabular-nums }
.curve span { grid-column: 1; text-align: right } .curve span:nth-of-type(2) { grid-row: 2;
  align-self: end }
.curve svg { grid-area: 1 / 2 / 3 / 4; width: 100%; height: 11rem; overflow: visible;
  border: solid var(--rule); border-width: 0 0 1px 1px }
.curve svg ~ span { grid-row: 3; margin-top: .25rem } .curve svg + span { grid-column: 2;
  text-align: left } .curve span:last-child { grid-column: 3 }
polyline { fill: none; stroke: var(--accent); stroke-width: 1.75;
  vector-effect: non-scaling-stroke; stroke-linejoin: round }
.each { stroke-width: 1; stroke-opacity: .45 }
@media (max-width: 34rem) { td small { display: block; margin: 0 } }
</style>
</head>
<body>
<h1>Run {{ title }}</h1>
<p>{% if ended == "done" %}The run is done: {{ done }} stages, {{ all }} in all.
{%- elif ended %}The run {{ {"stopped": "was stopped", "failed": "failed"}[ended] }} after
{{ done }} of {{ rows|length }} stages. What is finished is kept: the same command goes on from
there.{% else %}Under way: {{ done }} of {{ rows|length }} stages are done;
{{ "about " ~ left ~ " left" if left else "the time left is not known yet" }}.{% endif %}
{%- if report %} <a href="{{ report }}">The report</a>.{% endif %}</p>
{% if why %}<pre class="why">{{ why }}</pre>
{% endif %}<p class="soft">Written {{ at }}.{% if not ended %} That is done as a stage begins and
ends, and every minute of training; this page loads itself again. Where it is longer ago than a
stage takes, the run was killed: the same command goes on.{% endif %}</p>
{% if line and not ended %}<pre>{{ line }}</pre>
{% endif %}{% if curve %}<figure>{{ curve }}
<figcaption class="soft">Loss of {{ curve_of }}, by optimizer step
{%- if "each" in curve %}: pale every step, strong a moving mean{% endif %}.</figcaption></figure>
{% endif %}<table>
<thead><tr><th scope="col">stage</th><th scope="col">state</th>
<th scope="col">time</th></tr></thead>
<tbody>
{% for name, said, state, time in rows %}<tr{% if state == "under way" %} class="now"
{%- elif state == "to come" %} class="later"{% endif %}><td>{{ name }}
{%- if said %}<small>{{ said }}</small>{% endif %}</td><td>{{ state }}</td><td>{{ time }}</td></tr>
{% endfor %}</tbody></table>
</body>
</html>"""
)
