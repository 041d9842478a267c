"""The data as they are trained on, to look at.

    ldalign inspect policy=FOLDER data=FILE [rows=...] [key=value ...]
    python train/inspect_data.py ...

Prints the tokens of some rows with their ids, by part: the prompt, which is read; the response and
its end token, which are trained on; what max_length cuts off. In colour in a terminal (NO_COLOR=1:
without). Then for every file what becomes of its rows, and their lengths. rows=5: the first five in
the order in which they are trained on; rows=0: the files alone; rows=ID, rows=train.jsonl:17, or a
list of these. The keys are those of train/align.py (policy, template, data, heldout, turns,
max_length, long_prompts, bad_rows, method, ...); nothing is trained or written.
"""

import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldalign.data.encoding import FittedRow, TooLong
from ldalign.data.inspection import (
    QUANTILES,
    FileFigures,
    Part,
    Split,
    choose_rows,
    file_figures,
    fit_split,
    parts_of,
    pieces,
)
from ldalign.data.ledger import USES
from ldalign.data.reading import MAX_SKIPPED
from ldalign.data.records import BadRow
from ldalign.data.rows import Row
from ldalign.data.tokenizer import Tokenizer
from ldalign.models.weights import context_length
from ldalign.run.context import open_policy, open_tokenizer
from ldalign.run.folder import RunFolder
from ldalign.run.prepared import check_data, fitting_of, read_data, with_lengths
from ldalign.run.settings import RunConfig
from ldalign.system import distributed, exits
from ldalign.system.config import setting, to_yaml
from ldalign.system.metrics import Bar, say
from ldalign.train.command import need, read_config

LeftOut = Mapping[str, Mapping[str, int]]  # file -> reason -> rows that were read and not chosen
OF_BAD_ROWS = {  # what becomes of a row that cannot be used, by bad_rows
    "error": "bad, which ends a run",
    "skip": "skipped (bad_rows=skip)",
}
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
        "rows to show: how many of the first in the order of training, then held-out ones; 0: the "
        "files' figures alone; or an id, FILE:LINE or a number, or a list of these",
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
    inspect(config)


def inspect(config: InspectConfig) -> None:
    """Prints the chosen rows and the figures of every file."""
    check_data(config)
    folder = open_policy(config)
    tokenizer = open_tokenizer(config, folder, RunFolder(Path(config.run), to_yaml(config)).began)
    config = with_lengths(config, tokenizer)
    rows, files = read_data(config, tokenizer)
    splits: list[tuple[Row, Split]] = [(row, "training") for row in rows["train"]]
    splits += [(row, "held out") for row in rows["heldout"]]
    splits += [(row, "validation") for row in rows["validation"]]
    left_out: LeftOut = {
        name: {fate: count for fate, count in counts.items() if fate not in USES.values()}
        for name, counts in files.items()
    }
    paint = Paint(colour=wants_colour())
    for i in choose_rows([row for row, _ in splits], config.rows):
        print(*row_lines(*splits[i], tokenizer, config, paint), "", sep="\n")
    with Bar("rows", len(splits), "rows") as progress:
        found = file_figures(
            counted(splits, progress),
            tokenizer,
            fitting_of(config, tokenizer),
            config.method == "dpo",
        )
    for name in dict.fromkeys([*found, *left_out]):
        figures = found.get(name, FileFigures())
        print(*figures_lines(name, figures, left_out.get(name, {}), config, paint), "", sep="\n")
    for line in warnings(found.values(), left_out, folder, config):
        say(f"WARNING: {line}")


def warnings(
    files: Collection[FileFigures], left_out: LeftOut, policy: Path, config: RunConfig
) -> Iterator[str]:
    """What keeps a run from taking the rows, a sentence each."""
    bad = sum(len(figures.bad) for figures in files)
    read = sum(len(f.bad) + sum(map(len, f.dropped.values())) + f.splits.total() for f in files)
    read += sum(sum(reasons.values()) for reasons in left_out.values())
    if config.bad_rows == "skip" and bad > MAX_SKIPPED * read:
        yield (
            f"{bad} of {read} rows are bad, more than the {MAX_SKIPPED:.0%} that bad_rows=skip may "
            "leave out: a run ends"
        )
    positions = context_length(policy)
    longer = sum(figures.longer_than(positions) for figures in files)
    if longer:
        yield (
            f"{longer} rows are longer than the {positions} tokens that the policy reads "
            f"(max_position_embeddings in {policy}/config.json): no run takes them; give "
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
    """A row's lines: where it is from, what becomes of it, then its parts."""
    head = f"{plain(row.where or 'row')}, id {plain(row.id)}, {split}"
    preference = config.method == "dpo"
    [found] = fit_split([(row, split)], tokenizer, fitting_of(config, tokenizer), preference)
    if isinstance(found, BadRow):
        return [paint(f"{head}: {OF_BAD_ROWS[config.bad_rows]}", BOLD), f"  {plain(str(found))}"]
    parts = parts_of(found, trained_on(config))
    dropped = isinstance(found, TooLong)
    read = 0 if dropped else sum(len(part.ids) for part in parts if part.name != "cut")
    trained = sum(len(part.ids) for part in parts if part.trained)
    use = "trained on" if split == "training" else "measured"
    lines = [paint(f"{head}: {read} tokens, {trained} {use}", BOLD)]
    if isinstance(found, TooLong):
        lines.append(f"  dropped: {found.reason}")
    elif found.truncated:
        lines.append(f"  {truncation(row, found)}")
    for part in parts:
        name = f"cut by max_length={config.max_length}" if part.name == "cut" else part.name
        what = WHAT.get(part.name, use if part.trained else f"not {use}")
        count = f"{len(part.ids)} token{'s' * (len(part.ids) != 1)}"
        lines.append(f"  {name}, {'left out' if dropped else what}: {count}")
        lines += token_lines(part, tokenizer, paint)
    return lines


def truncation(row: Row, fitted: FittedRow) -> str:
    """What a row whose prompt was too long has lost of it."""
    turns = len(row.history) - len(fitted.row.history)
    lost = [f"the first {turns} turns" if turns else ""]
    if fitted.row.history[-1] != row.history[-1]:
        lost.append("the question's beginning")
    return (
        f"truncated: without {' and '.join(filter(None, lost))}; the prompt had "
        f"{fitted.whole_prompt} tokens"
    )


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


def figures_lines(
    name: str,
    figures: FileFigures,
    left_out: Mapping[str, int],
    config: RunConfig,
    paint: "Paint",
) -> list[str]:
    """A file's lines: what becomes of each of its rows, what is cut, and a table of their lengths.

    left_out: rows that were read and not chosen, by reason.
    """
    others = sum(left_out.values()) + sum(map(len, figures.dropped.values()))
    bad = OF_BAD_ROWS[config.bad_rows]
    counts: dict[str, int] = {str(split): count for split, count in figures.splits.items()}
    counts |= {"left out": others, bad: len(figures.bad)}
    shown = " + ".join(f"{count} {what}" for what, count in counts.items() if count)
    lines = [paint(f"{plain(name)}: {sum(counts.values())} rows = {shown or 0}", BOLD)]
    lines += [f"  {count} left out: {reason}" for reason, count in left_out.items()]
    places = {f"left out: {reason}": rows for reason, rows in figures.dropped.items()}
    places |= {bad: figures.bad} if figures.bad else {}
    lines += [
        f"  {len(rows)} {what} (the first: {plain(rows[0])})" for what, rows in places.items()
    ]
    if figures.truncated:
        lines.append(f"  {figures.truncated} are truncated to leave room for the response")
    lines.append(f"  {figures.cut} have a response that is cut at max_length={config.max_length}")
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
