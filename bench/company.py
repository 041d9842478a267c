"""How much of a response's log-prob is rounding: in which micro-batch it was computed.

    python bench/company.py [--rows 200] [--micro-tokens 256,1024,4096]

The responses of embedded rows, under the policy's chat template, and the same responses under each
other's prompts, where they are unlikely. Each is scored as the reference pass does, with fewer and
more rows a micro-batch; a product's rounding depends on how many. What two such log-probs differ by
is what the check of step 0 (`ldalign.training.policy.STEP0_TOLERANCE`) must let pass: it is given
as a part of what that allows.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import common
import numpy as np
import torch
from ours import SEED, make_model
from work import LENGTHS, make_pairs

from ldalign.data.embedded import make_rows
from ldalign.data.pairs import Pair
from ldalign.data.tokenizer import load_tokenizer
from ldalign.system.exits import run
from ldalign.training.policy import STEP0_SPARE_TOKENS, STEP0_TOLERANCE
from ldalign.training.scoring import response_logps


def main(argv: list[str]) -> None:
    parser = common.options("company", __doc__)
    parser.add_argument("--rows", type=int, default=200, help="rows whose responses are scored")
    parser.add_argument("--micro-tokens", default="256,1024,4096", help="of a micro-batch")
    args = parser.parse_args(argv)
    folder, config = common.model_of(args)
    job = {"folder": str(folder) if folder else None, "config": config}
    device, _ = common.device_and_dtype()
    pairs = toy_pairs(config) if folder is None else shuffled_pairs(folder, args.rows)
    sizes = [16, 64] if args.small else [int(size) for size in args.micro_tokens.split(",")]
    found, exact = [], None
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(job, dtype, device).eval().requires_grad_(False)
        logps = {}
        for size in sizes:
            common.say(f"company: {str(dtype).removeprefix('torch.')}, {size} tokens ...")
            logps[str(size)] = response_logps(model, pairs, size, device).numpy()
        del model
        if exact is None:  # float32 comes first
            exact = logps[str(sizes[-1])]
        else:
            logps["float32"] = exact
        for one, other in itertools.pairwise(logps):
            off = logps[one] - logps[other]
            found.append(compared(pairs, off, dtype) | {"one": one, "other": other})
    result = common.result("company", args, pairs=len(pairs), found=found)
    common.save(result, render(result), args.results)


def shuffled_pairs(folder: Any, count: int) -> list[Pair]:
    """Real prompts with their own response and the next row's."""
    tokenizer = load_tokenizer(folder)
    prompts, responses = [], []
    for row in make_rows(SEED, "heldout", count):
        ids = tokenizer.encode_rendered(tokenizer.render(row["messages"]))
        prompt = list(tokenizer.prompt_ids(row["messages"][:1]))
        prompts.append(prompt)
        responses.append(ids[len(prompt) :])
    others = [*responses[1:], responses[0]]
    rows = zip(prompts, responses, others, strict=True)
    return [Pair(str(n), *row) for n, row in enumerate(rows)]


def toy_pairs(config: common.Config) -> list[Pair]:
    pairs = make_pairs(LENGTHS["gsm8k"], 8, config["vocab_size"])
    return [Pair(str(n), pair["prompt"][:8], [3, 4, 5], [6, 7]) for n, pair in enumerate(pairs)]


def compared(pairs: Sequence[Pair], off: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What (P, 2) differences in nats are, and as parts of what the check of step 0 lets pass."""
    lengths = np.array([[len(response) for response in pair.responses] for pair in pairs])
    parts = off / (STEP0_TOLERANCE[dtype] * np.sqrt(lengths + STEP0_SPARE_TOKENS))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "a_token": float(np.sqrt((off**2 / lengths).mean())),
        "nats": float(np.abs(off).max()),
        "typical": float(np.sqrt((parts**2).mean())),
        "most": float(np.abs(parts).max()),
    }


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    lines = [
        "# What rounding makes of a log-prob",
        "",
        f"{result['policy']}, {2 * result['pairs']} responses, half of them under another row's "
        "prompt: the log-prob of each from micro-batches of two sizes, or from one and in float32. "
        "Deviation: root mean square, by the square root of the response's tokens. The last two "
        "are parts of what the check of step 0 lets pass in a response: 1 would be refused, and so "
        "would be a typical one of 0.3 in a large batch.",
        "",
        *common.table(
            "dtype",
            "tokens",
            "beside",
            "deviation, nats a square root of tokens",
            "most, nats",
            "typical part (root mean square)",
            "largest part",
        ),
    ]
    for entry in result["found"]:
        lines.append(
            common.row(
                entry["dtype"],
                entry["one"],
                entry["other"],
                f"{entry['a_token']:.2g}",
                f"{entry['nats']:.2g}",
                f"{entry['typical']:.2g}",
                f"{entry['most']:.2g}",
            )
        )
    return lines


if __name__ == "__main__":
    run(main)
