"""DPO steps on the same pairs: ldalign, TRL's DPOTrainer, a classic padded loop on transformers.

    python bench/step.py [--lengths gsm8k,short,...] [--optimizer adamw|rmsprop] [--shape
    mistral-7b] [--rounds 2]

Part of `make bench`. Every row runs in a process of its own, the peers in environments of their
own, one after the other in the same run; the machine's rate of matrix products is measured before
and after each, as it moves. All take the same pairs in the same order, the reference's log-probs at
hand, gradients clipped, optimizer states in the weights' dtype, and the first step of each warms
up. Ratios are medians over steps of the same pairs.
"""

import argparse
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import common
import torch
from environments import pins
from work import LENGTHS, SHAPES, Pair, Shape, describe, make_pairs, step_flops, tokens_of

from ldalign.system.exits import run

PRECISIONS = {
    "bfloat16": "bf16 weights and optimizer states",
    "mixed": "float32 weights and optimizer states, bf16 compute",
    "float32": "float32",
}
LEARNING_RATE, BETA = 5e-7, 0.1


@dataclass(frozen=True)
class Row:
    """One line of the table: who, how, in which environment."""

    name: str
    precision: str
    script: str = "ours.py"
    peer: str | None = None
    job: dict[str, Any] = field(default_factory=dict)
    keep_memory: bool = True  # a peer gets glibc's thresholds raised, as ldalign raises them itself


def _trl(name: str, precision: str, setting: str, keep_memory: bool = True) -> Row:
    return Row(
        f"TRL, {name}", precision, "peers/trl_trainer.py", "trl", {"setting": setting}, keep_memory
    )


def _padded(name: str, precision: str, keep_memory: bool = True) -> Row:
    return Row(name, precision, "peers/padded.py", "transformers", {}, keep_memory)


ROWS = (
    Row("ldalign", "bfloat16"),
    _trl("best setting", "bfloat16", "best"),
    _padded("padded eager loop, best setting", "bfloat16"),
    Row("ldalign", "mixed"),
    _trl("as a user gets it", "mixed", "default", keep_memory=False),
    _padded("padded eager loop, autocast", "mixed"),
    Row("ldalign", "float32"),
    _padded("padded eager loop", "float32"),
)
DEFAULT_MALLOC = (
    _trl("best setting, default malloc", "bfloat16", "best", keep_memory=False),
    _padded("padded eager loop, default malloc", "bfloat16", keep_memory=False),
)
LIGER = _trl("best setting with Liger's kernels", "bfloat16", "liger")


def main(argv: list[str]) -> None:
    args = _parse(argv)
    names = ["short"] if args.small else args.lengths.split(",")
    device, _ = common.device_and_dtype()
    folder, config = (
        (None, dict(SHAPES[args.shape])) if args.shape and not args.small else common.model_of(args)
    )
    if folder is None and args.layers:
        config["num_hidden_layers"] = args.layers
    batch = 2 if args.small else args.batch
    tables = []
    for place, name in enumerate(names):
        rows = choose_rows(args, device, first=place == 0, folder=folder is not None)
        steps = 1 if args.small else args.repeat or (8 if place == 0 else 3)
        pairs = make_pairs(LENGTHS[name], batch * (steps + 1), config["vocab_size"])
        batches = [pairs[i : i + batch] for i in range(0, len(pairs), batch)]
        job = {
            "task": "dpo",
            "device": str(device),
            "folder": str(folder) if folder else None,
            "config": config,
            "batches": batches,
            "optimizer": args.optimizer,
            "learning_rate": LEARNING_RATE,
            "beta": BETA,
            "micro_tokens": 10**9,
        }
        tables.append({"lengths": name} | measure_table(rows, job, args.rounds, device, args.small))
    result = common.result(
        "step",
        args,
        device=str(device),
        optimizer=args.optimizer,
        batch=batch,
        shape=args.shape,
        layers=config["num_hidden_layers"],
        parameters=Shape.of(config).weights,
        tables=tables,
        versions=pinned(),
    )
    suffix = f"-{args.shape}" if args.shape else ""
    common.save(result, render(result), args.results, f"step-{device.type}{suffix}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = common.options("step", __doc__)
    parser.add_argument(
        "--lengths", default=",".join(LENGTHS), help="of the pairs; the first gets every row"
    )
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument(
        "--optimizer", choices=["adamw", "rmsprop"], default="adamw", help="everybody's"
    )
    parser.add_argument(
        "--precisions", default=",".join(PRECISIONS), help="rows to measure, by precision"
    )
    parser.add_argument(
        "--shape", choices=list(SHAPES), help="random weights in this shape, no model folder"
    )
    parser.add_argument("--layers", type=int, help="of --shape; default: all that it has")
    parser.add_argument(
        "--rounds", type=int, default=1, help="times that all rows are gone through"
    )
    parser.add_argument(
        "--default-malloc", action="store_true", help="also the peers without malloc variables"
    )
    args = parser.parse_args(argv)
    for name in args.lengths.split(","):
        if name not in LENGTHS and not args.small:
            parser.error(f"--lengths {name}: choose from {', '.join(LENGTHS)}")
    return args


def choose_rows(args: Any, device: torch.device, first: bool, folder: bool) -> list[Row]:
    """The rows of a table: all of them in the first, those in bf16 for other lengths."""
    wanted = args.precisions.split(",") if first else ["bfloat16"]
    rows = [*ROWS, *(DEFAULT_MALLOC if args.default_malloc and first else ())]
    if device.type == "cuda":
        rows.insert(2, LIGER)
    if not folder:  # TRL reads its reference from the policy's folder
        rows = [row for row in rows if row.job.get("setting") != "default"]
    return [
        row for row in rows if row.precision in wanted and (row.peer is None or not args.no_peers)
    ]


def measure_table(
    rows: Sequence[Row], job: dict[str, Any], rounds: int, device: torch.device, small: bool
) -> dict[str, Any]:
    """Measures all rows on one set of pairs: seconds of each step, speed, peak memory, ratios."""
    batches: list[list[Pair]] = job["batches"]
    shape = Shape.of(job["config"])
    measured = [pair for batch in batches[1:] for pair in batch]
    results: list[dict[str, Any]] = [
        {"name": row.name, "precision": row.precision, "seconds": [], "rates": []} for row in rows
    ]
    for _ in range(rounds):
        for row, out in zip(rows, results, strict=True):
            if "skipped" in out:
                continue
            common.say(f"step: {row.name}, {row.precision} ...")
            dtype = "float32" if row.precision == "float32" else "bfloat16"
            machine = partial(
                common.measure_machine, shape, tokens_of(batches[0]), dtype, device, small
            )
            out["rates"].append(machine()["flops"])
            add(out, measure_row(row, job))
            out["rates"].append(machine()["flops"])
    finish(results, len(measured), tokens_of(measured), step_flops(shape, measured))
    return {
        "pairs": describe(batches[1:]),
        "flops_per_pair": step_flops(shape, measured) / len(measured),
        "rows": results,
    }


def measure_row(row: Row, job: dict[str, Any]) -> dict[str, Any]:
    """Measures a row in a process: one of ours has to run, a peer's may say why not."""
    products = common.float32_products(job["device"], row.precision)
    with tempfile.TemporaryDirectory() as scratch:
        whole = {**job, **row.job, **products, "precision": row.precision, "scratch": scratch}
        if row.peer is None:
            return common.measure_ours("dpo", whole)
        environment = {**(common.KEEP_MEMORY if row.keep_memory else {}), "HF_HOME": scratch}
        return common.measure_or_say(row.script, whole, row.peer, environment)


def add(out: dict[str, Any], measured: dict[str, Any]) -> None:
    """Adds a round's measurements to a row's."""
    if "skipped" in measured:
        out["skipped"] = measured["skipped"]
        return
    out["seconds"] += measured["seconds"]
    out["peak_gib"] = max(out.get("peak_gib", 0.0), measured["peak_gib"])
    out["first_loss"] = measured["losses"][0]


def finish(results: list[dict[str, Any]], pairs: int, tokens: int, flops: float) -> None:
    """Rates, shares of the machine's, and ratios to ldalign's row of the same precision."""
    ours = {r["precision"]: r for r in results if r["name"] == "ldalign"}
    for r in results:
        if "skipped" in r:
            continue
        rounds = len(r["rates"]) / 2
        seconds = sum(r["seconds"]) / rounds
        r["pairs_per_second"], r["tokens_per_second"] = pairs / seconds, tokens / seconds
        r["product_rate"] = statistics.median(r["rates"])
        r["mfu"] = flops / seconds / r["product_rate"]
        if r["precision"] in ours:
            r["time_ratio"] = common.median_ratio(r["seconds"], ours[r["precision"]]["seconds"])
            r["memory_ratio"] = r["peak_gib"] / ours[r["precision"]]["peak_gib"]


PINNED = {"trl": ("trl", "transformers"), "transformers": ("transformers",)}


def pinned(peers: Mapping[str, tuple[str, ...]] = PINNED) -> dict[str, str]:
    """The versions of the packages that are named of every peer, from its requirements file."""
    found = {}
    for peer, packages in peers.items():
        for package in packages:
            match = re.search(rf"^{package}==(\S+)", pins(peer), re.MULTILINE)
            if match:
                found[f"{package} ({peer}'s environment)"] = match[1]
    return found


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    memory = "GPU memory" if result["device"] != "cpu" else "resident memory"
    model = result["shape"] or result["policy"]
    lines = [
        f"## step, {result['device']}",
        "",
        f"DPO steps of {result['batch']} pairs, {model} ({result['parameters'] / 1e6:.0f} million "
        f"weights), {result['optimizer']}, reference log-probs at hand. Tokens are real ones, each "
        "prompt counted once. MFU: the step's matrix products (prompt once, head at responses) "
        "against the machine's rate of bare products, the median of those measured before and "
        "after each row. Ratios: to ldalign's row of the same precision, medians over steps.",
        "",
    ]
    for table in result["tables"]:
        lines += [*_table(table, memory), ""]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [
        *lines,
        f"Peers: {versions}; malloc thresholds raised for them where not said otherwise.",
    ]


def _table(table: dict[str, Any], memory: str) -> list[str]:
    pairs = table["pairs"]
    lines = [
        f"**{table['lengths']}**: {pairs['pairs']} pairs of {pairs['tokens_per_pair']:.0f} tokens "
        f"in the mean, {100 * pairs['prompt_share']:.0f} % of them prompt; a padded batch with the "
        f"prompt twice holds {pairs['padded_over_packed']:.2f} times as many; "
        f"{table['flops_per_pair'] / 1e9:.0f} GFLOP a pair.",
        "",
        *common.table(
            "",
            "precision",
            "pairs/s",
            "tokens/s",
            f"peak {memory}, GiB",
            "MFU",
            "time / ldalign's",
            "memory / ldalign's",
        ),
    ]
    for r in table["rows"]:
        precision = PRECISIONS[r["precision"]]
        if "skipped" in r:
            lines.append(
                common.row(r["name"], precision, f"not run: {r['skipped']}", "", "", "", "", "")
            )
            continue
        ratios = [f"{r[name]:.2f}" if name in r else "" for name in ("time_ratio", "memory_ratio")]
        speed = [f"{r['pairs_per_second']:.2f}", f"{r['tokens_per_second']:.0f}"]
        cells = [*speed, f"{r['peak_gib']:.2f}", f"{100 * r['mfu']:.0f} %", *ratios]
        lines.append(common.row(r["name"], precision, *cells))
    return lines


if __name__ == "__main__":
    run(main)
