"""What rounding the logits, or h, to bfloat16 costs a response's log-prob.

    python bench/logit_rounding.py [--responses N] [--results FOLDER] [--small]

Synthetic: h and W normal, in bfloat16, at two scales of the logits; the targets drawn from the
softmax. Against float64 of the same h and W are held: float32 products and logits (the Triton
head), logits stored in bfloat16 (the C++ and the CUDA C++ heads), and an h rounded from float32.
"""

import argparse
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

TOKENS, D = 256, 576  # a response's, and SmolLM2's width
VOCABULARIES = [32_000, 49_152, 151_936]
SPREADS = [2.6, 4.5]  # standard deviations of the logits: the highest of a row are 11 and 19


def logprob(logits: Tensor, target: Tensor) -> Tensor:
    """Returns the response's log-prob in float64 from its (n, V) logits, whatever their dtype."""
    logits = logits.double()
    chosen = logits.gather(1, target[:, None])[:, 0]
    return (chosen - logits.logsumexp(dim=1)).sum()


def errors(V: int, spread: float, generator: torch.Generator) -> tuple[dict[str, float], float]:
    """Draws one response; its errors in nats by what is rounded, and its mean highest logit."""
    wide = torch.randn(TOKENS, D, generator=generator) * spread
    weight = (torch.randn(V, D, generator=generator) * D**-0.5).bfloat16()
    hidden = wide.bfloat16()
    exact = hidden.double() @ weight.double().T
    target = torch.multinomial(exact.softmax(dim=1), 1, generator=generator)[:, 0]
    float32 = hidden.float() @ weight.float().T
    exact_sum = logprob(exact, target)
    found = {
        "float32": logprob(float32, target) - exact_sum,
        "bfloat16": logprob(float32.bfloat16(), target) - exact_sum,
        "hidden": exact_sum - logprob(wide.double() @ weight.double().T, target),
    }
    highest = exact.max(dim=1).values.mean().item()
    return {name: error.item() for name, error in found.items()}, highest


def measure(V: int, spread: float, responses: int) -> dict[str, Any]:
    """Returns the deviation and the bias, with its standard error, of each error over responses."""
    generator = torch.Generator().manual_seed(V)
    drawn = [errors(V, spread, generator) for _ in range(responses)]
    entry: dict[str, Any] = {"V": V, "highest": sum(top for _, top in drawn) / responses}
    for name in drawn[0][0]:
        each = torch.tensor([found[name] for found, _ in drawn], dtype=torch.float64)
        deviation = each.std().item()
        entry[name] = {
            "deviation": deviation,
            "bias": each.mean().item(),
            "bias_error": deviation / responses**0.5,
        }
    return entry


def page(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    lines = [
        "## How logits are rounded",
        "",
        f"Errors of a response's log-prob in nats against float64: {result['responses']} responses "
        f"of {TOKENS} tokens a row, D = {D}, synthetic. Deviation is over responses; a bias has "
        "its standard error.",
        "",
        *common.table(
            "V",
            "highest logit",
            "float32 logits: deviation",
            "bfloat16 logits: deviation",
            "bias",
            "h in bfloat16: deviation",
        ),
    ]
    for entry in result["rows"]:
        half = entry["bfloat16"]
        lines.append(
            common.row(
                f"{entry['V']:,}",
                f"{entry['highest']:.0f}",
                f"{entry['float32']['deviation']:.0e}",
                f"{half['deviation']:.2f}",
                f"{half['bias']:+.2f} +- {half['bias_error']:.2f}",
                f"{entry['hidden']['deviation']:.2f}",
            )
        )
    return lines


def main() -> None:
    """Measures every vocabulary at both spreads and writes logit-rounding.{json,md}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--responses", type=int, default=32)
    parser.add_argument("--results", type=Path, default=common.HERE / "results")
    parser.add_argument("--small", action="store_true", help="a small vocabulary, two responses")
    args = parser.parse_args()
    responses = 2 if args.small else args.responses
    rows = []
    for V in [1_000] if args.small else VOCABULARIES:
        for spread in SPREADS:
            common.say(f"logit rounding: V = {V}, standard deviation {spread} ...")
            rows.append(measure(V, spread, responses))
    result = {
        "benchmark": "logit-rounding",
        "small": args.small,
        "responses": responses,
        "rows": rows,
        **common.stamp(),
    }
    common.save(result, page(result), args.results)


if __name__ == "__main__":
    main()
