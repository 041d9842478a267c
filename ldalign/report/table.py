"""table.md and table.json: what every policy of a run reached, and what it took. The page is
page.py's.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldalign.evaluation import statistics
from ldalign.evaluation.statistics import standard_error
from ldalign.report import analysis
from ldalign.report.cautions import cautions, guide_name
from ldalign.run.folder import SUMMARY, benchmark_summaries, iterations, stage_names
from ldalign.run.plan import STEPS
from ldalign.system.files import make_folder, read_jsonl, write_text
from ldalign.system.metrics import say

Numbers = dict[str, Any]  # one policy: its name, and numbers by metric name
HELD_OUT = (("accuracy/greedy", "greedy accuracy"), ("accuracy/sampled", "sampled accuracy"))
# Which of a benchmark's metrics stands for it in the comparison: the first of these it has
LEADING = ("acc_norm", "acc", "exact_match/strict", "r@1", "exact_match/flexible")


def write_report(run: Path) -> str:
    """Collects the finished stages of a run folder into report/table.json and report/table.md;
    returns the latter.
    """
    table = collect(run)
    make_folder(run / "report")
    write_text(run / "report/table.json", json.dumps(table, indent=1) + "\n")
    text = render(table, read_steps(run, table["guides"]))
    write_text(run / "report/table.md", text)
    return text


def collect(run: Path) -> Numbers:
    """What table.json holds: every number of the finished stages, by policy, and the analysis of
    every iteration.
    """
    summaries = read_summaries(run)
    names = ["start", "sft", *(f"iteration_{t}" for t in iterations(run)), "continual_sft"]
    rows = [row for name in names if (row := _collect(run, summaries, name))]
    for row in rows:
        row |= _difference(run, rows[0]["policy"], row["policy"])
        if row is not rows[0]:
            scores, base = _scores(row), _scores(rows[0])
            gain = statistics.mean_relative_gain(scores, base)
            of = sum(bool(base.get(key)) for key in scores)  # a score of 0 has no relative gain
            row |= {} if gain is None else {"mean_relative_gain": gain, "mean_relative_gain_of": of}
    joined = [pairs for t in iterations(run) if (pairs := analysis.read_pairs(run, t))]
    agreement = run / "agreement" / SUMMARY
    return {
        "policies": rows,
        "guides": {k: v for k, v in summaries.items() if k.rpartition("/")[2] == "guide"},
        "data": summaries.get("data", {}),
        "agreement": _read(agreement) if agreement.is_file() else {},
        "analysis": {f"iteration_{pairs.iteration}": analysis.summarise(pairs) for pairs in joined},
        "seconds": {name: summary["seconds"] for name, summary in summaries.items()},
    }


def read_summaries(run: Path) -> dict[str, Numbers]:
    """Every finished stage's summary, in the order of the method."""
    return {name: _read(run / name / SUMMARY) for name in stage_names(run)}


def read_steps(run: Path, names: Iterable[str]) -> dict[str, list[Numbers]]:
    """metrics.jsonl of the named stages that have one."""
    files = {name: run / name / "metrics.jsonl" for name in names}
    return {name: read_jsonl(path) for name, path in files.items() if path.is_file()}


def _collect(run: Path, summaries: dict[str, Numbers], name: str) -> Numbers:
    """Everything known of one policy; {} where nothing was measured."""
    parts = {stage.name: summaries.get(stage.folder(name), {}) for stage in STEPS}
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


def leading(benchmark: Numbers) -> str | None:
    """The metric that stands for a benchmark in the comparison; None where its summary has none we
    know.
    """
    return next((name for name in LEADING if name in benchmark), None)


def _scores(row: Numbers) -> dict[str, float]:
    """What the mean relative gain is taken over: the benchmarks, or the held-out accuracies where
    there is none.
    """
    found = {task: b[name] for task, b in row["benchmarks"].items() if (name := leading(b))}
    return found or {key: row[key] for key, _ in HELD_OUT if key in row}


def _difference(run: Path, first: str, name: str) -> Numbers:
    """Accuracy minus the first policy's, with the standard error of the paired difference over
    prompts.
    """
    files = [run / policy / "evaluation/answers.jsonl" for policy in (first, name)]
    if first == name or not all(path.is_file() for path in files):
        return {}
    old, new = (
        {r["id"]: r["correct"] for r in read_jsonl(path) if "correct" in r} for path in files
    )
    if not old or old.keys() != new.keys():
        return {}
    out: Numbers = {}
    for key, pick in (("greedy", slice(0, 1)), ("sampled", slice(1, None))):
        pairs = [(old[i][pick], new[i][pick]) for i in old if old[i][pick]]
        gaps = np.array([sum(b) / len(b) - sum(a) / len(a) for a, b in pairs])
        if len(gaps):
            out |= {
                f"difference/{key}": float(gaps.mean()),
                f"difference/{key}_se": standard_error(gaps),
            }
    return out


# ----------------------------------------------------------------------------------------- Markdown


def render(table: Numbers, guide_steps: Mapping[str, Sequence[Numbers]]) -> str:
    """The Markdown page of what table.json holds. guide_steps: as in `cautions`."""
    rows: list[Numbers] = table["policies"]
    first = rows[0]["policy"] if rows else "start"
    found = cautions(table, guide_steps)
    parts = [
        "".join(f"Caution: {text}\n\n" for text in found),
        _table(
            "Held out",
            rows,
            [
                ("greedy accuracy, %", lambda r: _percent(r, "accuracy/greedy", "{:.1f}")),
                ("sampled accuracy, %", lambda r: _percent(r, "accuracy/sampled", "{:.1f}")),
                (
                    f"greedy - {first}, points",
                    lambda r: _percent(r, "difference/greedy", "{:+.1f}"),
                ),
                (
                    f"sampled - {first}, points",
                    lambda r: _percent(r, "difference/sampled", "{:+.1f}"),
                ),
                ("answers cut, %", lambda r: _number(r, "truncated_frac", "{:.1f}", 100)),
                ("NLL of real responses, nats/token", lambda r: _number(r, "nll/real", "{:.4f}")),
                ("reward of greedy answers", _reward),
                ("they beat the real ones, %", lambda r: _percent(r, "reward/win_rate", "{:.1f}")),
                (
                    f"they beat those of {first}, %",
                    lambda r: _percent(r, "reward/win_rate_first", "{:.1f}"),
                ),
            ],
        ),
        _table("Benchmarks", rows, _benchmark_columns(rows)),
        _moved(rows),
        _table(
            "Training",
            rows,
            [
                ("latent distance, mean (p10, p50, p90)", _distances),
                (
                    "latent gain of its own guide",
                    lambda r: _number(r, "guide/latent_gain", "{:+.4f}"),
                ),
                ("weight spread: deviation (min, max)", _spread),
                ("effective sample size", lambda r: _number(r, "weight/ess", "{:.2f}")),
                ("reward margin", lambda r: _number(r, "train/rewards/margins", "{:+.3f}")),
                ("reward accuracy", lambda r: _number(r, "train/rewards/accuracies", "{:.3f}")),
                ("loss", lambda r: _number(r, "train/loss", "{:.4f}")),
                ("pairs skipped", lambda r: _number(r, "train/skipped_pairs", "{:.0f}")),
                (
                    "losers cut, %",
                    lambda r: _number(r, "responses/losers/truncated_frac", "{:.1f}", 100),
                ),
                ("tokens generated", lambda r: _number(r, "responses/tokens", "{:.0f}")),
                ("tokens trained", lambda r: _number(r, "train/tokens", "{:.0f}")),
            ],
        ),
        *(_guide(name, losses) for name, losses in table["guides"].items()),
        _times(table["seconds"], [r["policy"] for r in rows]),
        "Accuracy: a program checks the answers to held-out prompts; +- is one standard error over "
        "prompts, and the differences are paired by prompt. NLL: of the data set's own responses. "
        "Reward margin, reward accuracy and loss: means over the last epoch of training. Weight: "
        "distance over its mean; its effective sample size is a share of the pairs. Tokens "
        "generated: sampled for training. Tokens trained: read in training, a prompt once a "
        "pair.\n",
    ]
    return "\n".join(part for part in parts if part)


def _table(
    title: str, rows: list[Numbers], columns: list[tuple[str, Callable[[Numbers], str]]]
) -> str:
    """A Markdown table, without the columns that no row has a value for."""
    cells = [(name, [form(r) for r in rows]) for name, form in columns]
    cells = [(name, values) for name, values in cells if any(value != "-" for value in values)]
    lines = [
        "| policy | " + " | ".join(name for name, _ in cells) + " |",
        "|---" * (len(cells) + 1) + "|",
    ]
    lines += [
        f"| {r['policy']} | " + " | ".join(values[i] for _, values in cells) + " |"
        for i, r in enumerate(rows)
    ]
    return f"**{title}**\n\n" + "\n".join(lines) + "\n" if cells else ""


def tasks_of(rows: Sequence[Numbers]) -> list[str]:
    """The benchmarks that any policy has."""
    return sorted({task for row in rows for task in row["benchmarks"]})


def _benchmark_columns(rows: list[Numbers]) -> list[tuple[str, Callable[[Numbers], str]]]:
    def column(task: str) -> tuple[str, Callable[[Numbers], str]]:
        name = next((leading(r["benchmarks"][task]) for r in rows if task in r["benchmarks"]), None)
        return f"{task} {name}, %", lambda r: _percent(
            r["benchmarks"].get(task, {}), str(name), "{:.1f}"
        )

    gain = ("mean relative gain, %", lambda r: _number(r, "mean_relative_gain", "{:+.2f}", 100))
    columns = [column(task) for task in tasks_of(rows)]
    return [*columns, gain] if columns else []


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
            parts.append(
                f"{key} accuracy {movement(gap, error)} ({100 * gap:+.1f} +- {100 * error:.1f} "
                "points)"
            )
    return "; ".join(parts)


def movement(gap: float, error: float) -> str:
    """What a difference with its standard error amounts to, as a verb."""
    return (
        ("rose" if gap > 0 else "fell")
        if abs(gap) > 2 * error
        else ("did not move beyond two standard errors")
    )


def _guide(name: str, losses: Numbers) -> str:
    if "latent_gain" not in losses:
        return ""
    verdict = "" if losses["latent_gain"] > 0 else " (NOT POSITIVE: the distances say nothing)"
    return (
        f"{guide_name(name).capitalize()}, held-out loss in nats/token: true latent "
        f"{losses['true']:.4f}, another row's {losses['other']:.4f}, none {losses['none']:.4f}; "
        f"latent gain {losses['latent_gain']:+.4f}, over the row's other response "
        f"{losses['sibling_gain']:+.4f}{verdict}.\n"
    )


def _times(seconds: dict[str, float], policies: list[str]) -> str:
    """Wall time, one row a policy and one column a stage."""
    columns = [s.name for s in STEPS if any(s.folder(p) in seconds for p in policies)]
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
    once = "".join(
        f"{name} {seconds[name]:.0f} s, " for name in ("data", "guide") if name in seconds
    )
    return "\n".join(lines) + f"\n\nOnce a run: {once}everything {sum(seconds.values()):.0f} s.\n"


def duration(seconds: float) -> str:
    """Seconds as a reader wants them."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _number(row: Numbers, key: str, form: str, factor: float = 1.0) -> str:
    return form.format(factor * row[key]) if key in row else "-"


def _percent(row: Numbers, key: str, form: str) -> str:
    if key not in row:
        return "-"
    error = f" +- {100 * row[f'{key}_se']:.1f}" if f"{key}_se" in row else ""
    return f"{form.format(100 * row[key])}{error}"


def _reward(row: Numbers) -> str:
    if "reward/mean" not in row:
        return "-"
    return (
        f"{row['reward/mean']:+.3f} +- {row['reward/mean_se']:.3f} (real {row['reward/real']:+.3f})"
    )


def _distances(row: Numbers) -> str:
    if "distance/mean" not in row:
        return "-"
    return ("{:.3g} ({:.3g}, {:.3g}, {:.3g})").format(
        *(row[f"distance/{key}"] for key in ("mean", "p10", "p50", "p90"))
    )


def _spread(row: Numbers) -> str:
    if "weight/std" not in row:
        return "-"
    return ("{:.2f} ({:.2f}, {:.2f})").format(
        *(row[f"weight/{key}"] for key in ("std", "min", "max"))
    )


def _read(path: Path) -> Numbers:
    value: Numbers = json.loads(path.read_text(encoding="utf-8"))
    return value


def say_table(run: Path) -> None:
    """The scores of all policies of a run folder, with standard errors and how
    they were measured.
    """
    lines = []
    for name, summary in benchmark_summaries(run).items():
        policy, _, task = name.partition("/benchmarks/")
        about = json.loads((run / name / "task.json").read_text(encoding="utf-8"))
        scores = ", ".join(
            f"{key} {100 * value:.1f} +- {100 * summary[f'{key}_se']:.1f}"
            for key, value in summary.items()
            if f"{key}_se" in summary
        )
        lines.append(
            f"| {policy} | {task} | {scores} | {summary['rows']:.0f} | {summary['shots']:.0f} | "
            f"{'on' if summary['chat_template'] else 'off'} | {about['version']:g} | "
            f"{about['lm_eval']} |"
        )
    if lines:
        head = (
            "| policy | benchmark | score, % +- standard error | rows | shots | chat template | "
            "version | lm-eval |"
        )
        say("\n".join(["", head, "|---" * 8 + "|", *lines]))
