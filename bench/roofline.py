"""What a training step and decoding take on a card, by part: computed, no GPU is needed.

    python bench/roofline.py [--shape mistral-7b] [--pairs 64] [--rows 256]

A part takes the longer of its operations at the card's rate of products and its bytes at the card's
bandwidth, each at the share of the peak that good kernels reach (`Reached`); what the ranks send is
hidden behind computing as far as that lasts. Operations and bytes are those of work.py, the least
there is, and what an implementation adds to them (`StepExtras`, `DecodeExtras`): two of each are
held against one another, ldalign's before its GPU path was reviewed and the one that is here. Their
numbers are counted by tests that need no GPU (docs/gpu.md names them). **Nothing on the page is
measured**; `make gpu` measures, and puts the same prediction beside what it finds.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from work import (
    LENGTHS,
    PRODUCTS,
    SHAPES,
    Cost,
    Pair,
    Shape,
    attention_flops,
    generation_costs,
    make_pairs,
    step_costs,
    tokens_of,
)

from ldalign.system.exits import run


@dataclass(frozen=True)
class Card:
    """The peaks of one card, as its maker gives them: operations a second of bf16 products, bytes a
    second of its memory, and those to the other cards of its host, one way.
    """

    flops: float
    bytes: float
    link: float


# NVIDIA's data sheets of the SXM versions: dense products, HBM, half of NVLink's both ways.
CARDS = {
    "H100": Card(989e12, 3.35e12, 450e9),
    "H200": Card(989e12, 4.80e12, 450e9),
}


@dataclass(frozen=True)
class Reached:
    """The shares of the peaks that are counted on, and what a kernel's start costs."""

    products: float = 0.70  # cuBLAS on products of thousands of rows
    attention: float = 0.28  # Triton's attention of this repository
    bytes: float = 0.85  # kernels that read and write large tensors once
    link: float = 0.75  # NCCL's rings within a host
    replayed: float = 1.5e-6  # s, from one kernel of a CUDA graph to the next
    wait: float = 60e-6  # s that the device stands still where the host waits for it


@dataclass(frozen=True)
class StepExtras:
    """What a training step does beyond the least."""

    one_pass: bool  # the optimizer's step; else `Case.eager_bytes` are moved a weight
    products_again: bool  # checkpointing "selective" multiplies gate and up again
    stream_passes: int  # over the stream, a block, forward and backward, beyond the norms' own
    values_copied: bool  # rope copies v, forward and backward
    waits_a_micro: int
    waits_a_step: int
    checkpoint: float  # share of the time that the step waits for checkpoints, one in 10 minutes


@dataclass(frozen=True)
class DecodeExtras:
    """What decoding does beyond the least, and how well its steps are filled."""

    rows_busy: float  # of the rows of a step, on the mean
    graphs: int  # captured a run
    kernels: int  # a block and step
    host: float  # s a step in which the device waits for the host


@dataclass(frozen=True)
class Case:
    """How a model is trained: ranks, and bytes a weight of what the optimizer reads and writes."""

    ranks: int
    weight: int  # of the master weights and gradients
    state: int  # of all averages together
    micro_tokens: int
    eager_bytes: int = 0  # moved a weight by an optimizer of PyTorch's operations

    @property
    def least_bytes(self) -> int:
        """Weight, gradient and averages read once, weight and averages written once."""
        return 3 * self.weight + 2 * self.state


# As counted before and after: docs/gpu.md says by which test each number.
STEP = {
    "before": StepExtras(False, True, 3, True, 7, 21, 0.045),
    "now": StepExtras(True, False, 0, False, 0, 1, 0.0),
}
DECODE = {
    "before": DecodeExtras(86 / 256, 129, 12, 0.6e-3),
    "now": DecodeExtras(220 / 256, 11, 9, 0.0),
}
CAPTURE = 0.35  # s a CUDA graph takes to capture, with the two runs that warm it up
RESPONSES = 2560  # of the run that pays for the captures
CASES = {
    "1 card, bf16, RMSprop": Case(1, 2, 2, 16384, 536),
    "8 cards, float32 masters, RMSprop": Case(8, 4, 4, 8192, 348),
}


def step_seconds(
    shape: Shape,
    pairs: Sequence[Pair],
    card: Card,
    case: Case,
    extras: StepExtras,
    reached: Reached = Reached(),
) -> dict[str, float]:
    """Seconds of one training step of `pairs` by part, on case.ranks cards that share it evenly.

    The parts: the four of products and elementwise work, and the optimizer, of work.py; "again"
    (products made a second time), "sending" (what is not hidden), "host" (what it waits for) and
    "checkpoints".
    """
    ranks = case.ranks
    costs = step_costs(shape, pairs, 2, 0)
    tokens = tokens_of(pairs)
    stream, values = tokens * shape.D * 2, tokens * shape.K * shape.E * 2
    more = extras.stream_passes * stream + (4 * values if extras.values_copied else 0)
    costs["elementwise"] += Cost(0, shape.layers * more)
    moved = case.least_bytes if extras.one_pass else case.eager_bytes
    costs["optimizer"] = Cost(12 * shape.weights, moved * shape.weights)
    found = {
        part: _seconds(cost, card, reached, products=part in PRODUCTS) / ranks
        for part, cost in costs.items()
    }
    # Attention's own two products and four run at another rate than the products around it.
    own = attention_flops(shape, pairs)
    rates = 1 / reached.attention - 1 / reached.products
    found["attention"] += own * rates / card.flops / ranks
    i, o = shape.mlp_products[0]
    again = Cost(2 * tokens * i * o * shape.layers, 0)
    found["again"] = (
        _seconds(again, card, reached, products=True) / ranks if extras.products_again else 0.0
    )
    micros = max(1, -(-tokens // (ranks * case.micro_tokens)))
    sent = 0.0
    if ranks > 1:
        # Weights are gathered for each forward and backward in bf16, gradients scattered once.
        share = shape.weights * (ranks - 1) / ranks
        sent = (micros * 2 * 2 + case.weight) * share / (reached.link * card.link)
    computing = sum(found[part] for part in (*PRODUCTS, "elementwise", "again"))
    found["sending"] = max(0.0, sent - computing)
    found["host"] = (micros * extras.waits_a_micro + extras.waits_a_step) * reached.wait
    found["checkpoints"] = extras.checkpoint * sum(found.values())
    return found


def decode_seconds(
    shape: Shape,
    prompts: Sequence[int],
    new_tokens: int,
    rows: int,
    card: Card,
    extras: DecodeExtras,
    reached: Reached = Reached(),
) -> dict[str, float]:
    """Seconds a response token on one card, by part, where `rows` are under way at a time.

    prompts: their lengths; each is answered by new_tokens. A part reads its weights once a step:
    with fewer rows busy there are more steps for the same tokens.
    """
    full = prompts[:rows]
    costs = generation_costs(shape, full, new_tokens, 2)
    tokens = len(full) * new_tokens
    emptier = rows / max(1.0, extras.rows_busy * rows) if rows > 1 else 1.0
    weights = {
        "attention": shape.layers * sum(i * o for i, o in shape.attention_products),
        "MLP": shape.layers * sum(i * o for i, o in shape.mlp_products),
        "head": shape.D * shape.V,
    }
    found = {}
    for part, cost in costs.items():
        rate = card.flops * (reached.products if part in PRODUCTS else 1.0)
        # Weights are read once a step, the cache and the rest for each token.
        again = (emptier - 1) * 2 * weights.get(part, 0) * new_tokens
        memory = (cost.bytes + again) / (card.bytes * reached.bytes)
        found[part] = max(cost.flops / rate, memory) / tokens
    steps = emptier / len(full)  # a response token
    # Those of steps with prompts in them are launched one by one, which their work hides.
    found["starting kernels"] = steps * shape.layers * extras.kernels * reached.replayed
    found["host"] = steps * extras.host
    found["captures"] = CAPTURE * extras.graphs / (RESPONSES * new_tokens)
    return found


def _seconds(cost: Cost, card: Card, reached: Reached, products: bool) -> float:
    compute = cost.flops / (card.flops * reached.products) if products else 0.0
    return max(compute, cost.bytes / (card.bytes * reached.bytes))


# -------------------------------------------------------------------------------------------- page

CHUNK = (300, 256)  # tokens of a prompt, and new ones of a response, in the page's decoding


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/roofline.py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--shape", default="mistral-7b", choices=SHAPES, help="of the policy")
    parser.add_argument("--pairs", type=int, default=64, help="of a step, over all ranks")
    parser.add_argument("--rows", type=int, default=256, help="under way at a time in decoding")
    parser.add_argument(
        "--results", type=Path, default=common.HERE / "results", help="folder of the result files"
    )
    args = parser.parse_args(argv)
    shape = Shape.of(SHAPES[args.shape])
    pairs = make_pairs(LENGTHS["long"], args.pairs, shape.V)
    found: dict[str, Any] = {"benchmark": "roofline", "shape": args.shape, "small": False}
    found |= {"pairs": args.pairs, "tokens": tokens_of(pairs), "rows": args.rows}
    found |= {"reached": vars(Reached()), "step": {}, "decode": {}}
    for name, card in CARDS.items():
        for case_name, case in CASES.items():
            found["step"][f"{name}, {case_name}"] = {
                when: step_seconds(shape, pairs, card, case, extras)
                for when, extras in STEP.items()
            }
        for rows in (1, args.rows):
            found["decode"][f"{name}, {rows} row{'s' * (rows > 1)}"] = {
                when: decode_seconds(shape, [CHUNK[0]] * rows, CHUNK[1], rows, card, extras)
                for when, extras in DECODE.items()
            }
    found |= common.stamp()
    common.save(found, render(found), args.results, "roofline")


def render(found: Mapping[str, Any]) -> list[str]:
    """The page: a table of steps and one of decoding, before and now side by side."""
    prompt, new = CHUNK
    lines = ["## roofline", "", "**Computed, nothing here is measured**: see bench/roofline.py."]
    lines += [
        "",
        f"**A training step** of {found['shape']}: {found['pairs']} pairs of 7B-sized chats, "
        f"{found['tokens']} tokens, bf16 computing, checkpointing=selective; milliseconds by part.",
        "",
        *_parts(found["step"], 1e3, 0),
        "",
        f"**Decoding** {RESPONSES} responses on one card: prompts of {prompt} tokens, {new} new "
        "ones; microseconds a response token by part.",
        "",
        *_parts(found["decode"], 1e6, 1),
    ]
    return lines


def _parts(
    tables: Mapping[str, Mapping[str, Mapping[str, float]]], unit: float, n: int
) -> list[str]:
    """A row a part, and the sum; two columns a table, before and now."""
    names = [f"{name}: {when}" for name, both in tables.items() for when in both]
    columns = [parts for both in tables.values() for parts in both.values()]
    lines = common.table("part", *names)
    for part in columns[0]:
        lines.append(common.row(part, *(f"{unit * column[part]:.{n}f}" for column in columns)))
    sums = (f"**{unit * sum(column.values()):.{n}f}**" for column in columns)
    return [*lines, common.row("**together**", *sums)]


if __name__ == "__main__":
    run(main)
