"""Rows as people have them become files of token ids, once: read, divided, encoded, written.

Two passes over the pieces of the data, each spread over the machine's cores. The first reads every
row and keeps of it no more than its id and what it shares with others: so it is known which rows
are held out, which are trained on, and in what order, before any is encoded. The second encodes
those, and leaves a part for each piece; parts that are there already, of an earlier start that was
cut short, are not made again. Then the parts are put together in the order in which the rows are
used. The result depends neither on the number of processes nor on where a stop came.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import numpy as np

from ldalign.data.encoding import Fitting, fit_rows
from ldalign.data.reading import MAX_SKIPPED, Reading, Tally, iter_chunks, read_chunk
from ldalign.data.records import BadRow, Chunk
from ldalign.data.rows import Row, RowNames
from ldalign.data.splitting import VALIDATION_ROWS, Division, divide, heldout_counts
from ldalign.data.store import Part, PartWriter, write_split
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


@dataclass
class Found:
    """What was read, and what became of it: every row is in `used`, or in `left_out`."""

    read: int = 0
    repeated: int = 0  # rows with an id, or a whole content, that came before
    cut: int = 0  # training responses that lost their end
    bad: int = 0  # that could not be read, or not be encoded
    long: int = 0  # whose prompt alone fills max_length
    used: dict[str, int] = field(default_factory=dict)  # rows by split
    # Of the others, a line each, or one for many: id or place, and the reason why.
    left_out: list[dict[str, str | int]] = field(default_factory=list)


@dataclass(frozen=True)
class Scan:
    """What the first pass keeps of a piece."""

    entry: int
    names: list[str]  # the ids as they are given, or of the content
    conversations: list[bytes]  # digests of what the row is a turn of
    prompts: list[bytes]
    tally: Tally


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

    Raises InputError for bad rows, as reading.bad_rows says, and for prompts that are too long.
    """
    parts.mkdir(parents=True, exist_ok=True)
    step = progress("reading", None)
    own, given = (
        [] if source is None else _scanned(source, reading, processes, step)
        for source in (data, heldout)
    )
    found = Found(read=sum(len(s.names) + len(s.tally.bad) for s in [*own, *given]))
    found.left_out += [{"reason": text} for s in [*own, *given] for text in s.tally.bad]
    found.bad = len(found.left_out)
    division = _divide(own, None if heldout is None else given, plan)
    jobs, places = _jobs(own, given, division, parts)
    found.repeated = jobs.repeated
    step = progress("encoding", sum(len(job.chosen) for job in jobs.of))
    pieces = (p for source in (data, heldout) if source is not None for p in source.pieces(reading))
    wanted = {job.number: job for job in jobs.of}
    tasks = ((wanted[n], piece) for n, piece in enumerate(pieces) if n in wanted)
    work = functools.partial(_encode, reading=reading, plan=plan)
    outcomes: dict[int, Outcome] = {}
    for job, outcome in zip(jobs.of, spread(work, tasks, processes), strict=True):
        if outcome.bad and reading.bad_rows == "error":
            raise InputError(next(iter(outcome.bad.values())))
        outcomes[job.number] = outcome
        step(len(job.chosen))
    _note(found, outcomes, jobs.of, division, plan)
    used = len(division.heldout) + len(division.validation)
    beyond = sum(len(scan.names) for scan in given) - used
    if heldout is not None and beyond:
        reason = "held-out rows beyond those that are used"
        found.left_out.append({"rows": beyond, "reason": reason})
    opened = {job.number: Part(job.path) for job in jobs.of}
    for split, order in places.items():
        kept = [(job, row) for job, row in order if row in outcomes[job].places]
        found.used[split] = len(kept)
        if split == "train":
            found.cut = sum(row in outcomes[job].cut for job, row in kept)
        if split == "validation" and not kept:
            continue  # as in runs of versions that had no validation
        write_split(folder, split, [(opened[job], outcomes[job].places[row]) for job, row in kept])
    return found


def read_splits(
    data: Source, heldout: Source | None, reading: Reading, plan: Plan
) -> dict[str, list[Row]]:
    """Returns the rows that `prepare_files` would encode, by split, in memory: for whoever looks at
    them. Raises InputError for bad rows, as reading.bad_rows says.
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
    division = _divide(found[0], None if heldout is None else found[1], plan)
    shift = sum(len(scan.names) for scan in found[0]) if heldout is not None else 0
    return {
        "train": [rows[i] for i in division.train],
        "heldout": [rows[i + shift] for i in division.heldout],
        "validation": [rows[i + shift] for i in division.validation],
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


def _divide(own: Sequence[Scan], given: Sequence[Scan] | None, plan: Plan) -> Division:
    conversations, prompts = _keys(own)
    aside = VALIDATION_ROWS if plan.validation_rows is None else plan.validation_rows
    asked = plan.heldout_rows + aside if plan.heldout_rows else 0
    if given is None:
        most = min(round(len(prompts) * plan.heldout_fraction), asked)
    else:
        most = sum(len(scan.names) for scan in given) if asked else 0
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
    )


# -------------------------------------------------------------------------------------- second pass


@dataclass(frozen=True)
class Job:
    """What of a piece is encoded."""

    number: int  # of the piece, those of given held-out rows after the others
    chosen: dict[int, str]  # the number of a row among the piece's good ones -> its id
    train: frozenset[int]  # of those chosen, the ones that are trained on
    path: Path  # of the part's files, without what their names end with


@dataclass(frozen=True)
class Outcome:
    """What became of a job's rows, each by its number in the piece."""

    places: dict[int, int]  # of those kept -> where it is in the part
    cut: set[int]
    long: set[int]  # whose prompt alone fills max_length
    bad: dict[int, str]


Places = dict[str, list[tuple[int, int]]]  # split -> (job, row in its piece) in the order of use


@dataclass(frozen=True)
class Jobs:
    """The pieces that have rows to encode."""

    of: list[Job]
    repeated: int  # rows with an id that one before them had


def _jobs(
    own: Sequence[Scan], given: Sequence[Scan], division: Division, parts: Path
) -> tuple[Jobs, Places]:
    """The work of the second pass, and where each split's rows lie."""
    names, repeated = [], 0
    for scans in (own, given):
        unique = RowNames()
        names += [unique.name(name) for scan in scans for name in scan.names]
        repeated += unique.repeated
    begins = np.cumsum([0, *(len(scan.names) for scan in [*own, *given])])
    # Given held-out rows are numbered from their own beginning.
    shift = begins[len(own)] if given else 0
    places: Places = {}
    chosen: dict[int, dict[int, str]] = {}
    splits = {
        "train": division.train,
        "heldout": division.heldout + shift,
        "validation": division.validation + shift,
    }
    for split, rows in splits.items():
        of_piece = np.searchsorted(begins, rows, side="right") - 1
        insides = rows - begins[of_piece]
        places[split] = list(zip(of_piece.tolist(), insides.tolist(), strict=True))
        for row, (number, inside) in zip(rows.tolist(), places[split], strict=True):
            chosen.setdefault(number, {})[inside] = names[row]
    train: dict[int, list[int]] = {}
    for number, inside in places["train"]:
        train.setdefault(number, []).append(inside)
    jobs = [
        Job(number, chosen[number], frozenset(train.get(number, ())), parts / f"{number:06}")
        for number in sorted(chosen)
    ]
    return Jobs(jobs, repeated), places


@functools.cache
def _tokenizer(folder: Path, template: str | None, today: date) -> Tokenizer:
    """Each process has one."""
    return load_tokenizer(folder, template, today)


def _encode(task: tuple[Job, Piece], reading: Reading, plan: Plan) -> Outcome:
    """Encodes the chosen rows of a piece into the files of a part, unless they are there."""
    job, piece = task
    done = Path(f"{job.path}.json")
    if done.is_file():
        return _read_outcome(done)
    tokenizer = _tokenizer(plan.folder, plan.template, plan.today)
    outcome = Outcome({}, set(), set(), {})
    with PartWriter(job.path) as part:
        for batch in _batches(job, piece, reading, plan.kinds):
            fitted = fit_rows([row for _, row in batch], tokenizer, plan.fitting)
            for (number, given), row in zip(batch, fitted, strict=True):
                if plan.preference and number in job.train and given.rejected is None:
                    outcome.bad[number] = (
                        f"{given.where or given.id}: has no rejected response, which method=dpo "
                        "needs: rows are {prompt, chosen, rejected} (docs/data.md)"
                    )
                elif row is None:
                    outcome.long.add(number)
                elif isinstance(row, BadRow):
                    outcome.bad[number] = str(row)
                else:
                    outcome.places[number] = part.add(row)
                    if row.cut:
                        outcome.cut.add(number)
    # Last: it says that the others are whole.
    write_text(
        done,
        json.dumps(
            {
                "places": list(outcome.places.items()),
                "cut": sorted(outcome.cut),
                "long": sorted(outcome.long),
                "bad": list(outcome.bad.items()),
            }
        ),
    )
    return outcome


def _read_outcome(path: Path) -> Outcome:
    r = json.loads(path.read_text(encoding="utf-8"))
    return Outcome(dict(r["places"]), set(r["cut"]), set(r["long"]), dict(r["bad"]))


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


# -------------------------------------------------------------------------------------- what it was


def _note(
    found: Found,
    outcomes: dict[int, Outcome],
    jobs: Sequence[Job],
    division: Division,
    plan: Plan,
) -> None:
    """Counts what was left out, and raises InputError where it is too much."""
    for job in jobs:
        outcome = outcomes[job.number]
        found.bad += len(outcome.bad)
        found.long += len(outcome.long)
        found.left_out += [
            {"id": job.chosen[number], "reason": message} for number, message in outcome.bad.items()
        ]
        found.left_out += [
            {
                "id": job.chosen[number],
                "reason": f"the prompt alone fills max_length={plan.fitting.max_length}",
            }
            for number in sorted(outcome.long)
        ]
    if found.bad > MAX_SKIPPED * found.read:
        raise InputError(
            f"{found.left_out[0]['reason']}; {found.bad} of {found.read} rows are bad, more than "
            f"the {MAX_SKIPPED:.0%} that bad_rows=skip may leave out"
        )
    for reason, rows in division.left_out.items():
        if len(rows):
            found.left_out.append({"rows": len(rows), "reason": reason})
