"""The guide's training and distance scoring against the same work on transformers' GPT-2, padded.

    python bench/guide.py [--sizes small,gpt2]  (by default the small one, and both on a GPU)

Part of `make bench`. Same weights (a new guide, written to a folder that both read), same texts and
tokenizer, same batches, AdamW, float32; the peer in an environment of its own. The distances of
both are compared.
"""

import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import common
from work import LENGTHS

from ldalign.data import embedded
from ldalign.models.gpt2 import GPT2Config
from ldalign.models.guide import GuideConfig
from ldalign.models.guide_folder import new_guide, save_guide
from ldalign.system.exits import run
from ldalign.training.batches import global_batches

# Layers, width, heads: settings.py's default for a new guide, and GPT-2's smallest size.
SIZES = {"small": (4, 256, 4), "gpt2": (12, 768, 12)}
VOCABULARY, POSITIONS, LATENT_WIDTH = 4096, 1024, 256
BATCH = 32  # rows a step, settings.py's default
PEER_ROWS = 16  # the peer's rows at a time
MICRO_TOKENS = 8192  # ldalign's budget, its default


def main(argv: list[str]) -> None:
    parser = common.options("guide", __doc__)
    parser.add_argument("--sizes", help=f"of {', '.join(SIZES)}; gpt2 takes a CPU an hour")
    args = parser.parse_args(argv)
    device, _ = common.device_and_dtype()
    sizes = args.sizes or (",".join(SIZES) if device.type == "cuda" else "small")
    steps, batch = (1, 2) if args.small else (args.repeat or 4, BATCH)
    texts = make_texts("short" if args.small else "gsm8k", batch * (steps + 1))
    tables = []
    for size in ["toy"] if args.small else sizes.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            folder = make_guide(size, Path(scratch) / "guide")
            job = {
                **texts,
                "guide": str(folder),
                "device": str(device),
                "batch": batch,
                "epochs": 1,
                "repeat": 2,
                "batches": [
                    list(map(int, b)) for _, b in global_batches(len(texts["prompts"]), batch, 1, 0)
                ],
                "learning_rate": 1e-4,
                "micro_tokens": MICRO_TOKENS,
                "rows": PEER_ROWS,
            }
            if device.type == "cpu":
                job["float32_products"] = "medium"  # the faster of torch's two libraries, for both
            tables.append({"size": size} | measure(job, not args.no_peers))
    result = common.result(
        "guide", args, device=str(device), batch=batch, steps=steps, tables=tables
    )
    common.save(result, render(result), args.results, f"guide-{device.type}")


def make_texts(lengths: str, count: int) -> dict[str, list[str]]:
    """Makes prompts with two responses each, of words of the embedded tasks, in GSM8K's lengths.

    A word is about one token.
    """
    words = " ".join(
        m["content"] for row in embedded.make_rows(0, "train", 300) for m in row["messages"]
    ).split()
    dice = random.Random(0)
    rows = [
        [" ".join(dice.choices(words, k=n)) for n in LENGTHS[lengths].draw(dice)]
        for _ in range(count)
    ]
    return {
        name: [row[i] for row in rows] for i, name in enumerate(("prompts", "real", "generated"))
    }


def make_guide(size: str, folder: Path) -> Path:
    """A new guide, saved; its tokenizer learns the embedded tasks."""
    layers, width, heads = SIZES.get(size, (2, 32, 2))
    texts = [m["content"] for row in embedded.make_rows(0, "train", 300) for m in row["messages"]]
    network = GPT2Config(VOCABULARY, POSITIONS, width, layers, heads)
    config = GuideConfig(latent_width=LATENT_WIDTH, max_tokens=POSITIONS - 1)
    save_guide(new_guide(config, 0, None, texts, network), folder)
    return folder


def measure(job: dict[str, Any], peers: bool) -> dict[str, Any]:
    """Measures both tasks on both sides: median seconds, ratios, peak memory, distances apart."""
    table: dict[str, Any] = {}
    for task in ("guide_training", "guide_distance"):
        common.say(f"guide: {task} ...")
        ours = common.measure_ours(task, job)
        theirs: dict[str, Any] = {"skipped": "--no-peers"}
        if peers:
            script, environment = "peers/padded_guide.py", common.KEEP_MEMORY
            theirs = common.measure_or_say(
                script, {**job, "task": task}, "transformers", environment
            )
        entry: dict[str, Any] = {"ldalign": _summary(ours), "peer": _summary(theirs)}
        if "skipped" not in theirs:
            entry["time_ratio"] = common.median_ratio(theirs["seconds"], ours["seconds"])
            entry["memory_ratio"] = theirs["peak_gib"] / ours["peak_gib"]
            if "distances" in ours:
                gaps = [
                    abs(a - b) / b
                    for a, b in zip(ours["distances"], theirs["distances"], strict=True)
                ]
                entry["largest_relative_difference"] = max(gaps)
        table[task] = entry
    return table


def _summary(measured: dict[str, Any]) -> dict[str, Any]:
    if "skipped" in measured:
        return measured
    seconds = measured["seconds"]
    return {
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "peak_gib": measured["peak_gib"],
    }


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    lines = [
        f"## guide, {result['device']}",
        "",
        f"Guide training (one AdamW step of {result['batch']} rows, two examples each, medians of "
        f"{result['steps']}) and distance scoring (all rows) against transformers' GPT-2 padded: "
        "same weights, texts and batches, float32.",
        "",
        *common.table(
            "guide", "", "ldalign, s", "GiB", "transformers, s", "GiB", "time ratio", "memory ratio"
        ),
    ]
    for table in result["tables"]:
        for task in ("guide_training", "guide_distance"):
            entry = table[task]
            ours, theirs = entry["ldalign"], entry["peer"]
            cells = [f"{ours['median_seconds']:.2f}", f"{ours['peak_gib']:.2f}"]
            if "skipped" in theirs:
                cells += [f"not run: {theirs['skipped']}", "", "", ""]
            else:
                cells += [f"{theirs['median_seconds']:.2f}", f"{theirs['peak_gib']:.2f}"]
                cells += [f"{entry[name]:.2f}" for name in ("time_ratio", "memory_ratio")]
            lines.append(common.row(table["size"], task.partition("_")[2], *cells))
    gaps = [t["guide_distance"].get("largest_relative_difference") for t in result["tables"]]
    apart = [f"{gap:.1e}" for gap in gaps if gap is not None]
    return (
        [*lines, "", f"Largest relative difference of a distance: {', '.join(apart)}."]
        if apart
        else lines
    )


if __name__ == "__main__":
    run(main)
