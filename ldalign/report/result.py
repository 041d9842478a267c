"""A run's main result: the selected policy against the baseline of the same run, paired by prompt.

The baseline is more SFT from the same start, where the run has it, else the start. Whoever wins,
this difference is the report's first sentence.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldalign.evaluation.statistics import NORMAL_95, ratio_error, standard_error
from ldalign.report.analysis import Numbers
from ldalign.run.folder import shown_name
from ldalign.run.selection import read_selected
from ldalign.system.files import read_jsonl

BASELINE = "continual_sft"
METHOD_NAMES = {
    "ld_align": "LD-Align",
    "spin": "SPIN",
    "dpo": "DPO",
    "sft": "SFT",
    "self_reward": "self-rewarding",
    "rlaif": "RLAIF",
}
# What the first sentence is of: the first of these that is known. Its words, unit and factor, and
# whether more of it is better.
FIGURES: dict[str, tuple[str, str, float, bool]] = {
    "sampled": ("sampled accuracy", "points", 100.0, True),
    "greedy": ("greedy accuracy", "points", 100.0, True),
    "nll": ("NLL of real responses", "nats/token", 1.0, False),
}


def method_name(config: Mapping[str, Any]) -> str:
    """Returns the method's name as the papers write it."""
    method = str(config.get("method", "the policy"))
    return METHOD_NAMES.get(method, method)


def paired(run: Path, base: str, name: str, prefix: str) -> Numbers:
    """Returns PREFIX/greedy, /sampled and /nll, the figures of policy `name` minus those of `base`,
    each with its standard error (`_se`) over the prompts, and PREFIX/rows, how many these are.

    {} where the two did not answer the same prompts, or are one. The NLL is over all tokens, as in
    the tables.
    """
    files = [run / policy / "evaluation/answers.jsonl" for policy in (base, name)]
    if base == name or not all(path.is_file() for path in files):
        return {}
    old, new = ({r["id"]: r for r in read_jsonl(path)} for path in files)
    if not old or old.keys() != new.keys():
        return {}
    both = [(old[i], new[i]) for i in old]
    out: Numbers = {}
    for key, pick in (("greedy", slice(0, 1)), ("sampled", slice(1, None))):
        gaps = np.array([_share(b, pick) - _share(a, pick) for a, b in both if _known(a, b, pick)])
        if len(gaps):
            out |= {key: float(gaps.mean()), f"{key}_se": standard_error(gaps)}
    if all("logp" in r for pair in both for r in pair):
        gaps = np.array([a["logp"] - b["logp"] for a, b in both])
        tokens = np.array([a["n_tokens"] for a, _ in both], dtype=np.float64)
        out |= {"nll": float(gaps.sum() / tokens.sum()), "nll_se": ratio_error(gaps, tokens)}
    return {f"{prefix}/{key}": value for key, value in out.items()} | (
        {f"{prefix}/rows": len(both)} if out else {}
    )


def _known(a: Numbers, b: Numbers, pick: slice) -> bool:
    return bool(a.get("correct", [])[pick]) and bool(b.get("correct", [])[pick])


def _share(record: Numbers, pick: slice) -> float:
    right: npt.NDArray[np.float64] = np.array(record["correct"][pick], dtype=np.float64)
    return float(right.mean())


def result(run: Path, rows: Sequence[Numbers], config: Mapping[str, Any]) -> Numbers:
    """Returns what table.json says of the main result: the policy, the baseline, the difference
    with its 95 % interval, and the sentences; {} where no iteration has finished.

    rows: the policies' numbers, which have the differences already (`paired`).
    """
    aligned = {row["policy"]: row for row in rows if row["policy"].startswith("iteration_")}
    if not aligned:
        return {}
    chosen = read_selected(run)
    name = chosen.get("policy") if chosen.get("policy") in aligned else list(aligned)[-1]
    row, measured = aligned[str(name)], {r["policy"] for r in rows if "nll/real" in r}
    baseline = BASELINE if BASELINE in measured else rows[0]["policy"]
    prefix = "baseline" if baseline == BASELINE else "difference"
    found: Numbers = {"policy": name, "baseline": baseline, "selected": chosen}
    key = next((key for key in FIGURES if f"{prefix}/{key}" in row), None)
    if key is not None:
        gap, half = row[f"{prefix}/{key}"], NORMAL_95 * row[f"{prefix}/{key}_se"]
        found |= {"figure": key, "rows": row[f"{prefix}/rows"], "difference": gap}
        found |= {"low": gap - half, "high": gap + half}
        found["sentence"] = _sentence(found, config)
    found["selection"] = _selection(found, len(aligned))
    return found


def _sentence(found: Numbers, config: Mapping[str, Any]) -> str:
    words, unit, factor, more = FIGURES[found["figure"]]
    form = "{:+.1f}" if factor == 100 else "{:+.4f}"
    gap, low, high = (form.format(factor * found[key]) for key in ("difference", "low", "high"))
    method = method_name(config)
    against = f"{shown_name(BASELINE)} from the same start"
    if found["baseline"] != BASELINE:
        against = f"the {shown_name(found['baseline'])}, as the run has no continual SFT"
    better = "" if more else "lower is better; "
    policy = f"{method[0].upper()}{method[1:]} ({shown_name(found['policy'])})"
    return (
        f"{policy} minus {against}: {gap} {unit} of {words} on {found['rows']:.0f} held-out "
        f"prompts (95 % interval {low} to {high}; {better}paired by prompt; one seed): "
        f"{_verdict(method, found, more)}."
    )


def _verdict(method: str, found: Numbers, more: bool) -> str:
    if found["low"] <= 0 <= found["high"]:
        return "the two cannot be told apart"
    return f"{method} is {'better' if (found['low'] > 0) == more else 'worse'}"


def _selection(found: Numbers, count: int) -> str:
    """Says which iteration stands for the run, and why."""
    name = shown_name(found["policy"])
    chosen = found["selected"]
    if chosen.get("policy") == found["policy"]:
        return f"The run's policy is that of {name}: {chosen['why']}."
    if count > 1:
        return f"{name.capitalize()}, the last so far, stands for the run: none is selected yet."
    return ""
