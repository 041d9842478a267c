"""Judge agreement as a reader wants it: who judged, and the guide's rate beside its rivals'.

The figures are `ldalign.evaluation.agreement`'s; table.md and the page show the same table.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldalign.evaluation.agreement import CHANCE, RIVALS
from ldalign.evaluation.judges import CHECKER, EMBEDDING, POLICY
from ldalign.evaluation.statistics import FEWEST
from ldalign.report.analysis import Numbers
from ldalign.report.notation import interval, interval_decimals, number, percent, with_error
from ldalign.run.folder import SUMMARY, read_summary
from ldalign.run.manifest import MANIFEST
from ldalign.run.stages.agreement import AGREEMENT_STAGE
from ldalign.run.stages.agreement_samples import AGREEMENT_SAMPLES_STAGE
from ldalign.run.stranger import read_if_there

GUIDE = "the guide"
WHO = "what calls a sample the worse one"  # the table's first column
NOTE = (
    "The policy answered each held-out prompt twice; of the two samples, the one farther from the "
    "real response is called the worse one, and the judge says which is the better one. Pairs: "
    "those on which both decide. Below the guide stands what needs no trained guide, on those of "
    "the same pairs that it decides too. First row less this: paired, +- one standard error, above "
    "0 where the first row agrees more often; below two standard errors it may be chance, and of "
    f"fewer than {FEWEST} pairs it is not shown. An interval that holds 50 % shows no agreement. "
    "Surer half: the pairs on which the judge's verdict is the surest, about half of them."
)


def read_agreement(run: Path, config: Mapping[str, Any]) -> Numbers:
    """Returns the stage's summary, with `judge`, its name, and `guide`, what measured the
    distances; {} where agreement was not measured. config: the run folder's.
    """
    folder = run / AGREEMENT_STAGE.folder()
    summary = read_summary(folder) if (folder / SUMMARY).is_file() else {}
    if not summary:
        return {}
    parents = _parents(run, AGREEMENT_STAGE.folder())
    samples = _parents(run, AGREEMENT_SAMPLES_STAGE.folder())
    guide = RIVALS["pooled"] if parents.get("guide") == "none" else GUIDE
    return {**summary, "judge": _judge(parents, samples, config), "guide": guide}


def _judge(parents: Numbers, samples: Numbers, config: Mapping[str, Any]) -> str:
    """Says the name of the judge: by what the stages were made from, as the config may be a later
    command's; "" where they do not say.
    """
    keys = config.get("judge") or {}
    keys = keys if isinstance(keys, Mapping) else {}
    given = str(keys.get("model", CHECKER))
    model = parents.get("judge.model")
    if model is None:
        return ""
    if "judge.endpoint" in parents:
        return f"endpoint, {model}"
    if model == CHECKER:
        return CHECKER
    if model == EMBEDDING:
        known = given == EMBEDDING and keys.get("folder")
        return f"{EMBEDDING}, {Path(keys['folder']).name}" if known else EMBEDDING
    if model == samples.get("policy"):  # hashes of the two folders
        return f"{POLICY}, of its own samples"
    unnamed = given in (CHECKER, EMBEDDING, POLICY)
    return "language model" if unnamed else f"language model, {Path(given).name}"


def sentence(found: Numbers) -> str:
    """Says the guide's rate of agreement with the judge, and what it amounts to."""
    judge = f"The judge ({found['judge']})" if found.get("judge") else "The judge"
    rest = _counts(found)
    rate = found.get("agreement/rate")
    if rate is None:
        return (
            f"{judge} and the distances decided no pair together: the samples were alike, or one "
            f"of the two tied.{rest}"
        )
    low, high = (found.get(f"agreement/{end}") for end in ("low", "high"))
    digits = 1 if low is None or high is None else interval_decimals(100 * low, 100 * high)
    shown = percent(rate, digits)
    said = f"{judge} agreed with {found.get('guide', GUIDE)} in {shown} of the cases"
    if low is None or high is None:
        return f"{said}; chance is {percent(CHANCE)}.{rest}"
    if low <= CHANCE <= high:
        meaning = "the interval holds chance, so no agreement is shown"
    else:
        meaning = f"{'more' if low > CHANCE else 'less'} often than chance"
    return (
        f"{said} (95 % interval {interval(100 * low, 100 * high)} %); chance is {percent(CHANCE)}: "
        f"{meaning}.{rest}"
    )


def _counts(found: Numbers) -> str:
    """Says what became of the prompts, in a sentence of its own; "" where it is not known."""
    names = {"rows": "decided", "ties": "ties", "no_verdict": "without a verdict"}
    names |= {"identical": "with two equal samples"}
    known = [
        f"{found[f'agreement/{key}']:.0f} {words}"
        for key, words in names.items()
        if f"agreement/{key}" in found
    ]
    if "agreement/prompts" not in found or not known:
        return ""
    return f" Of {found['agreement/prompts']:.0f} prompts: {', '.join(known)}."


def agreement_rows(found: Numbers) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Makes the table: the titles of its columns, and (who, a text a column) of each row; columns
    that no row fills are left out.
    """
    if "agreement/rate" not in found:
        return [], []
    pairs = found.get("agreement/rows")
    half = found.get("agreement/sure_rows", pairs) != pairs  # else the judge is always as sure
    parts = [("", "")] + [("sure_", "surer half: ")] * half
    titles = [
        f"{words}{title}"
        for _, words in parts
        for title in ("agrees, % (95 % interval)", "pairs", "first row less this, points")
    ]
    measured = found.get("guide", GUIDE)
    who = {"": measured, **{f"{name}_": words for name, words in RIVALS.items()}}
    rows = [
        (words, [cell for part, _ in parts for cell in _cells(found, f"agreement/{name}{part}")])
        for name, words in who.items()
        if found.get(f"agreement/{name}rows") and (not name or words != measured)
    ]
    kept = [n for n in range(len(titles)) if any(cells[n] != "-" for _, cells in rows)]
    return [titles[n] for n in kept], [(words, [cells[n] for n in kept]) for words, cells in rows]


def _cells(found: Numbers, prefix: str) -> list[str]:
    """The rate with its interval, the number of pairs, and the paired difference."""
    rate = gap = "-"
    if f"{prefix}rate" in found:
        value, low, high = (100 * found[f"{prefix}{n}"] for n in ("rate", "low", "high"))
        rate = f"{number(value, interval_decimals(low, high))} ({interval(low, high)})"
    rows = found.get(f"{prefix}rows", 0)
    if f"{prefix}behind" in found and rows >= FEWEST:
        gap = with_error(100 * found[f"{prefix}behind"], 100 * found[f"{prefix}behind_se"], "+")
    return [rate, f"{rows:.0f}", gap]


def _parents(run: Path, stage: str) -> Numbers:
    path = run / stage / MANIFEST
    found = read_if_there(path, f"delete {path.parent} to make it again").get("parents")
    return found if isinstance(found, dict) else {}
