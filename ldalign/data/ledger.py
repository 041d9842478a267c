"""What became of every row that was read: the account that preparation keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldalign.data.reading import MAX_SKIPPED, Tally
from ldalign.data.rows import RowNames
from ldalign.data.splitting import HELD_OUT, Indices
from ldalign.data.store import Part
from ldalign.system.errors import InputError

Order = dict[str, Indices]  # the rows of each split, in the order of their use

# What becomes of rows; `ldalign.data.splitting` has others.
USES = {"train": "trained on", "heldout": "held out", "validation": "validation"}
TOO_LONG = "the prompt alone fills max_length"
BAD = "bad"
BEYOND_HELD_OUT = "held-out rows beyond those that are used"


@dataclass
class Found:
    """What was read, and what became of it: every row is in `used`, or in `left_out`."""

    read: int = 0
    encoded: int = 0  # rows that were to be used
    repeated: int = 0  # rows with an id, or a whole content, that came before
    cut: int = 0  # training rows, a response of which lost its end
    truncated: int = 0  # training rows whose prompt lost its beginning
    bad: int = 0  # that could not be read, or not be encoded
    long: int = 0  # whose prompt alone fills max_length
    used: dict[str, int] = field(default_factory=dict)  # rows by split
    # Of the others, a line each, or one for many: id or place, and the reason why.
    left_out: list[dict[str, str | int]] = field(default_factory=list)
    # A file's rows that were read, by what became of them.
    files: dict[str, Counter[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scan:
    """What the first pass keeps of a piece."""

    entry: int
    file: str  # "" for rows of no file
    names: list[str]  # the ids as they are given, or of the content
    conversations: list[bytes]  # digests of what the row is a turn of
    prompts: list[bytes]
    tally: Tally


@dataclass(frozen=True)
class Job:
    """What of a piece is encoded."""

    number: int  # of the piece, those of given held-out rows after the others
    first: int  # the number of the piece's first row among all
    chosen: dict[int, str]  # the number of a row among the piece's good ones -> its id
    train: frozenset[int]  # of those chosen, the ones that are trained on
    path: Path  # of the part's files, without what their names end with


@dataclass
class Outcome:
    """What became of a job's rows, each by its number in the piece."""

    # Of those kept: number, where it is in the part, and a hash of its prompt's tokens.
    kept: list[tuple[int, int, int]] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    # Prompts that leave no room in max_length: the row's place, and the reason.
    long: dict[int, tuple[str, str]] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)  # and the reasons why


class Ledger:
    """All rows that were read, the data's before those of given held-out files, by their number:
    where each lies once it is encoded, or why it is not used.

    beside: how many the data have.
    """

    def __init__(self, scans: Sequence[Scan], beside: int) -> None:
        self.beside = beside
        self.begins = np.cumsum([0, *(len(scan.names) for scan in scans)])
        self.names: list[str] = []
        self.repeated = 0
        for number, scan in enumerate(scans):
            # Given held-out rows are named by themselves.
            if number == 0 or self.begins[number] == beside:
                unique = RowNames()
            before = unique.repeated
            self.names += [unique.name(name) for name in scan.names]
            self.repeated += unique.repeated - before
        count = len(self.names)
        self.unfit = np.zeros(count, dtype=bool)
        self.cut, self.truncated, self.leaks = (np.zeros(count, dtype=bool) for _ in range(3))
        self.part = np.full(count, -1, dtype=np.int32)  # of those encoded: which part they are in
        self.place = np.zeros(count, dtype=np.int32)  # and where in it
        self.prompt = np.zeros(count, dtype=np.uint64)  # hash of the prompt's tokens
        self.parts: list[Path] = []
        self.long: dict[int, tuple[str, str]] = {}
        self.bad: dict[int, str] = {}

    def jobs(self, order: Order, parts: Path) -> list[Job]:
        """The work that is left: the rows of `order` that are not encoded, piece by piece.

        parts: what the names of the parts' files begin with.
        """
        chosen: dict[int, dict[int, str]] = {}
        train: dict[int, list[int]] = {}
        for split, rows in order.items():
            rows = rows[(self.part[rows] < 0) & ~self.unfit[rows]]
            pieces = np.searchsorted(self.begins, rows, side="right") - 1
            for row, piece in zip(rows.tolist(), pieces.tolist(), strict=True):
                inside = row - int(self.begins[piece])
                chosen.setdefault(piece, {})[inside] = self.names[row]
                if split == "train":
                    train.setdefault(piece, []).append(inside)
        return [
            Job(
                number,
                int(self.begins[number]),
                chosen[number],
                frozenset(train.get(number, ())),
                Path(f"{parts}-{number:06}"),
            )
            for number in sorted(chosen)
        ]

    def note(self, job: Job, outcome: Outcome) -> None:
        """Takes down what became of a job's rows.

        Raises InputError where some of them were no longer there.
        """
        if len(outcome.kept) + len(outcome.long) + len(outcome.bad) < len(job.chosen):
            Path(f"{job.path}.json").unlink()  # of another file than the first pass read
            raise InputError("data: the files changed while they were read; start again")
        if outcome.kept:
            inside, places, prompts = zip(*outcome.kept, strict=True)
            rows = job.first + np.array(inside)
            self.part[rows] = len(self.parts)
            self.place[rows], self.prompt[rows] = places, np.array(prompts, dtype=np.uint64)
        self.parts.append(job.path)
        for flags, numbers in ((self.cut, outcome.cut), (self.truncated, outcome.truncated)):
            flags[job.first + np.array(numbers, dtype=np.int64)] = True
        self.long |= {job.first + number: found for number, found in outcome.long.items()}
        self.bad |= {job.first + number: reason for number, reason in outcome.bad.items()}
        self.unfit[[job.first + number for number in [*outcome.long, *outcome.bad]]] = True

    def leave_out_leaks(self, order: Order) -> bool:
        """Marks training rows whose prompt has the tokens of a held-out row's: a template that
        trims, or a truncation, makes equal what was not. Says whether there were any.
        """
        train = order["train"]
        others = np.concatenate([order["heldout"], order["validation"]])
        leaks = train[np.isin(self.prompt[train], self.prompt[others])]
        self.unfit[leaks] = self.leaks[leaks] = True
        return bool(len(leaks))

    def places(self, rows: Indices) -> list[tuple[Part, int]]:
        """Where rows lie, in their order."""
        opened = {number: Part(self.parts[number]) for number in np.unique(self.part[rows])}
        found = zip(self.part[rows].tolist(), self.place[rows].tolist(), strict=True)
        return [(opened[part], place) for part, place in found]

    def by_file(
        self, scans: Sequence[Scan], order: Order, left_out: dict[str, Indices]
    ) -> dict[str, Counter[str]]:
        """Of every file the rows that were read, by what becomes of them."""
        fates = [BEYOND_HELD_OUT, *USES.values(), *left_out, TOO_LONG, BAD, HELD_OUT]
        fate = np.zeros(len(self.names), dtype=np.int8)
        chosen = [*(order[split] for split in USES), *left_out.values()]
        chosen += [np.array(list(found), dtype=np.int64) for found in (self.long, self.bad)]
        for number, rows in enumerate([*chosen, np.flatnonzero(self.leaks)], start=1):
            fate[rows] = number
        files: dict[str, Counter[str]] = {}
        for scan, begin in zip(scans, self.begins, strict=False):
            counts = files.setdefault(scan.file, Counter())
            own = np.bincount(fate[begin : begin + len(scan.names)], minlength=len(fates))
            for name, count in zip(fates, own.tolist(), strict=True):
                counts[name] += count
            counts[BAD] += len(scan.tally.bad)
        return {file: +counts for file, counts in files.items()}

    def found(
        self,
        scans: Sequence[Scan],
        order: Order,
        left_out: dict[str, Indices],
    ) -> Found:
        """What there is to say once all is encoded. Raises InputError where too much is bad."""
        unread = [text for scan in scans for text in scan.tally.bad]
        found = Found(
            read=len(self.names) + len(unread),
            encoded=int((self.part >= 0).sum()) + len(self.long) + len(self.bad),
            repeated=self.repeated,
            cut=int(self.cut[order["train"]].sum()),
            truncated=int(self.truncated[order["train"]].sum()),
            bad=len(unread) + len(self.bad),
            long=len(self.long),
            used={split: len(rows) for split, rows in order.items()},
            files=self.by_file(scans, order, left_out),
        )
        if found.bad > MAX_SKIPPED * found.read:
            first = next(iter([*unread, *self.bad.values()]))
            raise InputError(
                f"{first}; {found.bad} of {found.read} rows are bad, more than the "
                f"{MAX_SKIPPED:.0%} that bad_rows=skip may leave out"
            )
        found.left_out += [{"reason": text} for text in unread]
        found.left_out += [{"id": self.names[i], "reason": t} for i, t in self.bad.items()]
        found.left_out += [
            {"id": self.names[i], "where": where, "reason": reason}
            for i, (where, reason) in self.long.items()
        ]
        counts = {reason: len(rows) for reason, rows in left_out.items()}
        counts[HELD_OUT] = counts.get(HELD_OUT, 0) + int(self.leaks.sum())
        given = len(self.names) - self.beside
        if given:
            spent = (
                len(order["heldout"])
                + len(order["validation"])
                + int(self.unfit[self.beside :].sum())
            )
            counts[BEYOND_HELD_OUT] = given - spent
        found.left_out += [{"rows": n, "reason": reason} for reason, n in counts.items() if n]
        return found
