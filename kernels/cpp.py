"""The ops in C++ for the CPU (`csrc/`, built as `ldalign._C`).

They are vectorised, threaded, and multiply in oneDNN. Forward and backward apart, as in
every backend; `ldalign.ops` adds autograd. Sums are kept wide and rounded once. Inputs
may have any strides; functions with a final underscore alone change them, those of the
optimizers the gradient too, by its factor. A wrong shape, dtype or target is a ValueError
that names the argument.

Shapes: N rows (flat tokens), D width, V vocabulary, S = 2P responses (runs of rows;
real, generated, real, ...) of P pairs, H heads, E head width. "Wide" is float32, or
float64 where the inputs are.

`LDALIGN_ISA` (default, avx2, avx512, avx512_vnni, avx512_bf16 or amx_bf16) chooses the instruction
set; unset, the best one this machine has.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldalign.kernels.eager import scale_
from ldalign.kernels.loss_options import DPO, Kind, LossOptions

# The most bytes of logits held at once. Beside them a 16-bit head of more than eight pieces keeps 1
# byte a weight while it sums dweight.
WORKSPACE_BYTES = 53 * 2**20


def _load() -> str:
    """Loads the extension; returns why that cannot be done, in one line, or ""."""
    try:
        # Imported by name: it may be missing, and that alone is no error.
        importlib.import_module("ldalign._C")
        torch.ops.ldalign_cpp.isa()
    except ModuleNotFoundError as error:
        if error.name != "ldalign._C":
            raise
        return (
            "the extension ldalign._C is not built; "
            "with a C++ compiler there, `make setup` builds it"
        )
    except ImportError as error:
        return (
            f"the extension ldalign._C does not load ({error}); "
            "build it again for this torch: pip install -e ."
        )
    except ValueError as error:
        return str(error)  # LDALIGN_ISA names what does not run here
    return ""


_REASON = _load()


def available() -> bool:
    """Says whether the extension is there; told once, at import."""
    return not _REASON


def why_not() -> str:
    """Returns why `available()` is false, or ""."""
    return _REASON


def build_info() -> dict[str, Any]:
    """Returns what was built and what is used.

    isa: the instruction set in use; isas: all that were built and run here;
    compiler; threads: any or not.
    """
    ops = torch.ops.ldalign_cpp
    return {
        "isa": ops.isa(),
        "isas": ops.isas(),
        "compiler": ops.compiler(),
        "threads": ops.threads(),
    }


def set_isa(name: str) -> None:
    """Uses another of `build_info()["isas"]` from now on. For tests and benchmarks."""
    torch.ops.ldalign_cpp.set_isa(name)


# ----------------------------------------------------------------------------------------- the head


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T)[target] and the log-sum-exp, (N,) wide each.

    hidden (N, D), weight (V, D), target (N,) int64. A row whose target is
    ignore_index has log-prob 0.
    """
    logp, lse = torch.ops.ldalign_cpp.linear_logprob(
        hidden, weight, target, ignore_index, WORKSPACE_BYTES
    )
    return logp, lse


def linear_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dhidden (N, D) and dweight (V, D) under the upstream gradient (N,) wide.

    The logits are made again. Ignored rows come with grad 0; a row with grad 0 adds nothing,
    whatever its target is.
    """
    dhidden, dweight = torch.ops.ldalign_cpp.linear_logprob_backward(
        grad, hidden, weight, target, lse, need_hidden, need_weight, WORKSPACE_BYTES
    )
    return dhidden, dweight


def pair_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lengths: Sequence[int],
    reference: Tensor,
    pair_weight: Tensor,
    beta: float,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
    options: LossOptions = DPO,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Summed log-probs of the responses, and the loss's gradients, in one pass: three products.

    lengths of S responses, reference (S,) and pair_weight (P,) wide -> sums (S,) wide, dhidden (N,
    D), dweight (V, D): the gradient of scale * `reference.pair_loss`.
    """
    sums, dhidden, dweight = torch.ops.ldalign_cpp.pair_loss(
        hidden,
        weight,
        target,
        lengths,
        reference,
        pair_weight,
        beta,
        scale,
        need_hidden,
        need_weight,
        WORKSPACE_BYTES,
        options.kind == "ipo",
        *options[1:],
    )
    return sums, dhidden, dweight


def sft_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs (N,) wide, and the gradient of scale * sum -logp, in one pass: three products."""
    logp, dhidden, dweight = torch.ops.ldalign_cpp.sft_loss(
        hidden, weight, target, scale, need_hidden, need_weight, WORKSPACE_BYTES
    )
    return logp, dhidden, dweight


def weighted_dpo(
    sums_real: Tensor,
    sums_generated: Tensor,
    ref_real: Tensor,
    ref_generated: Tensor,
    weight: Tensor,
    beta: float,
    kind: Kind = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weighted DPO loss of P pairs, all wide, and what its backward needs.

    Returns loss () = sum of weight * l, l (P,), both rewards (P,), d loss / d real (P,).
    """
    loss, unweighted, chosen, rejected, coefficient = torch.ops.ldalign_cpp.weighted_dpo(
        sums_real,
        sums_generated,
        ref_real,
        ref_generated,
        weight,
        beta,
        kind == "ipo",
        label_smoothing,
    )
    return loss, unweighted, chosen, rejected, coefficient


# ---------------------------------------------------------------------------------------- the block


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight (N, D), and 1 / rms (N,) wide."""
    y, rstd = torch.ops.ldalign_cpp.rms_norm(x, weight, eps)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx (N, D) and dweight (D,), the latter with the same bits for any number of threads."""
    dx, dweight = torch.ops.ldalign_cpp.rms_norm_backward(dy, x, weight, rstd)
    return dx, dweight


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm of x + residual, that sum itself (rounded to their dtype first), and 1 / rms."""
    y, total, rstd = torch.ops.ldalign_cpp.add_rms_norm(x, residual, weight, eps)
    return y, total, rstd


def add_rms_norm_backward(
    dy: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of x, which is also the residual's, and dweight (D,).

    It is the norm's, plus dtotal.
    """
    dx, dweight = torch.ops.ldalign_cpp.add_rms_norm_backward(dy, dtotal, total, weight, rstd)
    return dx, dweight


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, heads: int) -> None:
    """Turns pairs (x[e], x[e + E/2]) of the first `heads` heads by their angle, in place.

    x (N, H, E), cos and sin (N, E/2). `inverse` turns back, which is the gradient.
    """
    torch.ops.ldalign_cpp.rope_(x, cos, sin, inverse, heads)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of (..., 2 F), gates before ups: (..., F)."""
    out: Tensor = torch.ops.ldalign_cpp.swiglu(gate_up)
    return out


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up, laid out as it is."""
    out: Tensor = torch.ops.ldalign_cpp.swiglu_backward(dy, gate_up)
    return out


# ---------------------------------------------------------------------------------------- attention


def pair_attention(
    qkv: Tensor, heads: int, segments: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of a packed batch (`reference.pair_attention`).

    Returns (N, H, E), and its log-sum-exps (N, H) wide.
    """
    out, lse = torch.ops.ldalign_cpp.pair_attention(qkv, heads, segments, window)
    return out, lse


def pair_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    segments: Tensor,
    window: int | None,
) -> Tensor:
    """dqkv (N, H + 2K, E). The probabilities are made again, tile by tile."""
    dqkv: Tensor = torch.ops.ldalign_cpp.pair_attention_backward(
        grad, qkv, out, lse, heads, segments, window
    )
    return dqkv


# ----------------------------------------------------------------------------------- the optimizers


def adamw_(
    p: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    factor: Tensor | None,
    learning_rate: float,
    decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    seed: int,
) -> None:
    """One step in place (`ldalign.kernels.eager.adamw_`), in one pass but for a factor."""
    scale_(grad, factor)
    torch.ops.ldalign_cpp.adamw_(
        p, grad, mean, square, learning_rate, decay, beta1, beta2, eps, step, seed
    )


def rmsprop_(
    p: Tensor,
    grad: Tensor,
    square: Tensor,
    factor: Tensor | None,
    learning_rate: float,
    decay: float,
    alpha: float,
    eps: float,
    seed: int,
) -> None:
    """One step in place (`ldalign.kernels.eager.rmsprop_`), in one pass but for a factor."""
    scale_(grad, factor)
    torch.ops.ldalign_cpp.rmsprop_(p, grad, square, learning_rate, decay, alpha, eps, seed)


# --------------------------------------------------------------------------------------- generation


def packed_linear(
    x: Tensor, packed: Tensor, scales: Tensor | None, out_features: int, wide_out: bool
) -> Tensor:
    """x (N, K) times a weight packed by `ldalign.generation.decoders.pack_weight`.

    scales: those of an int8 weight (panels, groups, 32) float32, in whose product x is int8, too
    (`reference.int8_linear`); None: the weight has x's dtype.

    Returns (N, out_features), float32 with wide_out. A row's result does not depend on the other
    rows, to the bit, and that of int8 on nothing but its arguments.
    """
    out: Tensor = torch.ops.ldalign_cpp.packed_linear(x, packed, scales, out_features, wide_out)
    return out


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds rows x (N, K) float32 or bfloat16 to 8 bits: `reference.quantise`, to the bit."""
    q, scales = torch.ops.ldalign_cpp.quantise(x)
    return q, scales


def packed_rows(packed: Tensor, ids: Tensor) -> Tensor:
    """Rows ids (N,) int64 of a weight packed by `pack_weight`, as they were before: (N, K)."""
    out: Tensor = torch.ops.ldalign_cpp.packed_rows(packed, ids)
    return out


def decode_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    norms: Sequence[Tensor],
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    pages: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    intermediate: int,
    window: int | None,
    eps: float,
) -> Tensor:
    """A Mistral's layers and last norm on new tokens x (N, D) of R rows: (N, D).

    weights: packed; qkv, o, gate and up, down of each layer.
    scales: theirs, as in `packed_linear`, where they are int8; else none.
    norms: float32; two a layer, and the last.
    keys (L, pages, K, E, 16), values (L, pages, K, 16, E rounded up to 16): gain the new tokens'.
    rows (R, 2) int64: new and cached tokens; pages (R, P) int32: where they lie.
    cos, sin (positions, E/2) float32.
    intermediate: the feed-forward's width.

    A row's result does not depend on the other rows, to the bit.
    """
    out: Tensor = torch.ops.ldalign_cpp.decode_layers(
        x,
        weights,
        scales,
        norms,
        keys,
        values,
        rows,
        pages,
        cos,
        sin,
        heads,
        intermediate,
        window,
        eps,
    )
    return out


def all_finite(x: Tensor) -> Tensor:
    """Says of each row of x (R, V) float32 whether all of it is finite: (R,) bool."""
    out: Tensor = torch.ops.ldalign_cpp.all_finite(x)
    return out


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    seen: Tensor,
) -> tuple[Tensor, Tensor]:
    """The next tokens (R,) and their log-probs (R,) (`reference.sample`).

    logits (R, V) float32 are overwritten.
    """
    ids, logp = torch.ops.ldalign_cpp.sample(
        logits, uniform, temperature, top_k, top_p, min_p, penalty, seen
    )
    return ids, logp
