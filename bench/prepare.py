"""Rows become token ids on disk: the first start of a run, and every later one.

    python bench/prepare.py [--rows 50000] [--file FILE]

Part of `make bench`. The rows are chats of UltraChat's shape (2 to 4 turns, 4 KB), made here and
written as JSON Lines; ldalign reads, divides, renders and encodes them into the run's folder, and
opens that again. The peer is the usual way: `datasets.load_dataset` and `Dataset.map` with as many
processes, prompt and whole chat rendered by the same template and encoded by the same tokenizer.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np

from ldalign.data import embedded
from ldalign.models.fetch import resolve_model
from ldalign.models.toy import write_toy_model
from ldalign.system.exits import run
from ldalign.system.workers import available_cores

ROWS, SMALL_ROWS = 50_000, 300
MAX_LENGTH = 2048


def main(argv: list[str]) -> None:
    parser = common.options("prepare", __doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="chats")
    parser.add_argument("--file", type=Path, help="where they are written; kept")
    args = parser.parse_args(argv)
    rows = SMALL_ROWS if args.small else args.rows
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        data = args.file or place / "chats.jsonl"
        common.say(f"prepare: writing {rows} chats ...")
        write_chats(data, rows)
        policy = (
            write_toy_model(place / "policy")
            if args.small
            else resolve_model(args.policy, args.cache)
        )
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
        theirs: dict[str, Any] = {"skipped": "--no-peers"}
        if not args.no_peers:
            common.say("prepare: datasets.map ...")
            job |= {"task": "dataset_map", "cache": str(place / "cache")}
            theirs = common.measure_or_say("peers/dataset_map.py", job, "trl")
        size = data.stat().st_size
    result = common.result("prepare", args, rows=rows, bytes=size, ours=starts, peer=theirs)
    common.save(result, render(result), args.results)


def write_chats(path: Path, count: int) -> None:
    """Writes chats of UltraChat's shape: two to four turns, 4 KB in the mean, the words of the
    embedded tasks.
    """
    texts = [m["content"] for row in embedded.make_rows(0, "train", 2000) for m in row["messages"]]
    words = np.array(" ".join(texts).split())
    rng = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        size = int(rng.integers(low, high))
        start = int(rng.integers(0, len(words) - size))
        return " ".join(words[start : start + size])

    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            turns = []
            for _ in range(int(rng.integers(1, 3))):
                turns.append({"role": "user", "content": text(10, 120)})
                turns.append({"role": "assistant", "content": text(150, 750)})
            file.write(json.dumps({"id": f"chat-{i}", "messages": turns}) + "\n")


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    ours, theirs = result["ours"], result["peer"]
    lines = [
        "## Preparing rows",
        "",
        f"{result['rows']} chats, {result['bytes'] / 1e6:.0f} MB of JSON; cores: "
        f"{result['machine']['cores']}. Memory: the most that the process itself held, mapped "
        "files included; a worker's is the most of any one of them.",
        "",
        *common.table("", "s", "rows/s", "processor s", "MiB", "a worker, MiB", "tokens"),
    ]
    for name, one in [*ours.items(), ("datasets.map", theirs)]:
        if "skipped" in one:
            lines.append(common.row(name, f"not run: {one['skipped']}", "", "", "", "", ""))
            continue
        lines.append(
            common.row(
                name,
                f"{one['seconds']:.1f}",
                f"{result['rows'] / one['seconds']:.0f}",
                f"{one['cpu']:.1f}",
                f"{1024 * one['peak_gib']:.0f}",
                f"{one['worker_mib']:.0f}",
                f"{one['tokens']}",
            )
        )
    if "skipped" not in theirs:
        ratio = theirs["seconds"] / ours["first start"]["seconds"]
        lines += ["", f"datasets.map takes {ratio:.2f} times as long as the first start."]
    return lines


if __name__ == "__main__":
    run(main)
