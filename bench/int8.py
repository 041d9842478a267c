"""Decoding with weights in 8 bits (`sampling.weights=int8`): what is drawn, and how fast.

    python bench/int8.py [--texts 150] [--answers 300] [--rows 1,8,32] [--new-tokens 64]

Part of `make bench`; on CPUs. What is drawn: at every token of the responses of embedded held-out
rows, under the policy's chat template, the next-token distribution of each decoder against that of
float32; bfloat16's stands beside it, as what a run accepts anyway. What comes of it: the share of
held-out rows that the policy, after an epoch of SFT on rows of the same kinds, answers right.
How fast: the same rows sampled by the exact decoder in the run's dtype and by the one in 8 bits, in
turns.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import common
import numpy as np
import torch
from drafts import fine_tuned
from ours import SEED, make_model
from torch import Tensor
from work import LENGTHS, make_pairs

from ldalign.data.embedded import check, make_rows
from ldalign.data.tokenizer import load_tokenizer
from ldalign.evaluation.statistics import standard_error
from ldalign.generation.decoders import PackedDecoder, Weights
from ldalign.generation.engine import Engine, Request
from ldalign.generation.paged_cache import pages_for
from ldalign.generation.sampling import Sampling
from ldalign.models.fetch import resolve_model
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.exits import run

ANSWER_TOKENS = 96  # of an answer, at most
# Whose distributions are held against float32's.
SIDES: dict[str, tuple[torch.dtype, Weights]] = {
    "bfloat16": (torch.bfloat16, "exact"),
    "bfloat16, 8 bits": (torch.bfloat16, "int8"),
    "float32, 8 bits": (torch.float32, "int8"),
}


def main(argv: list[str]) -> None:
    parser = common.options("int8", __doc__)
    parser.add_argument("--texts", type=int, default=150, help="rows whose responses are measured")
    parser.add_argument("--answers", type=int, default=300, help="rows whose answers are checked")
    parser.add_argument("--sft-rows", type=int, default=400, help="that are trained on before")
    parser.add_argument("--rows", default="1,8,32", help="rows that are sampled at a time")
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args(argv)
    folder, config = common.model_of(args)
    job = {"folder": str(folder) if folder else None, "config": config}
    _, dtype = common.device_and_dtype()

    def decoder(dtype: torch.dtype, weights: Weights, of: common.Config = job) -> PackedDecoder:
        model = make_model(of, dtype, torch.device("cpu")).eval()
        if not PackedDecoder.able(model):
            raise EnvironmentProblem("bench: int8: needs the C++ extension; see `make setup`")
        return PackedDecoder(model, release=True, weights=weights)

    texts = toy_texts(config) if folder is None else responses(folder, args.texts)
    common.say(f"int8: the distributions at {sum(n for _, n in texts)} tokens ...")
    drawn = distributions(
        decoder(torch.float32, "exact"),
        {name: decoder(*side) for name, side in SIDES.items()},
        texts,
    )
    with tempfile.TemporaryDirectory() as scratch:
        taught = make_rows(SEED, "train", 8 if args.small else args.sft_rows)
        start = resolve_model("toy", args.cache) if folder is None else folder
        common.say("int8: an epoch of SFT ...")
        tuned = fine_tuned(start, taught, 1, Path(scratch), args.cache)
        asked = make_rows(SEED, "heldout", 4 if args.small else args.answers)
        common.say("int8: answers ...")
        right = {
            weights: answered(
                decoder(getattr(torch, dtype), weights, {"folder": str(tuned)}), tuned, asked
            )
            for weights in get_args(Weights)
        }
    pair = [decoder(getattr(torch, dtype), weights) for weights in get_args(Weights)]
    new, repeat = (4, 1) if args.small else (args.new_tokens, args.repeat or 5)
    speeds = []
    for rows in [2] if args.small else map(int, args.rows.split(",")):
        common.say(f"int8: {rows} rows ...")
        speeds.append(speed(pair, rows, new, repeat, config["vocab_size"]))
    result = common.result(
        "int8",
        args,
        texts=len(texts),
        dtype=dtype,
        new_tokens=new,
        sft_rows=len(taught),
        drawn=drawn,
        answers=compared(right),
        speeds=speeds,
    )
    common.save(result, render(result), args.results)


Text = tuple[list[int], int]  # ids, and how many of them, the last ones, are the response's


def responses(folder: Any, count: int) -> list[Text]:
    """Real prompts with real responses, in the policy's tokens."""
    tokenizer = load_tokenizer(folder)
    texts = []
    for row in make_rows(SEED, "heldout", count):
        ids = tokenizer.encode_rendered(tokenizer.render(row["messages"]))
        prompt = tokenizer.prompt_ids(row["messages"][:1])
        assert ids[: len(prompt)] == list(prompt)
        texts.append((ids, len(ids) - len(prompt)))
    return texts


def toy_texts(config: common.Config) -> list[Text]:
    pairs = make_pairs(LENGTHS["gsm8k"], 2, config["vocab_size"])
    return [(list(pair["prompt"]), 8) for pair in pairs]


def distributions(
    exact: PackedDecoder, sides: dict[str, PackedDecoder], texts: Sequence[Text]
) -> dict[str, dict[str, float]]:
    """Compares each side's distributions with the exact ones, at all tokens of the responses."""
    found: dict[str, list[Tensor]] = {name: [] for name in sides}
    for ids, count in texts:
        wanted = next_logps(exact, ids, count)
        for name, decoder in sides.items():
            other = next_logps(decoder, ids, count)
            divergence = (wanted.exp() * (wanted - other)).sum(1)
            distance = (wanted.exp() - other.exp()).abs().sum(1) / 2
            agrees = wanted.argmax(1) == other.argmax(1)
            gap = (other - wanted).gather(1, torch.tensor(ids[-count:])[:, None])[:, 0]
            found[name].append(torch.stack((divergence, distance, agrees.double(), gap)))
    drawn = {}
    for name, parts in found.items():
        divergence, distance, agrees, gap = torch.cat(parts, 1)
        drawn[name] = {
            "tokens": len(divergence),
            "kl_mean": divergence.mean().item(),
            "kl_99": divergence.quantile(0.99).item(),
            "distance": distance.mean().item(),
            "agreement": agrees.mean().item(),
            "bias": gap.mean().item(),
            "bias_error": (gap.std() / len(gap) ** 0.5).item(),
        }
    return drawn


def next_logps(decoder: PackedDecoder, ids: list[int], count: int) -> Tensor:
    """The log-probs of the next token before each of the last `count`: (count, V) float64."""
    decoder.allocate(pages_for(len(ids)), len(ids))
    pages = torch.arange(pages_for(len(ids)), dtype=torch.int32)[None]
    last = torch.arange(len(ids) - count - 1, len(ids) - 1)
    logits = decoder.step(torch.tensor(ids), torch.tensor([[len(ids), 0]]), pages, last)
    return logits.double().log_softmax(1)


def answered(
    decoder: PackedDecoder, folder: Path, rows: Sequence[dict[str, Any]]
) -> dict[str, list[float]]:
    """Whether each row is answered right, greedily and at temperature 1: 0 or 1."""
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer.prompt_ids(row["messages"][:1]) for row in rows]
    longest = max(map(len, prompts)) + ANSWER_TOKENS
    right = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        sampling = Sampling(ANSWER_TOKENS, temperature=temperature)
        engine = Engine(decoder, sampling, tokenizer.end_ids, SEED, longest=longest, rows=32)
        requests = [Request(row["id"], prompts[i], i) for i, row in enumerate(rows)]
        made = {request.index: response for request, response in engine.run(requests)}
        right[name] = [
            float(
                made[i].finish_reason == "stop"
                and check(row["kind"], row["answer"], tokenizer.decode(made[i].ids))
            )
            for i, row in enumerate(rows)
        ]
    return right


def compared(right: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Of greedy and of sampled answers: the share that is right of both decoders, and by how much
    that in 8 bits has more, with the standard error of the differences row by row.
    """
    found = []
    for name in right["exact"]:
        exact, int8 = (np.array(right[weights][name]) for weights in get_args(Weights))
        found.append(
            {
                "answers": name,
                "rows": len(exact),
                "exact": exact.mean(),
                "int8": int8.mean(),
                "more": (int8 - exact).mean(),
                "error": standard_error(int8 - exact),
            }
        )
    return found


def speed(
    decoders: Sequence[PackedDecoder], rows: int, new: int, repeat: int, vocabulary: int
) -> dict[str, Any]:
    """Tokens a second while rows are decoded, prompts apart: the exact decoder's, that in 8 bits',
    and their ratio, by turns.
    """
    seconds: list[list[float]] = [[] for _ in decoders]
    for n in range(repeat + 1):
        prompts = [pair["prompt"] for pair in make_pairs(LENGTHS["gsm8k"], rows, vocabulary)]
        requests = [Request(f"{n}/{i}", prompt, i) for i, prompt in enumerate(prompts)]
        longest = max(map(len, prompts)) + new
        for taken, decoder in zip(seconds, decoders, strict=True):
            engine = Engine(decoder, Sampling(new), [], SEED, longest=longest, rows=rows)
            steps: list[float] = []  # the end of each that gave all rows a token

            def note(chosen: list[Request], ids: list[int], steps: list[float] = steps) -> None:
                if len(chosen) == rows:
                    steps.append(time.perf_counter())

            assert len(list(engine.run(requests, note))) == rows
            if n:  # the first warms up
                taken.append(statistics.median(b - a for a, b in itertools.pairwise(steps)))
    exact, int8 = (rows / statistics.median(taken) for taken in seconds)
    return {
        "rows": rows,
        "exact": exact,
        "int8": int8,
        "ratio": common.median_ratio(seconds[0], seconds[1]),
    }


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    some = next(iter(result["drawn"].values()))
    lines = [
        "## int8",
        "",
        f"{result['policy']}, weights in 8 bits. Next-token distributions against float32's at "
        f"the {some['tokens']} tokens of {result['texts']} real responses (embedded, held out): KL "
        "divergence in nats a token; distance: half the sum of all differences, the share of "
        "draws that come out otherwise; the same first: the most likely token is. Shift: of the "
        "log-prob of the response's own token, with its standard error.",
        "",
        *common.table(
            "decoder", "KL, mean", "KL, 99 %", "distance", "the same first", "shift, nats a token"
        ),
    ]
    for name, side in result["drawn"].items():
        lines.append(
            common.row(
                name,
                f"{side['kl_mean']:.1e}",
                f"{side['kl_99']:.1e}",
                f"{100 * side['distance']:.1f} %",
                f"{100 * side['agreement']:.1f} %",
                f"{side['bias']:+.4f} +- {side['bias_error']:.4f}",
            )
        )
    lines += [
        "",
        f"Answers right of {result['answers'][0]['rows']} held-out rows, by the policy after an "
        f"epoch of SFT on {result['sft_rows']} rows; exact: {result['dtype']}. The difference is "
        "row by row, with its standard error.",
        "",
        *common.table("answers", "exact", "8 bits", "8 bits - exact"),
        *(
            common.row(
                found["answers"],
                f"{100 * found['exact']:.1f} %",
                f"{100 * found['int8']:.1f} %",
                f"{100 * found['more']:+.1f} +- {100 * found['error']:.1f} points",
            )
            for found in result["answers"]
        ),
    ]
    lines += [
        "",
        f"Tokens a second of rows being decoded, {result['new_tokens']} tokens each, medians over "
        f"the steps; exact: {result['dtype']}. In turns, in one process.",
        "",
        *common.table("rows", "exact", "8 bits", "8 bits / exact"),
    ]
    for speed in result["speeds"]:
        cells = [f"{speed['exact']:.0f}", f"{speed['int8']:.0f}", f"{speed['ratio']:.2f}"]
        lines.append(common.row(speed["rows"], *cells))
    return lines


if __name__ == "__main__":
    run(main)
