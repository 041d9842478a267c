"""table.md and table.json: what every policy of a run reached, and what it took."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ldalign.evaluate import standard_error
from ldalign.pipeline import read_jsonl, write_text
from ldalign.summaries import SUMMARY, iterations, stage_names

Row = dict[str, Any]  # one policy: its name, and numbers by metric name
STEPS = ("responses", "guide", "distances", "reference", "policy", "evaluation")


def write_report(run: Path) -> str:
    """Collects the finished stages of a run folder into report/table.json and report/table.md; returns the latter."""
    summaries = {name: _read(run / name / SUMMARY) for name in stage_names(run)}
    names = ["start", "sft", *(f"iteration_{t}" for t in iterations(run)), "continual_sft"]
    rows = [row for name in names if (row := _collect(summaries, name))]
    for row in rows:
        row |= _difference(run, rows[0]["policy"], row["policy"])
    table = {"policies": rows, "guide": summaries.get("guide", {}), "data": summaries.get("data", {}),
             "seconds": {name: summary["seconds"] for name, summary in summaries.items()}}  # fmt: skip
    (run / "report").mkdir(exist_ok=True)
    write_text(run / "report/table.json", json.dumps(table, indent=1) + "\n")
    text = render(table)
    write_text(run / "report/table.md", text)
    return text


def _collect(summaries: dict[str, Row], name: str) -> Row:
    """Everything known of one policy; {} where nothing was measured."""
    parts = {step: summaries.get(f"{name}/{step}", {}) for step in STEPS}
    if not (parts["evaluation"] or parts["policy"]):
        return {}
    return {
        "policy": name, **parts["distances"], **parts["evaluation"],
        **{f"guide/{key}": value for key, value in parts["guide"].items()},
        **{f"responses/{key}": value for key, value in parts["responses"].items()},
        **{f"train/{key}": value for key, value in parts["policy"].items()},
        "seconds": sum(part.get("seconds", 0.0) for part in parts.values()),
    }  # fmt: skip


def _difference(run: Path, first: str, name: str) -> Row:
    """Accuracy minus the first policy's, with the standard error of the paired difference over prompts."""
    files = [run / policy / "evaluation/answers.jsonl" for policy in (first, name)]
    if first == name or not all(path.is_file() for path in files):
        return {}
    old, new = ({r["id"]: r["correct"] for r in read_jsonl(path)} for path in files)
    if not old or old.keys() != new.keys():
        return {}
    out: Row = {}
    for key, pick in (("greedy", slice(0, 1)), ("sampled", slice(1, None))):
        pairs = [(old[i][pick], new[i][pick]) for i in old if old[i][pick]]
        gaps = np.array([sum(b) / len(b) - sum(a) / len(a) for a, b in pairs])
        if len(gaps):
            out |= {f"difference/{key}": float(gaps.mean()), f"difference/{key}_se": standard_error(gaps)}
    return out


# ---------------------------------------------------------------------------------------------------------- Markdown


def render(table: Row) -> str:
    """The Markdown page of what table.json holds."""
    rows: list[Row] = table["policies"]
    first = rows[0]["policy"] if rows else "start"
    parts = [
        _table("Held out", rows, [
            ("greedy accuracy, %", lambda r: _percent(r, "accuracy/greedy", "{:.1f}")),
            ("sampled accuracy, %", lambda r: _percent(r, "accuracy/sampled", "{:.1f}")),
            (f"greedy - {first}, points", lambda r: _percent(r, "difference/greedy", "{:+.1f}")),
            (f"sampled - {first}, points", lambda r: _percent(r, "difference/sampled", "{:+.1f}")),
            ("answers cut, %", lambda r: _number(r, "truncated_frac", "{:.1f}", 100)),
            ("NLL of real responses, nats/token", lambda r: _number(r, "nll/real", "{:.4f}")),
        ]),
        _moved(rows),
        _table("Training", rows, [
            ("latent distance, mean (p10, p50, p90)", _distances),
            ("latent gain of its own guide", lambda r: _number(r, "guide/latent_gain", "{:+.4f}")),
            ("weight spread: deviation (min, max)", _spread),
            ("effective sample size", lambda r: _number(r, "weight/ess", "{:.2f}")),
            ("reward margin", lambda r: _number(r, "train/rewards/margins", "{:+.3f}")),
            ("reward accuracy", lambda r: _number(r, "train/rewards/accuracies", "{:.3f}")),
            ("loss", lambda r: _number(r, "train/loss", "{:.4f}")),
            ("pairs skipped", lambda r: _number(r, "train/skipped_pairs", "{:.0f}")),
            ("losers cut, %", lambda r: _number(r, "responses/losers/truncated_frac", "{:.1f}", 100)),
            ("tokens generated", lambda r: _number(r, "responses/tokens", "{:.0f}")),
            ("tokens trained", lambda r: _number(r, "train/tokens", "{:.0f}")),
        ]),
        _guide(table["guide"]),
        _times(table["seconds"], [r["policy"] for r in rows]),
        "Accuracy: a program checks the answers to held-out prompts; +- is one standard error over prompts, and the "
        "differences are paired by prompt. NLL: of the data set's own responses. Reward margin, reward accuracy and "
        "loss: means over the last epoch of training. Weight: distance over its mean; its effective sample size is a "
        "share of the pairs. Tokens generated: sampled for training. Tokens trained: read in training, a prompt once a "
        "pair.\n",
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def _table(title: str, rows: list[Row], columns: list[tuple[str, Callable[[Row], str]]]) -> str:
    """A Markdown table, without the columns that no row has a value for."""
    cells = [(name, [form(r) for r in rows]) for name, form in columns]
    cells = [(name, values) for name, values in cells if any(value != "-" for value in values)]
    lines = ["| policy | " + " | ".join(name for name, _ in cells) + " |", "|---" * (len(cells) + 1) + "|"]
    lines += [f"| {r['policy']} | " + " | ".join(values[i] for _, values in cells) + " |" for i, r in enumerate(rows)]
    return f"**{title}**\n\n" + "\n".join(lines) + "\n" if cells else ""


def _moved(rows: list[Row]) -> str:
    compared = [r for r in rows if "difference/greedy" in r]
    if not compared:
        return ""
    lines = [f"- {r['policy']}: {_verdict(r)}" for r in compared]
    return f"What moved, against {rows[0]['policy']}:\n\n" + "\n".join(lines) + "\n"


def _verdict(row: Row) -> str:
    parts = []
    for key in ("sampled", "greedy"):
        if f"difference/{key}" in row:
            gap, error = row[f"difference/{key}"], row[f"difference/{key}_se"]
            word = (
                ("rose" if gap > 0 else "fell") if abs(gap) > 2 * error else "did not move beyond two standard errors"
            )
            parts.append(f"{key} accuracy {word} ({100 * gap:+.1f} +- {100 * error:.1f} points)")
    return "; ".join(parts)


def _guide(losses: Row) -> str:
    if "latent_gain" not in losses:
        return ""
    verdict = "" if losses["latent_gain"] > 0 else " (NOT POSITIVE: the distances say nothing)"
    return (
        f"Guide, held-out loss in nats/token: true latent {losses['true']:.4f}, another row's {losses['other']:.4f}, "
        f"none {losses['none']:.4f}; latent gain {losses['latent_gain']:+.4f}, over the row's other response "
        f"{losses['sibling_gain']:+.4f}{verdict}.\n"
    )


def _times(seconds: dict[str, float], policies: list[str]) -> str:
    """Wall time, one row a policy and one column a stage."""
    columns = [step for step in STEPS if any(f"{p}/{step}" in seconds for p in policies)]
    if not columns:
        return ""
    lines = ["| wall time, s | " + " | ".join(columns) + " | all |", "|---" * (len(columns) + 2) + "|"]
    for policy in policies:
        own = [seconds.get(f"{policy}/{step}") for step in columns]
        shown = " | ".join("-" if s is None else f"{s:.0f}" for s in own)
        lines.append(f"| {policy} | {shown} | {sum(s for s in own if s is not None):.0f} |")
    once = "".join(f"{name} {seconds[name]:.0f} s, " for name in ("data", "guide") if name in seconds)
    return "\n".join(lines) + f"\n\nOnce a run: {once}everything {sum(seconds.values()):.0f} s.\n"


def _number(row: Row, key: str, form: str, factor: float = 1.0) -> str:
    return form.format(factor * row[key]) if key in row else "-"


def _percent(row: Row, key: str, form: str) -> str:
    return f"{form.format(100 * row[key])} +- {100 * row[f'{key}_se']:.1f}" if key in row else "-"


def _distances(row: Row) -> str:
    if "distance/mean" not in row:
        return "-"
    return "{:.3g} ({:.3g}, {:.3g}, {:.3g})".format(*(row[f"distance/{key}"] for key in ("mean", "p10", "p50", "p90")))


def _spread(row: Row) -> str:
    if "weight/std" not in row:
        return "-"
    return "{:.2f} ({:.2f}, {:.2f})".format(*(row[f"weight/{key}"] for key in ("std", "min", "max")))


def _read(path: Path) -> Row:
    value: Row = json.loads(path.read_text(encoding="utf-8"))
    return value
