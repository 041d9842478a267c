"""Rows as people have them become files of token ids, once: read, divided, encoded, written.

Two passes over the pieces of the data, each spread over the machine's cores. The first reads every
row and keeps of it no more than its id and what it shares with others: so it is known which rows
are held out, which are trained on, and in what order, before any is encoded. The second encodes
those, and leaves a part for each piece; parts that are there already, of an earlier start that was
cut short, are not made again. Rows that do not fit give their place to others, which are encoded in
a round of their own. Then the parts are put together in the order in which the rows are used. The
result depends neither on the number of processes nor on where a stop came.
"""

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from ldalign.data.encoding import Fitting, TooLong, fit_rows
from ldalign.data.ledger import Found, Job, Ledger, Order, Outcome, Scan
from ldalign.data.reading import Reading, Tally, iter_chunks, read_chunk
from ldalign.data.records import BadRow, Chunk
from ldalign.data.rows import Row, RowNames
from ldalign.data.splitting import VALIDATION_ROWS, Division, divide, heldout_counts
from ldalign.data.store import PartWriter, write_split
from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.system.errors import InputError
from ldalign.system.files import write_text
from ldalign.system.workers import spread

Progress = Callable[[int], None]
# Above this share of rows whose prompt alone fills max_length, the setting may be wrong.
TOO_MANY = 0.01
ROWS_AT_ONCE = 256  # that are encoded together


@dataclass(frozen=True)
class Source:
    """Where rows come from: files, entry by entry of the data, or rows that no file holds."""

    entries: tuple[tuple[Path, ...], ...] = ()
    rows: tuple[Row, ...] = ()

    def pieces(self, reading: Reading) -> Iterator["Piece"]:
        """Yields the rows piece by piece, each small enough for one process at a time."""
        if self.rows:
            yield Piece(0, rows=self.rows)
        for entry, files in enumerate(self.entries):
            for chunk in iter_chunks(files, reading.columns):
                yield Piece(entry, chunk)


@dataclass(frozen=True)
class Piece:
    """Some records of a file that are not parsed yet, or rows; of one entry of the data."""

    entry: int
    chunk: Chunk | None = None
    rows: tuple[Row, ...] = ()

    def read(self, reading: Reading) -> tuple[Sequence[Row], Tally]:
        """Returns the rows, and what was found beside them."""
        if self.chunk is not None:
            return read_chunk(self.chunk, reading)
        return self.rows, Tally(good=len(self.rows), rows=len(self.rows))


@dataclass(frozen=True)
class Plan:
    """What is asked of the rows."""

    folder: Path  # of the policy, whose tokenizer is used
    template: str | None  # None: the policy's own
    today: date  # for a template that asks for it
    fitting: Fitting
    template_called: str | None = None  # in messages; None: by the policy's folder
    preference: bool = False  # every row that is trained on needs a rejected response
    heldout_fraction: float = 0.0
    heldout_rows: int = 0  # most rows that are held out, to be reported
    # Rows held out beside them, for validation; None: as `splitting.heldout_counts` has it.
    validation_rows: int | None = 0
    most: int | None = None  # most rows that are trained on
    shares: tuple[float, ...] | None = None  # of the data's entries in the rows trained on
    seed: int = 0
    shuffle: bool = True
    kinds: frozenset[str] = frozenset()  # of rows that a program checks; any other is none


def prepare_files(
    folder: Path,
    data: Source,
    heldout: Source | None,
    reading: Reading,
    plan: Plan,
    parts: Path,
    progress: Callable[[str, int | None], Progress],
    processes: int = 1,
) -> Found:
    """Writes the files of the splits into `folder` (`ldalign.data.store`) and says what was done.

    heldout: None: rows of `data` are held out. parts: a folder for what a later start goes on from.
    progress: (what is done, with how many rows in all, where that is known) gives what is called
    with rows that are done.

    In place of rows that turn out not to fit, the next ones are encoded, until there are as many as
    are wanted. Raises InputError for bad rows, as reading.bad_rows says, and for prompts that are
    too long.
    """
    parts.mkdir(parents=True, exist_ok=True)
    step = progress("reading", None)
    own, given = (
        [] if source is None else _scanned(source, reading, processes, step)
        for source in (data, heldout)
    )
    sources = [source for source in (data, heldout) if source is not None]
    ledger = Ledger([*own, *given], beside=sum(len(scan.names) for scan in own))
    for number in itertools.count():
        division = _divide(own, None if heldout is None else given, plan, ledger)
        order = _order(division, 0 if heldout is None else ledger.beside)
        jobs = ledger.jobs(order, parts / f"{number:02}")
        if not jobs:
            if ledger.leave_out_leaks(order):
                continue
            break
        step = progress("encoding", sum(len(job.chosen) for job in jobs))
        pieces = (piece for source in sources for piece in source.pieces(reading))
        wanted = {job.number: job for job in jobs}
        tasks = ((wanted[n], piece) for n, piece in enumerate(pieces) if n in wanted)
        work = functools.partial(_encode, reading=reading, plan=plan)
        for job, outcome in zip(jobs, spread(work, tasks, processes), strict=False):
            if outcome.bad and reading.bad_rows == "error":
                raise InputError(next(iter(outcome.bad.values())))
            ledger.note(job, outcome)
            step(len(job.chosen))
    found = ledger.found([*own, *given], order, division.left_out)
    for split, chosen in order.items():
        if split != "validation" or len(chosen):
            write_split(folder, split, ledger.places(chosen))
    return found


def read_splits(
    data: Source, heldout: Source | None, reading: Reading, plan: Plan
) -> tuple[dict[str, list[Row]], dict[str, Counter[str]]]:
    """Returns the rows that `prepare_files` would encode first, by split, in memory, and of every
    file the rows that were read, by what becomes of them: for whoever looks at them.

    Raises InputError for bad rows, as reading.bad_rows says.
    """
    rows: list[Row] = []
    found: list[list[Scan]] = [[], []]
    for scans, source in zip(found, (data, heldout), strict=True):
        tally, unique = Tally(), RowNames()
        for piece in source.pieces(reading) if source is not None else ():
            read, own = piece.read(reading)
            tally.add(own, reading)
            scans.append(_scan_of(piece, read, own))
            rows += map(unique.named, read)
        if source is not None:
            tally.finish(reading)
    scans = [*found[0], *found[1]]
    ledger = Ledger(scans, beside=sum(len(scan.names) for scan in found[0]))
    division = _divide(found[0], None if heldout is None else found[1], plan, ledger)
    order = _order(division, 0 if heldout is None else ledger.beside)
    chosen = {split: [rows[i] for i in numbers] for split, numbers in order.items()}
    return chosen, ledger.by_file(scans, order, division.left_out)


def _order(division: Division, shift: int) -> Order:
    """The rows of each split by their number among all. shift: of given held-out rows."""
    return {
        "train": division.train,
        "heldout": division.heldout + shift,
        "validation": division.validation + shift,
    }


# --------------------------------------------------------------------------------------- first pass


def _scanned(source: Source, reading: Reading, processes: int, step: Progress) -> list[Scan]:
    """What the first pass finds in a source, piece by piece."""
    tally, scans = Tally(), []
    work = functools.partial(_scan, reading=reading)
    for scan in spread(work, source.pieces(reading), processes):
        tally.add(scan.tally, reading)
        scans.append(scan)
        step(len(scan.names))
    tally.finish(reading)
    return scans


def _scan(piece: Piece, reading: Reading) -> Scan:
    return _scan_of(piece, *piece.read(reading))


def _scan_of(piece: Piece, rows: Sequence[Row], tally: Tally) -> Scan:
    return Scan(
        piece.entry,
        "" if piece.chunk is None else str(piece.chunk.path),
        [row.id for row in rows],
        [_digest(row.conversation or row.id) for row in rows],
        [_digest(json.dumps(row.history)) for row in rows],
        tally,
    )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _keys(scans: Sequence[Scan]) -> tuple[list[bytes], list[bytes]]:
    """The keys of the rows' conversations, and of their prompts."""
    conversations = [key for scan in scans for key in scan.conversations]
    return conversations, [key for scan in scans for key in scan.prompts]


def _divide(
    own: Sequence[Scan], given: Sequence[Scan] | None, plan: Plan, ledger: Ledger
) -> Division:
    conversations, prompts = _keys(own)
    aside = VALIDATION_ROWS if plan.validation_rows is None else plan.validation_rows
    asked = plan.heldout_rows + aside if plan.heldout_rows else 0
    if given is None:
        most = min(round(len(prompts) * plan.heldout_fraction), asked)
    else:
        most = int((~ledger.unfit[ledger.beside :]).sum()) if asked else 0
    heldout, validation = heldout_counts(most, plan.heldout_rows, plan.validation_rows)
    return divide(
        conversations,
        prompts,
        heldout=heldout,
        validation=validation,
        most=plan.most,
        seed=plan.seed,
        shuffle=plan.shuffle,
        entries=np.repeat([s.entry for s in own], [len(s.names) for s in own]),
        shares=plan.shares,
        given=None if given is None else _keys(given),
        unfit=(ledger.unfit[: ledger.beside], ledger.unfit[ledger.beside :]),
    )


# -------------------------------------------------------------------------------------- second pass


@functools.cache
def _tokenizer(
    folder: Path, template: str | None, today: date, template_called: str | None
) -> Tokenizer:
    """Each process has one."""
    return load_tokenizer(folder, template, today, template_called)


def _encode(task: tuple[Job, Piece], reading: Reading, plan: Plan) -> Outcome:
    """Encodes the chosen rows of a piece into the files of a part, unless they are there."""
    job, piece = task
    done = Path(f"{job.path}.json")
    if done.is_file():
        return _read_outcome(done)
    tokenizer = _tokenizer(plan.folder, plan.template, plan.today, plan.template_called)
    outcome = Outcome()
    with PartWriter(job.path) as part:
        for batch in _batches(job, piece, reading, plan.kinds):
            preference = [n for n, (number, _) in enumerate(batch) if number in job.train]
            fitted = fit_rows(
                [row for _, row in batch],
                tokenizer,
                plan.fitting,
                preference if plan.preference else (),
            )
            for (number, given), row in zip(batch, fitted, strict=True):
                if isinstance(row, TooLong):
                    outcome.long[number] = given.where, row.reason
                elif isinstance(row, BadRow):
                    outcome.bad[number] = str(row)
                else:
                    outcome.kept.append((number, part.add(row), _hash(row.prompt)))
                    if row.cut:
                        outcome.cut.append(number)
                    if row.truncated:
                        outcome.truncated.append(number)
    # Last: it says that the others are whole.
    write_text(done, json.dumps({k: _plain(v) for k, v in vars(outcome).items()}))
    return outcome


def _plain(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else value


def _read_outcome(path: Path) -> Outcome:
    r = json.loads(path.read_text(encoding="utf-8"))
    kept = [(number, place, prompt) for number, place, prompt in r["kept"]]
    long = {number: (where, reason) for number, (where, reason) in r["long"]}
    return Outcome(kept, r["cut"], r["truncated"], long, dict(r["bad"]))


def _hash(tokens: Sequence[int]) -> int:
    digest = hashlib.blake2b(np.array(tokens, dtype=np.int32).tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _batches(
    job: Job, piece: Piece, reading: Reading, kinds: frozenset[str]
) -> Iterator[list[tuple[int, Row]]]:
    """The chosen rows of a piece with their numbers, some at a time."""
    rows, _ = piece.read(reading)

    def named(number: int, row: Row) -> Row:
        # A kind of the user's own has no checker here.
        known = row if row.kind in kinds else replace(row, kind=None, answer=None)
        return replace(known, id=job.chosen[number])

    chosen = (
        (number, named(number, row)) for number, row in enumerate(rows) if number in job.chosen
    )
    while batch := list(itertools.islice(chosen, ROWS_AT_ONCE)):
        yield batch
