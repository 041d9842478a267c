"""The stage data: the rows as they are used, after reading, splitting and dropping."""

import json
from pathlib import Path
from typing import Any

from ldalign.data.rows import Row, data_hash
from ldalign.run.context import Context, data_files
from ldalign.run.manifest import MANIFEST, Parents
from ldalign.run.stage import Cost, Stage
from ldalign.system import distributed
from ldalign.system.distributed import on_rank0
from ldalign.system.errors import InputError
from ldalign.system.files import hash_file, write_json, write_jsonl
from ldalign.system.metrics import Metrics

SOURCES_FILE = "sources.json"  # in the data stage: the files that were read, and their sha256
ROW_BYTES = 100  # of a row in its file, beside its text: id, roles, quotes


def _cost(ctx: Context, name: str) -> Cost:
    kept = 0
    for row in [*ctx.train.rows, *ctx.heldout.rows]:
        history = sum(len(message["content"]) for message in row.history)
        kept += ROW_BYTES + len(row.response) + len(row.rejected or "") + history
    return Cost(kept=kept)


DATA_STAGE = Stage("data", _cost)


def data_stage(ctx: Context) -> None:
    """Writes the rows down as they are used, after reading, splitting and dropping:
    data/train.jsonl and data/heldout.jsonl.

    The ids of dropped rows are in data/dropped.jsonl, the files that were read in
    data/sources.json.
    """

    def make(folder: Path) -> Metrics:
        if distributed.rank() == 0:
            for name, prepared in (("train", ctx.train), ("heldout", ctx.heldout)):
                write_jsonl(folder / f"{name}.jsonl", map(_record, prepared.rows))
            dropped = [
                {
                    "split": name,
                    "id": id_,
                    "reason": f"the prompt alone fills max_length={ctx.config.max_length}",
                }
                for name, prepared in (("train", ctx.train), ("heldout", ctx.heldout))
                for id_ in prepared.dropped
            ]
            write_jsonl(folder / "dropped.jsonl", dropped)
            write_json(
                folder / SOURCES_FILE,
                {str(path): hash_file(path) for path in data_files(ctx.config)},
            )
        return {
            "rows/train": len(ctx.train.rows),
            "rows/heldout": len(ctx.heldout.rows),
            "rows/dropped": len(ctx.train.dropped),
            "rows/cut": ctx.train.cut,
            **{f"rows/{name}": n for name, n in ctx.counts.items()},
        }

    parents = _data_parents(ctx)
    on_rank0(lambda: check_sources(ctx))
    ctx.run.stage(DATA_STAGE.folder(), {**parents, **ctx.keys("turns", "max_length")}, make)


def _data_parents(ctx: Context) -> Parents:
    return {
        "data (training rows)": data_hash(ctx.train.rows),
        "number of training rows": len(ctx.train.rows),
        "data (held-out rows)": ctx.heldout_hash,
        "number of held-out rows": len(ctx.heldout.rows),
    }


def check_sources(ctx: Context) -> None:
    """Raises InputError where the run's rows are others than when it began, and a data
    file is why: it is named.

    A file that changed without changing the rows that are used is none of the run's business.
    """
    folder = ctx.run.path / DATA_STAGE.folder()
    try:
        began = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["parents"]
        old = dict(json.loads((folder / SOURCES_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # no such stage yet, or a damaged one, which says so itself
    if all(began.get(key) == value for key, value in _data_parents(ctx).items()):
        return
    new = {str(path): hash_file(path) for path in data_files(ctx.config)}
    for path in [*old, *new]:
        if path in old and path in new and old[path] != new[path]:
            raise InputError(
                f"{path}: changed since this run began: sha256 was {old[path]}, now {new[path]}; "
                "put it back, or start another run (run=NAME)"
            )


def _record(row: Row) -> dict[str, Any]:
    messages = [*row.history, {"role": "assistant", "content": row.response}]
    record: dict[str, Any] = {"id": row.id, "messages": messages}
    if row.rejected is not None:
        record = {
            "id": row.id,
            "chosen": messages,
            "rejected": [*row.history, {"role": "assistant", "content": row.rejected}],
        }
    return record | ({"kind": row.kind, "answer": row.answer} if row.kind is not None else {})
