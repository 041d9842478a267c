"""The report's drawings: each function makes one Chart, or says why there is nothing to draw.

The common part is chart.py. Needs matplotlib.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ldalign.evaluation.statistics import NORMAL_95, Array
from ldalign.report.analysis import MEASURES, Numbers, RunPairs, Sides, concentration
from ldalign.report.chart import (
    DASHES,
    GRID,
    INK,
    MARKERS,
    SERIES,
    WIDTH,
    Chart,
    apply_scale,
    bins,
    chart,
    choose_scale,
    left_out,
    spread_out,
)
from ldalign.report.guides import GAINS, gain_text, guide_name, is_known
from ldalign.report.notation import FIGURES, HELD_OUT, interval, number, page, percent
from ldalign.report.table import duration
from ldalign.run.folder import shown_name
from ldalign.run.plan import stage_of
from ldalign.run.stages.benchmarks import BENCHMARKS_STAGE
from ldalign.run.stages.distances import DISTANCES_STAGE
from ldalign.run.stages.evaluation import EVALUATION_STAGE
from ldalign.run.stages.guide import GUIDE_STAGE
from ldalign.run.stages.policy import POLICY_STAGE
from ldalign.run.stages.reference import REFERENCE_STAGE
from ldalign.run.stages.responses import RESPONSES_STAGE
from ldalign.system.visible import visible

FEWEST_SMOOTHED = 20  # steps, below which a running mean hides more than it shows
MOST_IN_A_ROW = 4  # panels: of more, three are a row
NAMES_OVER = 5  # of iterations, over a panel of steps: of more, every so many are named
MOST_POINTS = 800  # of a scatter; of more, so many are drawn at random, as the caption says
# The stages that have a colour of their own, in the order of SERIES; benchmarks have that of the
# evaluation.
COLOURED = (
    POLICY_STAGE,
    RESPONSES_STAGE,
    EVALUATION_STAGE,
    GUIDE_STAGE,
    REFERENCE_STAGE,
    DISTANCES_STAGE,
)


@dataclass(frozen=True)
class Relation:
    """A quantity that the latent distance is drawn over, and what to say of it.

    key: its name among the measures of table.json's analysis. reading: how to read the drawing.
    absent: why there is none where no pair has the quantity.
    """

    name: str
    title: str
    values: Callable[[RunPairs], Array]
    xlabel: str
    key: str
    reading: str
    absent: str


LENGTH = Relation(
    "distance_length",
    "Distance and length",
    lambda p: p.tokens,
    "generated response, tokens",
    "tokens",
    "A strong relation would mean that the weights mostly follow length.",
    "the responses' lengths are not known.",
)
LIKELIHOOD = Relation(
    "distance_nll",
    "Distance and likelihood",
    lambda p: p.nll,
    "NLL of the generated response, nats/token",
    "nll",
    "NLL is under the reference, the policy that sampled the response: far to the right are "
    "responses that the policy itself found unlikely.",
    "no reference log-probs yet.",
)
REWARD = Relation(
    "distance_reward",
    "Distance and reward",
    lambda p: p.reward_real - p.reward_generated,
    "reward, real - generated",
    "reward_gap",
    "If the distance knew what the reward model knows, points would rise to the right.",
    "no responses were scored by a reward model.",
)


# ----------------------------------------------------------------------------------------- held out


def held_out(rows: Sequence[Numbers]) -> Chart:
    """Draws every policy's accuracy with its interval, and the likelihood of the real responses."""

    def draw() -> tuple[Figure, str] | str:
        scores = [key for key, _ in HELD_OUT if any(key in row for row in rows)]
        likely = [row for row in rows if "nll/real" in row]
        if not likely:
            return "no policy was evaluated on held-out rows (evaluation.rows=0, or not yet)."
        figure = Figure(figsize=(WIDTH, 0.9 + 0.42 * len(rows)))
        axes = figure.subplots(1, 1 + bool(scores), squeeze=False, sharey=True)[0]
        places = np.arange(len(rows))
        for n, key in enumerate(scores):
            known = [i for i, row in enumerate(rows) if key in row]
            values = np.array([100 * rows[i][key] for i in known])
            errors = np.array([100 * NORMAL_95 * rows[i].get(f"{key}_se", 0.0) for i in known])
            axes[0].errorbar(
                values,
                places[known] + 0.24 * (n - 0.5),
                xerr=errors,
                fmt=MARKERS[n],
                ms=5,
                lw=1.4,
                color=SERIES[n],
                label=key.removeprefix("accuracy/"),
            )
        if scores:
            axes[0].set_xlabel("held-out accuracy, %")
            if not any(row.get(f"{key}_se", 0.0) for row in rows for key in scores):
                axes[0].set_xlim(-2, 102)  # of no width, its own would show a share below 0
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        known = [i for i, row in enumerate(rows) if "nll/real" in row]
        axes[-1].plot(
            [rows[i]["nll/real"] for i in known], places[known], "D", ms=5, color=SERIES[2]
        )
        axes[-1].set_xlabel(FIGURES["nll"].title())
        axes[-1].xaxis.set_major_locator(MaxNLocator(5))
        axes[0].set_yticks(places, [shown_name(row["policy"]) for row in rows])
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
        caption = (
            "NLL: how unlikely the data set's own held-out responses are to each policy, lower is "
            "better. "
        )
        if scores:
            paired = (
                "All policies met the same prompts and random numbers, so differences between them "
                "are surer than the bars make them look: the table has them in points. "
            )
            caption = (
                "Right is better on the left panel, left is better on the right. Bars: 95 % "
                f"intervals over prompts. {paired * (len(rows) > 1)}{caption}"
            )
        return figure, caption.strip()

    return chart("held_out", "Held-out results by policy", draw)


# ---------------------------------------------------------------------------------------- distances


def distances(iterations: Sequence[RunPairs], policies: Sequence[Numbers]) -> Chart:
    """Draws how the latent distances of an iteration's pairs are distributed. policies: as in
    table.json.
    """

    def draw() -> tuple[Figure, str] | str:
        every = _with_distances(iterations)
        if isinstance(every, str):
            return every
        known = spread_out(every)
        everything = np.concatenate([p.distance[p.trained] for p in known])
        edges, scale = bins(everything)
        figure = Figure(figsize=(WIDTH, 3.2))
        axes = figure.subplots()
        for n, p in enumerate(known):
            values = p.distance[p.trained]
            shares = np.histogram(values, edges)[0] / len(values)
            label = f"iteration {p.iteration}: {len(values)} pairs, median {np.median(values):.2f}"
            axes.stairs(
                100 * shares, edges, color=SERIES[n % 6], ls=DASHES[n % 4], lw=1.6, label=label
            )
            axes.stairs(100 * shares, edges, color=SERIES[n % 6], alpha=0.12, fill=True)
            axes.axvline(float(np.median(values)), color=SERIES[n % 6], ls=DASHES[n % 4], lw=1)
        apply_scale(axes, "x", scale)
        axes.set(
            xlabel="latent distance d" + (", logarithmic" if scale == "log" else ""),
            ylabel="share of pairs, %",
        )
        axes.legend()
        zero = sum(int((p.distance[p.trained] == 0).sum()) for p in known)
        caption = (
            "Distance between the latents of the real and of the generated response, over the "
            "pairs trained on; vertical lines are medians. It has no unit, and no meaning across "
            "guides: only its ratios count. With one guide for all iterations, a shrinking "
            "distance would mean that the policy's responses come closer to the data's. Pairs "
            "whose responses are equal are left out of training and of this figure, so those that "
            "remain are the harder ones."
        )
        if zero and scale == "log":
            caption += f" Not drawn: distances of exactly 0 ({zero})."
        caption += left_out(len(known), len(every))
        shown = {f"iteration_{p.iteration}" for p in known}
        explained = [_explained(row) for row in policies if row["policy"] in shown]
        return figure, caption + "".join(explained)

    return chart("distances", "Latent distances by iteration", draw)


def _explained(row: Numbers) -> str:
    """Says what explains an iteration's distances; "" where it is not known."""
    if "distance/length_share" not in row:
        return ""
    by = [percent(row[f"distance/{key}_share"]) for key in ("length", "cut")]
    return (
        f" {shown_name(row['policy']).capitalize()}: of the variance of these distances, the "
        f"difference in length of the two responses explains {by[0]}, and how many of the two were "
        f"cut {by[1]} (each by a straight line)."
    )


def against(relation: Relation, iterations: Sequence[RunPairs], found: Mapping[str, Any]) -> Chart:
    """Draws the distance over another quantity, a panel an iteration.

    found: table.json's analysis, by iteration's name; so too in the functions below.
    """
    values, key = relation.values, relation.key

    def draw() -> tuple[Figure, str] | str:
        known = _with_distances(iterations)
        if isinstance(known, str):
            return known
        every = [p for p in known if np.isfinite(values(p)[p.trained]).any()]
        if not every:
            return relation.absent
        known = spread_out(every)
        scales = [
            choose_scale(np.concatenate([quantity(p)[p.trained] for p in known]))
            for quantity in (values, _distance)
        ]
        columns = len(known) if len(known) <= MOST_IN_A_ROW else 3
        lines = -(-len(known) // columns)
        figure = Figure(figsize=(WIDTH, 3.1 * lines))
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        panels, unused = grid.flat[: len(known)], grid.flat[len(known) :]
        for axes in unused:
            axes.remove()
        for axes in panels[-columns:]:  # below which there is none
            axes.tick_params(labelbottom=True)
        cut = False
        for n, (p, axes) in enumerate(zip(known, panels, strict=True)):
            x, y = values(p)[p.trained], p.distance[p.trained]
            chosen = np.random.default_rng(0).permutation(len(x))[:MOST_POINTS]
            cut |= len(x) > MOST_POINTS
            axes.plot(
                x[chosen], y[chosen], MARKERS[n % 6], ms=3.2, mew=0, alpha=0.45, color=SERIES[n % 6]
            )
            for side, scale in zip("xy", scales, strict=True):
                apply_scale(axes, side, scale)
            axes.set(title=f"iteration {p.iteration}", xlabel=page(relation.xlabel))
        for axes in grid[:, 0]:
            axes.set_ylabel("latent distance d")
        seen = [
            f"Iteration {p.iteration}: "
            f"{_interval(found[f'iteration_{p.iteration}']['spearman'][key])}"
            for p in known
            if key in found[f"iteration_{p.iteration}"].get("spearman", {})
        ]
        caption = relation.reading
        if seen:
            caption = f"{'; '.join(seen)} (Spearman's rank correlation, 95 % interval). {caption}"
        if cut:
            caption += (
                f" At most {MOST_POINTS} pairs a panel are drawn, at random; the correlation is of "
                "all."
            )
        return figure, caption + left_out(len(known), len(every))

    return chart(relation.name, relation.title, draw)


def verdicts(iterations: Sequence[RunPairs], found: Mapping[str, Any]) -> Chart:
    """Draws distances of generated answers that are right, and of those that are wrong."""

    def draw() -> tuple[Figure, str] | str:
        known = _with_distances(iterations)
        if isinstance(known, str):
            return known
        known = [p for p in known if np.isfinite(p.right[p.trained]).any()]
        if not known:
            return (
                "no training row names a checker (kind and answer), so no answer can be called "
                "right or wrong."
            )
        figure = Figure(figsize=(WIDTH, 0.9 + 0.72 * len(known)))
        axes = figure.subplots()
        labels = []
        for n, p in enumerate(known):
            for m, (word, verdict) in enumerate((("right", 1.0), ("wrong", 0.0))):
                values = p.distance[p.trained & (p.right == verdict)]
                place = n * 2.4 + m
                labels.append((place, f"iteration {p.iteration}, {word} ({len(values)})"))
                if len(values):
                    _box(axes, values, place, SERIES[2] if verdict else SERIES[1])
        axes.set_yticks(*zip(*labels, strict=True))
        axes.set_ylim(labels[-1][0] + 0.7, -0.7)
        apply_scale(axes, "x", choose_scale(np.concatenate([p.distance[p.trained] for p in known])))
        axes.set_xlabel("latent distance d")
        axes.grid(axis="y", visible=False)
        seen = [_verdict_sentence(p.iteration, found[f"iteration_{p.iteration}"]) for p in known]
        return figure, (
            "Boxes: quartiles and median; whiskers: 5th to 95th percentile; dots: pairs beyond; "
            "the number of pairs in brackets. If the distance knew quality, wrong answers would "
            "lie farther from the real response than right ones, and with a probability well above "
            f"0.5. {'. '.join(seen)}. Answers equal to the real one, word for word, are not among "
            "them, as such pairs are not trained on."
        )

    return chart("distance_verdict", "Distance and the checker's verdict", draw)


def _box(axes: Axes, values: Array, place: float, colour: str) -> None:
    """Draws a lying box with whiskers at `place`."""
    axes.boxplot(
        values,
        positions=[place],
        orientation="horizontal",
        widths=0.7,
        whis=(5, 95),
        patch_artist=True,
        showfliers=len(values) <= MOST_POINTS,
        flierprops={"marker": ".", "ms": 3, "mec": colour},
        medianprops={"color": INK, "lw": 1.6},
        boxprops={"facecolor": colour + "55", "edgecolor": colour},
        whiskerprops={"color": colour},
        capprops={"color": colour},
    )


def _verdict_sentence(iteration: int, analysis: Mapping[str, Any]) -> str:
    """Says of an iteration how distance and verdict go together."""
    if "wrong_is_farther" not in analysis:
        return f"Iteration {iteration}: too few of one kind for an interval"
    if "wrong" not in analysis["spearman"]:
        return f"Iteration {iteration}: all distances are equal"
    share = analysis["wrong_is_farther"]
    return (
        f"Iteration {iteration}: {_interval(analysis['spearman']['wrong'])}, and a wrong answer "
        f"lies farther than a right one with probability {share['value']:.2f} ({share['low']:.2f} "
        f"to {share['high']:.2f})"
    )


def correlations(found: Mapping[str, Any]) -> Chart:
    """Draws all rank correlations of distance with their intervals."""

    def draw() -> tuple[Figure, str] | str:
        by_iteration = {name: a["spearman"] for name, a in found.items() if a.get("spearman")}
        if not by_iteration:
            return "this run has no latent distances, or too few pairs."
        shown = [
            (key, label)
            for key, label, _ in MEASURES
            if any(key in seen for seen in by_iteration.values())
        ]
        figure = Figure(figsize=(WIDTH, 0.8 + (0.2 + 0.14 * len(by_iteration)) * len(shown)))
        axes = figure.subplots()
        for n, (name, seen) in enumerate(by_iteration.items()):
            known = [(place, seen[key]) for place, (key, _) in enumerate(shown) if key in seen]
            values = np.array([e["value"] for _, e in known])
            errors = np.abs(np.array([[e["low"], e["high"]] for _, e in known]).T - values)
            count = len(by_iteration)
            places = np.array([place for place, _ in known]) + 0.5 * (n + 0.5) / count - 0.25
            axes.errorbar(
                values,
                places,
                xerr=errors,
                fmt=MARKERS[n % 6],
                ms=4.5,
                lw=1.4,
                color=SERIES[n % 6],
                label=shown_name(name),
            )
        axes.axvline(0, color=INK, lw=0.8)
        axes.set_yticks(range(len(shown)), [page(label) for _, label in shown])
        axes.set(
            ylim=(len(shown) - 0.5, -0.5),
            xlim=(-1, 1),
            xlabel="Spearman's rank correlation with latent distance",
        )
        axes.legend(loc="upper left")
        return figure, (
            "Where an interval crosses 0, the data do not show a relation. A distance that follows "
            "length or likelihood alone would weight pairs by what those already say. Intervals: "
            "95 %, Fisher's z with Bonett and Wright's error; of twenty quantities without any "
            "relation, one would miss 0 by chance."
        )

    return chart("correlations", "What the distance goes with", draw)


def _interval(found: Mapping[str, float]) -> str:
    """Says a rank correlation with its interval."""
    ends = interval(found["low"], found["high"], "+", 2)
    return f"ρ = {number(found['value'], 2, '+')} ({ends}; {found['n']} pairs)"


def _with_distances(iterations: Sequence[RunPairs]) -> list[RunPairs] | str:
    known = [p for p in iterations if p.trained.any() and np.isfinite(p.distance[p.trained]).all()]
    return known or "this run has no latent distances (another method, or not yet)."


def _distance(pairs: RunPairs) -> Array:
    return pairs.distance


# ----------------------------------------------------------------------------------- guide, weights


def guide(guides: Mapping[str, Mapping[str, float]]) -> Chart:
    """Draws what each guide's own latent adds on held-out rows, over four others, with intervals.

    guides: held-out figures by stage name.
    """

    def draw() -> tuple[Figure, str] | str:
        if not guides:
            return (
                "this run trained no guide (another method or a control, or a trained one was "
                "given)."
            )
        known = {guide_name(name): found for name, found in guides.items() if is_known(found)}
        if not known:
            return "the guide's held-out figures are of an older version, without standard errors."
        figure = Figure(figsize=(WIDTH, 1.0 + 0.5 * len(known)))
        panels = figure.subplots(1, len(GAINS), sharey=True)
        places = np.arange(len(known))
        for n, (axes, (key, words, unit)) in enumerate(zip(panels, GAINS, strict=True)):
            values = np.array([found[key] for found in known.values()])
            errors = np.array([NORMAL_95 * found[f"{key}_se"] for found in known.values()])
            colour = SERIES[0] if n == 0 else INK
            axes.errorbar(
                values, places, xerr=errors, fmt=MARKERS[n], ms=5, lw=1.6, capsize=3, color=colour
            )
            axes.axvline(0, color=INK, lw=0.8, ls=":")
            for place, found in zip(places, known.values(), strict=True):
                axes.annotate(
                    page(gain_text(found, key)),
                    (found[key], place),
                    (0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
            axes.set(title=words.removeprefix("own latent "), xlabel=unit)
            axes.margins(x=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(places, list(known))
        panels[0].set_ylim(len(known) - 0.5, -0.6)
        return figure, (
            "By how much a response's own latent makes it likelier to the guide's decoder, on "
            "held-out rows; right of the dotted line, at 0, it helps. First and in colour: over "
            "the latent of the other response to the same prompt, its sibling, which is what a "
            "distance between the two rests on. Where that bar is not clear of 0, the latent does "
            "not tell the two apart, and distances and weights are near noise, however large the "
            "gains over no latent and over another row's are. Bars: 95 % intervals over rows; "
            "beside them ± one standard error. Every panel has a scale of its own."
        )

    return chart("guide", "What the guide's latent is worth", draw)


def weights(iterations: Sequence[RunPairs], found: Mapping[str, Any]) -> Chart:
    """Draws the distribution of the pair weights, and what share of the pull the heaviest have."""

    def draw() -> tuple[Figure, str] | str:
        every = _with_distances(iterations)
        if isinstance(every, str):
            return every
        known = spread_out(every)
        edges, scale = bins(np.concatenate([p.weight[p.trained] for p in known]))
        figure = Figure(figsize=(WIDTH, 3.1))
        left, right = figure.subplots(1, 2)
        for n, p in enumerate(known):
            weight, look = p.weight[p.trained], {"color": SERIES[n % 6], "ls": DASHES[n % 4]}
            left.stairs(100 * np.histogram(weight, edges)[0] / len(weight), edges, lw=1.6, **look)
            share = 100 * np.arange(len(weight) + 1) / len(weight)
            right.plot(
                share, 100 * concentration(weight), lw=1.6, label=f"iteration {p.iteration}", **look
            )
        left.axvline(1, color=INK, lw=0.8, ls=":")
        apply_scale(left, "x", scale)
        left.set(xlabel="pair weight s (1: the mean)", ylabel="share of pairs, %", title="weights")
        right.plot([0, 100], [0, 100], color=INK, lw=0.8, ls=":", label="all weights equal")
        right.axvline(10, color=GRID, lw=1)
        right.set(
            xlabel="heaviest pairs, % of all",
            ylabel="share of the pull, %",
            title="concentration",
            xlim=(0, 100),
            ylim=(0, 101),
        )
        right.legend(loc="lower right")
        seen = [
            f"Iteration {p.iteration}: effective sample size {a['weight/ess'] * a['pairs']:.0f} of "
            f"{a['pairs']} pairs ({percent(a['weight/ess'])}), the heaviest 10 % have "
            f"{percent(a['weight/top10_share'])} of the pull"
            for p in known
            if "weight/ess" in (a := found[f"iteration_{p.iteration}"])
        ]
        return figure, (
            "LD-Align's weight is a pair's distance over the mean distance; the pull on the policy "
            f"at the start of an iteration is in proportion. {'. '.join(seen)}. A small effective "
            "sample size means noisier steps than the number of pairs suggests."
        ) + left_out(len(known), len(every))

    return chart("weights", "Pair weights", draw)


# ----------------------------------------------------------------------------------------- training


def training(steps: Mapping[str, Sequence[Numbers]], sides: Sides, kind: str) -> Chart:
    """Draws loss, rewards, log-probs and accuracies over the steps of all iterations.

    Without pairs, as in SFT, it draws the loss alone. steps: records by iteration's name. kind: the
    key `loss.kind`.
    """

    def draw() -> tuple[Figure, str] | str:
        known = {
            name: rows for name, rows in steps.items() if rows and "rewards/margins" in rows[0]
        }
        panels = _panels(sides, kind)
        if not known:
            known = {name: rows for name, rows in steps.items() if rows and "nll" in rows[0]}
            panels = {("loss", "NLL, nats/token"): {"nll": ("of the batch's responses", 0)}}
        if not known:
            return "no iteration has trained yet."
        paired = len(panels) > 1
        figure = Figure(figsize=(WIDTH, 5.4 if paired else 2.6))
        side = 2 if paired else 1
        grid = figure.subplots(side, side, sharex=paired, squeeze=False)
        begin = 0
        # the names that have room beside each other
        named = list(known)[:: -(-len(known) // NAMES_OVER)] if len(known) > 1 else []
        for name, rows in known.items():
            for axes, names in zip(grid.flat, panels.values(), strict=True):
                _draw_steps(axes, names, rows, begin)
                if name in named:
                    axes.annotate(
                        shown_name(name),
                        (begin + 0.5, 1),
                        (4, 1),
                        xycoords=("data", "axes fraction"),
                        textcoords="offset points",
                        va="bottom",
                        fontsize=7.5,
                    )
            begin += len(rows)
        if paired:
            if kind == "sigmoid":  # that of ipo depends on beta, which an iteration may have anew
                none = {"color": INK, "lw": 0.8, "ls": ":", "label": "ln 2: no preference"}
                grid[0, 0].axhline(np.log(2), **none)
            grid[1, 1].axhline(0.5, color=INK, lw=0.8, ls=":", label="0.5: no preference")
        for axes, (title, unit) in zip(grid.flat, panels, strict=True):
            axes.set_title(title, pad=14 if len(known) > 1 else None)
            axes.set_ylabel(unit)
            axes.set_xlim(0, begin + 1)
            axes.legend(loc="best")
        for axes in grid[-1]:
            axes.set_xlabel("optimizer step" + (", iterations in turn" if len(known) > 1 else ""))
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return figure, _training_caption(sides if paired else None)

    return chart("training", "Training, step by step", draw)


def _draw_steps(
    axes: Axes, names: Mapping[str, tuple[str, int]], rows: Sequence[Numbers], begin: int
) -> None:
    """Draws metrics of one iteration, whose first step is number `begin` + 1: thin and smoothed,
    or every step alone where these are few.

    names: of each metric the label and the place in SERIES and DASHES.
    """
    at = begin + np.arange(1, len(rows) + 1)
    for key, (label, n) in names.items():
        values = np.array([row.get(key, np.nan) for row in rows])
        smooth = {"color": SERIES[n], "ls": DASHES[n], "label": "" if begin else label}
        if len(rows) >= FEWEST_SMOOTHED:
            axes.plot(at, values, color=SERIES[n], lw=0.7, alpha=0.25)
            values = _smooth(values)
        axes.plot(at, values, lw=1.6, **smooth)
    if begin:
        axes.axvline(begin + 0.5, color=INK, lw=0.8, ls=":")


def _smooth(values: Array) -> Array:
    """Takes the running mean over about a tenth of the steps, shorter at the ends."""
    half = max(1, len(values) // 20)
    return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _panels(sides: Sides, kind: str) -> dict[tuple[str, str], dict[str, tuple[str, int]]]:
    """Returns (title, unit) -> metric -> label, place in SERIES and DASHES."""
    unit = "nats² a pair" if kind == "ipo" else "nats a pair"
    return {
        ("loss, all weights 1", unit): {"loss/unweighted": ("loss", 0)},
        ("rewards", "β × nats a response"): {
            "rewards/margins": ("margin", 0),
            "rewards/chosen": (sides.better, 2),
            "rewards/rejected": (sides.worse, 1),
        },
        ("log-probs under the policy", "nats a response"): {
            "logps/chosen": (sides.better, 2),
            "logps/rejected": (sides.worse, 1),
        },
        ("pairs with a positive margin", "share of the batch"): {
            "rewards/accuracies": ("accuracy", 0)
        },
    }


def _training_caption(sides: Sides | None) -> str:
    """Says what to see in the training figure; sides: None where responses have no pairs."""
    thin = (
        "Thin: every step, another batch each; thick: a running mean over about a tenth of an "
        f"iteration, or every step where there are fewer than {FEWEST_SMOOTHED}."
    )
    if sides is None:
        return f"{thin} How unlikely the responses trained on are to the policy; lower is better."
    return (
        f"{thin} A reward is β times what a response has gained in log-prob over the reference; "
        f"the margin is that of the {sides.better} response minus that of the {sides.worse} one, "
        "and is what the loss raises: look at it first. With reference=iteration, each iteration "
        "starts again from 0, as its reference is the policy it starts from."
    )


# ------------------------------------------------------------------------------------------- budget


def budget(seconds: Mapping[str, float]) -> Chart:
    """Draws the wall time of every stage. seconds: by stage name."""

    def draw() -> tuple[Figure, str] | str:
        if not sum(seconds.values()):
            return "no stage has finished yet."
        figure = Figure(figsize=(WIDTH, 0.8 + 0.19 * len(seconds)))
        axes = figure.subplots()
        colours = dict(zip(COLOURED, SERIES, strict=True))
        colours[BENCHMARKS_STAGE] = colours[EVALUATION_STAGE]
        drawn = axes.barh(
            range(len(seconds)),
            list(seconds.values()),
            height=0.7,
            color=[colours.get(stage_of(name), GRID) for name in seconds],
        )
        axes.bar_label(drawn, [duration(s) for s in seconds.values()], padding=3, fontsize=8)
        axes.set_yticks(range(len(seconds)), [visible(name) for name in seconds])
        axes.set(ylim=(len(seconds) - 0.4, -0.6), xlabel="wall time, s")
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        longest = max(seconds, key=lambda name: seconds[name])
        return figure, (
            f"In the order of the run; {duration(sum(seconds.values()))} in all, the longest stage "
            f"is {longest}. Stages of a kind share a colour. A stage's time counts its last, whole "
            "attempt, not what was cut short."
        )

    return chart("budget", "Wall time by stage", draw)


# -------------------------------------------------------------------------- a comparison of methods


def contrasts(summary: Mapping[str, Any]) -> Chart:
    """Draws every difference between methods with its interval, each seed beside it.

    summary: what `ldalign.report.comparison.summarise` returns.
    """

    def draw() -> tuple[Figure, str]:
        primary = len(summary["primary"])
        rows = summary["primary"] | summary["others"]
        measures = [(key, FIGURES[key]) for key in summary["figures"]]
        figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(rows)))
        panels = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
        places = np.arange(len(rows))
        for n, (axes, (key, measured)) in enumerate(zip(panels, measures, strict=True)):
            factor = measured.factor
            means = np.array([factor * gaps[key]["value"] for gaps in rows.values()])
            highs = np.array([factor * gaps[key]["high"] for gaps in rows.values()])
            for place, gaps in zip(places, rows.values(), strict=True):
                seeds = [factor * gap for gap in gaps[key]["by_seed"]]
                axes.plot(seeds, [place + 0.22] * len(seeds), "|", ms=5, color=INK, alpha=0.6)
            axes.errorbar(
                means, places, xerr=highs - means, fmt=MARKERS[n], ms=4.5, lw=1.4, color=SERIES[n]
            )
            if 0 < primary < len(rows):
                axes.axhline(primary - 0.5, color=INK, lw=0.8, ls=":")
            axes.axvline(0, color=INK, lw=0.8)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.set_xlabel(f"{measured.words}, {measured.points}")
        panels[0].set_yticks(places, [visible(name) for name in rows])
        panels[0].set_ylim(len(rows) - 0.4, -0.6)
        return figure, (
            "Bars: 95 % intervals over seeds and prompts. Small strokes: each seed's own "
            "difference. Above the dotted line: the comparisons named in advance."
        )

    return chart("comparison", "Differences between methods", draw)
