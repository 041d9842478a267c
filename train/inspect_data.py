"""The data as they are trained on, to look at.

    python train/inspect_data.py policy=FOLDER data=FILE [rows=...] [key=value ...]

Prints the tokens of some rows with their ids, by part: the prompt, which is read; the response and
its end token, which are trained on; what max_length cuts off. In colour in a terminal (NO_COLOR=1:
without). Then for every file the rows, their lengths, what is cut and what is dropped. rows=5: the
first five; rows=ID, rows=train.jsonl:17, or a list of these. The keys are those of train/align.py
(policy, template, data, heldout, turns, max_length, method, ...); nothing is trained or written.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldalign.data.inspection import (
    QUANTILES,
    FileFigures,
    Part,
    Split,
    choose_rows,
    file_figures,
    parts_of,
    pieces,
)
from ldalign.data.rows import Row
from ldalign.data.tokenizer import Tokenizer
from ldalign.models.weights import context_length
from ldalign.run.context import open_policy, open_tokenizer
from ldalign.run.folder import RunFolder
from ldalign.run.prepared import read_data
from ldalign.run.settings import RunConfig
from ldalign.system import distributed, exits
from ldalign.system.config import setting, to_yaml
from ldalign.system.errors import InputError
from ldalign.system.metrics import Bar, say
from ldalign.train.command import need, read_config

WHAT = {"prompt": "read", "cut": "left out"}  # becomes of a part; a response is trained on, or not
STYLES = {  # of a terminal, by part
    "prompt": "34",
    "response": "32",
    "end": "1;32",
    "rejected": "33",
    "rejected end": "1;33",
    "cut": "9;31",
}
DIM, BOLD = "2", "1"


@dataclass(frozen=True)
class InspectConfig(RunConfig):
    """The keys of `train/inspect_data.py`: a run's, and which rows are shown."""

    rows: int | str | list[str] = setting(
        3,
        "rows to show: how many of the first, training rows before held-out ones; or an id, "
        "FILE:LINE or a number, or a list of these",
    )


def main(argv: list[str]) -> None:
    """Reads the settings, prints."""
    config = read_config(argv, __doc__ or "", InspectConfig)
    if not isinstance(config, InspectConfig):
        return
    need("--dry-run" not in argv, "--dry-run: nothing is made here anyway; leave it out")
    need(distributed.world_size() == 1, "one process is enough; start it without torchrun")
    need(
        not isinstance(config.rows, int) or config.rows >= 0,
        f"rows={config.rows}: give 0 or more, or ids",
    )
    with contextlib.suppress(BrokenPipeError):  # `... | head` has seen enough
        inspect(config)


def inspect(config: InspectConfig) -> None:
    """Prints the chosen rows and the figures of every file."""
    folder = open_policy(config)
    tokenizer = open_tokenizer(config, folder, RunFolder(Path(config.run), to_yaml(config)).began)
    rows = read_data(config, tokenizer)
    splits: list[tuple[Row, Split]] = [(row, "training") for row in rows["train"]]
    splits += [(row, "held out") for row in rows["heldout"]]
    splits += [(row, "validation") for row in rows["validation"]]
    paint = Paint(colour=wants_colour())
    for i in choose_rows([row for row, _ in splits], config.rows):
        print(*row_lines(*splits[i], tokenizer, config, paint), "", sep="\n")
    with Bar("rows", len(splits), "rows") as progress:
        found = file_figures(counted(splits, progress), tokenizer, config.max_length)
    for name, figures in found.items():
        print(*figures_lines(name, figures, config.max_length, paint), "", sep="\n")
    positions = context_length(folder)
    longer = sum(f.longer_than(positions, config.max_length) for f in found.values())
    if longer:
        say(
            f"WARNING: {longer} rows are longer than the {positions} tokens that the policy reads "
            f"(max_position_embeddings in {folder}/config.json): no run takes them; give "
            f"max_length={positions} or less"
        )


def counted(
    rows: Sequence[tuple[Row, Split]], progress: Callable[[int, int], None]
) -> Iterator[tuple[Row, Split]]:
    """Yields the rows, and tells a bar of each that is done."""
    for row in rows:
        yield row
        progress(1, 0)


# ------------------------------------------------------------------------------------------ one row


def row_lines(
    row: Row, split: Split, tokenizer: Tokenizer, config: RunConfig, paint: "Paint"
) -> list[str]:
    """A row's lines: where it is from, then its parts."""
    head = f"{plain(row.where or 'row')}, id {plain(row.id)}, {split}"
    try:
        parts = parts_of(row, tokenizer, config.max_length, trained_on(config))
    except InputError as error:
        return [paint(f"{head}: cannot be encoded", BOLD), f"  {plain(str(error))}"]
    read = sum(len(part.ids) for part in parts if part.name != "cut")
    trained = sum(len(part.ids) for part in parts if part.trained)
    use = "trained on" if split == "training" else "measured"
    lines = [paint(f"{head}: {read} tokens, {trained} {use}", BOLD)]
    dropped = all(part.name in ("prompt", "cut") for part in parts)
    if dropped:
        lines.append(f"  dropped: the prompt alone fills max_length={config.max_length}")
    for part in parts:
        name = f"cut by max_length={config.max_length}" if part.name == "cut" else part.name
        what = WHAT.get(part.name, use if part.trained else f"not {use}")
        count = f"{len(part.ids)} token{'s' * (len(part.ids) != 1)}"
        lines.append(f"  {name}, {'left out' if dropped else what}: {count}")
        lines += token_lines(part, tokenizer, paint)
    return lines


def trained_on(config: RunConfig) -> set[str]:
    """Which responses of the data the config trains on: the real one, the rejected one."""
    fine_tuned = config.sft.epochs or config.continual_sft.epochs
    by_itself = config.method in ("self_reward", "rlaif")  # of two samples of its own
    real = {"response"} if fine_tuned or not by_itself else set()
    return real | ({"rejected"} if config.method == "dpo" else set())


def token_lines(part: Part, tokenizer: Tokenizer, paint: "Paint") -> list[str]:
    """A part's tokens, each as text:id, in lines of the terminal's width."""
    width = shutil.get_terminal_size((100, 24)).columns
    lines: list[str] = []
    used = width
    for piece, ids in pieces(part.ids, tokenizer):
        text, number = repr(piece), "+".join(map(str, ids))
        wide = len(text) + len(number) + 2
        if used + wide > width:
            lines.append("   ")
            used = 3
        lines[-1] += f" {paint(text, STYLES[part.name])}:{paint(number, DIM)}"
        used += wide
    return lines


# ----------------------------------------------------------------------------------------- one file


def figures_lines(name: str, figures: FileFigures, max_length: int, paint: "Paint") -> list[str]:
    """A file's lines: its rows, what is dropped and cut, and a table of their lengths."""
    splits = ", ".join(f"{count} {split}" for split, count in figures.splits.items())
    lines = [paint(f"{plain(name)}: {sum(figures.splits.values())} rows: {splits}", BOLD)]
    for reason, places in figures.dropped.items():
        lines.append(f"  {len(places)} dropped: {reason} (the first: {plain(places[0])})")
    lines.append(f"  {figures.cut} responses are cut at max_length={max_length}")
    table = figures.quantiles()
    if table:
        lines.append(f"  {'tokens':10}" + "".join(f"{title:>8}" for title in QUANTILES))
        lines += [f"  {key:10}" + "".join(f"{n:8}" for n in row) for key, row in table.items()]
    return lines


# --------------------------------------------------------------------------------------- a terminal


@dataclass(frozen=True)
class Paint:
    """Puts text into a terminal's style, where colour is wanted."""

    colour: bool

    def __call__(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self.colour else text


def wants_colour() -> bool:
    """Whether what is printed goes to a terminal that shows colours (https://no-color.org)."""
    dumb = os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not dumb


def plain(text: str) -> str:
    """A text of a stranger's file in one line: what a terminal would obey is escaped."""
    return text if text.isprintable() else repr(text)


if __name__ == "__main__":
    exits.run(main)
