"""What all drawings share: size, colours, scales, and the way to a file and into a page.

Colours differ for colour-blind readers too, and series differ by line style and marker besides.
Backgrounds are transparent. `inline_svg` hands the colours over to the page's CSS, so that one
drawing suits a light and a dark page.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ldalign.evaluation.statistics import Array
from ldalign.system.files import write_bytes, writing
from ldalign.system.visible import visible

T = TypeVar("T")

INK, GRID = "#1b1f24", "#d5d9de"
# Okabe and Ito's colours, which colour-blind readers can tell apart.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (4, 1.5, 1, 1.5)), (0, (1, 1.2)))
MARKERS = "osD^v<"
MOST_TOGETHER = len(SERIES)  # iterations in one drawing: of more, so many are drawn
WIDTH = 9.4  # inches: the page's text width
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ldalign",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "figure.constrained_layout.use": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.formatter.use_mathtext": False,
    "text.parse_math": False,  # a $ in a name is a $
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Chart:
    """A drawing and what to see in it; without a figure, `caption` is why there is none."""

    name: str
    title: str
    caption: str
    figure: Figure | None


def write_chart(chart: Chart, folder: Path) -> str:
    """Writes NAME.svg and NAME.png (on white); returns the SVG as it goes into a page.

    Without a figure it returns "", and removes the files of an earlier report.
    """
    if chart.figure is None:
        for suffix in (".svg", ".png"):  # of an earlier report
            path = (folder / chart.name).with_suffix(suffix)
            with writing(path):
                path.unlink(missing_ok=True)
        return ""
    with matplotlib.rc_context(STYLE):
        drawn, white = io.BytesIO(), io.BytesIO()
        chart.figure.savefig(drawn, format="svg", metadata={"Date": None})
        chart.figure.set_layout_engine("none")  # it is laid out: not a second time
        chart.figure.savefig(white, format="png", dpi=130, facecolor="white")
    # A name may hold a control character, with which the file were no XML.
    svg = visible(drawn.getvalue().decode())
    write_bytes(folder / f"{chart.name}.svg", svg.encode())
    write_bytes(folder / f"{chart.name}.png", white.getvalue())
    return inline_svg(svg, chart.name, chart.title)


def inline_svg(svg: str, name: str, title: str) -> str:
    """Makes an SVG file a part of an HTML page: no prolog, ids of its own, a label, CSS colours."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{name}-", svg)
    series = ((colour, f"--series-{n}") for n, colour in enumerate(SERIES))
    for colour, variable in ((INK, "--ink"), (GRID, "--rule"), *series):
        svg = svg.replace(colour, f"var({variable}, {colour})")
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    width = re.search(r'viewBox="0 0 ([\d.]+)', svg)
    assert width
    label = (
        f'<svg role="img" aria-label="{html.escape(title)}" style="width: 100%; max-width: '
        f'{float(width[1]) * 4 / 3:.0f}px"'
    )
    return svg.replace("<svg", label, 1).replace("'DejaVu Sans', ", "")


def chart(name: str, title: str, draw: Callable[[], tuple[Figure, str] | str]) -> Chart:
    """Makes a Chart of what `draw` returns: the figure and its caption, or why there is none."""
    with matplotlib.rc_context(STYLE):
        drawn = draw()
    figure, caption = (None, drawn) if isinstance(drawn, str) else drawn
    return Chart(name, title, caption, figure)


def spread_out(names: Sequence[T], most: int = MOST_TOGETHER) -> list[T]:
    """The first and the last of the names, and as many between them, evenly, as make `most`."""
    if len(names) <= most:
        return list(names)
    return [names[i * (len(names) - 1) // (most - 1)] for i in range(most)]


def left_out(drawn: int, there: int) -> str:
    """Says at a caption's end that only some iterations are drawn; "" where all are."""
    return f" Drawn: {drawn} of {there} iterations, evenly spread." if drawn < there else ""


def choose_scale(values: Array) -> str:
    """Returns "log" for positive values with a long tail, else "linear"."""
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    if not len(positive) or (values < 0).any() or (values == 0).mean() > 0.05:
        return "linear"
    return "log" if positive.max() > 12 * np.median(positive) else "linear"


def bins(values: Array) -> tuple[Array, str]:
    """Returns edges of about sqrt(N) bins, at most 40, and the scale that they are even on."""
    scale, count = choose_scale(values), int(np.clip(np.sqrt(len(values)), 6, 40))
    if scale == "log":
        positive = values[values > 0]
        return np.geomspace(positive.min(), positive.max() * 1.0001, count + 1), scale
    return np.linspace(0, values.max() * 1.0001 or 1.0, count + 1), scale


def apply_scale(axes: Axes, side: str, scale: str) -> None:
    """Gives the axis `side`, "x" or "y", the scale: logarithmic, with plain numbers, or linear."""
    if scale == "log":
        (axes.set_xscale if side == "x" else axes.set_yscale)("log")
        axis = axes.xaxis if side == "x" else axes.yaxis
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
