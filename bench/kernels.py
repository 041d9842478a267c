"""The kernels against named peers.

    python bench/kernels.py [--repeat 5] [--small] [--shape N,D,V]

Part of `make bench`. Every implementation lives in a process of its own and holds the same inputs;
the parent asks them in turn, round after round, so that a machine that slows down slows all of
them. What counts is the median over the rounds of the ratio to `bare`: the three matrix products
(hidden W^T, dZ W, dZ^T hidden) without which there is no loss and no gradient. Memory is the peak
above what was held before the first call, less the two gradients. Error is the relative distance of
both gradients from float64's. Results go to bench/results/kernels-DEVICE.json and .md.
"""

import argparse
import ctypes
import datetime
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldalign import ops
from ldalign.kernels import flash, reference, triton_ops
from ldalign.run.environment import describe_machine
from ldalign.system.exits import run
from ldalign.system.memory import keep_freed_memory, resident

HERE = Path(__file__).resolve().parent
BETA = 0.1
Step = Callable[[], tuple[Tensor, Tensor]]  # one forward and backward: (dhidden, dweight)
Shape = tuple[int, int, int]  # N rows, D width, V vocabulary
SHAPES: dict[str, list[Shape]] = {
    "cpu": [(2048, 576, 49_152)],
    "cuda": [(8192, 4096, 32_000), (8192, 4096, 128_256)],
}
SMALL: Shape = (64, 32, 512)
# Query heads, key heads, head width, window, pairs, tokens of a prompt and of a response (each give
# or take a quarter)
ATTENTION = [
    (9, 3, 64, None, 64, 128, 128),
    (32, 8, 128, 4096, 8, 512, 512),
    (32, 8, 128, 4096, 4, 2560, 512),
]
ATTENTION_SMALL = [(3, 1, 16, None, 2, 8, 8)]


class Inputs:
    """The inputs of all: pairs of uneven lengths and weights, references near the log-probs."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        N, D, V = shape
        make = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(N, D, generator=make).to(device, dtype)
        self.weight = (torch.randn(V, D, generator=make) * D**-0.5).to(device, dtype)
        self.target = torch.randint(V, (N,), generator=make).to(device)
        cuts = sorted(
            (torch.randperm(N - 1, generator=make)[: 2 * max(1, N // 128) - 1] + 1).tolist()
        )
        self.lengths = [b - a for a, b in zip([0, *cuts], [*cuts, N], strict=True)]
        P = len(self.lengths) // 2
        self.pair_weight = (torch.rand(P, generator=make) * 2).to(device)
        expected = -torch.tensor(self.lengths) * (torch.log(torch.tensor(float(V))) + 0.5)
        self.reference = (expected + torch.randn(2 * P, generator=make)).to(device)

    def dpo(self, logp: Tensor) -> Tensor:
        """Computes the weighted DPO loss of token log-probs, in plain PyTorch."""
        gap = torch.stack([run.sum() for run in logp.split(self.lengths)]) - self.reference.to(
            logp.dtype
        )
        return -(
            self.pair_weight.to(logp.dtype) * F.logsigmoid(BETA * (gap[0::2] - gap[1::2]))
        ).sum()

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()


# --------------------------------------------------------------------------- the peers of pair_loss


def bare(x: Inputs) -> Step:
    z = torch.randn(len(x.hidden), len(x.weight), dtype=x.hidden.dtype, device=x.hidden.device)

    def step() -> tuple[Tensor, Tensor]:
        torch.mm(x.hidden, x.weight.T, out=z)
        return z @ x.weight, z.T @ x.hidden

    return step


def ldalign(x: Inputs) -> Step:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return ops.pair_loss(hidden, weight, x.target, x.lengths, x.reference, x.pair_weight, BETA)[
            0
        ]

    return _graded(x, loss)


def eager(x: Inputs) -> Step:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logp = (hidden @ weight.T).log_softmax(-1).gather(1, x.target[:, None])[:, 0]
        return x.dpo(logp.float())

    return _graded(x, loss)


def eager_float32_logits(x: Inputs) -> Step:
    return _graded(
        x, lambda hidden, weight: x.dpo(reference.linear_logprob(hidden, weight, x.target))
    )


def compiled(x: Inputs) -> Step:
    def logprob(hidden: Tensor, weight: Tensor) -> Tensor:
        return reference.linear_logprob(hidden, weight, x.target)

    fused = torch.compile(logprob)
    return _graded(x, lambda hidden, weight: x.dpo(fused(hidden, weight)))


def torch_linear_cross_entropy(x: Inputs) -> Step:
    chunked: Any = F.linear_cross_entropy  # type: ignore[attr-defined]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return x.dpo(-chunked(hidden, weight, x.target, reduction="none").float())

    return _graded(x, loss)


def liger(x: Inputs) -> Step:
    """Times Liger's fused linear DPO loss, on the same rows cut into responses of one length."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    # It knows no weights and no cached reference: the same products and softmaxes, fewer numbers.
    fused = LigerFusedLinearDPOLoss(
        beta=BETA, use_ref_model=False, compute_nll_loss=False, compiled=False
    )
    N, rows = len(x.hidden), 2 * max(1, len(x.hidden) // 256)
    target = x.target.view(rows, N // rows)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        out = fused(weight, hidden.view(rows, N // rows, -1), target)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    return _graded(x, loss)


def cut_cross_entropy(x: Inputs) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return x.dpo(-linear_cross_entropy(hidden, weight, x.target, reduction="none"))

    return _graded(x, loss)


def _graded(x: Inputs, loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
    def step() -> tuple[Tensor, Tensor]:
        leaves = x.leaves()
        dh, dw = torch.autograd.grad(loss(*leaves), leaves)
        return dh, dw

    return step


# name -> (step, package it needs)
PEERS: dict[str, tuple[Callable[[Inputs], Step], str | None]] = {
    "bare": (bare, None),
    "ldalign": (ldalign, None),
    "eager": (eager, None),
    "eager_float32_logits": (eager_float32_logits, None),
    "compiled": (compiled, None),
    "torch_linear_cross_entropy": (torch_linear_cross_entropy, None),
    "liger": (liger, "liger_kernel"),
    "cut_cross_entropy": (cut_cross_entropy, "cut_cross_entropy"),
}
OTHER_LOSS = {"bare", "liger"}  # their gradients are not those of our loss: no error is given


# -------------------------------------------------------------------------- the elementwise kernels


def elementwise(
    shape: Shape, dtype: torch.dtype, device: torch.device, repeat: int
) -> dict[str, dict[str, float]]:
    """Times the block's kernels against eager PyTorch, forward and backward, in turn.

    Beside the times stand the bytes that they must move, as a share of what a copy moves.
    """
    cases = _elementwise_cases(shape, dtype, device)
    N, D, _ = shape
    copied = torch.empty(max(1, N * _feed_forward(D)), dtype=dtype, device=device)
    source = torch.ones_like(copied)
    results = {}
    for name, (ours, theirs, moved) in cases.items():
        seconds: dict[str, list[float]] = {"ldalign": [], "eager": [], "copy": []}
        steps: dict[str, Callable[[], Any]] = {
            "ldalign": ours,
            "eager": theirs,
            "copy": lambda: copied.copy_(source),
        }
        for turn in range(3 * repeat + 2):
            for who, step in steps.items():
                taken = _timed(step, device)
                if turn >= 2:
                    seconds[who].append(taken)
        median = {who: statistics.median(values) for who, values in seconds.items()}
        ratio = statistics.median(
            e / o for e, o in zip(seconds["eager"], seconds["ldalign"], strict=True)
        )
        bandwidth = 2 * copied.numel() / median["copy"]
        results[name] = {
            "milliseconds": 1e3 * median["ldalign"],
            "eager_over_ldalign": ratio,
            "share_of_copy_bandwidth": moved / median["ldalign"] / bandwidth,
        }
    return results


def _swiglu_of_both(gate_up: Tensor) -> Tensor:
    """The reference on ours's one input (N, 2 F), gates before ups."""
    return reference.swiglu(*gate_up.chunk(2, dim=-1))


def _feed_forward(width: int) -> int:
    """Returns the width that swiglu works on: 8/3 of the model's, in whole 64s."""
    return 8 * width // 3 // 64 * 64


def _elementwise_cases(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], int]]:
    """Returns name -> ours and eager, both ways, and how many numbers they read and write."""
    N, D, _ = shape
    H, E, wide = max(1, D // 64), 64, _feed_forward(D)
    make = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=make).to(device, dtype)

    angles = torch.randn(N, E // 2, generator=make).to(device)
    cos, sin = angles.cos(), angles.sin()
    x, w = normal(N, D), normal(D)
    added, heads, gate_up = [x, normal(N, D), w], normal(N, H, E), normal(N, 2 * wide)

    def turn() -> None:
        for inverse in (False, True):
            torch.ops.ldalign.rope_(heads, cos, sin, inverse, H)

    return {
        "rms_norm": (
            _both_ways(lambda x, w: ops.rms_norm(x, w, 1e-5), [x, w]),
            _both_ways(lambda x, w: reference.rms_norm(x, w, 1e-5), [x, w]),
            5 * N * D,
        ),
        "add_rms_norm": (
            _both_ways(lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-5), added),
            _both_ways(lambda x, r, w: (reference.rms_norm(x + r, w, 1e-5), x + r), added),
            8 * N * D,
        ),
        "rope_": (
            turn,
            _both_ways(lambda x: reference.rope(x, cos, sin), [heads]),
            4 * N * H * E,
        ),
        "swiglu": (
            _both_ways(ops.swiglu, [gate_up]),
            _both_ways(_swiglu_of_both, [gate_up]),
            8 * N * wide,
        ),
    }


def _both_ways(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[[], Any]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    upstream = [torch.ones_like(out) for out in _tuple(function(*leaves))]
    return lambda: torch.autograd.grad(_tuple(function(*leaves)), leaves, upstream)


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _timed(step: Callable[[], Any], device: torch.device) -> float:
    """Returns the seconds of one call; on a GPU by events around ten: launches do not count."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e4


# ----------------------------------------------------------------------------------- pair attention


class Pairs:
    """A packed batch, and the same as sequences [prompt | response], as peers want them."""

    def __init__(
        self,
        heads: int,
        key_heads: int,
        width: int,
        pairs: int,
        prompt: int,
        response: int,
        device: torch.device,
    ) -> None:
        make = torch.Generator().manual_seed(0)
        spread = torch.rand(pairs, 3, generator=make) / 2 + 0.75
        lengths = (spread * torch.tensor([prompt, response, response])).long()
        rows, self.sequences, at = [], [], 0
        for P, *responses in lengths.tolist():
            begin, end = at, at + P
            rows.append((begin, end, begin, begin))
            at = end
            for n in responses:
                rows.append((at, at + n, begin, end))
                self.sequences.append(
                    torch.cat([torch.arange(begin, end), torch.arange(at, at + n)])
                )
                at += n
        self.heads, self.segments = heads, torch.tensor(rows)
        self.qkv = torch.randn(at, heads + 2 * key_heads, width, generator=make).to(
            device, torch.bfloat16
        )
        self.grad = torch.randn(at, heads, width, generator=make).to(device, torch.bfloat16)
        seen = sum((e - b) * (pe - pb) + (e - b) * (e - b + 1) // 2 for b, e, pb, pe in rows)
        # seven products with the backward's, two operations a number
        self.operations = 14 * heads * width * seen

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v on the axis of heads, the last but one."""
        key_heads = (x.shape[-2] - self.heads) // 2
        q, k, v = x.split([self.heads, key_heads, key_heads], dim=-2)
        return q, k, v


def attend_packed(backend: Any, x: Pairs, window: int | None) -> Callable[[], Any]:
    def step() -> Tensor:
        out, lse = backend.pair_attention(x.qkv, x.heads, x.segments, window)
        return backend.pair_attention_backward(x.grad, x.qkv, out, lse, x.heads, x.segments, window)  # type: ignore[no-any-return]

    return step


def attend_padded(x: Pairs) -> Callable[[], Any]:
    """Attends with torch's scaled_dot_product_attention on separate, padded sequences."""
    index = torch.nn.utils.rnn.pad_sequence(x.sequences, batch_first=True).to(x.qkv.device)
    leaves = [part.transpose(1, 2).contiguous().requires_grad_() for part in x.split(x.qkv[index])]
    grad = x.grad[index].transpose(1, 2).contiguous()

    def step() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out, leaves, grad)

    return step


def attend_flash(x: Pairs) -> Callable[[], Any]:
    """Attends with FlashAttention on separate sequences without padding."""
    number = flash.generation(x.qkv.shape[2])
    assert number is not None
    attend = flash.interface(number).flash_attn_varlen_func
    index = torch.cat(x.sequences).to(x.qkv.device)
    lengths = torch.tensor([0, *map(len, x.sequences)])
    starts, longest = lengths.cumsum(0).to(x.qkv.device, torch.int32), int(lengths.max())
    leaves = [part.contiguous().requires_grad_() for part in x.split(x.qkv[index])]
    grad = x.grad[index]

    def step() -> tuple[Tensor, ...]:
        out = attend(*leaves, starts, starts, longest, longest, causal=True)
        return torch.autograd.grad(out, leaves, grad)

    return step


def attention(device: torch.device, repeat: int, small: bool) -> list[dict[str, Any]]:
    """Times pair attention, forward and backward, against the same work on separate sequences."""
    tables = []
    for heads, key_heads, width, window, *sizes in ATTENTION_SMALL if small else ATTENTION:
        pairs, prompt, response = sizes
        x = Pairs(heads, key_heads, width, pairs, prompt, response, device)
        assert window is None or window >= max(map(len, x.sequences)), (
            "the peers are given no window"
        )
        steps = {
            "ldalign, Triton": attend_packed(triton_ops, x, window),
            "torch SDPA, padded": attend_padded(x),
        }
        if flash.available():
            steps["ldalign, FlashAttention"] = attend_packed(flash, x, window)
            steps["FlashAttention, separate sequences"] = attend_flash(x)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(repeat + 2):
            for name, step in steps.items():
                taken = _timed(step, device)
                if turn >= 2:
                    seconds[name].append(taken)
        first = seconds["ldalign, Triton"]
        tables.append(
            {
                "heads": heads,
                "key_heads": key_heads,
                "width": width,
                "window": window,
                "pairs": pairs,
                "tokens": len(x.qkv),
                "sequence_tokens": sum(map(len, x.sequences)),
                "flash_attn": flash.why_not(),
                "peers": {
                    name: {
                        "milliseconds": 1e3 * statistics.median(taken),
                        "over_ldalign": statistics.median(
                            s / o for s, o in zip(taken, first, strict=True)
                        ),
                        "needed_tflops_per_s": x.operations / statistics.median(taken) / 1e12,
                    }
                    for name, taken in seconds.items()
                },
            }
        )
    return tables


# ------------------------------------------------------------------------------------------ workers


def worker(job: dict[str, Any]) -> None:
    """Runs one implementation: a first call, then a call for each line of stdin.

    The first is measured for memory, and its gradients are kept for their error.
    """
    # what ldalign's scripts do first; the peers run as their users run them
    if job["peer"] in ("bare", "ldalign"):
        keep_freed_memory()
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    make = PEERS[job["peer"]][0]
    warm = Inputs(SMALL, dtype, device)
    make(warm)()  # library start-up and compilers are not this shape's memory
    x = Inputs(tuple(job["shape"]), dtype, device)
    step = make(x)
    if device.type == "cpu":
        # what making the inputs left behind must not serve the first call
        ctypes.CDLL(None).malloc_trim(0)
    before = _memory(device, reset=True)
    gradients = step()
    held = sum(g.numel() * g.element_size() for g in gradients)
    extra = _memory(device) - before - held
    save_file(
        {name: g.cpu().contiguous() for name, g in zip(("dh", "dw"), gradients, strict=True)},
        job["keep"],
    )
    del gradients
    print(json.dumps({"extra_bytes": extra}), flush=True)
    for _ in sys.stdin:
        step()  # caches, threads and clocks were others' for a while
        print(json.dumps({"seconds": _timed(step, device)}), flush=True)


def _memory(device: torch.device, reset: bool = False) -> int:
    """Returns bytes: the peak since the last reset; at a reset, what is held now."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        # Linux: the peak falls to what is resident now
        Path("/proc/self/clear_refs").write_text("5")
    found = resident("VmRSS" if reset else "VmHWM")
    assert found is not None
    return found


def measure_head(
    shape: Shape, dtype: str, device: torch.device, repeat: int
) -> dict[str, dict[str, Any]]:
    """Measures every peer that is here: median seconds, ratio, extra MiB, error against float64."""
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        running: dict[str, subprocess.Popen[str]] = {}
        exact = exact_gradients(Inputs(shape, getattr(torch, dtype), device))
        for name, (_, package) in PEERS.items():
            if package is not None and importlib.util.find_spec(package) is None:
                results[name] = {"skipped": f"{package} is not installed"}
                continue
            job = {
                "peer": name,
                "shape": shape,
                "dtype": dtype,
                "device": str(device),
                "keep": f"{scratch}/{name}",
            }
            process = subprocess.Popen(
                [sys.executable, __file__, "--worker", json.dumps(job)],
                text=True,
                env=os.environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            print(f"bench: kernels: {name} ...", file=sys.stderr, flush=True)
            line = _answer(process)
            if line is None:  # it stopped: a peer that does not run here is a row that says so
                _, errors = process.communicate()
                results[name] = {"skipped": (errors.strip().splitlines() or ["stopped"])[-1][:300]}
                continue
            running[name] = process
            results[name] = {"extra_mib": line["extra_bytes"] / 2**20, "seconds": []}
            if name not in OTHER_LOSS:
                given = load_file(job["keep"])
                results[name]["error"] = [
                    float((given[key].double() - e).norm() / e.norm())
                    for key, e in zip(("dh", "dw"), exact, strict=True)
                ]
        for _ in range(repeat):
            for name, process in running.items():
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                line = _answer(process)
                assert line is not None, name
                results[name]["seconds"].append(line["seconds"])
        for process in running.values():
            process.communicate()
    floor = results["bare"]["seconds"]
    for result in results.values():
        if "seconds" in result:
            result["over_bare"] = statistics.median(
                s / b for s, b in zip(result["seconds"], floor, strict=True)
            )
    return results


def _answer(process: "subprocess.Popen[str]") -> dict[str, Any] | None:
    assert process.stdout is not None
    for text in process.stdout:  # a library may print lines of its own
        if text.startswith("{"):
            return json.loads(text)  # type: ignore[no-any-return]
    return None


def exact_gradients(x: Inputs) -> tuple[Tensor, Tensor]:
    """In float64 from the same rounded inputs, a response at a time."""
    hidden, weight, target = x.hidden.double(), x.weight.double(), x.target
    pieces = zip(hidden.split(256), target.split(256), strict=True)
    logps = torch.cat([reference.linear_logprob(h, weight, t) for h, t in pieces]).requires_grad_()
    (coefficient,) = torch.autograd.grad(x.dpo(logps), logps)
    dh, dw = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), 256):
        rows = slice(start, start + 256)
        z = (hidden[rows] @ weight.T).softmax(1).mul_(-coefficient[rows, None])
        z.scatter_add_(1, target[rows, None], coefficient[rows, None])
        dh[rows] = z @ weight
        dw.addmm_(z.T, hidden[rows])
    return dh.cpu(), dw.cpu()


# -------------------------------------------------------------------------------------------- pages


def measure(
    device: torch.device, repeat: int, small: bool, shapes: list[Shape] | None = None
) -> Iterator[dict[str, Any]]:
    """Yields all there is for one device after each part: a run that is cut short leaves some."""
    shapes = shapes or ([SMALL] if small else SHAPES[device.type])
    dtype = "bfloat16"
    found: dict[str, Any] = {
        "benchmark": "kernels",
        "device": str(device),
        "dtype": dtype,
        "repeat": repeat,
        "small": small,
        "backends": {
            op: ops.choose(op, device.type) for op in ("pair_loss", "rms_norm", "rope_", "swiglu")
        },
        "machine": describe_machine(),
        "head": [],
        "elementwise": [],
        "attention": [],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    for s in shapes:
        found["head"].append({"shape": s, "peers": measure_head(s, dtype, device, repeat)})
        yield found
    for d in (dtype, "float32"):
        measured = elementwise(shapes[0], getattr(torch, d), device, repeat)
        found["elementwise"].append({"shape": shapes[0][:2], "dtype": d, "ops": measured})
        yield found
    if device.type == "cuda" and triton_ops.available():
        found["attention"] = attention(device, repeat, small)
        yield found


def render(result: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [f"## kernels, {result['device']}", ""]
    for table in result["head"]:
        N, D, V = table["shape"]
        lines += [
            f"`pair_loss` ({result['backends']['pair_loss']}), forward and backward: {N} rows, "
            f"width {D}, vocabulary {V}, {result['dtype']}; medians of {result['repeat']} rounds.",
            "",
            "| | milliseconds | time / bare products | extra memory, MiB | relative error of "
            "dhidden, dweight |",
            "|---|---|---|---|---|",
        ]
        for name, r in table["peers"].items():
            if "skipped" in r:
                lines.append(f"| {name} | not run: {r['skipped']} | | | |")
                continue
            error = ", ".join(f"{e:.1e}" for e in r["error"]) if "error" in r else "-"
            middle = f"{1e3 * statistics.median(r['seconds']):.1f} | {r['over_bare']:.2f}"
            lines.append(f"| {name} | {middle} | {r['extra_mib']:.0f} | {error} |")
        lines.append("")
    lines.append(
        "| forward and backward | dtype | milliseconds | eager / ldalign | share of copy bandwidth "
        "|"
    )
    lines.append("|---|---|---|---|---|")
    for table in result["elementwise"]:
        for name, r in table["ops"].items():
            lines.append(
                f"| {name} ({table['shape'][0]} x {table['shape'][1]}) | {table['dtype']} | "
                f"{r['milliseconds']:.3f} | {r['eager_over_ldalign']:.2f} | "
                f"{r['share_of_copy_bandwidth']:.2f} |"
            )
    for table in result["attention"]:
        lines += [
            "",
            f"Pair attention, forward and backward: {table['pairs']} pairs, {table['tokens']} "
            f"tokens packed, {table['sequence_tokens']} as separate sequences, {table['heads']} "
            f"heads over {table['key_heads']} key heads of width {table['width']}, bfloat16. "
            f"{table['flash_attn']}",
            "",
            "| | milliseconds | time / ldalign | TFLOP/s of what is needed |",
            "|---|---|---|---|",
        ]
        for name, r in table["peers"].items():
            lines.append(
                f"| {name} | {r['milliseconds']:.3f} | {r['over_ldalign']:.2f} | "
                f"{r['needed_tflops_per_s']:.1f} |"
            )
    machine = result["machine"]
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads"
    where = ", ".join(machine["gpus"]) or cpu
    lines += [
        "",
        f"{result['date']}, commit {machine['git_commit']}, {where}, torch "
        f"{machine['packages']['torch']}.",
    ]
    if result["small"]:
        lines += ["", "Made with --small: shows that it runs, measures nothing."]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/kernels.py", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--repeat", type=int, default=7, help="measured rounds")
    parser.add_argument(
        "--small", action="store_true", help="a fraction of the work: does it run at all?"
    )
    parser.add_argument("--shape", help="N,D,V in place of the device's own")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="folder of the result files"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        worker(json.loads(args.worker))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = None
    if args.shape:
        N, D, V = map(int, args.shape.split(","))
        shape = [(N, D, V)]
    args.results.mkdir(exist_ok=True)
    path = args.results / f"kernels-{device.type}"
    for result in measure(device, args.repeat, args.small, shape):
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(render(result), encoding="utf-8")
    print(render(result))


if __name__ == "__main__":
    run(main)
