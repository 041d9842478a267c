"""Batched sampling with a KV cache: `generate.generate_ids` against transformers' `generate` on a left-padded batch.

    python bench/generate.py

Part of `make bench`. No row may stop before its full length, so both make the same number of tokens from the same
prompts; the peer in an environment of its own.
"""

import statistics
from typing import Any

import common
from work import LENGTHS, make_pairs

from ldalign.errors import run

ROWS, NEW_TOKENS = 32, 48


def main(argv: list[str]) -> None:
    parser = common.options("generate", __doc__)
    args = parser.parse_args(argv)
    device, dtype = common.device_and_dtype()
    folder, config = common.model_of(args)
    rows, new_tokens, repeat = (2, 4, 1) if args.small else (ROWS, NEW_TOKENS, args.repeat or 5)
    prompts = [pair["prompt"] for pair in make_pairs(LENGTHS["gsm8k"], rows * (repeat + 1), config["vocab_size"])]
    job = {
        "task": "generation", "device": str(device), "dtype": dtype, "folder": str(folder) if folder else None,
        "config": config, "new_tokens": new_tokens,
        "batches": [prompts[i : i + rows] for i in range(0, len(prompts), rows)],
    }  # fmt: skip
    common.say("generate ...")
    sides: dict[str, dict[str, Any]] = {"ldalign": common.measure_ours("generation", job)}
    if not args.no_peers:
        sides["transformers"] = common.measure_or_say("peers/padded.py", job, "transformers", common.KEEP_MEMORY)
    for side in sides.values():
        if "skipped" not in side:
            side["tokens_per_second"] = rows * new_tokens / statistics.median(side["seconds"])
            side["time_ratio"] = common.median_ratio(side["seconds"], sides["ldalign"]["seconds"])
    result = common.result(
        "generate", args, device=str(device), dtype=dtype, rows=rows, new_tokens=new_tokens, repeat=repeat, sides=sides
    )
    common.save(result, render(result), args.results)


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    lines = [
        "## generate", "",
        f"Sampling at temperature 1, {result['rows']} rows a batch, each to {result['new_tokens']} new tokens; "
        f"{result['policy']}, {result['dtype']} on {result['device']}, medians of {result['repeat']} after one to "
        "warm up.", "",
        *common.table("", "seconds", "tokens made a second", "time / ldalign's", "peak memory, GiB"),
    ]  # fmt: skip
    for name, side in result["sides"].items():
        if "skipped" in side:
            lines.append(common.row(name, f"not run: {side['skipped']}", "", "", ""))
        else:
            seconds = f"{statistics.median(side['seconds']):.3f}"
            speed = [f"{side['tokens_per_second']:.0f}", f"{side['time_ratio']:.2f}", f"{side['peak_gib']:.2f}"]
            lines.append(common.row(name, seconds, *speed))
    return lines


if __name__ == "__main__":
    run(main)
