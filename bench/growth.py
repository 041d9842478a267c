"""How one DPO step grows: from 128 to 4,096 tokens a pair, and from SmolLM2's 135M to its 360M.

    python bench/growth.py [--tokens 128,256,...] [--shapes smollm2-135m,smollm2-360m]

Part of `make bench`. One pair a step (a quarter prompt, two responses of one length, so that nobody
pads), random weights, bf16 weights and optimizer states; ldalign and the padded loop in turn, each
size in a process of its own. A row is left out where its memory, twice that of half the length,
would not be free.
"""

import statistics
from pathlib import Path
from typing import Any

import common
from step import BETA, LEARNING_RATE, Row, measure_row
from work import SHAPES, Shape, even_pair, step_flops

from ldalign.models.toy import CONFIG as TOY_CONFIG
from ldalign.system.exits import run

SIDES = (
    Row("ldalign", "bfloat16"),
    Row("padded eager loop", "bfloat16", "peers/padded.py", "transformers"),
)
TOKENS = {
    "smollm2-135m": (128, 256, 512, 1024, 2048, 4096),
    "smollm2-360m": (256, 1024),
    "mistral-7b": (1024, 4096),
}


def main(argv: list[str]) -> None:
    parser = common.options("growth", __doc__)
    parser.add_argument(
        "--shapes", default="smollm2-135m,smollm2-360m", help=f"of {', '.join(SHAPES)}"
    )
    parser.add_argument("--tokens", help="tokens a pair, for every shape")
    parser.add_argument("--optimizer", choices=["adamw", "rmsprop"], default="adamw")
    args = parser.parse_args(argv)
    device, _ = common.device_and_dtype()
    sides = [side for side in SIDES if side.peer is None or not args.no_peers]
    steps = 1 if args.small else args.repeat or 3
    rows: list[dict[str, Any]] = []
    for name in ["toy"] if args.small else args.shapes.split(","):
        config = dict(TOY_CONFIG) if args.small else SHAPES[name]
        lengths = (
            (16,)
            if args.small
            else tuple(map(int, args.tokens.split(",")))
            if args.tokens
            else TOKENS[name]
        )
        held: dict[str, tuple[int, float]] = {}  # by side: the last length, and its peak in GiB
        for tokens in lengths:
            pair = even_pair(tokens, config["vocab_size"])
            job = {
                "task": "dpo",
                "device": str(device),
                "folder": None,
                "config": config,
                "batches": [[pair]] * (steps + 1),
                "optimizer": args.optimizer,
                "learning_rate": LEARNING_RATE,
                "beta": BETA,
                "micro_tokens": 10**9,
            }
            row = {
                "shape": name,
                "parameters": Shape.of(config).weights,
                "tokens": tokens,
                "flops": step_flops(Shape.of(config), [pair]),
                "sides": {},
            }
            for side in sides:
                common.say(f"growth: {name}, {tokens} tokens: {side.name} ...")
                row["sides"][side.name] = measure_side(side, job, tokens, held, device.type)
            rows.append(row)
    result = common.result(
        "growth", args, device=str(device), optimizer=args.optimizer, steps=steps, rows=rows
    )
    common.save(result, render(result), args.results, f"growth-{device.type}")


def measure_side(
    side: Row, job: dict[str, Any], tokens: int, held: dict[str, tuple[int, float]], device: str
) -> dict[str, Any]:
    """Median seconds and peak memory of one size, or why it was not run."""
    if device == "cpu" and side.name in held:
        before, peak = held[side.name]
        needed, free = peak * tokens / before, free_gib()
        if needed > free:
            return {"skipped": f"needs up to {needed:.0f} GiB, {free:.0f} are free"}
    measured = measure_row(side, job)
    if "skipped" in measured:
        return measured
    held[side.name] = (tokens, measured["peak_gib"])
    return {"seconds": statistics.median(measured["seconds"]), "peak_gib": measured["peak_gib"]}


def free_gib() -> float:
    """Memory that a new process could have: Linux's MemAvailable."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kib) / 2**20


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    names = list(result["rows"][0]["sides"])
    columns = [
        f"{name}: {what}" for name in names for what in ("seconds", "microseconds a token", "GiB")
    ]
    lines = [
        f"## growth, {result['device']}",
        "",
        f"One DPO step of one pair, {result['optimizer']}, bf16 weights and optimizer states, "
        f"random weights; medians of {result['steps']} steps after one to warm up. A pair is a "
        "quarter prompt, the rest two responses of one length: the padded loop pads nothing and "
        "reads the prompt twice.",
        "",
        *common.table("model", "tokens a pair", "GFLOP", *columns, "time ratio", "memory ratio"),
    ]
    for row in result["rows"]:
        cells: list[str] = []
        for side in row["sides"].values():
            if "skipped" in side:
                cells += [f"not run: {side['skipped']}", "", ""]
            else:
                per_token = 1e6 * side["seconds"] / row["tokens"]
                cells += [f"{side['seconds']:.2f}", f"{per_token:.0f}", f"{side['peak_gib']:.2f}"]
        model = f"{row['shape']} ({row['parameters'] / 1e6:.0f}M)"
        lines.append(
            common.row(
                model, row["tokens"], f"{row['flops'] / 1e9:.0f}", *cells, *_ratios(row["sides"])
            )
        )
    return lines


def _ratios(sides: dict[str, dict[str, Any]]) -> list[str]:
    measured = [side for side in sides.values() if "skipped" not in side]
    if len(measured) < 2:
        return ["", ""]
    ours, theirs = measured
    return [f"{theirs[what] / ours[what]:.2f}" for what in ("seconds", "peak_gib")]


if __name__ == "__main__":
    run(main)
