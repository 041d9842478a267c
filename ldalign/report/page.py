"""report.html: one self-contained page that tells an outsider what a run did, reached and cost.

Derived from the run folder alone, from whatever stages are finished, without loading a
model: `ldalign report run=RUN` makes it again at any time. The page itself is page.html, a
jinja2 template with autoescaping (responses are data); what it shows beside the figures is
put in words by words.py.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ldalign.report import notation, words
from ldalign.report.analysis import Numbers, RunPairs, read_pairs, sides_of
from ldalign.report.cautions import LEADING_CAUTIONS, cautions
from ldalign.report.glossary import Glossary
from ldalign.report.result import Kind, kind_of, method_name
from ldalign.report.table import (
    collect,
    read_config,
    read_steps,
    read_summaries,
    read_validation,
)
from ldalign.run.folder import iterations, read_machine, stage_names
from ldalign.run.manifest import check_stage
from ldalign.run.plan import stage_of
from ldalign.run.stages.guide import GUIDE_STAGE
from ldalign.run.stages.policy import POLICY_STAGE
from ldalign.run.stranger import refuse_outside
from ldalign.system.errors import EnvironmentProblem, InputError, how_to_install
from ldalign.system.files import make_folder, write_text, writing
from ldalign.system.visible import visible

log = logging.getLogger(__name__)

PAGE = "report/report.html"
# In which part of the page a figure stands, but for those of the distances.
PART_OF = {
    "held_out": "results",
    "guide": "pull",
    "weights": "distance",
    "training": "steps",
    "validation": "steps",
    "budget": "cost",
}


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
            f"there, and `ldalign report run={run} --debug` tries again"
        )


def check_run(run: Path) -> None:
    """Raises InputError where `run` is no run folder, leads out of itself by a link, or has a
    finished stage whose files are not what its manifest says. Of weights only the size counts.
    """
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: is no run folder, as it has no config.yaml; give one (run=RUN)")
    refuse_outside(run)
    read_machine(run)  # here: the page comes after the table
    for name in stage_names(run):
        weighty = stage_of(name) in (POLICY_STAGE, GUIDE_STAGE)
        check_stage(run / name, unread="*.safetensors" if weighty else None)


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
    environment = Environment(
        autoescape=True,
        finalize=notation.seen,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"signs": notation.page, "glossed": _glossed(Glossary())}
    environment.filters["parted"] = _parted
    write_text(run / PAGE, environment.from_string(source).render(values) + "\n")
    return run / PAGE


def gather(run: Path) -> dict[str, Any]:
    """Returns everything that the template shows; the figures are drawn and written on the way."""
    table, summaries = collect(run), read_summaries(run)
    kind = kind_of(list(summaries))
    text = (run / "config.yaml").read_text(encoding="utf-8")
    config = read_config(run)
    machine = read_machine(run)
    joined = [pairs for t in iterations(run) if (pairs := read_pairs(run, t))]
    stages = [
        *["sft/policy"] * (kind == "sft"),
        *(f"iteration_{t}/policy" for t in iterations(run)),
    ]
    trained = read_steps(run, stages)
    steps = {name.removesuffix("/policy"): records for name, records in trained.items()}
    method, sides = config.get("method", "ld_align"), sides_of(config.get("method"))
    rows = table["policies"]
    settings = words.settings(config, table, kind)
    loss = str(dict(settings).get("loss.kind", "sigmoid"))
    found = cautions(table, read_steps(run, table["guides"]), machine.get("git_commit"))
    whole = kind in ("align", "nothing")
    sampled = words.samples(joined if whole else [])
    answered = words.answers(run, rows, table["result"].get("policy"))
    rewards, judged = words.rewards(rows), words.judge_agreement(table["agreement"])
    parts = _parts(
        kind,
        bool(rewards["rows"] or judged),
        bool(answered["answers"]),
        bool(table["guides"]),
    )
    return {
        "kind": kind,
        "title": words.title(config, kind),
        "meta": words.origin(run, machine),
        "headline": words.headline(table, config),
        "cautions": found[:LEADING_CAUTIONS],
        "more_cautions": found[LEADING_CAUTIONS:],
        "parts": parts,
        "has_guide": method == "ld_align" or bool(table["guides"]),
        "has_pairs": method != "sft",
        "sides": sides,
        "method_name": method_name(config),
        "method": words.SCRIPTS.get(kind) or words.method_text(config),
        "data": words.data_text(config),
        "settings": settings,
        "machine": words.machine_line(machine),
        "results": words.results(rows),
        "kinds": words.kinds(rows),
        "measured_in": words.measured_in(config),
        "guides": words.guide_figures(table["guides"]),
        "charts": _charts(run, table, joined, steps, str(method), loss, list(parts)),
        "fallen": words.fallen(steps, sides),
        "rewards": rewards,
        "agreement": judged,
        **sampled,
        **answered,
        "budget": words.budget(summaries),
        "command": words.command(config, machine, kind if kind in words.SCRIPTS else "align"),
        "reproduce_note": (
            f"config.yaml is the run folder's own, below. Seed {config.get('seed')}; the same "
            "seed, machine and versions give the same samples; on another machine the last bits of "
            "sums differ, and with them rare tokens."
        ),
        "config": text,
        "environment": json.dumps(machine, indent=1),
    }


def _parts(kind: Kind, judged: bool, answered: bool, guided: bool) -> dict[str, str]:
    """The page's parts, in their order: what they are called in the page and in its list.

    judged, answered, guided: whether a judge or reward model, answers and a guide are there.
    """
    titles = {
        "results": "Results",
        "run": "What was run",
        "distance": "Distances",
        "pull": "Guide and weights",
        "steps": "Training",
        "judges": "Other judges",
        "samples": "Samples",
        "cost": "Time and tokens",
        "again": "Reproduce",
    }
    if kind == "judge":
        order = ["judges", "run", *["pull"] * guided]
    elif kind == "guide":
        order = ["pull", "run"]
    elif kind in ("sft", "evaluate"):
        order = ["results", "run", *["steps"] * (kind == "sft")]
    else:
        return titles
    order += ["judges"] * (judged and kind != "judge") + ["samples"] * answered
    own = {"judge": {"judges": "Agreement"}, "guide": {"pull": "The guide"}}.get(kind, {})
    return {name: (titles | own)[name] for name in [*order, "cost", "again"]}


def _parted(name: str) -> Markup:
    """A stage's name that may be broken after its slashes, and nowhere else."""
    return Markup("/<wbr>").join(visible(name).split("/"))


def _glossed(glossary: Glossary) -> Callable[[str], str]:
    """Makes the filter that ends a block of the page with a line on the terms that it is the first
    to use, as a reader sees it: texts of the data, settings and drawings do not count.
    """

    def filtered(block: str) -> str:
        shown = re.sub(r"<(svg|pre|dl|details)\b.*?</\1>", " ", block, flags=re.DOTALL)
        found = glossary.first_used(re.sub(r"<[^>]*>", " ", shown).replace("\u00a0", " "))
        if not found:
            return block
        said = " ".join(
            f"<span><dfn>{term[0].upper()}{term[1:]}</dfn>: {meaning}.</span>"
            for term, meaning in found
        )
        # both are ours, and hold nothing to escape
        return f'{block}<p class="terms">{notation.page(said)}</p>\n'

    return filtered


# ------------------------------------------------------------------------------------------ figures


def _charts(
    run: Path,
    table: Numbers,
    joined: Sequence[RunPairs],
    steps: Mapping[str, list[Numbers]],
    method: str,
    loss: str,
    parts: Sequence[str],
) -> dict[str, Numbers]:
    """Draws and writes every figure of the page's parts: name -> title, caption, SVG ("" where
    there is no figure).
    """
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
        figures.training(steps, sides_of(method), loss),
        validation(*_validation(run, table["policies"])),
        figures.budget(table["seconds"]),
    ]
    folder = run / "report/figures"
    with writing(folder):
        make_folder(folder)
    drawn = [
        chart if PART_OF.get(chart.name, "distance") in parts else replace(chart, figure=None)
        for chart in drawn
    ]
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
