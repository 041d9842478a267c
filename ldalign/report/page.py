"""report.html: one self-contained page that tells an outsider what a run did, reached and cost.

Derived from the run folder alone, from whatever stages are finished, without loading a
model: `train/report.py run=RUN` makes it again at any time. The page itself is page.html, a
jinja2 template with autoescaping (responses are data); what it shows beside the figures is
put in words by words.py.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ldalign.report import words
from ldalign.report.analysis import Numbers, RunPairs, read_pairs, sides_of
from ldalign.report.cautions import cautions
from ldalign.report.result import method_name
from ldalign.report.table import (
    collect,
    read_config,
    read_steps,
    read_summaries,
    read_validation,
)
from ldalign.run.folder import ENVIRONMENT, iterations
from ldalign.system.errors import EnvironmentProblem, InputError, how_to_install
from ldalign.system.files import write_text

log = logging.getLogger(__name__)

PAGE = "report/report.html"


def try_page(run: Path) -> str:
    """Writes the page at the end of a run; says in one line where it is, or why there is none.

    Never raises: the run is done all the same.
    """
    try:
        return f"The report: {write_page(run)}"
    except EnvironmentProblem as error:
        return str(error)
    except Exception as error:  # the run is done and stays so; the page can be made again
        log.debug("report", exc_info=True)
        return (
            f"{run / PAGE}: not written: {type(error).__name__}: {error}; everything else is "
            f"there, and `train/report.py run={run} --debug` tries again"
        )


def check_run(run: Path) -> None:
    """Raises InputError where `run` is no run folder."""
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: is no run folder, as it has no config.yaml; give one (run=RUN)")


def write_page(run: Path) -> Path:
    """Writes report/report.html and report/figures/*; returns the page's path.

    Raises EnvironmentProblem without matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EnvironmentProblem(
            f"{run / PAGE}: not written, as matplotlib is not installed: "
            f"{how_to_install('report')}, then ldalign report run={run}"
        ) from None
    values = gather(run)
    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    write_text(run / PAGE, template.render(values) + "\n")
    return run / PAGE


def gather(run: Path) -> dict[str, Any]:
    """Returns everything that the template shows; the figures are drawn and written on the way."""
    table, summaries = collect(run), read_summaries(run)
    text = (run / "config.yaml").read_text(encoding="utf-8")
    config = read_config(run)
    machine = _json(run / ENVIRONMENT)
    joined = [pairs for t in iterations(run) if (pairs := read_pairs(run, t))]
    trained = read_steps(run, (f"iteration_{t}/policy" for t in iterations(run)))
    steps = {name.removesuffix("/policy"): records for name, records in trained.items()}
    method, sides = config.get("method", "ld_align"), sides_of(config.get("method"))
    rows = table["policies"]
    settings = words.settings(config, table)
    kind = str(dict(settings).get("loss.kind", "sigmoid"))
    policy = words.short_name(config.get("policy", "a policy"))
    return {
        "title": f"{method_name(config)} on {policy}",
        "meta": words.origin(run, machine),
        "headline": words.headline(table, config),
        "warnings": cautions(table, read_steps(run, table["guides"]), machine.get("git_commit")),
        "has_guide": method == "ld_align" or bool(table["guides"]),
        "has_pairs": method != "sft",
        "sides": sides,
        "method_name": method_name(config),
        "method": words.method_text(config),
        "settings": settings,
        "machine": words.machine_line(machine),
        "results": words.results(rows),
        "kinds": words.kinds(rows),
        "measured_in": words.measured_in(config),
        "guides": words.guide_figures(table["guides"]),
        "charts": _charts(run, table, joined, steps, str(method), kind),
        "fallen": words.fallen(steps, sides),
        "rewards": words.rewards(rows),
        "agreement": words.judge_agreement(table["agreement"]),
        **words.samples(joined),
        **words.answers(run, rows, table["result"].get("policy")),
        "budget": words.budget(summaries),
        "command": words.command(config, machine),
        "reproduce_note": (
            f"config.yaml is the run folder's own, below. Seed {config.get('seed')}; the same "
            "seed, machine and versions give the same samples; on another machine the last bits of "
            "sums differ, and with them rare tokens."
        ),
        "config": text,
        "environment": json.dumps(machine, indent=1),
    }


# ------------------------------------------------------------------------------------------ figures


def _charts(
    run: Path,
    table: Numbers,
    joined: Sequence[RunPairs],
    steps: Mapping[str, list[Numbers]],
    method: str,
    kind: str,
) -> dict[str, Numbers]:
    """Draws and writes every figure: name -> title, caption, SVG ("" where there is no figure)."""
    from ldalign.report import figures
    from ldalign.report.chart import write_chart
    from ldalign.report.validation import validation

    found = table["analysis"]
    drawn = [
        figures.held_out(table["policies"]),
        figures.distances(joined, table["policies"]),
        figures.correlations(found),
        figures.against(figures.LENGTH, joined, found),
        figures.against(figures.LIKELIHOOD, joined, found),
        figures.verdicts(joined, found),
        figures.against(figures.REWARD, joined, found),
        figures.guide(table["guides"]),
        figures.weights(joined, found),
        figures.training(steps, sides_of(method), kind),
        validation(*_validation(run, table["policies"])),
        figures.budget(table["seconds"]),
    ]
    folder = run / "report/figures"
    folder.mkdir(parents=True, exist_ok=True)
    return {
        chart.name: {
            "title": chart.title,
            "caption": chart.caption,
            # ours: drawn from numbers, with no text of a row in it
            "svg": Markup(write_chart(chart, folder)),
        }
        for chart in drawn
    }


def _validation(
    run: Path, rows: Sequence[Numbers]
) -> tuple[dict[str, list[Numbers]], dict[str, float]]:
    """The evaluations of every training stage, and the step whose weights it wrote, by policy."""
    found = read_validation(run, (f"{row['policy']}/policy" for row in rows))
    key = "train/validation/step"
    written = {row["policy"]: row[key] for row in rows if key in row}
    return {name.removesuffix("/policy"): records for name, records in found.items()}, written


def _json(path: Path) -> Numbers:
    value: Numbers = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return value
