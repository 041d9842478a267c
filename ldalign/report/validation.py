"""The figure of what validation found while the policies of a run were trained."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ldalign.report.analysis import Numbers
from ldalign.report.chart import DASHES, MARKERS, SERIES, WIDTH, Chart, chart
from ldalign.report.notation import FIGURES
from ldalign.run.folder import shown_name

PANELS = {"validation/nll": FIGURES["nll"], "validation/accuracy": FIGURES["greedy"]}
ABSENT = (
    "no policy was measured while it was trained: no held-out rows are set aside for validation "
    "(validation.rows)."
)
CAPTION = (
    "Of rows that no other figure is of, as these choose: a line a training, over its optimizer "
    "steps, beginning with the weights that it started from. The ring marks the weights that the "
    "stage wrote: the best after a step of training, or the last (select). NLL: left where it "
    "rises, training longer makes the data's responses less likely."
)


def validation(records: Mapping[str, Sequence[Numbers]], written: Mapping[str, float]) -> Chart:
    """Draws the evaluations of every training stage over its steps.

    records: by the policy's name, of `table.read_validation`. written: by the same, the step whose
    weights the stage wrote.
    """

    def draw() -> tuple[Figure, str] | str:
        known = {name: rows for name, rows in records.items() if rows}
        keys = [key for key in PANELS if any(key in row for rows in known.values() for row in rows)]
        if not keys:
            return ABSENT
        figure = Figure(figsize=(WIDTH, 2.8))
        (panels,) = figure.subplots(1, len(keys), squeeze=False)
        for axes, key in zip(panels, keys, strict=True):
            measured = PANELS[key]
            for n, (name, rows) in enumerate(known.items()):
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
        return figure, CAPTION

    return chart("validation", "Validation while training", draw)
