"""The comparison of several methods from one start: what `train/compare.py` reports.

The start policy is made once. Then every method trains from it, on the same rows with the same
number of optimizer steps, at each learning rate of one grid (first seed); its best on the
validation rows is run with the other seeds and reported on the rest of the held-out rows, which no
choice has seen. run/comparison.py has the arms and reads their answers.

Differences are paired by prompt: a method's figure for a prompt is the mean over seeds,
the standard error is over prompts. It holds for these seeds' average; the spread
between seeds is beside it.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ldalign.evaluation.statistics import standard_error
from ldalign.report.table import LEADING
from ldalign.run.comparison import (
    FIGURES,
    START,
    Arm,
    arm_folder,
    last_iteration,
    read_answers,
    validation_ids,
)
from ldalign.run.folder import benchmark_summaries
from ldalign.run.settings import CompareConfig
from ldalign.run.stages.policy import start_name
from ldalign.system import distributed
from ldalign.system.files import make_folder, write_json, write_text

TITLES = {"sampled": "sampled, %", "greedy": "greedy, %", "nll": "NLL, nats/token"}

# ------------------------------------------------------------------------------------- measurements


def summarise(
    config: CompareConfig,
    arms: Sequence[Arm],
    chosen: dict[str, float],
    searched: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Returns what the page shows: each arm's means, and differences from the start and others."""
    validation, test = validation_ids(config)
    seeds = config.compare.seeds

    def last_answers(arm: Arm, seed: int) -> dict[str, dict[str, float]]:
        run = arm_folder(config, arm, seed, chosen[arm.name])
        return read_answers(last_iteration(run, config))

    start = _over_seeds([read_answers(_start_of(config, arms, chosen, s)) for s in seeds], test)
    tables = {arm.name: _over_seeds([last_answers(arm, s) for s in seeds], test) for arm in arms}
    policies = {name: _row(table, start) for name, table in {START: start, **tables}.items()}
    contrasts = {
        f"{a} - {b}": _row(tables[a], tables[b])["difference"]
        for n, a in enumerate(tables)
        for b in list(tables)[:n]
    }
    return {
        "rows": {"validation": len(validation), "test": len(test)},
        "seeds": seeds,
        "learning_rates": chosen,
        "search": searched,
        "policies": policies,
        "contrasts": contrasts,
        "settings": asdict(config.compare),
        "steps": config.training.steps,
        "global_batch": config.global_batch,
        "max_rows": config.max_rows,
        "benchmarks": _benchmarks(config, arms, chosen),
    }


def _benchmarks(
    config: CompareConfig, arms: Sequence[Arm], chosen: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Returns {policy: {task: its summary}} of the start and of each arm's first seed."""
    seed, last = config.compare.seeds[0], f"iteration_{config.iterations - 1}"
    folders = {START: (Path(config.run) / START, start_name(config))}
    folders |= {arm.name: (arm_folder(config, arm, seed, chosen[arm.name]), last) for arm in arms}
    out: dict[str, dict[str, Any]] = {}
    for name, (run, policy) in folders.items():
        found = benchmark_summaries(run).items()
        out[name] = {
            key.rpartition("/")[2]: value for key, value in found if key.startswith(f"{policy}/")
        }
    return {name: tasks for name, tasks in out.items() if tasks}


def _start_of(
    config: CompareConfig, arms: Sequence[Arm], chosen: dict[str, float], seed: int
) -> Path:
    return arm_folder(config, arms[0], seed, chosen[arms[0].name]) / START


def _over_seeds(
    tables: Sequence[dict[str, dict[str, float]]], ids: Sequence[str]
) -> dict[str, np.ndarray]:
    """Returns {figure: (seeds, rows)} of the rows in `ids`, without figures that no row has."""
    out = {}
    for name in FIGURES:
        kept = [i for i in ids if name in tables[0][i]]
        if kept:
            out[name] = np.array([[table[i][name] for i in kept] for table in tables])
    return out


def _row(table: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, Any]:
    out: dict[str, Any] = {"difference": {}}
    for name, values in table.items():
        gaps = values - other[name]
        out[name] = float(values.mean())
        out[f"{name}_se"] = standard_error(values.mean(0))
        out["difference"][name] = {
            "mean": float(gaps.mean()),
            "se": standard_error(gaps.mean(0)),
            "by_seed": [float(gap) for gap in gaps.mean(1)],
        }
    return out


# ------------------------------------------------------------------------------------------- report


def write_comparison(config: CompareConfig, summary: dict[str, Any]) -> str:
    """Writes report/comparison.json, .md and, with matplotlib, .svg and .png; returns the page.

    The page is the text of comparison.md.
    """
    folder = Path(config.run) / "report"
    text = render(summary)
    if distributed.rank() == 0:
        make_folder(folder)
        write_json(folder / "comparison.json", summary)
        write_text(folder / "comparison.md", text)
        try:
            from ldalign.report.chart import write_chart
            from ldalign.report.figures import contrasts
        except ImportError:
            missing = "matplotlib is not installed; pip install 'ldalign[report]'"
            return f"{text}\n(no figure: {missing})"
        write_chart(contrasts(summary), folder)
    return text


def render(summary: dict[str, Any]) -> str:
    """Writes the Markdown page of what `summarise` returns."""
    figures = [name for name in FIGURES if name in summary["policies"][START]]
    seeds, rows = summary["seeds"], summary["rows"]
    budget = f"{summary['steps']} optimizer steps of {summary['global_batch']}"
    lines = [
        f"**{len(seeds)} seed(s), {rows['test']} held-out rows; learning rates chosen on "
        f"{rows['validation']} more**",
        "",
        f"Every method: {summary['max_rows']} prompts, {budget}",
        "",
        *_policy_lines(summary, figures),
        "",
        "**Between methods** (first minus second)",
        "",
        *_contrast_lines(summary, figures),
        "",
        *_search_lines(summary, figures[0]),
        *_benchmark_lines(summary["benchmarks"], seeds[0]),
        "",
        "+- is one standard error over prompts of the seeds' mean; differences are paired by "
        "prompt.",
        "",
    ]
    return "\n".join(lines)


def _policy_lines(summary: dict[str, Any], figures: Sequence[str]) -> list[str]:
    """A table of every method's figures, and of its differences from the start."""
    titles = [TITLES[f] for f in figures]
    differences = [f"{title} - start" for title in titles]
    last = f"each seed: {titles[0]} - start"
    lines = [
        _line(["method", "learning rate", *titles, *differences, last]),
        _line(["---"] * (3 + 2 * len(figures))),
    ]
    for name, row in summary["policies"].items():
        cells = [name, f"{summary['learning_rates'][name]:g}" if name != START else ""]
        cells += [_shown(f, row[f], row[f"{f}_se"]) for f in figures]
        empty = [""] * (len(figures) + 1)
        cells += empty if name == START else _difference_cells(row["difference"], figures)
        lines.append(_line(cells))
    return lines


def _contrast_lines(summary: dict[str, Any], figures: Sequence[str]) -> list[str]:
    """A table of the differences between methods."""
    titles = [TITLES[f] for f in figures]
    lines = [
        _line(["", *titles, f"each seed: {titles[0]}"]),
        _line(["---"] * (2 + len(figures))),
    ]
    for name, gaps in summary["contrasts"].items():
        lines.append(_line([name, *_difference_cells(gaps, figures)]))
    return lines


def _difference_cells(gaps: dict[str, Any], figures: Sequence[str]) -> list[str]:
    """Each figure's difference, and the first figure's seed by seed."""
    cells = [_shown(f, gaps[f]["mean"], gaps[f]["se"], sign="+") for f in figures]
    by_seed = [_shown(figures[0], gap, sign="+") for gap in gaps[figures[0]]["by_seed"]]
    return [*cells, ", ".join(by_seed)]


def _search_lines(summary: dict[str, Any], figure: str) -> list[str]:
    """A table of what the search found for each method at each learning rate."""
    rates = summary["settings"]["learning_rates"]
    what = "-NLL" if figure == "nll" else f"{figure} accuracy, %"
    seed = summary["seeds"][0]
    lines = [
        f"**The search** (seed {seed}, validation rows: {what}; the best is taken)",
        "",
        _line(["method", *(f"{rate:g}" for rate in rates)]),
        _line(["---"] * (1 + len(rates))),
    ]
    for name, found in summary["search"].items():
        lines.append(_line([name, *(_shown(figure, found[f"{rate:g}"]) for rate in rates)]))
    return lines


def _benchmark_lines(found: dict[str, dict[str, Any]], seed: int) -> list[str]:
    """Returns a table of every task's leading metric, of the first seed's policies."""
    if not found:
        return []
    tasks = sorted({task for scores in found.values() for task in scores})
    first = next(iter(found.values()))

    def leading(task: str) -> str:
        seen = [scores[task] for scores in found.values() if task in scores]
        return next(metric for metric in LEADING if any(metric in scores for scores in seen))

    metrics = {task: leading(task) for task in tasks}
    lines = [
        "",
        f"**Benchmarks**, % (seed {seed}; +- one standard error over rows)",
        "",
        _line(["", *(f"{task} {metric}" for task, metric in metrics.items())]),
        _line(["---"] * (1 + len(tasks))),
    ]
    for name, scores in found.items():
        cells = [
            _shown(m, scores[t][m], scores[t][f"{m}_se"]) if t in scores else ""
            for t, m in metrics.items()
        ]
        lines.append(_line([name, *cells]))
    shots = ", ".join(
        f"{t}: {s['rows']:.0f} rows, {s['shots']:.0f} shots" for t, s in sorted(first.items())
    )
    return [*lines, "", f"{shots}."]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(figure: str, value: float, error: float | None = None, sign: str = "") -> str:
    """Shows accuracies in per cent, NLL in nats."""
    factor, digits = (1, 4) if figure == "nll" else (100, 1)
    text = f"{factor * value:{sign}.{digits}f}"
    return text if error is None else f"{text} +- {factor * error:.{digits}f}"
