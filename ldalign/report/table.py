"""table.json and table.md: what every policy of a run reached, and what it took.

`collect` reads the finished stages into the former, `render` makes the latter of it. The page
(page.py) shows the same numbers.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldalign.evaluation import statistics
from ldalign.report import agreement, analysis, guides, notation
from ldalign.report.analysis import Numbers
from ldalign.report.cautions import LEADING_CAUTIONS, cautions
from ldalign.report.glossary import Glossary, explained
from ldalign.report.notation import (
    FIGURES,
    HELD_OUT,
    Figure,
    column_decimals,
    decimals,
    leading,
    number,
    with_error,
)
from ldalign.report.result import (
    BASELINE,
    first_sentence,
    kind_of,
    paired,
    read_answers,
    result,
)
from ldalign.run.folder import benchmark_summaries, iterations, read_summary, stage_names
from ldalign.run.plan import PER_POLICY
from ldalign.run.settings import RunConfig
from ldalign.run.stranger import read_object
from ldalign.system.config import read_written
from ldalign.system.files import make_folder, read_jsonl, write_text, writing
from ldalign.system.metrics import say

Form = Callable[[Numbers], str]  # a row's cell
Column = tuple[str, Form]  # of a Markdown table: its title and cells


def write_report(run: Path) -> str:
    """Collects a run's finished stages into report/table.json and table.md; returns the text, in
    ASCII, as a console shows it.
    """
    table = collect(run)
    with writing(run / "report"):
        make_folder(run / "report")
    write_text(run / "report/table.json", json.dumps(table, indent=1) + "\n")
    text = render(table, read_steps(run, table["guides"]), read_config(run))
    write_text(run / "report/table.md", notation.markdown(text))
    return text


def say_table(run: Path) -> None:
    """Prints the benchmark scores of all policies of a run, and how they were measured."""
    lines = []
    for name, summary in benchmark_summaries(run).items():
        policy, _, task = name.partition("/benchmarks/")
        about = read_object(run / name / "task.json", f"delete {run / name} to make it again")
        scores = ", ".join(
            f"{key} {with_error(100 * value, 100 * summary[f'{key}_se'])}"
            for key, value in summary.items()
            if f"{key}_se" in summary
        )
        lines.append(
            f"| {policy} | {task} | {scores} | {summary['rows']:.0f} | {summary['shots']:.0f} | "
            f"{'on' if summary['chat_template'] else 'off'} | {about['version']:g} | "
            f"{about['lm_eval']} |"
        )
    if lines:
        head = "| policy | benchmark | score, % +- standard error | rows | shots | chat template | "
        head += "version | lm-eval |"
        say("\n".join(["", head, "|---" * 8 + "|", *lines]))


# --------------------------------------------------------------------------------------- collecting


def collect(run: Path) -> Numbers:
    """Returns what table.json holds: each finished stage's numbers, by policy, and the analysis.

    The analysis is `analysis.summarise` of every iteration.
    """
    summaries = read_summaries(run)
    names = ["start", "sft", *(f"iteration_{t}" for t in iterations(run)), "continual_sft"]
    rows = [row for name in names if (row := _collect(run, summaries, name))]
    answers = read_answers(run, [row["policy"] for row in rows])
    for row in rows:
        row |= paired(answers, rows[0]["policy"], row["policy"], "difference")
        if row["policy"].startswith("iteration_"):
            row |= paired(answers, BASELINE, row["policy"], "baseline")
        if row is not rows[0]:
            scores, base = _scores(row), _scores(rows[0])
            gain = statistics.mean_relative_gain(scores, base)
            of = sum(bool(base.get(key)) for key in scores)  # a score of 0 has no relative gain
            row |= {} if gain is None else {"mean_relative_gain": gain, "mean_relative_gain_of": of}
    joined = [pairs for t in iterations(run) if (pairs := analysis.read_pairs(run, t))]
    return {
        "result": result(run, rows, read_config(run), kind_of(list(summaries))),
        "policies": rows,
        "guides": {k: v for k, v in summaries.items() if k.rpartition("/")[2] == "guide"},
        "data": summaries.get("data", {}),
        "agreement": agreement.read_agreement(run, read_config(run)),
        "analysis": {f"iteration_{pairs.iteration}": analysis.summarise(pairs) for pairs in joined},
        "seconds": {name: summary["seconds"] for name, summary in summaries.items()},
    }


def read_config(run: Path) -> Numbers:
    """Reads the settings of the run folder's last command; {} where there are none."""
    path = run / "config.yaml"
    return read_written(RunConfig, path) if path.is_file() else {}


def read_summaries(run: Path) -> dict[str, Numbers]:
    """Reads every finished stage's summary, in the order of the method."""
    return {name: read_summary(run / name) for name in stage_names(run)}


def read_steps(run: Path, names: Iterable[str]) -> dict[str, list[Numbers]]:
    """Reads the optimizer steps in metrics.jsonl of the named stages that have one."""
    return _read_metrics(run, names, validation=False)


def read_validation(run: Path, names: Iterable[str]) -> dict[str, list[Numbers]]:
    """Reads the evaluations during training in metrics.jsonl of the named stages that have one."""
    return _read_metrics(run, names, validation=True)


def _read_metrics(run: Path, names: Iterable[str], validation: bool) -> dict[str, list[Numbers]]:
    files = {name: run / name / "metrics.jsonl" for name in names}
    return {
        name: [r for r in read_jsonl(path) if ("validation/nll" in r) == validation]
        for name, path in files.items()
        if path.is_file()
    }


def _collect(run: Path, summaries: dict[str, Numbers], name: str) -> Numbers:
    """Returns everything known of one policy; {} where nothing was measured."""
    parts = {stage.name: summaries.get(stage.folder(name), {}) for stage in PER_POLICY}
    benchmarks = {
        key.rpartition("/")[2]: value
        for key, value in summaries.items()
        if key.startswith(f"{name}/benchmarks/")
    }
    if not (parts["evaluation"] or parts["policy"] or benchmarks):
        return {}
    return {
        "policy": name,
        **parts["distances"],
        **parts["judged"],
        **parts["evaluation"],
        **parts["reward"],
        **{f"guide/{key}": value for key, value in parts["guide"].items()},
        **{f"responses/{key}": value for key, value in parts["responses"].items()},
        **{f"train/{key}": value for key, value in parts["policy"].items()},
        "benchmarks": benchmarks,
        "seconds": sum(part.get("seconds", 0.0) for part in parts.values()),
    }


def _scores(row: Numbers) -> dict[str, float]:
    """Returns the scores of the mean relative gain: benchmarks, or else held-out accuracies."""
    found = {task: b[name] for task, b in row["benchmarks"].items() if (name := leading(b))}
    return found or {key: row[key] for key, _ in HELD_OUT if key in row}


# ----------------------------------------------------------------------------------------- Markdown


def render(
    table: Numbers, guide_steps: Mapping[str, Sequence[Numbers]], config: Mapping[str, Any]
) -> str:
    """Writes the text of table.md about what table.json holds, in ASCII (`notation.markdown` has
    the signs of a page). guide_steps: as in `cautions`. config: the run folder's.
    """
    rows: list[Numbers] = table["policies"]
    first = rows[0]["policy"] if rows else "start"
    found = cautions(table, guide_steps)
    main = [first_sentence(table, config)]
    main += [table["result"]["selection"]] if table["result"].get("selection") else []
    parts = [
        "".join(f"{notation.plain(text)}\n\n" for text in main)
        + "".join(f"Caution: {text}\n\n" for text in found[:LEADING_CAUTIONS]),
        _table("Held out", rows, _held_out_columns(rows, first), _held_out_note(rows)),
        _table("Benchmarks", rows, _benchmark_columns(rows)),
        _moved(rows),
        _more(found[LEADING_CAUTIONS:]),
        _guides(table["guides"]),
        _table("Training", rows, _training_columns(), TRAINING_NOTE),
        _agreement(table["agreement"]),
        _times(table["seconds"], [r["policy"] for r in rows]),
    ]
    glossary = Glossary()
    return "\n".join(_explained_part(part, glossary) for part in parts if part)


def _explained_part(part: str, glossary: Glossary) -> str:
    """A part of the page, with what its terms mean where no part before had them."""
    terms = explained(glossary.first_used(part))
    return f"{part.rstrip()}\n\n*{terms}*\n" if terms else part


def _held_out_note(rows: Sequence[Numbers]) -> str:
    """What the table of held-out scores needs to be read; of accuracy, where there is any."""
    accuracy = (
        "Accuracy: a program checks the answers to held-out prompts; one that does not end is "
        "wrong. "
    )
    scored = any(key in row for row in rows for key, _ in HELD_OUT)
    return (
        f"{accuracy * scored}Differences are paired by prompt. "
        "NLL: of the data set's own responses."
    )


TRAINING_NOTE = (
    "Reward margin, reward accuracy and loss: means over the last epoch of training. Weight: "
    "distance over its mean; its effective sample size is a share of the pairs. Distance "
    "explained: the share of the variance of the pairs' distances that a straight line "
    "explains in the difference of the two lengths, in tokens, and in how many of the two "
    "responses were cut. Validation NLL: of held-out rows that no other figure is of, before "
    "the stage, of the weights that it wrote, after its last step. Tokens generated: sampled "
    "for training. Tokens trained: read in training, a prompt once a pair."
)


def _more(found: Sequence[str]) -> str:
    """The cautions that do not stand at the top."""
    return "**More cautions**\n\n" + "".join(f"- {text}\n" for text in found) if found else ""


def _held_out_columns(rows: Sequence[Numbers], first: str) -> list[Column]:
    nll = FIGURES["nll"]
    return [
        *((f"{words}, %", _percents(rows, key)) for key, words in HELD_OUT),
        *(
            (f"{figure} - {base}, points", _percents(rows, f"{prefix}/{figure}", "+"))
            for prefix, base in (("difference", first), ("baseline", BASELINE))
            for figure in ("greedy", "sampled")
        ),
        ("answers cut, %", _numbers("truncated_frac", 1, factor=100)),
        (nll.title(), _numbers("nll/real", nll.digits)),
        (f"NLL - {first}", _with_error(rows, "difference/nll", nll, "+")),
        (f"NLL - {BASELINE}", _with_error(rows, "baseline/nll", nll, "+")),
        ("reward of greedy answers", _reward),
        ("they beat the real ones, %", _percents(rows, "reward/win_rate")),
        (f"they beat those of {first}, %", _percents(rows, "reward/win_rate_first")),
    ]


def _benchmark_columns(rows: list[Numbers]) -> list[Column]:
    def column(task: str) -> Column:
        found = [r["benchmarks"][task] for r in rows if task in r["benchmarks"]]
        name = next(map(leading, found))
        score = _percents(found, str(name))
        return f"{notation.plain(task)} {name}, %", lambda r: score(r["benchmarks"].get(task, {}))

    gain = ("mean relative gain, %", _numbers("mean_relative_gain", 2, "+", 100))
    columns = [column(task) for task in tasks_of(rows)]
    return [*columns, gain] if columns else []


def _training_columns() -> list[Column]:
    return [
        ("latent distance, mean (p10, p50, p90)", _distances),
        ("distance explained by length / by the cut, %", _explained),
        ("weight spread: deviation (min, max)", _spread),
        ("effective sample size", _numbers("weight/ess", 2)),
        ("reward margin", _numbers("train/rewards/margins", 3, "+")),
        ("reward accuracy", _numbers("train/rewards/accuracies", 3)),
        ("loss", _numbers("train/loss", 4)),
        ("validation NLL, start, written, last", _validated),
        ("step written, of", _step_written),
        ("pairs skipped", _numbers("train/skipped_pairs", 0)),
        ("losers cut, %", _numbers("responses/losers/truncated_frac", 1, factor=100)),
        ("tokens generated", _numbers("responses/tokens", 0)),
        ("tokens trained", _numbers("train/tokens", 0)),
    ]


def _guides(found: Mapping[str, Numbers]) -> str:
    """Writes the table of the guides' held-out figures, and what it says."""
    parts = [
        f"{guides.older_figures(guides.guide_name(name), figures)}\n"
        for name, figures in found.items()
        if not guides.is_known(figures)
    ]
    names, lines = guides.guide_rows(found)
    if names:
        parts += [_texts("The guide", guides.WHAT, names, lines), f"{guides.NOTE}\n"]
    return "\n".join(parts)


def _agreement(found: Numbers) -> str:
    """Writes what the judge says of the distances, in a sentence and in a table."""
    if not found:
        return ""
    titles, lines = agreement.agreement_rows(found)
    said = f"{notation.plain(agreement.sentence(found))}\n"
    if not titles:
        return f"**Agreement with a judge**\n\n{said}"
    table = _texts("Agreement with a judge", agreement.WHO, titles, lines)
    return f"{table}\n{said}\n{agreement.NOTE}\n"


def _table(title: str, rows: list[Numbers], columns: list[Column], note: str = "") -> str:
    """Writes a table of the policies, without the columns that no row has a value for, and what is
    to be said of it.
    """
    cells = [(name, [form(r) for r in rows]) for name, form in columns]
    cells = [(name, values) for name, values in cells if any(value != "-" for value in values)]
    lines = [(r["policy"], [values[i] for _, values in cells]) for i, r in enumerate(rows)]
    if not cells:
        return ""
    table = _texts(title, "policy", [name for name, _ in cells], lines)
    return f"{table}\n{note}\n" if note else table


def _texts(
    title: str, corner: str, columns: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]
) -> str:
    """Writes a Markdown table. corner: the title of the lines' names. lines: name and cells."""
    rows = [(corner, columns), *lines]
    head, *body = ["| " + " | ".join([name, *cells]) + " |" for name, cells in rows]
    rule = "|---" * (len(columns) + 1) + "|"
    return f"**{title}**\n\n" + "\n".join([head, rule, *body]) + "\n"


def _moved(rows: list[Numbers]) -> str:
    compared = [r for r in rows if "difference/greedy" in r]
    if not compared:
        return ""
    lines = [f"- {r['policy']}: {_verdict(r)}" for r in compared]
    return f"What moved, against {rows[0]['policy']}:\n\n" + "\n".join(lines) + "\n"


def _verdict(row: Numbers) -> str:
    parts = []
    for key in ("sampled", "greedy"):
        if f"difference/{key}" in row:
            gap, error = row[f"difference/{key}"], row[f"difference/{key}_se"]
            points = with_error(100 * gap, 100 * error, "+")
            moved = movement(gap, error, row[f"difference/{key}_rows"])
            parts.append(f"{key} accuracy {moved} ({points} points)")
    return "; ".join(parts)


def _times(seconds: dict[str, float], policies: list[str]) -> str:
    """Writes a table of wall times, one row a policy and one column a stage."""
    columns = [s.name for s in PER_POLICY if any(s.folder(p) in seconds for p in policies)]
    if not columns:
        return ""
    lines = [
        "| wall time, s | " + " | ".join(columns) + " | all |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for policy in policies:
        own = [seconds.get(f"{policy}/{step}") for step in columns]
        shown = " | ".join("-" if s is None else f"{s:.0f}" for s in own)
        lines.append(f"| {policy} | {shown} | {sum(s for s in own if s is not None):.0f} |")
    shared = [name for name in ("data", "guide") if name in seconds]
    once = "".join(f"{name} {seconds[name]:.0f} s, " for name in shared)
    return "\n".join(lines) + f"\n\nOnce a run: {once}everything {sum(seconds.values()):.0f} s.\n"


def _numbers(key: str, digits: int, sign: str = "", factor: float = 1.0) -> Form:
    """Makes the cells of a metric: its value, "-" where it is not there."""
    return lambda row: number(factor * row[key], digits, sign) if key in row else "-"


def _percents(rows: Sequence[Numbers], key: str, sign: str = "") -> Form:
    """Makes the cells of a share, in per cent, with its standard error where that is known."""
    return _with_error(rows, key, FIGURES["greedy"], sign)


def _with_error(rows: Sequence[Numbers], key: str, figure: Figure, sign: str = "") -> Form:
    """Makes the cells of a metric with its standard error where it is known; "-" where the metric
    is not there. One form for all rows.
    """
    digits = column_decimals(rows, key, figure)

    def cell(row: Numbers) -> str:
        if key not in row:
            return "-"
        value = figure.factor * row[key]
        if f"{key}_se" not in row:
            return number(value, digits, sign)
        return with_error(value, figure.factor * row[f"{key}_se"], sign, digits)

    return cell


def _reward(row: Numbers) -> str:
    if "reward/mean" not in row:
        return "-"
    digits = decimals([row["reward/mean_se"]], 3)
    mean = with_error(row["reward/mean"], row["reward/mean_se"], "+", digits)
    return f"{mean} (real {number(row['reward/real'], digits, '+')})"


def _distances(row: Numbers) -> str:
    if "distance/mean" not in row:
        return "-"
    values = (row[f"distance/{key}"] for key in ("mean", "p10", "p50", "p90"))
    return "{:.3g} ({:.3g}, {:.3g}, {:.3g})".format(*values)


def _explained(row: Numbers) -> str:
    if "distance/length_share" not in row:
        return "-"
    return " / ".join(f"{100 * row[f'distance/{key}_share']:.0f}" for key in ("length", "cut"))


def _validated(row: Numbers) -> str:
    keys = [f"train/validation/nll{end}" for end in ("_start", "", "_last")]
    return ", ".join(f"{row[key]:.4f}" for key in keys) if keys[0] in row else "-"


def _step_written(row: Numbers) -> str:
    step, steps = row.get("train/validation/step"), row.get("train/steps")
    return "-" if step is None or steps is None else f"{step:.0f} of {steps:.0f}"


def _spread(row: Numbers) -> str:
    if "weight/std" not in row:
        return "-"
    values = (row[f"weight/{key}"] for key in ("std", "min", "max"))
    return "{:.2f} ({:.2f}, {:.2f})".format(*values)


# ----------------------------------------------------------------------------- shared with the page


def tasks_of(rows: Sequence[Numbers]) -> list[str]:
    """Lists the benchmarks that any policy has."""
    return sorted({task for row in rows for task in row["benchmarks"]})


def movement(gap: float, error: float, rows: int) -> str:
    """Says what a difference with its standard error, over so many prompts, amounts to, as a verb.

    Of fewer than FEWEST the error says nothing: of one prompt, or of equal ones, it is 0.
    """
    if rows < statistics.FEWEST:
        return f"was measured on {rows} prompt{'s' * (rows > 1)}, too few to say whether it moved"
    if abs(gap) <= 2 * error:
        return "did not move beyond two standard errors"
    return "rose" if gap > 0 else "fell"


def duration(seconds: float) -> str:
    """Says seconds as a reader wants them."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
