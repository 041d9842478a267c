"""What torch.compile would bring: one block, forward and backward, as it is and compiled.

    python bench/compile.py [--tokens 1200]

Part of `make bench`. The block is the policy's own; both forms take the same packed pairs by turns
in one process. On a CPU torch.compile needs a C++ compiler. The time to compile is said apart.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from ours import make_model
from torch import Tensor
from work import LENGTHS, SHAPES, make_pairs

from ldalign.models.layout import Packed
from ldalign.models.mistral import rope_tables
from ldalign.system import distributed
from ldalign.system.exits import run

SEED = 0


def main(argv: list[str]) -> None:
    parser = common.options("compile", __doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=4, help="of GSM8K's lengths, packed")
    args = parser.parse_args(argv)
    device, dtype = common.device_and_dtype()
    distributed.start(device.type)
    config = common.model_of(args)[1] if args.small else dict(SHAPES[args.shape])
    config["num_hidden_layers"] = 1
    model = make_model({"folder": None, "config": config}, getattr(torch, dtype), device)
    pairs = make_pairs(LENGTHS["gsm8k"], 1 if args.small else args.pairs, config["vocab_size"])
    layout = Packed(
        [(len(p["prompt"]), len(p["real"]), len(p["generated"])) for p in pairs], device
    )
    cos, sin = rope_tables(layout.positions, model.config.head_dim, model.config.rope_theta)
    torch.manual_seed(SEED)
    x = torch.randn(
        sum(layout.lengths), config["hidden_size"], dtype=getattr(torch, dtype), device=device
    )
    block = model.blocks[0]

    def plain(x: Tensor) -> Tensor:
        update, stream = block(x, None, cos, sin, layout)
        return update + stream

    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "as it is": plain,
        "torch.compile": torch.compile(plain),
    }
    repeat = 2 if args.small else args.repeat or 30
    rows = measure(forms, x, repeat, device)
    distributed.stop()
    result = common.result(
        "compile",
        args,
        device=str(device),
        dtype=dtype,
        shape=args.shape,
        tokens=len(x),
        repeat=repeat,
        rows=rows,
    )
    common.save(result, render(result), args.results, f"compile-{device.type}")


def measure(
    forms: dict[str, Callable[[Tensor], Tensor]], x: Tensor, repeat: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Seconds of each form, by turns; the first call of each, which compiles, apart."""
    rows: dict[str, dict[str, Any]] = {
        name: {"first": _once(form, x, device)} for name, form in forms.items()
    }
    for _ in range(repeat):
        for name, form in forms.items():
            rows[name].setdefault("seconds", []).append(_once(form, x, device))
    plain = rows["as it is"]["seconds"]
    for row in rows.values():
        row["median_seconds"] = statistics.median(row["seconds"])
        row["time_ratio"] = common.median_ratio(row["seconds"], plain)
    return rows


def _once(form: Callable[[Tensor], Tensor], x: Tensor, device: torch.device) -> float:
    leaf = x.detach().requires_grad_()
    began = time.perf_counter()
    form(leaf).backward(torch.ones_like(x))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def render(result: dict[str, Any]) -> list[str]:
    """The Markdown page."""
    lines = [
        f"## compile, {result['device']}",
        "",
        f"One block of {result['shape']}, forward and backward, {result['tokens']} packed tokens, "
        f"{result['dtype']}; medians of {result['repeat']}, by turns.",
        "",
        *common.table("", "seconds", "time / as it is", "first call, s"),
    ]
    for name, row in result["rows"].items():
        cells = [f"{row['median_seconds']:.4f}", f"{row['time_ratio']:.2f}", f"{row['first']:.1f}"]
        lines.append(common.row(name, *cells))
    return lines


if __name__ == "__main__":
    run(main)
