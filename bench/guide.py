"""The guide: its step against the policy's, distances and training against transformers, padded.

    python bench/guide.py [--sizes small,gpt2]  (by default the small one, and both on a GPU)

Part of `make bench`. Three tables. One optimizer step of a guide of the policy (its tower frozen,
or two that are trained) against the policy's own DPO step on the same pairs, the reference's
log-probs at hand. Distances by the policy and by a new GPT-2, and training that GPT-2, against the
same network by transformers: same weights (a guide folder that both read), token ids and batches;
the peer, in an environment of its own, reads [prompt; response] for each response, right-padded.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from step import BETA, LEARNING_RATE
from work import LENGTHS, Pair, describe, make_pairs, tokens_of

from ldalign.data import embedded
from ldalign.data.pairs import Pair as IdPair
from ldalign.models.gpt2 import GPT2Config
from ldalign.models.guide import WAY_OUT, GuideConfig, longest_first
from ldalign.models.guide_folder import new_guide, pretrained_guide, save_guide
from ldalign.models.toy import write_toy_model
from ldalign.system.exits import run
from ldalign.system.seeds import normals
from ldalign.training.latent_map import standardise

# Layers, width, heads: settings.py's default for a new guide, and GPT-2's smallest size.
SIZES = {"small": (4, 256, 4), "gpt2": (12, 768, 12), "toy": (2, 32, 2)}
VOCABULARY, POSITIONS = 4096, 1024
BATCH = 8  # pairs a step, settings.py's default for a guide
ROWS = 64  # whose distances are measured
PEER_ROWS = 16  # the peer's rows at a time, in training
MICRO_TOKENS = 8192  # ldalign's budget, its default
# Beside the sibling contrast and dropped latents, which all have: a frozen tower's and a trained
# one's token dropout (run/stages/guide.py).
FROZEN = {"contrast": 10.0, "latent_dropout": 0.1, "token_dropout": 0.0}
TRAINED = FROZEN | {"token_dropout": 1.0}
# With these nothing is drawn, so that both sides of --small have the same losses.
PLAIN = {"contrast": 10.0, "latent_dropout": 0.0, "token_dropout": 0.0}
TOWERS = {"frozen": "guide, one frozen tower", "trained": "guide, two trained towers"}


def main(argv: list[str]) -> None:
    parser = common.options("guide", __doc__)
    parser.add_argument("--sizes", help=f"of {', '.join(SIZES)}; gpt2 takes a CPU long")
    args = parser.parse_args(argv)
    device, dtype = common.device_and_dtype()
    small = args.small
    batch = 2 if small else BATCH
    lengths, repeat = ("short", 1) if small else ("gsm8k", args.repeat or 4)
    sizes = args.sizes or (
        "toy" if small else ",".join(["small", "gpt2"] if device.type == "cuda" else ["small"])
    )
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model, config = common.model_of(args)
        policy, vocabulary = model or write_toy_model(place / "policy"), config["vocab_size"]
        shared = {"device": str(device), "scratch": scratch, "micro_tokens": MICRO_TOKENS}

        batches = make_batches(lengths, batch, repeat + 1, vocabulary)
        steps = {
            "dtype": dtype,
            "pairs": describe(batches[1:]),
            "rows": measure_steps(shared | {"batches": batches}, policy, dtype, place),
        }

        pairs = make_pairs(LENGTHS[lengths], 4 if small else ROWS, vocabulary)
        distances = []
        for each in ["float32"] if small or dtype == "float32" else [dtype, "float32"]:
            folder = policy_guide(policy, place / f"frozen-{each}", True, each)
            job = distance_job(folder, each, pairs, 1 if small else 2) | shared
            distances.append({"guide": "policy", "dtype": each} | against(job, args))
        training = []
        for size in sizes.split(","):
            folder, batches = new_gpt2(size, place / size, lengths, batch, repeat + 1)
            job = training_job(folder, batches, PLAIN if small else TRAINED) | shared
            training.append({"guide": size, "dtype": "float32"} | against(job, args))
            rows = [pair for batch in batches for pair in batch]
            job = distance_job(folder, "float32", rows, 1 if small else 2) | shared
            distances.append({"guide": size, "dtype": "float32"} | against(job, args))
    result = common.result(
        "guide",
        args,
        device=str(device),
        repeat=repeat,
        batch=batch,
        steps=steps,
        distances=distances,
        training=training,
    )
    common.save(result, render(result), args.results, f"guide-{device.type}")


# ------------------------------------------------------------------------------------------- guides


def policy_guide(policy: Path, folder: Path, frozen: bool, dtype: str) -> Path:
    """A guide that starts as the policy, saved."""
    config = GuideConfig(max_tokens=None)
    save_guide(pretrained_guide(config, 0, policy, frozen, getattr(torch, dtype)), folder)
    return folder


def new_gpt2(
    size: str, folder: Path, lengths: str, batch: int, count: int
) -> tuple[Path, list[list[Pair]]]:
    """A new guide, saved, and batches of pairs in its ids; its tokenizer learns the embedded tasks.

    What its latents do to the decoder's states is drawn, not nothing as in a run: so both sides'
    losses can be compared.
    """
    layers, width, heads = SIZES[size]
    texts = [m["content"] for row in embedded.make_rows(0, "train", 300) for m in row["messages"]]
    network = GPT2Config(VOCABULARY, POSITIONS, width, layers, heads)
    guide = new_guide(GuideConfig(max_tokens=None), 0, texts, network)
    batches = make_batches(lengths, batch, count, guide.encoder.embedding.num_embeddings)
    standardise(guide, [IdPair("", **pair) for batch in batches for pair in batch])
    with torch.no_grad():
        for name in ("to_scale", "to_output"):
            weight = getattr(guide.latent, name).weight
            weight.copy_(0.1 * normals(0, f"bench/{name}", *weight.shape))
    save_guide(guide, folder)
    return folder, batches


def make_batches(lengths: str, size: int, count: int, vocabulary: int) -> list[list[Pair]]:
    """Makes `count` batches of `size` pairs of random ids."""
    pairs = make_pairs(LENGTHS[lengths], size * count, vocabulary)
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


# --------------------------------------------------------------------------------------------- jobs


def training_job(
    folder: Path,
    batches: list[list[Pair]],
    loss: dict[str, float],
    dtype: str = "float32",
    compute: str = "float32",
) -> dict[str, Any]:
    """Optimizer steps of the guide in a folder, whose towers are held in `dtype`."""
    return {
        "task": "guide_training",
        "guide": str(folder),
        "batches": batches,
        "dtype": dtype,
        "compute": compute,
        "loss": loss,
        "way_out": WAY_OUT,
        "learning_rate": 1e-4,
        "rows": PEER_ROWS,
    }


def distance_job(folder: Path, dtype: str, pairs: list[Pair], repeat: int) -> dict[str, Any]:
    """Distances of pairs by the guide in a folder; the peer gets ldalign's batches of rows."""
    costs = [tokens_of([pair]) for pair in pairs]
    return {
        "task": "guide_distance",
        "guide": str(folder),
        "pairs": pairs,
        "row_batches": longest_first(costs, MICRO_TOKENS),
        "dtype": dtype,
        "repeat": repeat,
    }


# ------------------------------------------------------------------------------------- measurements


def measure_steps(
    job: dict[str, Any], policy: Path, dtype: str, place: Path
) -> list[dict[str, Any]]:
    """The policy's DPO step as a run takes it (float32 weights), then the guides' on its pairs."""
    common.say("guide: DPO step ...")
    dpo = {
        "folder": str(policy),
        "precision": "float32" if dtype == "float32" else "mixed",
        "optimizer": "adamw",
        "learning_rate": LEARNING_RATE,
        "beta": BETA,
    }
    rows = [{"name": "policy, DPO"} | _summary(common.measure_ours("dpo", job | dpo))]
    for towers, loss in (("frozen", FROZEN), ("trained", TRAINED)):
        common.say(f"guide: step, {TOWERS[towers]} ...")
        held = dtype if towers == "frozen" else "float32"
        folder = policy_guide(policy, place / f"step-{towers}", towers == "frozen", held)
        guide = training_job(folder, job["batches"], loss, held, dtype)
        rows.append(
            {"name": TOWERS[towers]} | _summary(common.measure_ours("guide_training", job | guide))
        )
    tokens = [tokens_of(batch) for batch in job["batches"][1:]]
    for r in rows:
        each = [seconds / n for seconds, n in zip(r["seconds"], tokens, strict=True)]
        r["seconds_per_token"] = statistics.median(each)
        r["time_ratio"] = common.median_ratio(r["seconds"], rows[0]["seconds"])
    return rows


def against(job: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measures a job on both sides: seconds, ratios, and how far their results are apart."""
    common.say(f"guide: {job['task'].partition('_')[2]}, {Path(job['guide']).name} ...")
    job = job | common.float32_products(job["device"], job["dtype"])
    ours = common.measure_ours(job["task"], job)
    theirs: dict[str, Any] = {"skipped": "--no-peers"}
    if not args.no_peers:
        script, environment = "peers/padded_guide.py", common.KEEP_MEMORY
        theirs = common.measure_or_say(script, job, "transformers", environment)
    entry: dict[str, Any] = {"ldalign": _summary(ours), "peer": _summary(theirs)}
    if "pairs" in job:
        rows = [[job["pairs"][i] for i in batch] for batch in job["row_batches"]]
        entry |= {"rows": len(job["pairs"]), "work": describe(rows)}
    if "skipped" not in theirs:
        entry["time_ratio"] = common.median_ratio(theirs["seconds"], ours["seconds"])
        entry["memory_ratio"] = theirs["peak_gib"] / ours["peak_gib"]
        if "distances" in ours:
            both = zip(ours["distances"], theirs["distances"], strict=True)
            entry["largest_relative_difference"] = max(abs(a - b) / b for a, b in both)
    return entry


def _summary(measured: dict[str, Any]) -> dict[str, Any]:
    if "skipped" in measured:
        return measured
    kept = {name: measured[name] for name in ("seconds", "peak_gib")}
    if "losses" in measured:
        kept["first_loss"] = measured["losses"][0]
    return kept | {"median_seconds": statistics.median(measured["seconds"])}


# --------------------------------------------------------------------------------------------- page


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    steps = result["steps"]
    lines = [
        f"## guide, {result['device']}",
        "",
        f"**Beside the policy's own step**: {result['batch']} pairs of "
        f"{steps['pairs']['tokens_per_pair']:.0f} tokens in the mean, {result['policy']}, "
        f"{steps['dtype']} compute, AdamW, the policy's reference log-probs at hand; medians over "
        f"{result['repeat']} steps. Tokens: a pair's prompt and both responses, each once. The "
        "frozen tower reads them in every step here, in a run once for all epochs.",
        "",
        *common.table("", "s a step", "ms a token", "time / DPO's", "GiB"),
    ]
    for r in steps["rows"]:
        cells = [f"{r['median_seconds']:.2f}", f"{1e3 * r['seconds_per_token']:.2f}"]
        cells += [f"{r['time_ratio']:.2f}", f"{r['peak_gib']:.2f}"]
        lines.append(common.row(r["name"], *cells))
    lines += [
        "",
        "**Distances** of such pairs, against the same network in transformers, padded: "
        "same weights, batches of the same rows, longest first, which hold "
        f"{result['distances'][0]['work']['padded_over_packed']:.2f} times as many tokens there. "
        "Ratio: of rows a second, and of memory.",
        "",
        *common.table(
            "guide", "", "rows/s", "GiB", "padded, rows/s", "GiB", "ratio", "memory", "most apart"
        ),
    ]
    for entry in result["distances"]:
        cells = _both(entry, lambda side, entry=entry: entry["rows"] / side["median_seconds"])
        gap = entry.get("largest_relative_difference")
        cells.append("" if gap is None else f"{gap:.1e}")
        lines.append(common.row(entry["guide"], entry["dtype"], *cells))
    lines += [
        "",
        f"**Training** a new GPT-2 guide: seconds of a step of {result['batch']} pairs, medians "
        f"over {result['repeat']}; against transformers' GPT-2, padded. Ratio: of time, and of "
        "memory.",
        "",
        *common.table("guide", "", "s", "GiB", "padded, s", "GiB", "ratio", "memory"),
    ]
    for entry in result["training"]:
        cells = _both(entry, lambda side: side["median_seconds"])
        lines.append(common.row(entry["guide"], entry["dtype"], *cells))
    return lines


def _both(entry: dict[str, Any], figure: Callable[[dict[str, Any]], float]) -> list[str]:
    """The cells of both sides, each with its figure and its memory, and of their ratios."""
    ours, theirs = entry["ldalign"], entry["peer"]
    cells = [f"{figure(ours):.2f}", f"{ours['peak_gib']:.2f}"]
    if "skipped" in theirs:
        return [*cells, f"not run: {theirs['skipped']}", "", "", ""]
    cells += [f"{figure(theirs):.2f}", f"{theirs['peak_gib']:.2f}"]
    return cells + [f"{entry[name]:.2f}" for name in ("time_ratio", "memory_ratio")]


if __name__ == "__main__":
    run(main)
