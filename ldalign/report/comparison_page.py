"""The page of a comparison, from what `ldalign.report.comparison.summarise` returns."""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ldalign.report import notation
from ldalign.report.cautions import UNCOMMITTED
from ldalign.report.glossary import Glossary, explained
from ldalign.report.guides import gain_text, is_known
from ldalign.report.notation import (
    FIGURES,
    count,
    decimals,
    interval,
    leading,
    number,
    plain,
    with_error,
)
from ldalign.report.result import METHOD_NAMES, difference_sentence
from ldalign.run.comparison import START
from ldalign.system import distributed
from ldalign.system.errors import how_to_install
from ldalign.system.files import make_folder, write_text, writing
from ldalign.system.visible import visible

# What `ldalign.report.words.command` writes of a comparison; an older version named no folder.
_COMMAND = re.compile(
    r"(git checkout [0-9a-f]+\n)?ldalign compare( --ranks [0-9]+)? --config config\.yaml"
    r"( run=(?P<folder>.+))?",
    re.DOTALL,
)
# The differences that the page may begin with: the first of these that there is.
LEADING_DIFFERENCES = ("ld_align - sft", f"ld_align - {START}")


def write_comparison(run: Path, summary: Mapping[str, Any]) -> str:
    """Writes report/comparison.json, .md and, with matplotlib, .svg and .png into the comparison's
    folder; returns the page, in ASCII, as a console shows it.
    """
    folder = run / "report"
    text = render(summary)
    if distributed.rank() == 0:
        with writing(folder):
            make_folder(folder)
        write_text(folder / "comparison.json", json.dumps(summary, indent=1) + "\n")
        write_text(folder / "comparison.md", "\n".join(_signed(text)))
        try:
            from ldalign.report.chart import write_chart
            from ldalign.report.figures import contrasts
        except ImportError:
            missing = f"matplotlib is not installed; {how_to_install('report')}"
            return f"{text}\n(no figure: {missing})"
        write_chart(contrasts(summary), folder)
    return text


def _signed(text: str) -> Iterator[str]:
    """The lines of a page with the signs of one, those of code as they are."""
    fence = ""
    for line in text.split("\n"):
        opened = re.match("`{3,}", line)
        if not fence and opened:
            fence = opened[0]
        elif fence and line == fence:
            fence = ""
        yield line if fence or opened else notation.markdown(line)


def render(summary: Mapping[str, Any]) -> str:
    """Writes the Markdown page, in ASCII."""
    parts = (
        _opening,
        _set_up,
        _primary,
        _policies,
        _others,
        _on_the_way,
        _oracle,
        _weights,
        _guides,
        _power,
        _search,
        _benchmarks,
        _notes,
        _again,
    )
    glossary, out = Glossary(), []
    for part in parts:
        lines = part(summary)
        terms = [] if part is _again else glossary.first_used("\n".join(lines))
        lines += ["", f"*{explained(terms)}*"] if terms else []
        out += [*lines, ""] if lines else []
    return "\n".join(out)


def _opening(summary: Mapping[str, Any]) -> list[str]:
    """LD-Align less more SFT, win or lose, else less the start, else the first difference named in
    advance, else one less more SFT, else the first there is: by the first figure.
    """
    known = summary["primary"] | summary["others"]
    against = (name for name in summary["others"] if name.endswith(" - sft"))
    order = (*LEADING_DIFFERENCES, *summary["primary"], *against, *known)
    name = next((name for name in order if name in known), None)
    if name is None:
        return ["No two policies are compared."]
    figure, seeds = summary["figures"][0], len(summary["seeds"])
    gap = known[name][figure]
    first, second = (_called(method) for method in name.split(" - "))
    over = f"{seeds} seeds" if seeds > 1 else "one seed"
    first, second = plain(first), plain(second)
    return [
        difference_sentence(
            f"{first[0].upper()}{first[1:]} minus {second}",
            first,
            figure,
            (gap["value"], gap["low"], gap["high"]),
            f"{count(summary['rows']['test'])} held-out prompts",
            f"paired by {'seed and prompt' if seeds > 1 else 'prompt'}; {over}",
        )
    ]


def _called(method: str) -> str:
    """A method of a comparison as a reader says it."""
    named = {START: "the start", "sft": "more SFT from the same start"}
    return named.get(method) or METHOD_NAMES.get(method, method)


def _set_up(summary: Mapping[str, Any]) -> list[str]:
    rows, rounds = summary["rows"], summary["iterations"]
    prompts = "all" if summary["max_rows"] is None else count(summary["max_rows"])
    each = f"{count(rounds)} iterations of " * (rounds > 1) + count(summary["steps"])
    return [
        f"**{len(summary['seeds'])} seed(s), {count(rows['test'])} held-out rows; learning rates "
        f"chosen on {count(rows['validation'])} more**",
        "",
        f"Every method: {prompts} prompts, {each} optimizer steps of "
        f"{count(summary['global_batch'])}",
    ]


# -------------------------------------------------------------------------------------- differences


def _primary(summary: Mapping[str, Any]) -> list[str]:
    """A table of the comparisons named in advance, with all that is known of the first figure."""
    if not summary["primary"]:
        return []
    figure, *others = summary["figures"]
    head = ["", _title(figure), "95 % interval", "p", "p, Holm", "bootstrap's interval"]
    head += [*map(_title, others), "each seed", "seen with 80 % power"]
    unit = FIGURES[figure].points
    lines = [f"**The comparisons named in advance** (first minus second, {unit})", ""]
    lines += _head(head)
    digits = _digits(summary["primary"].values(), figure)
    places = {f: _digits(summary["primary"].values(), f) for f in others}
    for name, gaps in summary["primary"].items():
        gap = gaps[figure]
        cells = [_gap(figure, gap, digits), _interval(figure, gap, digits)]
        cells += [_p(gap["p"]), _p(gap["p_holm"]), _interval(figure, gap["bootstrap"], digits)]
        cells += [_gap(f, gaps[f], places[f]) for f in others]
        sees = _shown(figure, gap["sees"], digits) if gap["sees"] else "not known"
        cells += [_seeds(figure, gap, digits), sees]
        lines.append(_row(name, cells))
    return lines


def _policies(summary: Mapping[str, Any]) -> list[str]:
    """A table of every policy's figures."""
    figures = summary["figures"]
    titles = [FIGURES[f].title() for f in figures]
    lines = ["**Policies**", "", *_head(["method", "learning rate", *titles])]
    digits = {f: _digits(summary["policies"].values(), f) for f in figures}
    for name, row in summary["policies"].items():
        rate = "" if name == START else f"{summary['learning_rates'][name]:g}"
        cells = [_shown(f, row[f]["value"], digits[f], row[f]["se"]) for f in figures]
        lines.append(_row(name, [rate, *cells]))
    return lines


def _others(summary: Mapping[str, Any]) -> list[str]:
    """A table of the other comparisons."""
    figure, *others = summary["figures"]
    head = ["", _title(figure), "95 % interval", "p", "p, Holm"]
    lines = [
        f"**Other comparisons** (first minus second; {len(summary['others'])}, a family of tests)",
        "",
        *_head([*head, *map(_title, others), "each seed"]),
    ]
    digits = {f: _digits(summary["others"].values(), f) for f in summary["figures"]}
    for name, gaps in summary["others"].items():
        gap, own = gaps[figure], digits[figure]
        cells = [_gap(figure, gap, own), _interval(figure, gap, own)]
        cells += [_p(gap["p"]), _p(gap["p_holm"])]
        cells += [*(_gap(f, gaps[f], digits[f]) for f in others), _seeds(figure, gap, own)]
        lines.append(_row(name, cells))
    return lines


def _on_the_way(summary: Mapping[str, Any]) -> list[str]:
    """A table of every method's difference from the start after each iteration."""
    found = summary["on_the_way"]
    if not found:
        return []
    figure = found["figure"]
    head = [f"after {n} iteration{'s' * (n > 1)}" for n in range(1, summary["iterations"] + 1)]
    every = [{figure: gap} for gaps in found["methods"].values() for gap in gaps]
    digits = _digits(every, figure)
    return [
        f"**On the way** (method minus start, {_title(figure)})",
        "",
        *_head(["", *head]),
        *(
            _row(name, (_gap(figure, gap, digits) for gap in gaps))
            for name, gaps in found["methods"].items()
        ),
    ]


def _oracle(summary: Mapping[str, Any]) -> list[str]:
    """A table of the share of the oracle's gain that each weight gets."""
    found = summary["oracle"]
    if not found:
        return []
    figures = summary["figures"]
    names = list(found["shares"][figures[0]])

    def cell(figure: str, name: str) -> str:
        share = found["shares"][figure][name]
        if share is None:
            return "not defined"
        return f"{share['value']:.2f} ({share['low']:.2f} to {share['high']:.2f})"

    return [
        f"**The share of the oracle's gain** (of {plain(found['gain'])}, the bound on what a "
        "perfect distance buys, with 95 % interval; not defined where that gain's own interval "
        "holds 0)",
        "",
        *_head(["", *(FIGURES[f].words for f in figures)]),
        *(_row(name, (cell(f, name) for f in figures)) for name in names),
    ]


# ---------------------------------------------------------------------------- what was known before


def _weights(summary: Mapping[str, Any]) -> list[str]:
    """A table of what the first iteration's weights know of the losers, before any training."""
    found = summary["weights"]
    checked = any(value for row in found.values() for value in row["wrong"])
    embedded = any(value for row in found.values() for value in row["embedding"])
    if not checked and not embedded:
        return []
    head = ["", *["a wrong loser weighs more than a right one"] * checked]
    head += ["correlation with the loser's distance by sentence embeddings"] * embedded
    lines = [
        "**What the weights know before any training** (of iteration 0's pairs: the probability, "
        "0.5 is nothing; Spearman's correlation; mean, and each seed)",
        "",
        *_head(head),
    ]
    for name, row in found.items():
        cells = [_over_seeds(row["wrong"])] * checked + [_over_seeds(row["embedding"])] * embedded
        lines.append(_row(name, cells))
    losers = next(iter(found.values()))["losers"]
    if checked:
        counts = ", ".join(f"{count(n['wrong'])} / {count(n['right'])}" for n in losers)
        lines += ["", f"Wrong / right losers, by seed: {counts}."]
    return lines


def _guides(summary: Mapping[str, Any]) -> list[str]:
    """Whether each seed's guide tells a row's two responses apart."""
    gains = [gain_text(found, "sibling_gain") for found in summary["guides"] if is_known(found)]
    if not gains:
        return []
    return [
        "The guide, on rows that it was not trained on: a response's own latent over that of the "
        f"other response to its prompt, nats a response, by seed: {', '.join(gains)}."
    ]


def _over_seeds(found: Sequence[Mapping[str, float] | None]) -> str:
    known = [value["value"] for value in found if value]
    if not known:
        return ""
    return f"{sum(known) / len(known):.2f} ({', '.join(f'{value:.2f}' for value in known)})"


def _power(summary: Mapping[str, Any]) -> list[str]:
    """What difference could have been seen, as known before and after."""
    figure, before = summary["figures"][0], summary["power_before"]
    lines = []
    if before:
        lines.append(power_sentence(before, len(summary["seeds"])))
    for name, gaps in summary["primary"].items():
        gap = gaps[figure]
        digits, said = _digits([gaps], figure), FIGURES[figure]
        if not gap["sees"]:  # an error of 0 would claim that any difference is seen
            lines.append(
                f"After it: of {plain(name)}, not known, as the differences have no spread."
            )
            continue
        parts = ", ".join(
            f"{part} {_shown(figure, gap[part], digits)}" for part in ("seeds", "prompts", "rest")
        )
        lines.append(
            f"After it: of {plain(name)}, {_shown(figure, gap['sees'], digits)} {said.points} of "
            f"{said.words} (deviations of {parts}; {gap['df']:.1f} degrees of freedom)."
        )
    return ["**The smallest difference seen with 80 % power**", "", *lines] if lines else []


def power_sentence(before: Mapping[str, Any], seeds: int) -> str:
    """Says what `ldalign.report.comparison.power_before` found."""
    if not before["sees"]:
        return "Before training: not known, as the start's answers are all right or all wrong."
    return (
        f"Before training, from the start's own answers: with {seeds} seed(s) and "
        f"{count(before['prompts'])} prompts, {100 * before['sees']:.1f} points of sampled "
        "accuracy, for two policies that answer as well as the start and independently; effects of "
        "seeds and prompts come on top."
    )


def _search(summary: Mapping[str, Any]) -> list[str]:
    """A table of what the search found for each method at each learning rate."""
    rates = summary["settings"]["learning_rates"]
    figure = summary["searched_by"]
    if len(rates) < 2:
        return []
    what = "-NLL" if figure == "nll" else FIGURES[figure].title()
    lines = [
        f"**The search** (seed {count(summary['seeds'][0])}, validation rows: {what}; the best is "
        "taken; in brackets, by how many standard errors of the difference over rows a rate is "
        "below it)",
        "",
        *_head(["method", *(f"{rate:g}" for rate in rates)]),
    ]
    for name, found in summary["search"].items():
        lines.append(_row(name, (_tried(figure, found[f"{rate:g}"]) for rate in rates)))
    return lines


def _tried(figure: str, found: Mapping[str, float]) -> str:
    score = _shown(figure, found["score"], FIGURES[figure].digits)
    if found["below"] == 0:
        return score
    return f"{score} ({found['below'] / found['se']:.1f})" if found["se"] else f"{score} (inf)"


def _benchmarks(summary: Mapping[str, Any]) -> list[str]:
    """Returns a table of every task's leading metric, its mean over the seeds and each of them."""
    found: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]] = summary["benchmarks"]
    if not found:
        return []
    tasks = sorted({task for scores in found.values() for task in scores})
    first = next(iter(found.values()))
    metrics = {}
    for task in tasks:
        every = {
            metric for scores in found.values() if task in scores for metric in scores[task][0]
        }
        metric = leading(dict.fromkeys(every))
        if metric is not None:  # of a task without one that we know, nothing can be shown
            metrics[task] = metric
    if not metrics:
        return []
    lines = [
        "**Benchmarks**, % (mean over the seeds, +- one standard error over rows of one seed; each "
        "seed)",
        "",
        *_head(["", *(f"{plain(task)} {metric}" for task, metric in metrics.items())]),
    ]
    for name, scores in found.items():
        cells = [_over_runs(scores[t], m) if t in scores else "" for t, m in metrics.items()]
        lines.append(_row(name, cells))
    shots = ", ".join(
        f"{plain(t)}: {s[0]['rows']:.0f} rows, {s[0]['shots']:.0f} shots"
        for t, s in sorted(first.items())
        if t in metrics
    )
    return [*lines, "", f"{shots}."] if shots else lines


def _over_runs(scores: Sequence[Mapping[str, float]], metric: str) -> str:
    """A benchmark's mean over the runs, the error of one of them, and each where there are more."""
    values, errors = ([s[name] for s in scores] for name in (metric, f"{metric}_se"))
    digits = decimals(100 * error for error in errors)
    mean = with_error(100 * fmean(values), 100 * fmean(errors), "", digits)
    each = ", ".join(number(100 * value, digits) for value in values)
    return f"{mean} ({each})" if len(values) > 1 else mean


def _notes(summary: Mapping[str, Any]) -> list[str]:
    """Says what the errors are."""
    seeds, tested = len(summary["seeds"]), FIGURES[summary["figures"][0]].words
    alone = " With one seed they are over prompts alone, and hold for this seed." * (seeds == 1)
    return [
        "+- is one standard error over seeds and prompts, both taken as drawn at random (variance "
        "components); differences are taken seed by seed and prompt by prompt. Intervals and p are "
        f"Student's t with Satterthwaite's degrees of freedom.{alone} The bootstrap resamples "
        "seeds and prompts; of few seeds its interval is too narrow. p is of "
        f"{tested} alone, adjusted by Holm's method over each table; differences of other figures "
        "are shown with their error and not tested."
    ]


def _again(summary: Mapping[str, Any]) -> list[str]:
    """How to make every number of the page again."""
    found = summary["again"]
    machine = [plain(found["machine"]), ""] if found["machine"] else []
    run, settings = _command(found["command"]), visible(found["settings"])
    # longer than any that the settings or the command's folder hold
    runs = re.findall("`+", f"{run}\n{settings}")
    fence = "`" * max(3, *(1 + len(one) for one in runs), 0)
    changed = str(found["commit"] or "").endswith("-dirty")
    return [
        "**Every number again**",
        "",
        *machine,
        *[UNCOMMITTED, ""] * changed,
        fence,
        run,
        fence,
        "",
        "where config.yaml is",
        "",
        f"{fence}yaml",
        settings.rstrip(),
        fence,
    ]


def _command(said: str) -> str:
    """The command of `words.command`, as a comparison.json has it: it is pasted into a shell.
    Raises ValueError for another one, which may be a stranger's.
    """
    match = _COMMAND.fullmatch(said)
    folder = match and match["folder"]
    if not match or (folder and [shlex.quote(word) for word in shlex.split(folder)] != [folder]):
        raise ValueError("again.command is none that ldalign compare writes")
    return visible(said)


# ------------------------------------------------------------------------------------------- cells


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _row(name: str, cells: Iterable[str]) -> str:
    """A line that begins with a name, which may be from elsewhere."""
    return _line([plain(name), *cells])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _title(figure: str) -> str:
    """The head of a column of differences."""
    return f"{FIGURES[figure].words}, {FIGURES[figure].points}"


def _digits(rows: Iterable[Mapping[str, Mapping[str, float]]], figure: str) -> int:
    """How many decimals a column of this figure has, by its standard errors."""
    said = FIGURES[figure]
    return decimals((said.factor * row[figure]["se"] for row in rows), said.digits)


def _gap(figure: str, gap: Mapping[str, float], digits: int) -> str:
    return _shown(figure, gap["value"], digits, gap["se"], sign="+")


def _interval(figure: str, gap: Mapping[str, float], digits: int) -> str:
    factor = FIGURES[figure].factor
    return interval(factor * gap["low"], factor * gap["high"], "+", digits)


def _seeds(figure: str, gap: Mapping[str, Any], digits: int) -> str:
    return ", ".join(_shown(figure, value, digits, sign="+") for value in gap["by_seed"])


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _shown(
    figure: str, value: float, digits: int, error: float | None = None, sign: str = ""
) -> str:
    factor = FIGURES[figure].factor
    if error is None:
        return number(factor * value, digits, sign)
    return with_error(factor * value, factor * error, sign, digits)
