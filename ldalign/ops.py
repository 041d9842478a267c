"""One function per fused operation; each call runs the best implementation for its device.

Four backends offer the same raw functions (values and gradients apart): `cpp` (C++, `csrc/`) on the
CPU, `triton` and `cuda` (CUDA C++; the head and the DPO loss only) on NVIDIA GPUs, and `eager`,
plain PyTorch, anywhere. Here they become operators of torch (`torch.ops.ldalign`): a schema, a fake
for `torch.compile`, and autograd, once for all backends.

`LDALIGN_BACKEND` names the wanted one (default auto: the first available of cpp, eager on the CPU
and of triton, cuda, eager on a GPU). A backend that is not there is an error, never a silent
fallback; the choice is logged once per op.

Each operation's oracle is the function of its name in `ldalign.kernels.reference`,
unless it says otherwise.

Shapes: N rows (flat tokens), D width, V vocabulary, P pairs, S = 2P responses, H query heads, K
key/value heads, E head width, F feed-forward width, R rows of a generation.
"""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library

from ldalign.kernels import flash
from ldalign.kernels.loss_options import DPO, Kind, LossOptions
from ldalign.kernels.reference import accumulate_dtype
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.transfer import to_device

__all__ = [
    "adamw_",
    "add_rms_norm",
    "choose",
    "linear_logprob",
    "paged_attention",
    "pair_attention",
    "pair_loss",
    "rms_norm",
    "rmsprop_",
    "rope_",
    "rope_to_pages",
    "sample",
    "segment_sum",
    "sft_loss",
    "swiglu",
    "weighted_dpo_loss",
    "workspace_bytes",
]

log = logging.getLogger(__name__)
IGNORE = -100  # the target of a row that counts for nothing

# Backend -> its module in ldalign.kernels; per device, the order in which `auto` tries them.
MODULES = {"cpp": "cpp", "triton": "triton_ops", "cuda": "cuda", "eager": "eager"}
ORDER = {"cpu": ("cpp", "eager"), "cuda": ("triton", "cuda", "eager")}
RAW_OPS = tuple(
    "linear_logprob pair_loss sft_loss weighted_dpo rms_norm add_rms_norm rope_ swiglu "
    "pair_attention rope_to_pages paged_attention sample adamw_ rmsprop_".split()
)


# ----------------------------------------------------------------------------------------- backends


def choose(op: str, device: str, wide: bool = False) -> str:
    """Returns the backend that runs `op` (a raw function's name) on a device type.

    wide: for float64 inputs. Raises EnvironmentProblem where LDALIGN_BACKEND names one that is
    unknown, not built, or not for this device.
    """
    return _choose(os.environ.get("LDALIGN_BACKEND", "auto"), op, device, wide)


@functools.cache
def _choose(wanted: str, op: str, device: str, wide: bool) -> str:
    if wanted not in ("auto", *MODULES):
        raise EnvironmentProblem(
            f"LDALIGN_BACKEND={wanted!r} is unknown; choose auto or {', '.join(MODULES)}"
        )
    order = ORDER.get(device, ("eager",))
    if wanted == "auto":
        offering = [b for b in order if _offers(b, op, wide)]
        chosen = next(b for b in offering if b == "eager" or _module(b).available())
        passed_over = order[: order.index(chosen)]
        why = ", ".join(f"{b}: {_module(b).why_not()}" for b in passed_over)
    else:
        module = _module(wanted)
        if not module.available():
            raise EnvironmentProblem(
                f"LDALIGN_BACKEND={wanted}: not available here: {module.why_not()}"
            )
        interpreted = wanted == "triton" and module.interpreted()  # then it runs on any device
        if wanted not in order and wanted != "eager" and not interpreted:
            raise EnvironmentProblem(
                f"LDALIGN_BACKEND={wanted} does not run on device {device}; use auto"
            )
        chosen = wanted if _offers(wanted, op, wide) else "eager"
        why = "" if chosen == wanted else f"{wanted} has no {op}{' in float64' if wide else ''}"
    reason = f"; {why}" if why else ""
    log.info("ops: %s on %s: %s (LDALIGN_BACKEND=%s%s)", op, device, chosen, wanted, reason)
    return chosen


def backends(device: str) -> dict[str, list[str]]:
    """Returns the backends that are chosen on a device type, each with its operations."""
    users: dict[str, list[str]] = {}
    for op in RAW_OPS:
        users.setdefault(choose(op, device), []).append(op)
    return users


def flash_wanted() -> bool:
    """Says whether pair attention on a GPU is FlashAttention's, where that can do a batch."""
    return os.environ.get("LDALIGN_BACKEND", "auto") == "auto" and flash.available()


def _offers(backend: str, op: str, wide: bool) -> bool:
    return hasattr(_module(backend), op) and not (wide and backend in ("triton", "cuda"))


@functools.cache
def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"ldalign.kernels.{MODULES[backend]}")


def workspace_bytes(device: str) -> int:
    """Returns the most bytes of logits that the head holds at once on a device type."""
    return int(_module(choose("pair_loss", device)).WORKSPACE_BYTES)


def _raw(op: str, x: Tensor) -> Callable[..., Any]:
    """The raw function `op` of the backend for x's device and dtype."""
    return getattr(_module(choose(op, x.device.type, x.dtype == torch.float64)), op)


# ---------------------------------------------------------------------------------------- operators

_operators = library.Library("ldalign", "DEF")


def _operator(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Registers torch.ops.ldalign.NAME.

    `run` is called with real tensors, `fake` for shapes; `setup` and `backward` are autograd's.
    """
    name = schema.partition("(")[0]
    _operators.define(schema)
    _operators.impl(name, run, "CompositeExplicitAutograd")
    library.register_fake(f"ldalign::{name}", fake, lib=_operators)
    if backward is not None:
        library.register_autograd(f"ldalign::{name}", backward, setup_context=setup, lib=_operators)


def _none(x: Tensor) -> Tensor:
    """Stands for a gradient nobody asked for: an operator returns tensors only."""
    return x.new_empty(0)


def _or_none(gradient: Tensor | None, like: Tensor) -> Tensor:
    return _none(like) if gradient is None else gradient


def _wide_like(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=accumulate_dtype(x.dtype))


# ----------------------------------------------------------------------------------------- the head


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = IGNORE
) -> Tensor:
    """Returns log softmax(hidden weight^T)[target], natural-log probabilities (N,) float32.

    hidden (N, D), weight (V, D), target (N,) int64; 0 where the target is `ignore_index`. No (N, V)
    tensor is held; the log-sum-exp is kept, the logits are made again in the backward. Raises
    ValueError where shapes, dtypes or (on the CPU) targets do not fit.
    """
    _check_head("linear_logprob", hidden, weight, target)
    return torch.ops.ldalign.linear_logprob(hidden, weight, target, ignore_index)[0]


def _run_linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore: int
) -> tuple[Tensor, Tensor]:
    _check_targets("linear_logprob", target, len(weight), ignore)
    return _raw("linear_logprob", hidden)(hidden, weight, target, ignore)


def _setup_linear_logprob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, target, ctx.ignore = inputs
    ctx.save_for_backward(hidden, weight, target, output[1])


def _backward_linear_logprob(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, target, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    dh, dw = torch.ops.ldalign.linear_logprob_backward(
        grad, hidden, weight, target, lse, *needs, ctx.ignore
    )
    return dh if needs[0] else None, dw if needs[1] else None, None, None


def _fake_linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore: int
) -> tuple[Tensor, Tensor]:
    return _wide_like(hidden, len(hidden)), _wide_like(hidden, len(hidden))


_operator(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor target, int ignore_index) -> (Tensor, "
    "Tensor)",
    _run_linear_logprob,
    _fake_linear_logprob,
    _setup_linear_logprob,
    _backward_linear_logprob,
)


def _run_linear_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    need_hidden: bool,
    need_weight: bool,
    ignore: int,
) -> tuple[Tensor, Tensor]:
    raw = _raw("linear_logprob_backward", hidden)
    grad = grad.masked_fill(target == ignore, 0)
    dh, dw = raw(grad, hidden, weight, target, lse, need_hidden, need_weight)
    return _or_none(dh, hidden), _or_none(dw, weight)


_operator(
    "linear_logprob_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor lse, "
    "bool need_hidden, bool need_weight, int ignore_index) -> (Tensor, Tensor)",
    _run_linear_logprob_backward,
    lambda grad, hidden, weight, target, lse, need_hidden, need_weight, ignore: (
        torch.empty_like(hidden) if need_hidden else _none(hidden),
        torch.empty_like(weight) if need_weight else _none(weight),
    ),
)


def pair_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lengths: Sequence[int],
    reference_sums: Tensor,
    pair_weight: Tensor,
    beta: float,
    scale: float = 1.0,
    options: LossOptions = DPO,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The weighted DPO loss from hidden states, its gradient made in the same pass.

    hidden (N, D), weight (V, D), target (N,) int64.
    lengths: the rows of each of the S = 2P responses (real, generated, real, ...); their sum is N.
    reference_sums (S,): the responses' log-probs under the reference.
    pair_weight (P,): the weights s.
    options: another loss of a pair; an empty response counts as one of one token.

    Returns loss () = scale * sum_p weight_p * -log sigmoid(beta Delta_p), or what the options make
    of it; the log-prob sums (S,) and the per-pair metrics of `weighted_dpo_loss`, both detached:
    rewards are of sums with every option, the metric `loss` has no weights and no NLL. All float32
    (float64 in float64).

    It takes three matrix products in all: the logits of whole pairs become their own gradient where
    they stand (docs/kernels.md), so the backward only scales them. It can run once.
    Raises ValueError where shapes, dtypes, options or (on the CPU) targets do not fit. Oracle:
    `linear_logprob` and `pair_loss` of the reference.
    """
    _check_options("pair_loss", options)
    _check_head("pair_loss", hidden, weight, target)
    if len(lengths) % 2 or sum(lengths) != len(hidden) or min(lengths, default=1) < 0:
        raise ValueError(
            f"pair_loss: {len(lengths)} lengths with sum {sum(lengths)} do not fit {len(hidden)} "
            "rows of hidden; expected two non-negative lengths a pair, of sum N"
        )
    pairs = len(lengths) // 2
    if reference_sums.shape != (2 * pairs,) or pair_weight.shape != (pairs,):
        raise ValueError(
            f"pair_loss: reference_sums {tuple(reference_sums.shape)} and pair_weight "
            f"{tuple(pair_weight.shape)} do not fit {len(lengths)} lengths; expected "
            f"({2 * pairs},) and ({pairs},)"
        )
    wide = accumulate_dtype(hidden.dtype)
    loss, sums, unweighted, chosen, rejected, _, _ = torch.ops.ldalign.pair_loss(
        hidden,
        weight,
        target,
        list(lengths),
        reference_sums.to(wide),
        pair_weight.to(wide),
        beta,
        scale,
        *_needs(hidden, weight),
        *options,
    )
    return loss, sums.detach(), _metrics(unweighted, chosen, rejected)


def _run_pair_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lengths: list[int],
    reference_sums: Tensor,
    pair_weight: Tensor,
    beta: float,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
    *given: Any,
) -> tuple[Tensor, ...]:
    _check_targets("pair_loss", target, len(weight))
    options = LossOptions(*given)
    sums, dh, dw = _raw("pair_loss", hidden)(
        hidden,
        weight,
        target,
        lengths,
        reference_sums,
        pair_weight,
        beta,
        scale,
        need_hidden,
        need_weight,
        options,
    )
    gap = sums - reference_sums  # (S,)
    compared = gap / _tokens(lengths, gap) if options.length_normalised else gap
    # The gaps stand for the policy's log-probs, so the reference's are taken as 0.
    zeros = torch.zeros_like(pair_weight)
    loss, unweighted, chosen, rejected, _ = _raw("weighted_dpo", sums)(
        compared[0::2],
        compared[1::2],
        zeros,
        zeros,
        pair_weight,
        beta,
        options.kind,
        options.label_smoothing,
    )
    if options.length_normalised:  # rewards stay those of whole responses
        chosen, rejected = beta * gap[0::2], beta * gap[1::2]
    if options.nll:
        loss = loss - options.nll * (sums / _tokens(lengths, sums))[0::2].sum()
    gradients = _or_none(dh, hidden), _or_none(dw, weight)
    return loss * scale, sums, unweighted, chosen, rejected, *gradients


def _tokens(lengths: list[int], like: Tensor) -> Tensor:
    """What to divide sums (S,) by; an empty response has a sum of 0."""
    return to_device(like.device, torch.tensor(lengths).clamp_(min=1).to(like.dtype))[0]


def _fake_pair_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lengths: list[int],
    reference_sums: Tensor,
    pair_weight: Tensor,
    beta: float,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
    *_: Any,
) -> tuple[Tensor, ...]:
    per_pair = [_wide_like(hidden, len(pair_weight)) for _ in range(3)]
    dh = torch.empty_like(hidden) if need_hidden else _none(hidden)
    dw = torch.empty_like(weight) if need_weight else _none(weight)
    return _wide_like(hidden), _wide_like(hidden, len(lengths)), *per_pair, dh, dw


def _setup_fused_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Else autograd fills zeros of dW's size for an output that nobody differentiates.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[-2:])


def _backward_pair_loss(
    ctx: Any, grad: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    return (*_scaled(ctx, grad), *[None] * 12)


def _scaled(ctx: Any, grad: Tensor | None) -> list[Tensor | None]:
    """The gradients that the forward made, times the upstream one.

    In place, since a second copy of dW can be a GiB.
    """
    if grad is None:  # only outputs that carry no gradient were used
        return [None, None]
    wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
    made = [g if need else None for g, need in wanted]
    # On the CPU the factor can be looked at; nearly always it is 1.
    if grad.device.type == "cpu" and not torch.compiler.is_compiling() and float(grad) == 1.0:
        return made
    return [None if g is None else g.mul_(grad.to(g.dtype)) for g in made]


_operator(
    "pair_loss(Tensor hidden, Tensor weight, Tensor target, int[] lengths, Tensor reference_sums, "
    "Tensor pair_weight, float beta, float scale, bool need_hidden, bool need_weight, str kind, "
    "float nll, float label_smoothing, bool length_normalised) -> (Tensor, Tensor, Tensor, Tensor, "
    "Tensor, Tensor, Tensor)",
    _run_pair_loss,
    _fake_pair_loss,
    _setup_fused_loss,
    _backward_pair_loss,
)


def sft_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood from hidden states, in one pass as `pair_loss`.

    Returns loss () = scale * -sum logp, and logp (N,), detached; float32 (float64 in float64).
    Raises ValueError where shapes, dtypes or (on the CPU) targets do not fit. Oracle:
    `linear_logprob` of the reference.
    """
    _check_head("sft_loss", hidden, weight, target)
    loss, logp, _, _ = torch.ops.ldalign.sft_loss(
        hidden, weight, target, scale, *_needs(hidden, weight)
    )
    return loss, logp.detach()


def _run_sft_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_targets("sft_loss", target, len(weight))
    logp, dh, dw = _raw("sft_loss", hidden)(hidden, weight, target, scale, need_hidden, need_weight)
    return -scale * logp.sum(), logp, _or_none(dh, hidden), _or_none(dw, weight)


_operator(
    "sft_loss(Tensor hidden, Tensor weight, Tensor target, float scale, bool need_hidden, bool "
    "need_weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_sft_loss,
    lambda hidden, weight, target, scale, need_hidden, need_weight: (
        _wide_like(hidden),
        _wide_like(hidden, len(hidden)),
        torch.empty_like(hidden) if need_hidden else _none(hidden),
        torch.empty_like(weight) if need_weight else _none(weight),
    ),
    _setup_fused_loss,
    lambda ctx, grad, *_: (*_scaled(ctx, grad), None, None, None, None),
)


def _needs(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Which gradients the forward must make. It cannot see it from inside an operator."""
    if not torch.is_grad_enabled():
        return False, False
    return hidden.requires_grad, weight.requires_grad


def _check_options(name: str, options: LossOptions) -> None:
    if problem := options.problem():
        raise ValueError(f"{name}: {problem}")


def _check_head(name: str, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    if hidden.ndim != 2 or hidden.shape[1:] != weight.shape[1:] or target.shape != hidden.shape[:1]:
        raise ValueError(
            f"{name}: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and target "
            f"{tuple(target.shape)} do not fit; expected (N, D), (V, D) and (N,)"
        )
    if hidden.dtype != weight.dtype or target.dtype != torch.int64:
        raise ValueError(
            f"{name}: hidden is {hidden.dtype}, weight {weight.dtype}, target {target.dtype}; "
            "expected one float dtype and torch.int64"
        )


def _check_targets(name: str, target: Tensor, vocabulary: int, ignore: int | None = None) -> None:
    """On the CPU alone: on a GPU, looking at the targets would mean to wait for it.

    There the kernels themselves stop on a bad target, or give NaN.
    """
    if target.device.type != "cpu" or not len(target):
        return
    bad = (target < 0) | (target >= vocabulary)
    if ignore is not None:
        bad &= target != ignore
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{name}: target {int(target[row])} of row {row} is not in [0, {vocabulary})"
        )


# -------------------------------------------------------------------------------- weighted DPO loss


def weighted_dpo_loss(
    logp_real: Tensor,
    logp_generated: Tensor,
    ref_real: Tensor,
    ref_generated: Tensor,
    weight: Tensor,
    beta: float,
    kind: Kind = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """LD-Align's loss: the sum over pairs of -weight log sigmoid(beta Delta).

    All inputs (P,): summed response log-probs under policy and reference, and the pair weights s.
    Delta = (logp_real - ref_real) - (logp_generated - ref_generated). The caller divides by the
    pairs of the *global* batch. kind, label_smoothing: as `LossOptions` has them; its other options
    need lengths, which `pair_loss` is given. Returns the loss (), and per-pair metrics (P,),
    detached: loss (unweighted), rewards/chosen, rewards/rejected, rewards/margins,
    rewards/accuracies. Raises ValueError where shapes differ or options do not fit. Source: arXiv
    2404.06390, section 4.2.3.
    """
    _check_options("weighted_dpo_loss", LossOptions(kind, label_smoothing=label_smoothing))
    columns = (logp_real, logp_generated, ref_real, ref_generated, weight)
    if any(c.shape != logp_real.shape or c.ndim != 1 for c in columns):
        raise ValueError(
            f"weighted_dpo_loss: shapes {[tuple(c.shape) for c in columns]} differ; expected five "
            "of (P,)"
        )
    wide = accumulate_dtype(logp_real.dtype)
    loss, unweighted, chosen, rejected, _ = torch.ops.ldalign.weighted_dpo(
        *(c.to(wide) for c in columns), beta, kind, label_smoothing
    )
    return loss, _metrics(unweighted, chosen, rejected)


def _metrics(unweighted: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    unweighted, chosen, rejected = unweighted.detach(), chosen.detach(), rejected.detach()
    # A tie counts one half, so that step 0 reads 0.5 and not 0 or 1 by rounding.
    better, tie = (chosen > rejected).to(chosen.dtype), (chosen == rejected).to(chosen.dtype)
    return {
        "loss": unweighted,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": better + 0.5 * tie,
    }


def _setup_weighted_dpo(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, unweighted, _, _, coefficient = output
    ctx.save_for_backward(unweighted, coefficient)


def _backward_weighted_dpo(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    unweighted, coefficient = ctx.saved_tensors
    down = grad * coefficient
    return down, -down, -down, down, grad * unweighted, None, None, None


_operator(
    "weighted_dpo(Tensor real, Tensor generated, Tensor ref_real, Tensor ref_generated, Tensor "
    "weight, float beta, str kind, float label_smoothing) -> (Tensor, Tensor, Tensor, Tensor, "
    "Tensor)",
    lambda real, *rest: _raw("weighted_dpo", real)(real, *rest),
    lambda real, *rest: (real.new_empty(()), *(torch.empty_like(real) for _ in range(4))),
    _setup_weighted_dpo,
    _backward_weighted_dpo,
)


def segment_sum(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sums consecutive runs: values (N,), lengths of S runs with sum N -> (S,).

    It makes per-response sums of log-probs. Raises ValueError where the lengths do not fit.
    """
    if sum(lengths) != len(values):
        raise ValueError(
            f"segment_sum: lengths add up to {sum(lengths)}, but there are {len(values)} values"
        )
    # One sum a run: a scatter-add would add in an order that depends on the device. In float64,
    # rounded once: the fused losses sum so too, and step 0 compares their sums with these.
    if not len(lengths):
        return values.new_zeros(0)
    runs = values.double().split(list(lengths))
    return torch.stack([run.sum() for run in runs]).to(values.dtype)


# ---------------------------------------------------------------------------------------- the block


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: (..., D), (D,) -> (..., D).

    Raises ValueError where shapes or dtypes do not fit. Source: arXiv 1910.07467.
    """
    _check_norm("rms_norm", x, weight)
    y, _ = torch.ops.ldalign.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)
    return y.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns rms_norm(x + residual) and x + residual itself, one read of each.

    x and residual (..., D), weight (D,) -> (..., D) twice. Raises ValueError where
    shapes or dtypes do not fit.
    """
    _check_norm("add_rms_norm", x, weight)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"add_rms_norm: x {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} "
            f"{residual.dtype} differ"
        )
    D = x.shape[-1]
    y, total, _ = torch.ops.ldalign.add_rms_norm(
        x.reshape(-1, D), residual.reshape(-1, D), weight, eps
    )
    return y.view(x.shape), total.view(x.shape)


def _check_norm(name: str, x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"{name}: x {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} {weight.dtype} "
            "do not fit; expected (..., D) and (D,) of one dtype"
        )


def _setup_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


_operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda x, weight, eps: _raw("rms_norm", x)(x, weight, eps),
    lambda x, weight, eps: (x.new_empty(x.shape), _wide_like(x, len(x))),
    _setup_rms_norm,
    lambda ctx, grad, _: (*torch.ops.ldalign.rms_norm_backward(grad, *ctx.saved_tensors), None),
)
_operator(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)",
    lambda grad, x, weight, scale: _raw("rms_norm_backward", x)(grad, x, weight, scale),
    lambda grad, x, weight, scale: (x.new_empty(x.shape), torch.empty_like(weight)),
)


def _setup_add_rms_norm(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _backward_add_rms_norm(
    ctx: Any, grad: Tensor, grad_total: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    dx, dweight = torch.ops.ldalign.add_rms_norm_backward(grad, grad_total, *ctx.saved_tensors)
    return dx, dx, dweight, None


_operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    lambda x, residual, weight, eps: _raw("add_rms_norm", x)(x, residual, weight, eps),
    lambda x, residual, weight, eps: (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        _wide_like(x, len(x)),
    ),
    _setup_add_rms_norm,
    _backward_add_rms_norm,
)
_operator(
    "add_rms_norm_backward(Tensor grad, Tensor grad_total, Tensor total, Tensor weight, Tensor "
    "scale) -> (Tensor, Tensor)",
    lambda grad, grad_total, total, weight, scale: _raw("add_rms_norm_backward", total)(
        grad, grad_total, total, weight, scale
    ),
    lambda grad, grad_total, total, weight, scale: (
        total.new_empty(total.shape),
        torch.empty_like(weight),
    ),
)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Rotary embedding, half-split, of the first `heads` heads of x (N, H, E), in place.

    cos and sin (N, E/2). Autograd does not see it: gradients are `pair_attention`'s. Raises
    ValueError where shapes do not fit. Source: arXiv 2104.09864.
    """
    fits = x.ndim == 3 and x.shape[2] % 2 == 0 and cos.shape == (len(x), x.shape[2] // 2)
    if not fits or sin.shape != cos.shape or not 0 <= heads <= x.shape[1]:
        raise ValueError(
            f"rope_: x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)} and heads "
            f"{heads} do not fit; expected (N, H, E), E even, twice (N, E/2), and 0 to H"
        )
    with torch.no_grad():
        torch.ops.ldalign.rope_(x, cos, sin, False, heads)


_operator(
    "rope_(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse, int heads) -> ()",
    lambda x, cos, sin, inverse, heads: _raw("rope_", x)(x, cos, sin, inverse, heads),
    lambda x, cos, sin, inverse, heads: None,
)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up (..., 2 F), all gates before all ups -> (..., F).

    The reference takes the two apart. Raises ValueError for an odd last axis.
    Source: arXiv 2002.05202.
    """
    if gate_up.ndim < 1 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"swiglu: gate_up {tuple(gate_up.shape)}; expected (..., 2 F), gates and ups side by "
            "side"
        )
    return torch.ops.ldalign.swiglu(gate_up)


def _half(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


_operator(
    "swiglu(Tensor gate_up) -> Tensor",
    lambda gate_up: _raw("swiglu", gate_up)(gate_up),
    _half,
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lambda ctx, grad: torch.ops.ldalign.swiglu_backward(grad, *ctx.saved_tensors),
)
_operator(
    "swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor",
    lambda grad, gate_up: _raw("swiglu_backward", gate_up)(grad, gate_up),
    lambda grad, gate_up: gate_up.new_empty(gate_up.shape),
)


# ---------------------------------------------------------------------------------------- attention


def pair_attention(
    qkv: Tensor,
    heads: int,
    segments: Tensor,
    window: int | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention over a packed batch: qkv (N, H + 2K, E), H = heads -> (N, H, E).

    segments (S, 4) int64 on the CPU and window: as `ldalign.kernels.reference.pair_attention` says.
    rotary: cos and sin (N, E/2), by which queries and keys turn first, as `rope_` turns them: qkv
    is overwritten. Its gradient, of qkv as it came, is turned back in place, too. Kept for the
    backward: qkv, turned, the result and a log-sum-exp a head and token; no scores. Raises
    ValueError where shapes, segments or window do not fit.
    """
    N, all_heads = qkv.shape[:2] if qkv.ndim == 3 else (0, 0)
    K = (all_heads - heads) // 2
    if K < 1 or heads + 2 * K != all_heads or heads % K or (window is not None and window < 1):
        raise ValueError(
            f"pair_attention: qkv {tuple(qkv.shape)}, heads {heads}, window {window}; expected (N, "
            "H + 2K, E), H a multiple of K, and a window of 1 or more"
        )
    if not torch.compiler.is_compiling():
        _check_segments(segments, N)
    if rotary is not None:
        rope_(qkv, *rotary, heads + K)
    cos, sin = rotary or (None, None)
    return torch.ops.ldalign.pair_attention(qkv, cos, sin, heads, segments, window)[0]


def _attention(qkv: Tensor, segments: Tensor, window: int | None) -> ModuleType:
    """The backend of pair attention.

    FlashAttention where it is installed and can do this batch, else the chosen one.
    """
    if _may_use_flash(qkv) and flash.supports(segments, window, qkv.dtype, qkv.shape[2]):
        _note_flash("pair_attention", flash.generation(qkv.shape[2]))
        return flash
    return _module(choose("pair_attention", qkv.device.type, qkv.dtype == torch.float64))


def _may_use_flash(x: Tensor) -> bool:
    return x.is_cuda and flash_wanted()


@functools.cache
def _note_flash(op: str, number: int | None) -> None:
    name = f"FlashAttention-{number}"
    log.info("ops: %s on cuda: %s, where it can (LDALIGN_BACKEND=auto)", op, name)


def _check_segments(segments: Tensor, tokens: int) -> None:
    done, prompt = 0, 0
    for i, (begin, end, prefix_begin, prefix_end) in enumerate(segments.tolist()):
        if prefix_begin == prefix_end:
            prompt = begin
        if begin != done or end <= begin or not prompt <= prefix_begin <= prefix_end <= begin:
            raise ValueError(
                f"pair_attention: segment {i} is ({begin}, {end}, {prefix_begin}, {prefix_end}); "
                f"expected one that begins at {done}, with an empty prefix or one inside the "
                "prompt before it"
            )
        done = end
    if done != tokens:
        raise ValueError(f"pair_attention: the segments end at {done}, but qkv has {tokens} rows")


def _setup_pair_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cos, sin, ctx.heads, segments, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, cos, sin, segments)


def _backward_pair_attention(
    ctx: Any, grad: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    *tensors, segments = ctx.saved_tensors
    dqkv = torch.ops.ldalign.pair_attention_backward(
        grad, *tensors, ctx.heads, segments, ctx.window
    )
    return dqkv, *[None] * 5


def _run_pair_attention(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    segments: Tensor,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    # qkv is turned already: what by is told for the backward.
    backend = _attention(qkv, segments, window)
    return backend.pair_attention(qkv, heads, segments, window)


def _fake_pair_attention(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    segments: Tensor,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(len(qkv), heads, qkv.shape[2]), _wide_like(qkv, len(qkv), heads)


def _run_pair_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    segments: Tensor,
    window: int | None,
) -> Tensor:
    backend = _attention(qkv, segments, window)
    dqkv = backend.pair_attention_backward(grad, qkv, out, lse, heads, segments, window)
    if cos is not None:
        _raw("rope_", dqkv)(dqkv, cos, sin, True, (heads + qkv.shape[1]) // 2)
    return dqkv


_operator(
    "pair_attention(Tensor qkv, Tensor? cos, Tensor? sin, int heads, Tensor segments, int? window) "
    "-> (Tensor, Tensor)",
    _run_pair_attention,
    _fake_pair_attention,
    _setup_pair_attention,
    _backward_pair_attention,
)
_operator(
    "pair_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor? cos, Tensor? "
    "sin, int heads, Tensor segments, int? window) -> Tensor",
    _run_pair_attention_backward,
    lambda grad, qkv, *rest: qkv.new_empty(qkv.shape),
)


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
    """Takes step number `step`, from 1, of AdamW on a parameter and its averages, in place.

    All are of one shape, each float32 or bfloat16; bfloat16 is rounded at random
    (`ldalign.kernels.eager.adamw_`). factor () float32 on their device, None for 1: the gradient
    counts times it, rounded to its dtype; no host waits for it. The gradient may be overwritten.
    Oracle: `ldalign.kernels.reference.adamw`.
    """
    raw = _raw("adamw_", p)
    raw(p, grad, mean, square, factor, learning_rate, decay, beta1, beta2, eps, step, seed)


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
    """Takes one step of RMSprop on a parameter and its average, in place.

    Shapes, dtypes, rounding and factor are as in `adamw_`. Oracle:
    `ldalign.kernels.reference.rmsprop`.
    """
    _raw("rmsprop_", p)(p, grad, square, factor, learning_rate, decay, alpha, eps, seed)


# --------------------------------------------------------------------------------------- generation


def rope_to_pages(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, keys: Tensor, values: Tensor, slots: Tensor
) -> Tensor:
    """Rotary embedding of new tokens, whose keys and values go to a paged cache.

    qkv (N, H + 2K, E), H = heads, cos and sin (N, E/2) -> the queries (N, H, E). keys and values
    (pages, 16, K, E), contiguous: written to, token n in slot slots[n] of the flattened pages;
    slots (N,) int64. No gradients. Raises ValueError where shapes, dtypes or strides do not fit.
    """
    N, E, K = len(qkv), qkv.shape[-1], keys.shape[2] if keys.ndim == 4 else 0
    fits = qkv.ndim == 3 and qkv.shape[1] == heads + 2 * K and keys.shape[3:] == (E,) and E % 2 == 0
    if not fits or cos.shape != (N, E // 2) or sin.shape != cos.shape or slots.shape != (N,):
        raise ValueError(
            f"rope_to_pages: qkv {tuple(qkv.shape)}, heads {heads}, cos {tuple(cos.shape)}, sin "
            f"{tuple(sin.shape)}, keys {tuple(keys.shape)} and slots {tuple(slots.shape)} do not "
            "fit; expected (N, H + 2K, E), E even, twice (N, E/2), (pages, 16, K, E) and (N,)"
        )
    alike = keys.shape == values.shape and keys.dtype == values.dtype == qkv.dtype
    if not alike or not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError(
            f"rope_to_pages: keys {tuple(keys.shape)} {keys.dtype} and values "
            f"{tuple(values.shape)} {values.dtype}; expected both alike, contiguous, of qkv's "
            f"dtype {qkv.dtype}"
        )
    return torch.ops.ldalign.rope_to_pages(qkv, cos, sin, heads, keys, values, slots)


_operator(
    "rope_to_pages(Tensor qkv, Tensor cos, Tensor sin, int heads, Tensor(a!) keys, Tensor(b!) "
    "values, Tensor slots) -> Tensor",
    lambda qkv, *rest: _raw("rope_to_pages", qkv)(qkv, *rest),
    lambda qkv, cos, sin, heads, *rest: qkv.new_empty(len(qkv), heads, qkv.shape[2]),
)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    pages: Tensor,
    most: int,
    window: int | None = None,
) -> Tensor:
    """Attention of new tokens over a paged cache that holds their keys: (N, H, E) -> (N, H, E).

    keys, values (pages, 16, K, E); rows (R, 2), pages (R, P), window: as
    `ldalign.kernels.reference.paged_attention` says. most: the largest number of new tokens of a
    row. No gradients. Raises ValueError where shapes or dtypes do not fit.
    """
    H, K = (q.shape[1], keys.shape[2]) if q.ndim == 3 and keys.ndim == 4 else (1, 0)
    fits = K > 0 and H % K == 0 and keys.shape == values.shape and keys.shape[3] == q.shape[2]
    if not fits or q.dtype != keys.dtype:
        raise ValueError(
            f"paged_attention: q {tuple(q.shape)} {q.dtype}, keys {tuple(keys.shape)} {keys.dtype} "
            f"and values {tuple(values.shape)} do not fit; expected (N, H, E) and twice (pages, "
            "16, K, E) of one dtype, H a multiple of K"
        )
    if rows.shape != (len(pages), 2) or pages.ndim != 2 or (window is not None and window < 1):
        raise ValueError(
            f"paged_attention: rows {tuple(rows.shape)}, pages {tuple(pages.shape)}, window "
            f"{window}; expected (R, 2), (R, P), and a window of 1 or more"
        )
    return torch.ops.ldalign.paged_attention(q, keys, values, rows, pages, most, window)


def _run_paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    pages: Tensor,
    most: int,
    window: int | None,
) -> Tensor:
    if _may_use_flash(q) and flash.supports_pages(most, q.dtype, q.shape[2]):
        _note_flash("paged_attention", 3)
        return flash.paged_attention(q, keys, values, rows, pages, most, window)
    out: Tensor = _raw("paged_attention", q)(q, keys, values, rows, pages, most, window)
    return out


_operator(
    "paged_attention(Tensor q, Tensor keys, Tensor values, Tensor rows, Tensor pages, int most, "
    "int? window) -> Tensor",
    _run_paged_attention,
    lambda q, *rest: q.new_empty(q.shape),
)


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    penalty: float = 1.0,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws one token a row; returns ids (R,) int64 and log-probs (R,) float32.

    logits (R, V) float32: may be overwritten.
    uniform (R,) float64 in [0, 1): the draws.
    seen (R, T) int64: the tokens that the penalty counts, -1 for none.

    What the settings mean: `ldalign.kernels.reference.sample`. Raises ValueError where
    shapes or dtypes do not fit.
    """
    if logits.ndim != 2 or logits.dtype != torch.float32 or uniform.shape != logits.shape[:1]:
        raise ValueError(
            f"sample: logits {tuple(logits.shape)} {logits.dtype} and uniform "
            f"{tuple(uniform.shape)} do not fit; expected (R, V) float32 and (R,)"
        )
    if seen is None:  # an operator takes tensors only
        seen = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    ids, logp = torch.ops.ldalign.sample(
        logits, uniform, temperature, top_k, top_p, min_p, penalty, seen
    )
    return ids, logp


_operator(
    "sample(Tensor(a!) logits, Tensor uniform, float temperature, int top_k, float top_p, float "
    "min_p, float penalty, Tensor seen) -> (Tensor, Tensor)",
    lambda logits, *rest: _raw("sample", logits)(logits, *rest),
    lambda logits, *rest: (
        logits.new_empty(len(logits), dtype=torch.int64),
        logits.new_empty(len(logits)),
    ),
)
