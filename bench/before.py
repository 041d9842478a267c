"""This checkout against another one of ldalign: is it as fast as before?

    python bench/before.py OLD [--rounds 3] [--only step,guide]

OLD: a checkout with a `.venv` of its own, as `make setup` leaves it, and with this one's form of
guide folders (else --only step,generation). Both do the same DPO steps, guide training, distances
and sampling, each in a process of its own, in turns: old, new, old, new.
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

from ldalign.models.toy import write_toy_model
from ldalign.system.exits import run

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
            jobs |= guide_jobs(Path(scratch), dtype, model, args.small)
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


def guide_jobs(
    scratch: Path, dtype: str, model: dict[str, Any], small: bool
) -> dict[str, dict[str, Any]]:
    """Training steps and distances of a guide whose frozen tower is the policy (--small: the
    toy's), and training steps of a new one.
    """
    lengths, size, batch, count = ("short", "toy", 2, 2) if small else ("gsm8k", "small", 8, 5)
    policy = Path(model["folder"]) if model["folder"] else write_toy_model(scratch / "policy")
    frozen = guide_bench.policy_guide(policy, scratch / "frozen", True, dtype)
    batches = guide_bench.make_batches(lengths, batch, count, model["config"]["vocab_size"])
    new, of_new = guide_bench.new_gpt2(size, scratch / "new", lengths, batch, count)
    rows = [pair for batch in batches for pair in batch]
    jobs = {
        "guide training": guide_bench.training_job(
            frozen, batches, guide_bench.FROZEN, dtype, dtype
        ),
        "guide distance": guide_bench.distance_job(frozen, dtype, rows, 1 if small else 2),
        "new guide's training": guide_bench.training_job(new, of_new, guide_bench.TRAINED),
    }
    shared = {
        "device": model["device"],
        "scratch": str(scratch),
        "micro_tokens": guide_bench.MICRO_TOKENS,
    }
    return {name: job | shared for name, job in jobs.items()}


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
