"""The rows of a run, in token ids: prepared once into RUN/data, and opened there by every rank and
every later start.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ldalign.data import embedded
from ldalign.data.encoding import Fitting
from ldalign.data.preparation import (
    TOO_MANY,
    Found,
    Plan,
    Progress,
    Source,
    prepare_files,
    read_splits,
)
from ldalign.data.reading import Reading
from ldalign.data.rows import Row
from ldalign.data.sources import files_of
from ldalign.data.store import NO_ROWS, Split, open_split
from ldalign.data.tokenizer import Tokenizer
from ldalign.run.manifest import MANIFEST, Parents, hash_settings, stage_parents
from ldalign.run.settings import RunConfig
from ldalign.system import distributed
from ldalign.system.distributed import on_rank0
from ldalign.system.errors import InputError
from ldalign.system.files import PARTIAL, hash_file, write_json, write_jsonl
from ldalign.system.metrics import Bar, Metrics, say
from ldalign.system.partial_rows import FOLDER as PARTS
from ldalign.system.workers import available_cores

if TYPE_CHECKING:
    from ldalign.run.context import Run

DATA = "data"  # the stage's folder
EMBEDDED = "embedded"
EMBEDDED_ROWS = {"train": 4000, "heldout": 600}
SOURCES_FILE = "sources.json"  # in the data stage: the files that were read, and their sha256
FORMAT = 1  # of the files; another is made anew
SMALL_BYTES = 16 * 2**20  # of data: not worth the start of other processes
# Keys that the rows depend on, and the files that their tokens do.
KEYS = "turns bad_rows max_length long_prompts shuffle seed heldout_fraction".split()
COUNTED_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Data(NamedTuple):
    """The rows of a run."""

    train: Split
    heldout: Split  # whose figures are reported
    validation: Split  # which choices are made by; empty: none are set aside
    counts: Metrics  # what was read, and what became of it


def open_data(run: Run, config: RunConfig, tokenizer: Tokenizer, write: bool = True) -> Data:
    """Opens the rows of a run, prepared first where they are not there: all ranks call it.

    write: False: nothing is written into the run folder. Raises InputError for rows that cannot be
    used, and where the data, or what is asked of them, are others than when the run began.
    """
    sources = on_rank0(lambda: {str(path): hash_file(path) for path in data_files(config)})
    parents = _parents(config, tokenizer, sources)
    folder = run.path / DATA
    there = on_rank0(lambda: _there(run.path, parents, sources, write))
    if not there and not write:
        return _in_passing(config, tokenizer)
    summary = run.stage(
        DATA,
        parents,
        lambda place: on_rank0(lambda: _make(place, config, tokenizer, sources)),
        resume=True,
    )
    return _open(folder, summary)


def _open(folder: Path, summary: Metrics) -> Data:
    train, heldout = (open_split(folder, name) for name in ("train", "heldout"))
    aside = summary.get("rows/validation", 0) > 0
    return Data(train, heldout, open_split(folder, "validation") if aside else NO_ROWS, summary)


def read_data(config: RunConfig, tokenizer: Tokenizer) -> dict[str, list[Row]]:
    """Returns the rows of a run by split, before any is encoded, in memory."""
    train, heldout = _sources(config)
    reading = Reading(config.turns, config.bad_rows, config.data_columns)
    return read_splits(train, heldout, reading, _plan(config, tokenizer))


def data_files(config: RunConfig) -> list[Path]:
    """The files that the run's rows are read from, fetched where they are not there yet."""
    specs = [spec for spec in (config.data, config.heldout) if spec not in (None, EMBEDDED)]
    return [path for spec in specs for path in files_of(spec, config.cache_folder)]


def _parents(config: RunConfig, tokenizer: Tokenizer, sources: Mapping[str, str]) -> Parents:
    tokens = (tokenizer.folder / name for name in COUNTED_FILES)
    return {
        "format": FORMAT,
        "sources": hash_settings(sorted(sources.values())),
        "tokenizer": hash_settings([hash_file(path) for path in tokens if path.is_file()]),
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


def _there(run: Path, parents: Parents, sources: Mapping[str, str], write: bool) -> bool:
    """Whether the rows are there as they are wanted. Others go, where nothing was made of them yet;
    else raises InputError.
    """
    old = stage_parents(run / DATA)
    if old == dict(parents) or not old:
        return (run / DATA / MANIFEST).is_file()
    made = [p for p in run.glob("*/") if p.name not in (DATA, f"{DATA}{PARTIAL}")]
    if made:
        _refuse_changed(run / DATA, sources)
        return True  # `run.stage` says which of the settings are others
    if write:
        for name in (DATA, f"{DATA}{PARTIAL}"):
            shutil.rmtree(run / name, ignore_errors=True)
    return False


def _refuse_changed(folder: Path, sources: Mapping[str, str]) -> None:
    """Raises InputError naming a data file that changed since the run began."""
    try:
        old = dict(json.loads((folder / SOURCES_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return  # a damaged stage, which says so itself
    for path, new in sources.items():
        if path in old and old[path] != new:
            raise InputError(
                f"{path}: changed since this run began: sha256 was {old[path]}, now {new}; "
                "put it back, or start another run (run=NAME)"
            )


# ------------------------------------------------------------------------------------------- making


def _in_passing(config: RunConfig, tokenizer: Tokenizer) -> Data:
    """The rows, out of a folder that is gone when they are open."""
    place = Path(on_rank0(lambda: tempfile.mkdtemp(prefix="ldalign-data-")))
    try:
        summary = on_rank0(lambda: _make(place, config, tokenizer, {}))
        return _open(place, summary)
    finally:
        distributed.barrier()  # all have opened them
        if distributed.rank() == 0:
            shutil.rmtree(place, ignore_errors=True)


def _make(
    folder: Path, config: RunConfig, tokenizer: Tokenizer, sources: Mapping[str, str]
) -> Metrics:
    """Prepares the rows into a folder; returns its summary. Rank 0 does it."""
    train, heldout = _sources(config)
    large = sum(path.stat().st_size for path in data_files(config)) > SMALL_BYTES
    with contextlib.ExitStack() as stack:

        def progress(what: str, count: int | None) -> Progress:
            bar = stack.enter_context(Bar(f"{DATA}: {what}", count, "rows"))
            return lambda done: bar(done, 0)

        found = prepare_files(
            folder,
            train,
            heldout,
            Reading(config.turns, config.bad_rows, config.data_columns),
            _plan(config, tokenizer),
            folder / PARTS,
            progress,
            available_cores() if large else 1,
        )
    write_jsonl(folder / "dropped.jsonl", found.left_out)
    write_json(folder / SOURCES_FILE, dict(sources))
    _warn(found, config)
    return {
        "rows/read": found.read,
        "rows/train": found.used["train"],
        "rows/heldout": found.used["heldout"],
        "rows/validation": found.used["validation"],
        "rows/dropped": found.long,
        "rows/cut": found.cut,
        "rows/skipped": found.bad,
        "rows/repeated": found.repeated,
        "rows/unused": found.read - found.bad - found.long - sum(found.used.values()),
    }


def _sources(config: RunConfig) -> tuple[Source, Source | None]:
    """Where training rows come from, and held-out rows that are given."""
    entries = [config.data] if isinstance(config.data, str) else config.data
    given = None if config.heldout is None else _files(config, config.heldout)
    if config.data != EMBEDDED:
        return _files(config, *entries), given
    train, heldout = (
        _embedded_rows(config.seed, split, count) for split, count in EMBEDDED_ROWS.items()
    )
    if config.method == "dpo":
        train = _with_wrong_answers(train)
    return Source(rows=tuple(train)), given or Source(rows=tuple(heldout))


def _files(config: RunConfig, *entries: str) -> Source:
    return Source(tuple(tuple(files_of(entry, config.cache_folder)) for entry in entries))


def _plan(config: RunConfig, tokenizer: Tokenizer) -> Plan:
    return Plan(
        folder=tokenizer.folder,
        template=tokenizer.template,
        today=tokenizer.today,
        fitting=Fitting(config.max_length, config.long_prompts),
        preference=config.method == "dpo",
        kinds=frozenset(embedded.KINDS),
        heldout_fraction=config.heldout_fraction,
        heldout_rows=config.evaluation.rows,
        validation_rows=config.validation.rows,
        most=_most(config),
        shares=None if config.data_shares is None else tuple(config.data_shares),
        seed=config.seed,
        # The embedded rows are made in a random order.
        shuffle=config.shuffle and config.data != EMBEDDED,
    )


def _warn(found: Found, config: RunConfig) -> None:
    if found.long > TOO_MANY * found.read:
        say(
            f"data: WARNING: the prompt alone fills max_length={config.max_length} in {found.long} "
            f"of {found.read} rows, which are not used (data/dropped.jsonl); raise max_length, or "
            "give long_prompts=truncate"
        )


def _embedded_rows(seed: int, split: str, count: int) -> list[Row]:
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
        for r in embedded.make_rows(seed, split, count)
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
