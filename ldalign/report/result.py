"""A run's main result: the selected policy against the baseline of the same run, paired by prompt.

The baseline is more SFT from the same start, where the run has it, else the start. Whoever wins,
this difference is the report's first sentence; where a run has none, the sentence says so, and
what was found instead.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ldalign.evaluation.guide import tells_apart
from ldalign.evaluation.statistics import FEWEST, NORMAL_95, ratio_error, standard_error
from ldalign.report import agreement
from ldalign.report.analysis import Numbers
from ldalign.report.guides import gain_text, guide_name, is_known
from ldalign.report.notation import (
    FIGURES,
    interval,
    interval_decimals,
    leading,
    number,
    with_error,
)
from ldalign.run.folder import shown_name
from ldalign.run.selection import read_selected
from ldalign.run.stages.evaluation import answers_file
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
# Where a figure of `notation.FIGURES` is among a policy's numbers.
KEYS = {"sampled": "accuracy/sampled", "greedy": "accuracy/greedy", "nll": "nll/real"}
Kind = Literal["align", "judge", "guide", "sft", "evaluate", "nothing"]


def kind_of(names: Sequence[str]) -> Kind:
    """Says what was run, by the names of the finished stages: of `align` at least an iteration has
    begun; the others are named for the script that makes these stages and goes no further.
    """
    own = set(names)
    later = (name for name in own - {"iteration_0/responses"} if name.startswith("iteration_"))
    if any(later) or any(name.startswith(BASELINE) for name in own):
        return "align"
    if own & {"agreement", "agreement_samples"}:
        return "judge"
    if "guide" in own:
        return "guide"
    if "sft/policy" in own:
        return "sft"
    measured = any("/evaluation" in name or "/benchmarks/" in name for name in own)
    return "evaluate" if measured else "nothing"


def method_name(config: Mapping[str, Any]) -> str:
    """Returns the method's name as the papers write it."""
    method = str(config.get("method", "the policy"))
    return METHOD_NAMES.get(method, method)


# ------------------------------------------------------------------------------- paired differences


def read_answers(run: Path, policies: Sequence[str]) -> dict[str, dict[str, Numbers]]:
    """Reads what the policies' held-out answers were found to be: {policy: {row: verdicts, log-prob
    and number of tokens of the real response}}, without texts, of those that were evaluated.
    """
    kept = ("correct", "logp", "n_tokens")
    files = {name: answers_file(run / name) for name in policies}
    return {
        name: {r["id"]: {key: r[key] for key in kept if key in r} for r in read_jsonl(path)}
        for name, path in files.items()
        if path.is_file()
    }


def paired(
    answers: Mapping[str, Mapping[str, Numbers]], base: str, name: str, prefix: str
) -> Numbers:
    """Returns PREFIX/greedy, /sampled and /nll, the figures of policy `name` minus those of `base`,
    each with its standard error (`_se`) over the prompts and the number of these (`_rows`), and
    PREFIX/rows, how many prompts both answered.

    {} where the two did not answer the same prompts, or are one. The NLL is over all tokens, as in
    the tables. answers: of `read_answers`.
    """
    old, new = (answers.get(policy, {}) for policy in (base, name))
    if base == name or not old or old.keys() != new.keys():
        return {}
    both = [(old[i], new[i]) for i in old]
    out: Numbers = {}
    for key, pick in (("greedy", slice(0, 1)), ("sampled", slice(1, None))):
        gaps = np.array([_share(b, pick) - _share(a, pick) for a, b in both if _known(a, b, pick)])
        if len(gaps):
            out |= {key: float(gaps.mean()), f"{key}_se": standard_error(gaps)}
            out[f"{key}_rows"] = len(gaps)  # those that a program checks
    if all("logp" in r for pair in both for r in pair):
        gaps = np.array([a["logp"] - b["logp"] for a, b in both])
        tokens = np.array([a["n_tokens"] for a, _ in both], dtype=np.float64)
        out |= {"nll": float(gaps.sum() / tokens.sum()), "nll_se": ratio_error(gaps, tokens)}
        out["nll_rows"] = len(gaps)
    return {f"{prefix}/{key}": value for key, value in out.items()} | (
        {f"{prefix}/rows": len(both)} if out else {}
    )


def _known(a: Numbers, b: Numbers, pick: slice) -> bool:
    return bool(a.get("correct", [])[pick]) and bool(b.get("correct", [])[pick])


def _share(record: Numbers, pick: slice) -> float:
    right: npt.NDArray[np.float64] = np.array(record["correct"][pick], dtype=np.float64)
    return float(right.mean())


# ------------------------------------------------------------------------------- the first sentence


def result(run: Path, rows: Sequence[Numbers], config: Mapping[str, Any], kind: Kind) -> Numbers:
    """Returns what table.json says of the main result: the policy, the baseline, the difference
    with its 95 % interval (of FEWEST prompts and more), and the sentences; {} where no iteration
    has finished, and of a run of another kind.

    rows: the policies' numbers, which have the differences already (`paired`).
    """
    aligned = {row["policy"]: row for row in rows if row["policy"].startswith("iteration_")}
    if kind == "sft" and len(rows) > 1:
        aligned = {"sft": rows[-1]}
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
        found |= {"figure": key, "rows": row[f"{prefix}/{key}_rows"], "difference": gap}
        if found["rows"] >= FEWEST:
            found |= {"low": gap - half, "high": gap + half}
        method = "SFT" if kind == "sft" else method_name(config)
        epochs = (config.get(BASELINE) or {}).get("epochs", 0)
        found["sentence"] = _sentence(found, method, planned=bool(epochs))
    found["selection"] = "" if kind == "sft" else _selection(found, len(aligned))
    return found


def _sentence(found: Numbers, method: str, planned: bool) -> str:
    """The difference in words. planned: whether the run is to have more SFT as its baseline."""
    what = f"{method} minus the start"
    if found["policy"] != "sft":
        policy = f"{_capital(method)} ({shown_name(found['policy'])})"
        what = f"{policy} minus {_against(found['baseline'], planned)}"
    if "low" not in found:
        said, count = FIGURES[found["figure"]], found["rows"]
        gap = number(said.factor * found["difference"], said.digits, "+")
        return (
            f"{what}: {gap} {said.points} of {said.words} on {count} held-out "
            f"prompt{'s' * (count > 1)}: too few to tell the two apart (evaluation.rows)."
        )
    return difference_sentence(
        what,
        method,
        found["figure"],
        (found["difference"], found["low"], found["high"]),
        f"{found['rows']:.0f} held-out prompts",
        "paired by prompt; one seed",
    )


def difference_sentence(
    what: str,
    winner: str,
    figure: str,
    gap: tuple[float, float, float],
    prompts: str,
    how: str,
) -> str:
    """Says a difference with its 95 % interval, and whether `winner` is the better one.

    gap: the difference and the interval's ends. how: in what it is paired, and over what the
    interval is.
    """
    said = FIGURES[figure]
    gap_, low, high = (said.factor * value for value in gap)
    digits = interval_decimals(low, high, said.digits)
    better = "" if said.more else "lower is better; "
    verdict = "the two cannot be told apart"
    if not low <= 0 <= high:
        verdict = f"{winner} is {'better' if (low > 0) == said.more else 'worse'}"
    return (
        f"{what}: {number(gap_, digits, '+')} {said.points} of {said.words} on {prompts} (95 % "
        f"interval {interval(low, high, '+', digits)}; {better}{how}): {verdict}."
    )


def _against(baseline: str, planned: bool) -> str:
    if baseline == BASELINE:
        return f"{shown_name(BASELINE)} from the same start"
    yet = " yet" if planned else ""
    return f"the {shown_name(baseline)}, as the run has no {shown_name(BASELINE)}{yet}"


def _selection(found: Numbers, count: int) -> str:
    """Says which iteration stands for the run, and why."""
    name = shown_name(found["policy"])
    chosen = found["selected"]
    if chosen.get("policy") == found["policy"]:
        return f"The run's policy is that of {name}: {chosen['why']}."
    if count > 1:
        return f"{name.capitalize()}, the last so far, stands for the run: none is selected yet."
    return ""


def first_sentence(table: Numbers, config: Mapping[str, Any]) -> str:
    """Says what came out: the difference to the baseline; where there is none, so, and what was
    found instead. table: what table.json holds.
    """
    main, kind = table["result"], kind_of(list(table["seconds"]))
    if main.get("sentence"):
        return str(main["sentence"])
    rows: Sequence[Numbers] = table["policies"]
    if kind == "judge":
        return _judge_sentence(table)
    if kind == "guide":
        return " ".join(_guide_sentence(table["guides"]))
    if main:
        return _unmeasured(main, rows, method_name(config))
    if kind == "nothing" or not rows:
        return "No stage of this run has results yet."
    if kind == "align":
        reached = measured_text(rows[0])
        begun = f" It reached {reached}." if reached else ""
        return f"No iteration has finished: this is where the run starts from.{begun}"
    reached = measured_text(rows[-1])
    named = {"sft": "the policy after SFT", "evaluate": "the policy given"}[kind]
    if not reached:
        reached = ", ".join(
            f"{100 * found[metric]:.1f} % {metric} on {task}"
            for task, found in rows[-1]["benchmarks"].items()
            if (metric := leading(found))
        )
    if not reached:
        return "No difference to a baseline: nothing was evaluated on held-out rows."
    return (
        f"No difference to a baseline, as this run measured one policy alone: {named} reached "
        f"{reached}."
    )


def _unmeasured(main: Numbers, rows: Sequence[Numbers], method: str) -> str:
    """Says why a run with an iteration has no difference to its baseline."""
    what = f"{_capital(method)} minus a baseline is not known: "
    evaluated = [row["policy"] for row in rows if "nll/real" in row]
    if not evaluated:
        return f"{what}nothing was evaluated on held-out rows (evaluation.rows=0, or not yet)."
    if main["policy"] not in evaluated or len(evaluated) == 1:
        names = ", ".join(shown_name(name) for name in evaluated)
        return f"{what}of this run's policies only {names} was evaluated on held-out rows."
    return f"{what}{shown_name(main['policy'])} and the others did not answer the same prompts."


def _judge_sentence(table: Numbers) -> str:
    """Says what the judge found; no two policies are compared in such a run."""
    if not table["agreement"]:
        return "No policy was compared with another; the judge has not judged yet."
    return agreement.sentence(table["agreement"])


def _guide_sentence(guides: Mapping[str, Numbers]) -> list[str]:
    """Says that no policy was trained, and whether the guide tells two responses apart."""
    said = ["No difference to a baseline, as no policy was trained, only a guide."]
    for name, figures in guides.items():
        if is_known(figures):
            apart = "tells" if tells_apart(figures) else "does not tell"
            said.append(
                f"{_capital(guide_name(name))} {apart} a row's two responses apart: a response is "
                f"{gain_text(figures, 'sibling_gain')} nats likelier with its own latent than with "
                f"that of the other response, on {figures['differing']:.0f} held-out rows."
            )
    return said


def measured_text(row: Numbers) -> str:
    """Says a policy's leading figure: "49.5 +- 3.5 % sampled accuracy"; "" where it has none."""
    key = next((key for key in KEYS if KEYS[key] in row), None)
    if key is None:
        return ""
    figure, name = FIGURES[key], KEYS[key]
    value = figure.factor * row[name]
    if f"{name}_se" not in row:
        on = "" if figure.more else " (lower is better)"
        return f"{number(value, figure.digits)} {figure.unit} {figure.words}{on}"
    error = figure.factor * row[f"{name}_se"]
    return f"{with_error(value, error)} {figure.unit} {figure.words} on held-out prompts"


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"
