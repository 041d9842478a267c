"""The figure of what validation found while the policies of a run were trained."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ldalign.report.analysis import Numbers
from ldalign.report.chart import DASHES, MARKERS, SERIES, WIDTH, Chart, chart, left_out, spread_out
from ldalign.report.notation import FIGURES
from ldalign.run.folder import shown_name

PANELS = {"validation/nll": FIGURES["nll"], "validation/accuracy": FIGURES["greedy"]}
ABSENT = (
    "no policy was measured while it was trained: no held-out rows are set aside for validation "
    "(validation.rows)."
)
CAPTION = (
    "Measured on the validation rows, a line for each training, over its optimizer steps; step 0 "
    "is before the first. The ring marks the weights that were kept: the best after a step of "
    "training (select=best), or the last. Where the NLL rises, training longer makes the data's "
    "responses less likely. Every panel has a scale of its own."
)


def validation(records: Mapping[str, Sequence[Numbers]], written: Mapping[str, float]) -> Chart:
    """Draws the evaluations of every training stage over its steps.

    records: by the policy's name, of `table.read_validation`. written: by the same, the step whose
    weights the stage wrote.
    """

    def draw() -> tuple[Figure, str] | str:
        every = {name: rows for name, rows in records.items() if rows}
        turns = [name for name in every if name.startswith("iteration_")]
        drawn = spread_out(turns)
        known = {n: rows for n, rows in every.items() if n in drawn or n not in turns}
        keys = [key for key in PANELS if any(key in row for rows in known.values() for row in rows)]
        if not keys:
            return ABSENT
        # SFT falls so far that the other lines would lie on each other beside it.
        groups = [g for g in ({"sft"} & known.keys(), known.keys() - {"sft"}) if g]
        figure = Figure(figsize=(WIDTH, 0.2 + 2.6 * len(keys)))
        grid = figure.subplots(len(keys), len(groups), squeeze=False)
        for axes, (key, group) in zip(grid.flat, product(keys, groups), strict=True):
            measured = PANELS[key]
            for n, (name, rows) in enumerate(known.items()):
                if name not in group:
                    continue
                steps = np.array([row["global_step"] for row in rows])
                values = measured.factor * np.array([row.get(key, np.nan) for row in rows])
                colour, n = SERIES[n % len(SERIES)], n % len(DASHES)
                axes.plot(
                    steps,
                    values,
                    color=colour,
                    ls=DASHES[n],
                    marker=MARKERS[n % len(MARKERS)],
                    ms=3.5,
                    lw=1.4,
                    label=shown_name(name),
                )
                chosen = steps == written.get(name)
                axes.plot(steps[chosen], values[chosen], "o", ms=9, mfc="none", mec=colour, mew=1.4)
            axes.set_title(measured.words)
            axes.set_ylabel(measured.unit)
            axes.set_xlabel("optimizer step of the stage")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.legend(loc="best")
        return figure, CAPTION + left_out(len(drawn), len(turns))

    return chart("validation", "Validation while training", draw)
