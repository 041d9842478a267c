"""The rows of a run, in token ids: prepared once into RUN/data, and opened there by every rank and
every later start.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ldalign.data import embedded
from ldalign.data.encoding import Fitting
from ldalign.data.ledger import Found
from ldalign.data.preparation import (
    TOO_MANY,
    Plan,
    Progress,
    Source,
    prepare_files,
    read_splits,
)
from ldalign.data.reading import Reading
from ldalign.data.rows import Row
from ldalign.data.sources import EMBEDDED, WANTED, Key, check_local, described, files_of, find_files
from ldalign.data.splitting import VALIDATION_ROWS
from ldalign.data.store import NO_ROWS, Split, open_split
from ldalign.data.tokenizer import Tokenizer
from ldalign.models.weights import context_length
from ldalign.run.lengths import C, Lengths, asked_of, given, measure, read_lengths, write_lengths
from ldalign.run.manifest import MANIFEST, Parents, as_read, hash_settings, stage_parents
from ldalign.run.positions import reads
from ldalign.run.settings import RunConfig
from ldalign.system import distributed
from ldalign.system.config import to_yaml
from ldalign.system.distributed import on_rank0
from ldalign.system.errors import InputError
from ldalign.system.files import (
    PARTIAL,
    hash_file,
    read_json,
    temporary_folder,
    write_json,
    write_jsonl,
    writing,
)
from ldalign.system.metrics import Bar, Metrics, say
from ldalign.system.partial_rows import FOLDER as PARTS
from ldalign.system.workers import available_cores

if TYPE_CHECKING:
    from ldalign.run.context import Run

DATA = "data"  # the stage's folder
EMBEDDED_ROWS = {"train": 4000, "heldout": 600}
SOURCES_FILE = "sources.json"  # in the data stage: the files that were read, sha256 and rows
MAX_SOURCES = 10**9  # bytes of it: millions of files
FORMAT = 2  # of the files; another is made anew
SMALL_BYTES = 16 * 2**20  # of data: not worth the start of other processes
# Keys that the rows depend on, and the files that their tokens do.
KEYS = "turns bad_rows max_length long_prompts shuffle seed heldout_fraction".split()
COUNTED_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
FEWER = 0.9  # held out, as a share of what is asked for, below which it is said


class Data(NamedTuple):
    """The rows of a run, and its settings with the lengths that come from them."""

    train: Split
    heldout: Split  # whose figures are reported
    validation: Split  # which choices are made by; empty: none are set aside
    counts: Metrics  # what was read, and what became of it
    config: RunConfig


def open_data(run: Run, config: RunConfig, tokenizer: Tokenizer, write: bool = True) -> Data:
    """Opens the rows of a run, prepared first where they are not there: all ranks call it. Lengths
    that are 0 in the settings are taken from the data before, or from what is there.

    write: False: nothing is written into the run folder. Raises InputError for rows that cannot be
    used, and where the data, or what is asked of them, are others than when the run began.
    """
    folder = run.path / DATA
    files = on_rank0(lambda: _read_files(config, folder))
    lengths = None
    if asked_of(given(config)):
        lengths = on_rank0(lambda: _lengths(config, tokenizer, files, folder))
        config = lengths.applied(config)
        run.settle(to_yaml(config))
        say(lengths.text)
    parents = _parents(config, tokenizer, files)
    there = on_rank0(lambda: _there(run.path, parents, files, write))
    if not there and not write:
        return Data(*_in_passing(config, tokenizer, files), config)
    summary = run.stage(
        DATA,
        parents,
        lambda place: on_rank0(lambda: _make(place, config, tokenizer, files, lengths)),
        resume=True,
    )
    return Data(*_open(folder, summary, tokenizer), config)


def _open(
    folder: Path, summary: Metrics, tokenizer: Tokenizer
) -> tuple[Split, Split, Split, Metrics]:
    def split(name: str) -> Split:
        return open_split(folder, name, tokenizer.vocab_size)

    train, heldout = split("train"), split("heldout")
    aside = summary.get("rows/validation", 0) > 0
    return train, heldout, split("validation") if aside else NO_ROWS, summary


def _lengths(
    config: RunConfig, tokenizer: Tokenizer, files: Sequence[DataFile], folder: Path
) -> Lengths:
    """The lengths of a run: those that its rows were prepared with, where these are of the same
    data; else new ones.
    """
    old = read_lengths(folder, config)
    if old is not None:
        parents = as_read(_parents(old.applied(config), tokenizer, files))
        if stage_parents(folder) == parents:
            return old
    data, _ = _sources(config, [(file.key, file.entry, Path(file.path)) for file in files])
    return measure(config, data, _reading(config), tokenizer)


def with_lengths(config: C, tokenizer: Tokenizer) -> C:
    """The settings with the lengths that a new run would take from its data, for whoever only looks
    at rows.
    """
    if not asked_of(given(config)):
        return config
    lengths = measure(config, _sources(config, _listed(config))[0], _reading(config), tokenizer)
    say(lengths.text)
    return lengths.applied(config)


def _reading(config: RunConfig) -> Reading:
    return Reading(config.turns, config.bad_rows, config.data_columns)


def read_data(
    config: RunConfig, tokenizer: Tokenizer
) -> tuple[dict[str, list[Row]], dict[str, Counter[str]]]:
    """Returns the rows of a run by split, before any is encoded, in memory; and of every file the
    rows that were read, by what becomes of them.
    """
    say_files(config)
    sources = _sources(config, _listed(config))
    return read_splits(*sources, _reading(config), _plan(config, tokenizer))


def check_data(config: RunConfig) -> None:
    """Raises InputError for files of rows that are not there: before another is fetched, which may
    take long. Rank 0 looks.
    """
    for key, spec in _given(config).items():
        on_rank0(partial(check_local, spec, key))


def say_files(config: RunConfig) -> None:
    """Says how many files are read, which, and what of their folders is not."""
    for key, spec in _given(config).items():
        for line in described(find_files(spec, config.cache_folder, key), key):
            say(line)


def _given(config: RunConfig) -> dict[Key, str | list[str]]:
    """The keys that stand for files, and what they are."""
    specs = {key: getattr(config, key) for key in WANTED}
    return {key: spec for key, spec in specs.items() if spec is not None and spec not in EMBEDDED}


# ------------------------------------------------------------------------------------ what is there


class DataFile(NamedTuple):
    """A file that rows are read from, as it was when the start began."""

    key: str  # data or heldout
    entry: int  # of the key's list
    path: str
    sha256: str
    version: tuple[int, int]  # size in bytes, time of its last change in ns


def _listed(config: RunConfig) -> list[tuple[str, int, Path]]:
    """Key, entry and path of every file, in order; fetched where they are not there yet."""
    return [
        (key, number, path)
        for key, spec in _given(config).items()
        for number, entry in enumerate([spec] if isinstance(spec, str) else spec)
        for path in files_of(entry, config.cache_folder, key)
    ]


def _read_files(config: RunConfig, folder: Path) -> list[DataFile]:
    """The files with their hashes. Raises InputError for one in `folder`, which is written anew."""
    files = []
    for key, entry, path in _listed(config):
        if path.resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"{path}: lies where this run keeps its prepared rows; put it elsewhere, or start "
                "another run (run=NAME)"
            )
        version = _version(path)
        files.append(DataFile(key, entry, str(path), hash_file(path), version))
    return files


def _version(path: str | Path) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns


def _parents(config: RunConfig, tokenizer: Tokenizer, files: Sequence[DataFile]) -> Parents:
    tokens = (tokenizer.folder / name for name in COUNTED_FILES)
    own = str(config.data) if config.data in EMBEDDED else "files"
    return {
        "format": FORMAT,
        "data": own,
        "files": hash_settings([[f.key, f.entry, f.sha256] for f in files]),
        "tokenizer": hash_settings([hash_file(path) for path in tokens if path.is_file()]),
        "end and begin": json.dumps([tokenizer.end_ids, tokenizer.bos_id, tokenizer.adds_bos]),
        **tokenizer.template_parents,
        "rows used": _most(config) or "all",
        "method=dpo": str(config.method == "dpo"),
        "data_shares": json.dumps(config.data_shares),
        "columns": json.dumps([config.data_columns.named, sorted(config.ignore_columns)]),
        **{name: getattr(config, name) for name in KEYS},
        "evaluation.rows": config.evaluation.rows,
        **_validation_parents(config),
    }


def _validation_parents(config: RunConfig) -> Parents:
    """What is asked for, where it is not none, as in versions that had no validation."""
    rows = config.validation.rows
    return {} if rows == 0 else {"validation.rows": json.dumps(rows)}


def _most(config: RunConfig) -> int | None:
    """The most training rows that any stage uses."""
    asked = [
        config.max_rows,
        *(sft.rows for sft in (config.sft, config.continual_sft) if sft.epochs),
    ]
    return None if None in asked else max(n for n in asked if n is not None)


def _there(run: Path, parents: Parents, files: Sequence[DataFile], write: bool) -> bool:
    """Whether the rows are there as they are wanted. Others go, where nothing was made of them yet;
    else raises InputError.
    """
    old = stage_parents(run / DATA)
    if old == as_read(parents) or not old:
        return (run / DATA / MANIFEST).is_file()
    made = [p for p in run.glob("*/") if p.name not in (DATA, f"{DATA}{PARTIAL}")]
    if made:
        _refuse_changed(run / DATA, old, as_read(parents), files)
    if write:
        for name in (DATA, f"{DATA}{PARTIAL}"):
            shutil.rmtree(run / name, ignore_errors=True)
    return False


def _refuse_changed(
    folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], files: Sequence[DataFile]
) -> NoReturn:
    """Raises InputError naming what is another than when the run began: a file, or a key."""
    again = "or start another run (run=NAME)"
    before = _written_files(folder)
    if before and old.get("files") != new["files"]:
        hashes = {path: sha256 for _, path, sha256 in before}
        for file in files:
            if hashes.get(file.path, file.sha256) != file.sha256:
                raise InputError(
                    f"{file.path}: changed since this run began: sha256 was {hashes[file.path]}, "
                    f"now {file.sha256}; put it back, {again}"
                )
        was, now = (
            ", ".join(f"{key}={path}" for key, path in pairs) or "data=embedded"
            for pairs in ([f[:2] for f in before], [(f.key, f.path) for f in files])
        )
        raise InputError(f"{folder}: this run began with {was}, now {now}; put it back, {again}")
    changes = [
        f"{key} was {old.get(key, 'absent')!r}, now {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    raise InputError(
        f"{folder}: its rows were prepared otherwise, and used: {', '.join(changes)}; put it back, "
        f"{again}"
    )


def _written_files(folder: Path) -> list[tuple[str, str, str]]:
    """Key, path and sha256 of the files that the rows of `folder` are of; [] if it is damaged,
    which the stage says itself.
    """
    try:
        files = read_json(folder / SOURCES_FILE, MAX_SOURCES)
        return [(str(f["key"]), str(f["path"]), str(f["sha256"])) for f in files]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


# ------------------------------------------------------------------------------------------- making


def _in_passing(
    config: RunConfig, tokenizer: Tokenizer, files: Sequence[DataFile]
) -> tuple[Split, Split, Split, Metrics]:
    """The rows, out of a folder that is gone when they are open."""
    place = Path(on_rank0(lambda: temporary_folder("ldalign-data-")))
    try:
        summary = on_rank0(lambda: _make(place, config, tokenizer, files))
        return _open(place, summary, tokenizer)
    finally:
        distributed.barrier()  # all have opened them
        if distributed.rank() == 0:
            shutil.rmtree(place, ignore_errors=True)


def _make(
    folder: Path,
    config: RunConfig,
    tokenizer: Tokenizer,
    files: Sequence[DataFile],
    lengths: Lengths | None = None,
) -> Metrics:
    """Prepares the rows into a folder; returns its summary. Rank 0 does it.

    lengths: those that come from the data, to be kept beside the rows.
    """
    large = sum(file.version[0] for file in files) > SMALL_BYTES
    with writing(folder), contextlib.ExitStack() as stack:

        def progress(what: str, count: int | None) -> Progress:
            bar = stack.enter_context(Bar(f"{DATA}: {what}", count, "rows"))
            return lambda done: bar(done, 0)

        try:
            found = prepare_files(
                folder,
                *_sources(config, [(file.key, file.entry, Path(file.path)) for file in files]),
                _reading(config),
                _plan(config, tokenizer),
                folder / PARTS,
                progress,
                available_cores() if large else 1,
            )
        finally:
            _refuse_changing(files, folder / PARTS)  # also where a row is bad only now
    write_jsonl(folder / "dropped.jsonl", found.left_out)
    write_json(folder / SOURCES_FILE, [_account(file, found) for file in files])
    if lengths is not None:
        write_lengths(folder, lengths)
    _warn(found, config, tokenizer.folder)
    return {
        "rows/read": found.read,
        "rows/train": found.used["train"],
        "rows/heldout": found.used["heldout"],
        "rows/validation": found.used["validation"],
        "rows/dropped": found.long,
        "rows/cut": found.cut,
        "rows/truncated": found.truncated,
        "rows/skipped": found.bad,
        "rows/repeated": found.repeated,
        "rows/unused": found.read - found.bad - found.long - sum(found.used.values()),
    }


def _account(file: DataFile, found: Found) -> dict[str, Any]:
    """What is kept of a file that was read: its hash, and what became of its rows."""
    rows = dict(found.files.get(file.path, {}))
    return {"key": file.key, "path": file.path, "sha256": file.sha256, "rows": rows}


def _refuse_changing(files: Sequence[DataFile], parts: Path) -> None:
    """Raises InputError for a file that is another than when it was hashed; parts may be of both,
    and go.
    """
    for file in files:
        if _version(file.path) != file.version:
            shutil.rmtree(parts, ignore_errors=True)
            raise InputError(f"{file.path}: changed while it was read; start again")


def _sources(
    config: RunConfig, files: Sequence[tuple[str, int, Path]]
) -> tuple[Source, Source | None]:
    """Where training rows come from, and held-out rows that are given."""

    def of(key: str) -> Source:
        entries: dict[int, list[Path]] = {}
        for own, entry, path in files:
            if own == key:
                entries.setdefault(entry, []).append(path)
        return Source(tuple(tuple(paths) for paths in entries.values()))

    given = None if config.heldout is None else of("heldout")
    if config.data not in EMBEDDED:
        return of("data"), given
    any_wording = config.data == EMBEDDED[1]
    train, heldout = (
        _embedded_rows(config.seed, split, count, any_wording)
        for split, count in EMBEDDED_ROWS.items()
    )
    if config.method == "dpo":
        train = _with_wrong_answers(train)
    return Source(rows=tuple(train)), given or Source(rows=tuple(heldout))


def fitting_of(config: RunConfig, tokenizer: Tokenizer) -> Fitting:
    """How a run makes rows fit."""
    return Fitting(config.max_length, config.long_prompts, context_length(tokenizer.folder))


def _plan(config: RunConfig, tokenizer: Tokenizer) -> Plan:
    return Plan(
        folder=tokenizer.folder,
        template=tokenizer.template,
        template_called=tokenizer.template_called,
        today=tokenizer.today,
        fitting=fitting_of(config, tokenizer),
        preference=config.method == "dpo",
        kinds=frozenset(embedded.KINDS),
        heldout_fraction=config.heldout_fraction,
        heldout_rows=config.evaluation.rows,
        validation_rows=config.validation.rows,
        most=_most(config),
        shares=None if config.data_shares is None else tuple(config.data_shares),
        seed=config.seed,
        # The embedded rows are made in a random order.
        shuffle=config.shuffle and config.data not in EMBEDDED,
    )


def _warn(found: Found, config: RunConfig, policy: Path) -> None:
    """Says what a user may not expect of the rows."""
    length = f"max_length={config.max_length}"
    if found.long > TOO_MANY * found.encoded:
        positions = context_length(policy)
        more = config.max_length < positions
        why = "" if more else f", and {reads(policy, positions)}"
        helps = ["raise max_length" if more else "shorten the prompts"]
        helps += ["give long_prompts=truncate"] if config.long_prompts == "drop" else []
        say(
            f"data: WARNING: the prompt leaves no room in {length} in {found.long} of "
            f"{found.encoded} rows, in whose place others came as far as there are any "
            f"(data/dropped.jsonl){why}; {', or '.join(helps)}"
        )
    train = found.used["train"]
    if found.truncated > TOO_MANY * train:
        say(
            f"data: WARNING: {found.truncated} of {train} training prompts lost their beginning to "
            f"{length} (long_prompts=truncate)"
        )
    rows = config.validation.rows
    asked = config.evaluation.rows + (VALIDATION_ROWS if rows is None else rows)
    asked = min(asked, round(found.read * config.heldout_fraction)) if config.evaluation.rows else 0
    asked = asked if config.heldout is None and config.data not in EMBEDDED else 0
    heldout = found.used["heldout"] + found.used["validation"]
    if heldout < FEWER * asked:
        say(
            f"data: WARNING: {heldout} rows are held out of {asked} that are asked for: rows of "
            "one conversation or one prompt stay together, and their groups are larger"
        )
    if config.evaluation.rows and not found.used["heldout"] and not asked:
        say("data: nothing is held out (heldout_fraction=0): no policy will be evaluated")


def _embedded_rows(seed: int, split: str, count: int, any_wording: bool) -> list[Row]:
    # A system turn of our own, because SmolLM2's template else puts a longer one in front of every
    # prompt.
    system = {"role": "system", "content": "Be brief."}
    return [
        Row(
            r["id"],
            (system, r["messages"][0]),
            r["messages"][1]["content"],
            kind=r["kind"],
            answer=r["answer"],
            where=f"embedded:{r['id']}",
        )
        for r in embedded.make_rows(seed, split, count, any_wording)
    ]


def _with_wrong_answers(rows: list[Row]) -> list[Row]:
    """Preference rows of the embedded ones: rejected is the next response to another prompt of the
    kind, wrong here.

    A row for which there is none is left out.
    """
    out = []
    for i, row in enumerate(rows):
        for other in (*rows[i + 1 :], *rows[:i]):
            if other.kind == row.kind and not embedded.check(
                str(row.kind), row.answer, other.response
            ):
                out.append(replace(row, rejected=other.response))
                break
    return out
