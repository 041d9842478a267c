"""This checkout against another one of ldalign: is it as fast as before?

    python bench/before.py OLD [--rounds 3] [--only step,guide]

OLD: a checkout with a `.venv` of its own, as `make setup` leaves it. Both do the same DPO steps,
guide training, distances and sampling, each in a process of its own, in turns: old, new, old, new.
A line says how long the old one took for what the new one takes 1 for: the median over rounds of
the ratio of each round's medians, beside the least and the greatest, which say how noisy the
machine is. Not part of `make bench`: it is for a change that must not cost time.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import common
import guide as guide_bench
import step as step_bench
from work import LENGTHS, make_pairs

from ldalign.system.exits import run
from ldalign.training.batches import global_batches

ROWS = 8  # sampled at a time


def main(argv: list[str]) -> None:
    parser = common.options("before", __doc__)
    parser.add_argument("old", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=3, help="times that all is measured")
    parser.add_argument("--only", default="step,guide,generation", help="what to measure")
    args = parser.parse_args(argv)
    device, dtype = common.device_and_dtype()
    folder, config = common.model_of(args)
    model = {"device": str(device), "folder": str(folder) if folder else None, "config": config}
    with tempfile.TemporaryDirectory() as scratch:
        jobs: dict[str, dict[str, Any]] = {}
        wanted = args.only.split(",")
        if "step" in wanted:
            jobs["step"] = model | step_job(dtype, config, scratch, args.small)
        if "guide" in wanted:
            shared = guide_job(Path(scratch), str(device), args.small)
            jobs |= {f"guide {name}": shared | {"task": f"guide_{name}"} for name in GUIDE_TASKS}
        if "generation" in wanted:
            jobs["generation"] = model | generation_job(dtype, config, args.small)
        ratios: dict[str, list[float]] = {name: [] for name in jobs}
        for number in range(args.rounds):
            for name, job in jobs.items():
                common.say(f"before: round {number + 1}, {name} ...")
                old, new = (
                    common.measure("ours.py", job, checkout=checkout)["seconds"]
                    for checkout in (args.old, None)
                )
                ratios[name].append(statistics.median(old) / statistics.median(new))
    result = common.result("before", args, device=str(device), rounds=args.rounds, ratios=ratios)
    common.save(result, render(result), args.results, f"before-{device.type}")


GUIDE_TASKS = ("training", "distance")


def step_job(dtype: str, config: dict[str, Any], scratch: str, small: bool) -> dict[str, Any]:
    """DPO steps on pairs of GSM8K's lengths, four a step."""
    batch, steps = (2, 1) if small else (4, 4)
    pairs = make_pairs(
        LENGTHS["short" if small else "gsm8k"], batch * (steps + 1), config["vocab_size"]
    )
    return {
        "task": "dpo",
        "precision": dtype,
        "batches": [pairs[i : i + batch] for i in range(0, len(pairs), batch)],
        "optimizer": "adamw",
        "learning_rate": step_bench.LEARNING_RATE,
        "beta": step_bench.BETA,
        "micro_tokens": 10**9,
        "scratch": scratch,
    }


def guide_job(scratch: Path, device: str, small: bool) -> dict[str, Any]:
    """Training steps and distances of a small new guide."""
    steps, batch = (1, 2) if small else (4, guide_bench.BATCH)
    texts = guide_bench.make_texts("short" if small else "gsm8k", batch * (steps + 1))
    batches = global_batches(len(texts["prompts"]), batch, 1, 0)
    return texts | {
        "guide": str(guide_bench.make_guide("toy" if small else "small", scratch / "guide")),
        "device": device,
        "batch": batch,
        "epochs": 1,
        "repeat": 2,
        "batches": [list(map(int, indices)) for _, indices in batches],
        "learning_rate": 1e-4,
        "micro_tokens": guide_bench.MICRO_TOKENS,
    }


def generation_job(dtype: str, config: dict[str, Any], small: bool) -> dict[str, Any]:
    """Sampling of rows of GSM8K's lengths."""
    rows, repeat, new = (2, 1, 4) if small else (ROWS, 3, 64)
    pairs = make_pairs(LENGTHS["gsm8k"], rows * (repeat + 1), config["vocab_size"])
    prompts = [pair["prompt"] for pair in pairs]
    batches = [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
    return {"task": "generation", "dtype": dtype, "new_tokens": new, "batches": batches}


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    lines = [
        "## This checkout against another",
        "",
        *common.table("", "old / new", "least", "most"),
    ]
    for name, ratios in result["ratios"].items():
        middle = statistics.median(ratios)
        lines.append(f"| {name} | {middle:.3f} | {min(ratios):.3f} | {max(ratios):.3f} |")
    return lines


if __name__ == "__main__":
    run(main)
