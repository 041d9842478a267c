"""What the page says beside its figures: the result in words, the run, tables, samples, budget.

Each function turns numbers and files of a run into plain texts for page.html, which escapes them.
"""

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ldalign.report import agreement, guides
from ldalign.report.analysis import GIVEN, Numbers, RunPairs, Sides
from ldalign.report.notation import (
    FIGURES,
    HELD_OUT,
    column_decimals,
    decimals,
    leading,
    number,
    percent,
    with_error,
)
from ldalign.report.result import BASELINE, Kind, first_sentence, measured_text, method_name
from ldalign.report.table import duration, movement, tasks_of
from ldalign.run.folder import SUMMARY, shown_name
from ldalign.run.keys import LossKeys
from ldalign.run.settings import GUIDED, reader, unread
from ldalign.run.stages.evaluation import answers_file
from ldalign.system.files import read_jsonl

METHODS = {
    "ld_align": (
        "LD-Align: the policy answered every prompt of the data set by itself; the data's response "
        "counts as the better of the two, its own as the worse, and no human preference is used. A "
        "conditional autoencoder, the guide, was trained on both kinds of responses, and the "
        "distance between their latents says how far the policy's response is from the data's. The "
        "policy was then trained with the DPO loss on these pairs, each weighted by its distance "
        "over the mean distance; every iteration repeats this from the policy before."
    ),
    "spin": (
        "SPIN: the policy answered every prompt of the data set by itself; the data's response "
        "counts as the better of the two, its own as the worse, and no human preference is used. "
        "The policy was then trained with the DPO loss on these pairs, all with weight 1. Every "
        "iteration repeats this from the policy before."
    ),
    "dpo": (
        "DPO: the policy was trained on given preference pairs, a chosen and a rejected response a "
        "prompt. The loss raises the log-prob of the chosen over that of the rejected, each "
        "measured against the policy it started from. All pairs have weight 1."
    ),
    "sft": (
        "Supervised fine-tuning: the policy was trained to predict the data set's responses. There "
        "are no pairs, no generated responses and no distances."
    ),
    "self_reward": (
        "Self-rewarding: the policy gave two answers to every prompt and judged them itself "
        "through a prompt. The one it preferred is the better side of a pair, the other the worse. "
        "The policy was then trained with the DPO loss on these pairs, all with weight 1. The "
        "data's responses serve for held-out measurements alone."
    ),
    "rlaif": (
        "AI feedback: the policy gave two answers to every prompt, and the judge that judge.model "
        "names decided between them. The one it preferred is the better side of a pair, the other "
        "the worse. The policy was then trained with the DPO loss on these pairs, all with weight "
        "1. The data's responses serve for held-out measurements alone."
    ),
}
# What was run where it was not the whole method.
SCRIPTS = {
    "evaluate": (
        "Evaluation alone (ldalign evaluate): one policy answered held-out prompts, and its "
        "log-probability of the data's responses was measured. Nothing was trained."
    ),
    "judge": (
        "Judge agreement alone (ldalign judge): the policy answered every held-out prompt twice. "
        "The guide called the answer that lies farther from the data's the worse one, and a judge "
        "said which of the two is the better one. No policy was trained by the guide."
    ),
    "sft": (
        "Supervised fine-tuning alone (ldalign sft): the policy was trained to predict the data "
        "set's responses, and measured. It is the first step of ldalign align, which goes on from "
        "here with the same settings."
    ),
    "guide": (
        "The guide alone (ldalign guide): a conditional autoencoder was trained on the data's "
        "responses and on generated ones. No policy was trained by it; ldalign align goes on from "
        "here with the same settings."
    ),
}
MADE_TASKS = (
    "small tasks made by a program that also checks the answers; the held-out prompts have "
    "wordings, people and combinations of numbers that training never shows"
)
DATA_SAID = {
    "embedded": f"The data are ldalign's own (data=embedded): {MADE_TASKS}.",
    "embedded-wordings": (
        f"The data are ldalign's own (data=embedded-wordings): {MADE_TASKS}. Every answer has nine "
        "right wordings, and the checker takes any of them."
    ),
}
TITLES = {
    "evaluate": "Evaluation of",
    "judge": "Judge agreement on",
    "sft": "Supervised fine-tuning of",
    "guide": "A guide for",
}
# What the weights are where they are not the method's, and in what their distances are measured.
WEIGHTS_SAID = {
    "uniform": "1 for every pair, as in SPIN",
    "shuffled": "the method's, dealt out among the pairs at random",
    "length": "by how many tokens the two responses differ in length",
    "inverse": "large where the latent distance is small",
    "semantic": "by the distance of sentence embeddings",
    "pooled": "by the distance of the two responses' mean states under the start policy",
    "oracle": "by a checker's verdict: large where the policy's response is wrong",
}
SPACES = {
    "uniform": "nothing: every pair has the distance 1",
    "length": "numbers of tokens",
    "semantic": "the space of a sentence-embedding model",
    "pooled": "the space of the start policy's mean states",
    "oracle": "the checker's verdicts",
}
# The keys of a config that the page shows, in this order.
SETTINGS = (
    "policy data method sft_prompts weights oracle_contrast weight_clip mix_previous judge.model "
    "iterations max_rows max_new_tokens max_length sampling.temperature global_batch learning_rate "
    "beta reference loss.kind loss.nll loss.label_smoothing loss.length_normalised "
    "training.epochs training.steps training.optimizer training.schedule guide.folder "
    "guide.backbone guide.towers distance guide.retrain guide.readout guide.injection "
    "guide.latent_tokens guide.latent_width guide.contrast guide.epochs guide.gate sft.epochs "
    "sft.rows continual_sft.epochs evaluation.rows evaluation.samples validation.every "
    "validation.metric validation.early_stop select agreement.rows benchmarks.tasks seed dtype"
).split()
# Which of them the scripts that do a part read: these, and those that begin so.
ALWAYS = "policy data max_new_tokens max_length evaluation. seed dtype".split()
READ = {
    "evaluate": [*ALWAYS, "benchmarks."],
    "judge": [*ALWAYS, "sampling.", "weights", "distance", "guide.folder", "judge.", "agreement."],
    "sft": [*ALWAYS, "sft.", "training.optimizer", "training.schedule", "validation."],
    "guide": [*ALWAYS, "max_rows", "sampling.", "distance", "guide.", "sft."],
}
LOSS_OFF = {f"loss.{key}": value for key, value in vars(LossKeys()).items()}
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the distance, at which samples are shown
ANSWERS_SHOWN = 4


# ----------------------------------------------------------------------------------------- headline


def headline(table: Numbers, config: Mapping[str, Any]) -> list[str]:
    """Says what came out, a paragraph each: the selected policy against the run's baseline first,
    then which policy that is and why, then what stands beside it.
    """
    rows: list[Numbers] = table["policies"]
    main: Numbers = table["result"]
    opening = [first_sentence(table, config)]
    if main.get("selection"):
        opening.append(main["selection"])
    aligned = [row for row in rows if row["policy"].startswith("iteration_")]
    if not aligned:
        return opening
    first, last = rows[0], next(row for row in aligned if row["policy"] == main["policy"])
    count = aligned.index(last) + 1
    done = f"After {count} iteration{'s' * (count > 1)} of {method_name(config)}"
    sentences: list[str] = []
    scores = [
        (key, name, f"difference/{key.removeprefix('accuracy/')}")
        for key, name in reversed(HELD_OUT)
    ]
    scores = [score for score in scores if score[2] in last]
    for key, name, difference in scores:
        gap, error = 100 * last[difference], 100 * last[f"{difference}_se"]
        digits = decimals([error])
        before, after = (number(100 * row[key], digits) for row in (first, last))
        moved = movement(gap, error, last[f"{difference}_rows"])
        sentence = (
            f"{name} on held-out prompts {moved}: from {before} % to {after} % "
            f"({with_error(gap, error, '+')} points, paired by prompt)"
        )
        sentences.append(f"{done}, {sentence}." if not sentences else f"{sentence.capitalize()}.")
    if "nll/real" in first and "nll/real" in last:
        change = last["nll/real"] / first["nll/real"] - 1
        text = (
            f"the NLL of held-out real responses went from {first['nll/real']:.4f} to "
            f"{last['nll/real']:.4f} nats/token ({100 * change:+.1f} %; lower is better)"
        )
        sentences.append(f"{done}, {text}." if not sentences else f"{text[0].upper()}{text[1:]}.")
    if last["benchmarks"] and "mean_relative_gain" in last:
        count = last["mean_relative_gain_of"]
        text = (
            f"mean relative gain over {count} benchmark{'s' * (count > 1)}: "
            f"{100 * last['mean_relative_gain']:+.2f} %"
        )
        sentences.append(f"{done}, {text}." if not sentences else f"{text.capitalize()}.")
    baseline = next((row for row in rows if row["policy"] == BASELINE), None)
    if baseline and scores and scores[0][0] in baseline:
        sentences.append(
            f"The baseline, {shown_name(BASELINE)} from the same start, reached "
            f"{measured_text(baseline)}."
        )
    return [*opening, " ".join(sentences) or f"{done}, nothing was measured on held-out data."]


# ------------------------------------------------------------------------------------- what was run


def title(config: Mapping[str, Any], kind: Kind) -> str:
    """The page's title: what was run, on which policy."""
    policy = short_name(config.get("policy", "a policy"))
    return f"{TITLES[kind] if kind in TITLES else f'{method_name(config)} on'} {policy}"


def data_text(config: Mapping[str, Any]) -> str:
    """Says what the data are where they are ldalign's own; "" of others, which a setting names."""
    return DATA_SAID.get(str(config.get("data")), "")


def method_text(config: Mapping[str, Any]) -> str:
    """Says what the method does, for somebody who does not know it, and names a control."""
    text = METHODS.get(str(config.get("method")), f"Method: {config.get('method')}.")
    if config.get("sft_prompts", "all") == "pairs":
        text += (
            " In this run it was trained on those prompts alone on which the policy's own response "
            "differed from the data's, as the methods with pairs are."
        )
    weights = str(config.get("weights", "latent"))
    if weights == "latent":
        return text
    text += f" In this run the weights are a control in their place: {weights}"
    if weights in WEIGHTS_SAID:
        text += f", {WEIGHTS_SAID[weights]}"
    return f"{text}." if weights in GUIDED else f"{text}. No guide was trained."


def measured_in(config: Mapping[str, Any]) -> str:
    """Says in what the distances of a config are measured."""
    weights = str(config.get("weights", "latent"))
    return (
        f"{SPACES[weights]} (weights={weights})"
        if weights in SPACES
        else "the guide's latent space"
    )


def short_name(policy: Any) -> str:
    """Returns the last part of a model folder's or a hub name."""
    return Path(str(policy)).name or str(policy)


def origin(run: Path, machine: Numbers) -> str:
    """Says folder, time (of the stages' files) and version in one line."""
    times = [path.stat().st_mtime for path in run.rglob(SUMMARY)]
    parts = [f"run folder {run.resolve().name}"]
    if times:
        ends = (datetime.fromtimestamp(t, UTC) for t in (min(times), max(times)))
        (day, first), (other, last) = (end.strftime("%Y-%m-%d %H:%M").split() for end in ends)
        begun = "" if (day, first) == (other, last) else f"stages from {day} {first} to "
        ended = last if begun and day == other else f"{other} {last}"
        parts.append(f"{begun or 'finished '}{ended} UTC")
    commit = machine.get("git_commit")
    parts.append(f"ldalign {machine.get('ldalign', 'of a version not known')}")
    parts[-1] += f", commit {commit[:12]}" if commit else ""
    return " · ".join(parts)


def settings(
    config: Mapping[str, Any], table: Numbers, kind: Kind = "align"
) -> list[tuple[str, Any]]:
    """Lists the settings that matter, by their keys, after the number of rows.

    Those that are off, or that the method or the script does not read, are left out.
    """
    counts = table["data"]
    out: list[tuple[str, Any]] = []
    method = reader(str(config.get("method", "ld_align")), str(config.get("sft_prompts", "all")))
    if counts:
        rows = f"{counts.get('rows/train', 0):.0f} training"
        rows += f", {counts.get('rows/heldout', 0):.0f} held out"
        fates = {
            "rows/validation": "for validation",
            "rows/cut": "training responses cut",
            "rows/truncated": "training prompts truncated",
            "rows/dropped": "dropped as too long",
            "rows/skipped": "bad",
            "rows/unused": "not used",
        }
        rows += "".join(
            f", {counts[key]:.0f} {fate}" for key, fate in fates.items() if counts.get(key)
        )
        out.append(("rows", rows))
    for key in SETTINGS:
        if unread(method, [key]) or (kind in READ and not key.startswith(tuple(READ[kind]))):
            continue
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        out.append((key, value))
    given = dict(out)
    off = {key for key, value in out if value is None or value == []}
    off |= {key for key in given if key.endswith(".epochs") and given[key] == 0}
    off |= {"oracle_contrast"} if given.get("weights") != "oracle" else set()
    off |= {"sft.rows"} if "sft.epochs" in off else set()
    off |= {key for key, value in LOSS_OFF.items() if given.get(key) == value}
    off |= {"training.epochs"} if given.get("training.steps") is not None else set()
    return [(key, value) for key, value in out if key not in off]


def machine_line(machine: Numbers) -> str:
    """Says device, ranks and versions in a sentence. machine: environment.json."""
    packages = machine.get("packages", {})
    device = "; ".join(machine.get("gpus") or []) or (
        f"{machine.get('cpu')}, {machine.get('cores')} cores, no GPU"
    )
    ranks = machine.get("world_size", 1)
    return (
        f"On {device}; {ranks} rank{'s' * (ranks != 1)}; torch {packages.get('torch')}, Python "
        f"{machine.get('python')}, {machine.get('system')}."
    )


def command(config: Mapping[str, Any], machine: Numbers, script: str = "align") -> str:
    """Says how to run the same again, as one types it: elsewhere, and on as many ranks."""
    commit = machine.get("git_commit")
    checkout = f"git checkout {commit.removesuffix('-dirty')}\n" if commit else ""
    ranks = machine.get("world_size", 1)
    start = f"ldalign {script}{f' --ranks {ranks}' * (ranks != 1)}"
    run = shlex.quote(f"{config.get('run', 'runs/this')}-again")  # it is pasted into a shell
    return f"{checkout}{start} --config config.yaml run={run}"


# ------------------------------------------------------------------------------------------ results


def results(rows: Sequence[Numbers]) -> Numbers:
    """Makes the table in the paper's form: policies by scores, with gains over the first."""
    columns = _result_columns(rows)
    gained = any("mean_relative_gain" in row for row in rows)
    lines = []
    for row in rows:
        cells = [_cell(column, row, rows[0]) for column in columns]
        if gained:
            gain = "-"
            if "mean_relative_gain" in row:
                gain = f"{number(100 * row['mean_relative_gain'], 2, '+')} %"
            cells.append({"value": gain, "below": []})
        lines.append({"name": _shown(row), "cells": cells})
    over = "the benchmarks" if tasks_of(rows) else "the held-out accuracies"
    shown = [{"title": c["title"], "unit": c["unit"]} for c in columns]
    first = f" over {_shown(rows[0])}" if rows else ""
    means = [{"title": "mean relative gain", "unit": f"of {over}"}] * gained
    has_baseline = any(row["policy"] == BASELINE for row in rows)
    last = f"; last, the difference from the baseline, {shown_name(BASELINE)}" * has_baseline
    compared = (
        f"Below each score: the gain{first} relative to its score, as in the paper's table; of "
        f"held-out accuracy the difference in points, paired by prompt{last}. A difference below "
        "two standard errors may be chance. "
    )
    accuracy = (
        "Accuracy: a program checks the answers; one that does not end is wrong."
        if any(key in row for row in rows for key, _ in HELD_OUT)
        else ""
    )
    return {
        "what": "policy",
        "columns": [*shown, *means] if columns else [],
        "rows": lines,
        "note": (
            "Real responses: the data set's own (of preference data, the chosen ones). +-: one "
            f"standard error over prompts or questions. {compared * (len(rows) > 1)}{accuracy}"
        ).rstrip(),
    }


def _result_columns(rows: Sequence[Numbers]) -> list[Numbers]:
    """Lists the scores: title, unit, where it is (task or None, key), its figure, and the decimals
    of its values and differences.
    """
    columns: list[Numbers] = [
        {"title": name, "unit": "held out, %", "get": (None, key), "figure": FIGURES["greedy"]}
        for key, name in HELD_OUT
        if any(key in row for row in rows)
    ]
    nll = FIGURES["nll"]
    if any("nll/real" in row for row in rows):
        unit = f"{nll.unit}, lower is better"
        columns.append({"title": nll.words, "unit": unit, "get": (None, "nll/real"), "figure": nll})
    for task in tasks_of(rows):
        seen = next(row["benchmarks"][task] for row in rows if task in row["benchmarks"])
        if metric := leading(seen):
            unit = f"{metric}, %"
            if "shots" in seen:
                unit += f", {seen['shots']:.0f}-shot"
            if seen.get("chat_template"):
                unit += ", chat template"
            if "rows" in seen:
                unit += f", {seen['rows']:.0f} rows"
            figure = FIGURES["greedy"]
            columns.append({"title": task, "unit": unit, "get": (task, metric), "figure": figure})
    for column in columns:
        task, key = column["get"]
        values = [_values(row, task) for row in rows]
        gap = "nll" if key == "nll/real" else key.removeprefix("accuracy/")
        column["digits"] = column_decimals(values, key, column["figure"])
        column["gaps"] = {
            f"{prefix}/{gap}": column_decimals(values, f"{prefix}/{gap}", column["figure"])
            for prefix in ("difference", "baseline")
        }
    return columns


def _values(row: Numbers, task: str | None) -> Numbers:
    """The numbers of a policy, or of one of its benchmarks."""
    values: Numbers = row if task is None else row["benchmarks"].get(task, {})
    return values


def _cell(column: Numbers, row: Numbers, first: Numbers) -> Numbers:
    """A score; below it the relative gain over the first policy and the paired differences."""
    task, key = column["get"]
    figure, digits = column["figure"], column["digits"]
    values, base = _values(row, task), _values(first, task)
    if key not in values:
        return {"value": "-", "below": []}
    below = []
    if row is not first and base.get(key):
        below.append(f"{number(100 * (values[key] / base[key] - 1), 1, '+')} %")
    for name, places in column["gaps"].items():
        over = "" if name.startswith("difference") else f" vs {shown_name(BASELINE)}"
        if name in values and (over or figure.unit == "%"):
            gap, error = (figure.factor * values[n] for n in (name, f"{name}_se"))
            unit = f" {figure.points}" if figure.unit == "%" else ""
            below.append(f"{with_error(gap, error, '+', places)}{unit}{over}")
    value = figure.factor * values[key]
    if f"{key}_se" in values:
        shown = with_error(value, figure.factor * values[f"{key}_se"], "", digits)
    else:
        shown = number(value, digits)
    return {"value": shown, "below": below}


def _shown(row: Numbers) -> str:
    return shown_name(row["policy"])


def kinds(rows: Sequence[Numbers]) -> Numbers:
    """Makes the table of accuracies by kind of task: (kind, one text a policy)."""
    known = [row for row in rows if "accuracy/greedy" in row]
    keys = {key for row in known for key in row if key.startswith("accuracy/greedy/")}
    kinds = sorted({key.split("/")[2] for key in keys})

    def text(row: Numbers, kind: str) -> str:
        pair = [row.get(f"{key}/{kind}") for key, _ in HELD_OUT]
        return " / ".join("–" if value is None else number(100 * value, 0) for value in pair)

    return {
        "policies": [_shown(row) for row in known],
        "rows": [(kind, [text(row, kind) for row in known]) for kind in kinds],
    }


def rewards(rows: Sequence[Numbers]) -> Numbers:
    """Makes the table of the reward model's numbers: their names, and (policy, a text a number)."""
    names = sorted({key for row in rows for key in row if key.startswith("reward/")})
    known = [row for row in rows if any(name in row for name in names)]
    return {
        "names": names,
        "rows": [(_shown(row), [_plain(row.get(name)) for name in names]) for row in known],
    }


def guide_figures(found: Mapping[str, Numbers]) -> Numbers:
    """Makes the table of the guides' held-out figures, a column a guide; an older version's are in
    its note.
    """
    names, lines = guides.guide_rows(found)
    old = {guides.guide_name(n): f for n, f in found.items() if not guides.is_known(f)}
    notes = [guides.NOTE] * bool(names)
    notes += [guides.older_figures(name, figures) for name, figures in old.items()]
    return _scores(guides.WHAT, names, lines, " ".join(notes))


def judge_agreement(found: Numbers) -> Numbers:
    """Says the rate of agreement, and tables it beside its rivals'; {} where there is none."""
    if not found:
        return {}
    titles, lines = agreement.agreement_rows(found)
    table = _scores(agreement.WHO, titles, lines, agreement.NOTE)
    return {"sentence": agreement.sentence(found), **(table if lines else {"rows": []})}


def _scores(
    corner: str, columns: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]], note: str
) -> Numbers:
    """Makes a table of texts that table.md has too."""
    return {
        "what": corner,
        "columns": [{"title": title, "unit": ""} for title in columns],
        "rows": [
            {"name": name, "cells": [{"value": cell, "below": []} for cell in cells]}
            for name, cells in lines
        ],
        "note": note,
    }


def _plain(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def fallen(steps: Mapping[str, Sequence[Numbers]], sides: Sides) -> str:
    """Says what the rewards of both sides did in the last iteration; "" where none has steps."""
    known = [(name, rows) for name, rows in steps.items() if rows and "rewards/chosen" in rows[0]]
    if not known:
        return ""
    name, rows = known[-1]
    tail = rows[-max(1, len(rows) // 4) :]
    real, generated, margin = (
        float(np.mean([row[f"rewards/{key}"] for row in tail]))
        for key in ("chosen", "rejected", "margins")
    )
    return (
        f"Here, over the last quarter of {name.replace('_', ' ')}: reward of the {sides.better} "
        f"responses {real:+.3f}, of the {sides.worse} ones {generated:+.3f}, margin {margin:+.3f}."
    )


# ------------------------------------------------------------------------------------------ samples


def samples(joined: Sequence[RunPairs]) -> Numbers:
    """Picks a few training rows, by quantiles of distance, with every iteration's responses."""
    if not joined:
        return {"samples": [], "sample_rule": ""}
    first = joined[0]
    order = np.flatnonzero(first.trained)
    far = bool(len(order)) and bool(np.isfinite(first.distance[order]).all())
    if far:
        order = order[np.argsort(first.distance[order], kind="stable")]
        rule = (
            f"at the minimum, the quartiles and the maximum of iteration {first.iteration}'s "
            "latent distances (of the pairs trained on). d: distance; s: weight."
        )
    else:
        order = order if len(order) else np.arange(len(first.ids))
        rule = "the first, the last and three evenly spaced between them, in the data's order."
    places = (int(order[round(q * (len(order) - 1))]) for q in QUANTILES if len(order))
    samples = []
    for i in dict.fromkeys(places):
        own = "the data's response" if first.data else first.sides.better
        answers = [{"title": own, "text": (first.data or first.real)[i], "note": ""}]
        for p in joined:
            answers += _sample_answers(p, first.ids[i], first.sides)
        label = f"row {first.ids[i]}"
        samples.append({"label": label, "prompt": first.prompts[i], "answers": answers})
    return {"samples": samples, "sample_rule": rule}


def _sample_answers(pairs: RunPairs, row_id: str, sides: Sides) -> list[dict[str, str]]:
    """Lists an iteration's answers to a row: the worse side, and the better if it is a sample."""
    out = []
    when = "" if sides == GIVEN else f", iteration {pairs.iteration}"
    for k in (k for k, id_ in enumerate(pairs.ids) if id_ == row_id):
        if pairs.data:
            out.append({"title": f"{sides.better}{when}", "text": pairs.real[k], "note": ""})
        worse = f"{sides.worse}{when}"
        out.append({"title": worse, "text": pairs.generated[k], "note": _note(pairs, k)})
    return out


def _note(pairs: RunPairs, i: int) -> str:
    parts = []
    if not pairs.trained[i]:
        why = ""
        if pairs.generated[i] == pairs.real[i]:
            why = f"equal to the {pairs.sides.better} one: "
        elif pairs.preference is not None:
            why = "a tie: "
        parts.append(f"{why}not trained on")
    elif pairs.preference is not None:
        parts.append(f"the judge preferred the other, p = {pairs.preference[i]:.3f}")
    elif np.isfinite(pairs.distance[i]):
        parts.append(f"d = {pairs.distance[i]:.3f}, s = {pairs.weight[i]:.2f}")
    if np.isfinite(pairs.right[i]):
        parts.append("right" if pairs.right[i] else "wrong")
    if not pairs.finished[i]:
        parts.append("cut at max_new_tokens")
    return "; ".join(parts)


def answers(run: Path, rows: Sequence[Numbers], selected: str | None) -> Numbers:
    """Picks held-out prompts whose greedy answer the selected iteration changed; of a run that
    measured one policy alone, the first ones.
    """
    files = {row["policy"]: answers_file(run / row["policy"]) for row in rows}
    found = {
        name: {r["id"]: r for r in read_jsonl(path) if "greedy" in r}
        for name, path in files.items()
        if path.is_file()
    }
    if selected is None and len(rows) == 1 and any(found.values()):
        (name,) = found
        shown = list(found[name])[:ANSWERS_SHOWN]
        rule = f"of {len(found[name])}, the first {len(shown)} in the file's order."
        return {"answers": [_answer(i, name, found) for i in shown], "answer_rule": rule}
    if selected is None or selected not in found or rows[0]["policy"] not in found:
        return {"answers": [], "answer_rule": ""}
    first = rows[0]["policy"]
    old, new = found[first], found[selected]
    changed = [i for i in old if i in new and old[i]["greedy"] != new[i]["greedy"]]
    turned = [i for i in changed if old[i]["correct"][:1] != new[i]["correct"][:1]]
    rest = [i for i in changed if i not in set(turned)]
    answers = [_answer(i, first, found) for i in (turned + rest)[:ANSWERS_SHOWN]]
    rule = f"of {len(old)}, {len(changed)} changed from {_shown(rows[0])} to {shown_name(selected)}"
    order = ""
    if any(record["correct"] for record in old.values()):
        rule += (
            f"; {sum(new[i]['correct'][0] for i in turned)} became right and "
            f"{sum(old[i]['correct'][0] for i in turned)} became wrong"
        )
        order = ", beginning with those that became right or wrong"
    rule += f". Shown: the first {len(answers)} in the file's order{order}."
    return {"answers": answers, "answer_rule": rule}


def _answer(i: str, first: str, found: Mapping[str, Mapping[str, Numbers]]) -> Numbers:
    """A held-out prompt with the real response and every policy's greedy answer."""
    given = [{"title": "real", "text": found[first][i]["real"], "note": ""}]
    for name, records in found.items():
        if i in records:
            correct = records[i]["correct"][:1]
            note = "" if not correct else "right" if correct[0] else "wrong"
            given.append({"title": shown_name(name), "text": records[i]["greedy"], "note": note})
    return {"label": f"row {i}", "prompt": found[first][i]["prompt"], "answers": given}


# ------------------------------------------------------------------------------------------- budget


def budget(summaries: Mapping[str, Numbers]) -> list[tuple[str, ...]]:
    """Lists, a line a stage and one for all: tokens made, tokens read, time, its share, tokens/s.

    Made is generated, read is trained on. A guide's tokens are those of its own tokenizer: they
    stand in its line, not in the sum of the policy's.
    """
    total = sum(summary["seconds"] for summary in summaries.values())
    if not total:
        return []
    lines = []
    all_made = all_read = 0.0
    for name, summary in summaries.items():
        step = name.rpartition("/")[2]
        made = summary.get("tokens_generated", 0) if name.endswith("/evaluation") else 0
        sampled = step in ("responses", "agreement_samples")
        if sampled and not summary.get("losers/given"):
            made = summary.get("tokens", 0)
        read = summary.get("tokens", 0) if step in ("policy", "guide") else 0
        all_made, all_read = all_made + made, all_read + (read if name.endswith("/policy") else 0)
        lines.append(_budget_line(name, made, read, summary["seconds"], total))
    return [*lines, _budget_line("all", all_made, all_read, total, total)]


def _budget_line(
    name: str, made: float, read: float, seconds: float, total: float
) -> tuple[str, ...]:
    tokens = [f"{n:,.0f}" if n else "–" for n in (made, read)]
    rate = f"{(made + read) / seconds:,.0f}" if made + read and seconds and name != "all" else "–"
    return name, *tokens, duration(seconds), percent(seconds / total), rate
