"""What the page says beside its figures: the result in words, the run, tables, samples, budget.

Each function turns numbers and files of a run into plain texts for page.html, which escapes them.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ldalign.report import agreement, guides
from ldalign.report.analysis import GIVEN, Numbers, RunPairs, Sides
from ldalign.report.result import BASELINE, method_name
from ldalign.report.table import HELD_OUT, duration, leading, movement, tasks_of
from ldalign.run.folder import SUMMARY, shown_name
from ldalign.run.keys import LossKeys
from ldalign.run.settings import GUIDED, reader, unread
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
    "validation.metric validation.early_stop select seed dtype"
).split()
LOSS_OFF = {f"loss.{key}": value for key, value in vars(LossKeys()).items()}
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the distance, at which samples are shown
ANSWERS_SHOWN = 4


# ----------------------------------------------------------------------------------------- headline


def headline(table: Numbers, config: Mapping[str, Any]) -> list[str]:
    """Says what came out: the selected policy against the run's baseline first, then which policy
    that is and why, then what stands beside it.
    """
    rows: list[Numbers] = table["policies"]
    aligned = [row for row in rows if row["policy"].startswith("iteration_")]
    if not rows:
        return ["No stage of this run has results yet."]
    first = rows[0]
    if not aligned:
        known = [key for key in ("accuracy/sampled", "accuracy/greedy", "nll/real") if key in first]
        have = f" {_said(first, known[0])}." if known else ""
        return [f"No iteration has finished: this is where the run starts from.{have}"]
    main: Numbers = table["result"]
    last = next(row for row in aligned if row["policy"] == main["policy"])
    opening = [main[key] for key in ("sentence", "selection") if main.get(key)]
    count = aligned.index(last) + 1
    done = f"After {count} iteration{'s' * (count > 1)} of {method_name(config)}"
    sentences: list[str] = []
    scores = [
        (key, name, f"difference/{key.removeprefix('accuracy/')}")
        for key, name in reversed(HELD_OUT)
    ]
    scores = [score for score in scores if score[2] in last]
    for key, name, difference in scores:
        gap, error = last[difference], last[f"{difference}_se"]
        sentence = (
            f"{name} on held-out prompts {movement(gap, error)}: from {100 * first[key]:.1f} % to "
            f"{100 * last[key]:.1f} % ({100 * gap:+.1f} ± {100 * error:.1f} points, paired by "
            "prompt)"
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
    measured = [key for key, _, _ in scores if baseline and key in baseline]
    if baseline and measured:
        sentences.append(
            f"The baseline, {shown_name(BASELINE)} from the same start, reached "
            f"{_said(baseline, measured[0])}."
        )
    return [*opening, *(sentences or [f"{done}, nothing was measured on held-out data."])]


def _said(row: Numbers, key: str) -> str:
    if key == "nll/real":
        return f"{row[key]:.4f} nats/token on held-out real responses"
    return f"{100 * row[key]:.1f} ± {100 * row[f'{key}_se']:.1f} % {dict(HELD_OUT)[key]}"


# ------------------------------------------------------------------------------------- what was run


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
        first, last = (end.strftime("%Y-%m-%d %H:%M") for end in ends)
        one = f"finished {last} UTC"
        parts.append(one if first == last else f"stages finished {first} to {last} UTC")
    commit = machine.get("git_commit")
    version = f"ldalign {machine.get('ldalign')}, commit {commit[:12]}" if commit else None
    parts.append(version or "ldalign outside a checkout")
    return " · ".join(parts)


def settings(config: Mapping[str, Any], table: Numbers) -> list[tuple[str, Any]]:
    """Lists the settings that matter, by their keys, after the number of rows.

    Those that are off, or that the method does not read, are left out.
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
        if unread(method, [key]):
            continue
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        out.append((key, value))
    given = dict(out)
    off = {key for key, value in out if value is None}
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
    start = "python" if ranks == 1 else f"torchrun --standalone --nproc-per-node {ranks}"
    run = f"{config.get('run', 'runs/this')}-again"
    return f"{checkout}{start} train/{script}.py --config config.yaml run={run}"


# ------------------------------------------------------------------------------------------ results


def results(rows: Sequence[Numbers]) -> Numbers:
    """Makes the table in the paper's form: policies by scores, with gains over the first."""
    columns = _result_columns(rows)
    lines = []
    for row in rows:
        cells = [_cell(column, row, rows[0]) for column in columns]
        gain = f"{100 * row['mean_relative_gain']:+.2f} %" if "mean_relative_gain" in row else "–"
        lines.append({"name": _shown(row), "cells": [*cells, {"value": gain, "below": ""}]})
    over = "the benchmarks" if tasks_of(rows) else "the held-out accuracies"
    shown = [{"title": c["title"], "unit": c["unit"]} for c in columns]
    first = f" over {_shown(rows[0])}" if rows else ""
    last = {"title": "mean relative gain", "unit": f"of {over}"}
    return {
        "what": "policy",
        "columns": [*shown, last] if columns else [],
        "rows": lines,
        "note": (
            "Real responses: the data set's own (of preference data, the chosen ones). ±: one "
            f"standard error over prompts or questions. Below each score: the gain{first} relative "
            "to its score, as in the paper's table, and for held-out accuracy the difference in "
            "points, paired by prompt; then that to the baseline, continual SFT from the same "
            "start. A gain below two standard errors may be chance. Accuracy: a "
            "program checks the answers; one that does not end is wrong."
        ),
    }


def _result_columns(rows: Sequence[Numbers]) -> list[Numbers]:
    """Lists the scores: title, unit, where it is (task or None, key), whether it is a share."""
    columns: list[Numbers] = [
        {"title": name, "unit": "held out, %", "get": (None, key), "percent": True}
        for key, name in HELD_OUT
        if any(key in row for row in rows)
    ]
    if any("nll/real" in row for row in rows):
        title, unit = "NLL of real responses", "nats/token, lower is better"
        columns.append({"title": title, "unit": unit, "get": (None, "nll/real"), "percent": False})
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
            columns.append({"title": task, "unit": unit, "get": (task, metric), "percent": True})
    return columns


def _cell(column: Numbers, row: Numbers, first: Numbers) -> dict[str, str]:
    task, key = column["get"]
    values, base = ((r if task is None else r["benchmarks"].get(task, {})) for r in (row, first))
    if key not in values:
        return {"value": "–", "below": ""}
    gain = ""
    if row is not first and base.get(key):
        gain = f"{100 * (values[key] / base[key] - 1):+.1f} %"
    if not column["percent"]:
        if "baseline/nll" in values:
            gap, error = values["baseline/nll"], values["baseline/nll_se"]
            gain += f"; {gap:+.4f} ± {error:.4f} over {shown_name(BASELINE)}"
        return {"value": f"{values[key]:.4f}", "below": gain.removeprefix("; ")}
    error = f" ± {100 * values[f'{key}_se']:.1f}" if f"{key}_se" in values else ""
    points = f"difference/{key.removeprefix('accuracy/')}"
    if points in values:
        gain += f"; {100 * values[points]:+.1f} ± {100 * values[f'{points}_se']:.1f} points"
    over = f"baseline/{key.removeprefix('accuracy/')}"
    if over in values:
        gain += f"; {100 * values[over]:+.1f} ± {100 * values[f'{over}_se']:.1f} points over "
        gain += shown_name(BASELINE)
    return {"value": f"{100 * values[key]:.1f}{error}", "below": gain.removeprefix("; ")}


def _shown(row: Numbers) -> str:
    return shown_name(row["policy"])


def kinds(rows: Sequence[Numbers]) -> Numbers:
    """Makes the table of accuracies by kind of task: (kind, one text a policy)."""
    known = [row for row in rows if "accuracy/greedy" in row]
    keys = {key for row in known for key in row if key.startswith("accuracy/greedy/")}
    kinds = sorted({key.split("/")[2] for key in keys})

    def text(row: Numbers, kind: str) -> str:
        pair = [row.get(f"{key}/{kind}") for key, _ in HELD_OUT]
        return " / ".join("–" if value is None else f"{100 * value:.0f}" for value in pair)

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
    """Makes a table of texts that table.md has too, with the page's signs."""

    def shown(text: str) -> str:
        return "–" if text == "-" else text.replace("+-", "±")

    return {
        "what": corner,
        "columns": [{"title": title, "unit": ""} for title in columns],
        "rows": [
            {"name": name, "cells": [{"value": shown(cell), "below": ""} for cell in cells]}
            for name, cells in lines
        ],
        "note": shown(note),
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
    """Picks held-out prompts whose greedy answer the selected iteration changed."""
    files = {row["policy"]: run / row["policy"] / "evaluation/answers.jsonl" for row in rows}
    found = {
        name: {r["id"]: r for r in read_jsonl(path) if "greedy" in r}
        for name, path in files.items()
        if path.is_file()
    }
    if selected is None or selected not in found or rows[0]["policy"] not in found:
        return {"answers": [], "answer_rule": ""}
    old, new = found[rows[0]["policy"]], found[selected]
    changed = [i for i in old if i in new and old[i]["greedy"] != new[i]["greedy"]]
    turned = [i for i in changed if old[i]["correct"][:1] != new[i]["correct"][:1]]
    rest = [i for i in changed if i not in set(turned)]
    answers = []
    for i in (turned + rest)[:ANSWERS_SHOWN]:
        given = [{"title": "real", "text": old[i]["real"], "note": ""}]
        for name, records in found.items():
            if i in records:
                correct = records[i]["correct"][:1]
                note = "" if not correct else "right" if correct[0] else "wrong"
                title = shown_name(name)
                given.append({"title": title, "text": records[i]["greedy"], "note": note})
        answers.append({"label": f"row {i}", "prompt": old[i]["prompt"], "answers": given})
    rule = (
        f"of {len(old)}, {len(changed)} changed from {_shown(rows[0])} to "
        f"{shown_name(selected)}; {sum(new[i]['correct'][0] for i in turned)} became "
        f"right and {sum(old[i]['correct'][0] for i in turned)} became wrong. Shown: the first "
        f"{len(answers)} in the file's order, those whose verdict changed before others."
    )
    return {"answers": answers, "answer_rule": rule}


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
    return name, *tokens, duration(seconds), f"{seconds / total:.0%}", rate
