"""Rows become token ids on disk: the first start of a run, and every later one.

    python bench/prepare.py [--rows 50000,200000]

Part of `make bench`. The rows are chats of UltraChat's shape (2 to 4 turns, 4 KB), made here and
written as JSON Lines; ldalign reads, divides, renders and encodes them into the run's folder, and
opens that again. The peer is the usual way: `datasets.load_dataset` and `Dataset.map` with as many
processes, prompt and whole chat rendered by the same template and encoded by the same tokenizer.
"""

import json
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import common
import numpy as np

from ldalign.models.fetch import resolve_model
from ldalign.models.toy import write_toy_model
from ldalign.system.exits import run
from ldalign.system.workers import available_cores

ROWS, SMALL_ROWS = "50000,200000", "300"
MAX_LENGTH = 2048


def main(argv: list[str]) -> None:
    parser = common.options("prepare", __doc__)
    parser.add_argument("--rows", default=ROWS, help="chats; several numbers: one after the other")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        policy = (
            write_toy_model(Path(scratch) / "policy")
            if args.small
            else resolve_model(args.policy, args.cache)
        )
        sizes = [int(rows) for rows in (SMALL_ROWS if args.small else args.rows).split(",")]
        measured = [
            measure(rows, Path(scratch), policy, peer=not args.no_peers and rows == sizes[0])
            for rows in sizes
        ]
    result = common.result("prepare", args, sizes=measured)
    common.save(result, render(result), args.results)


def measure(rows: int, scratch: Path, policy: Path, peer: bool) -> dict[str, Any]:
    """The figures of one file; the larger ones are ours alone."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        place = Path(folder)
        data = place / "chats.jsonl"
        common.say(f"prepare: writing {rows} chats ...")
        write_chats(data, rows)
        job = {
            "device": "cpu",
            "policy": str(policy),
            "data": str(data),
            "run": str(place / "run"),
            "max_length": MAX_LENGTH,
            "processes": available_cores(),
        }
        starts = {}
        for name in ("first start", "later start"):
            common.say(f"prepare: {name} ...")
            starts[name] = common.measure_ours("prepare", job)
        theirs: dict[str, Any] = {"skipped": ""}
        if peer:
            common.say("prepare: datasets.map ...")
            job |= {"task": "dataset_map", "cache": str(place / "cache")}
            theirs = common.measure_or_say("peers/dataset_map.py", job, "trl")
        return {"rows": rows, "bytes": data.stat().st_size, "ours": starts, "peer": theirs}


def write_chats(path: Path, count: int) -> None:
    """Writes chats of UltraChat's shape: two to four turns, 4 KB in the mean, of the English that
    Python's own help is written in.
    """
    words = np.array(" ".join(text for _, text in sorted(topics.items())).split())
    rng = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        size = int(rng.integers(low, high))
        start = int(rng.integers(0, len(words) - size))
        return " ".join(words[start : start + size])

    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            turns = []
            for _ in range(int(rng.integers(1, 3))):
                turns.append({"role": "user", "content": text(8, 100)})
                turns.append({"role": "assistant", "content": text(110, 560)})
            file.write(json.dumps({"id": f"chat-{i}", "messages": turns}) + "\n")


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    lines = [
        "## Preparing rows",
        "",
        f"Cores: {result['machine']['cores']}. Memory: the most that the process itself held, "
        "mapped files included; a worker's is the most of any one of them.",
        "",
        *common.table(
            "chats, JSON", "", "s", "rows/s", "processor s", "MiB", "a worker, MiB", "tokens"
        ),
    ]
    for size in result["sizes"]:
        what = f"{size['rows']}, {size['bytes'] / 1e6:.0f} MB"
        for name, one in [*size["ours"].items(), ("datasets.map", size["peer"])]:
            if "skipped" in one:
                reason = one["skipped"] or "not asked for"
                lines.append(common.row(what, name, f"not run: {reason}", *[""] * 5))
                continue
            lines.append(
                common.row(
                    what,
                    name,
                    f"{one['seconds']:.1f}",
                    f"{size['rows'] / one['seconds']:.0f}",
                    f"{one['cpu']:.1f}",
                    f"{1024 * one['peak_gib']:.0f}",
                    f"{one['worker_mib']:.0f}",
                    f"{one['tokens']}",
                )
            )
    for size in result["sizes"]:
        if "skipped" not in size["peer"]:
            ratio = size["peer"]["seconds"] / size["ours"]["first start"]["seconds"]
            lines += [
                "",
                f"{size['rows']} chats: datasets.map takes {ratio:.2f} times as long as the first "
                "start.",
            ]
    return lines


if __name__ == "__main__":
    run(main)
