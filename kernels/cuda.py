"""The CUDA C++ backend (csrc/cuda): token log-probs, the fused losses, weighted DPO. No autograd.

Shapes: N rows (flat tokens), D width, V vocabulary, P pairs, S = 2 P responses, real and generated
in turn. "Wide": float32, or float64 where the inputs are float64. Oracle:
`ldalign.kernels.reference`; derivations: docs/kernels.md. Every function starts its work on the
current stream and returns; none waits for the GPU, and all repeat bit for bit.
"""

import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ldalign.kernels.loss_options import DPO, Kind, LossOptions

# What the scores may take, and the copies made beside them: with a few floats a row, a call needs
# at most 1 GiB beyond its results for 8,192 rows at D = 4,096, V = 128,256 in bfloat16. Less is
# used where less is enough. Only a sum over pieces needs more, a float32 dw, when dw is wanted for
# more rows than this memory and dw's own together can hold.
WORKSPACE_BYTES = 1020 * 2**20
IGNORE_INDEX = -100


@functools.cache
def why_not() -> str:
    """Returns why this backend cannot run here, in one line; "" if it can."""
    try:
        importlib.import_module("ldalign._C")
    except ImportError as error:
        return f"the extension ldalign._C is not built ({error})"
    if not hasattr(torch.ops.ldalign_cuda, "pair_loss"):
        return (
            "the extension ldalign._C was built without CUDA "
            "(no nvcc, or a torch without CUDA, at build time)"
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return ""


def available() -> bool:
    """Says whether this backend can run here."""
    return not why_not()


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    """Log-probs (N,) and log-sum-exps (N,), both wide.

    hidden (N, D), weight (V, D), target (N,) int64; ignored rows have log-prob 0. A target outside
    [0, V) that is not ignore_index stops the kernel: the CUDA context is lost, as with torch's own
    device assertions. Callers check targets where that costs no wait.
    """
    logp, lse = torch.ops.ldalign_cuda.linear_logprob(
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
    """dhidden and dweight of sum(grad * logp).

    Rows with a negative target, or a grad of 0, add nothing.
    """
    dh, dw = torch.ops.ldalign_cuda.linear_logprob_backward(
        grad, hidden, weight, target, lse, need_hidden, need_weight, WORKSPACE_BYTES
    )
    return dh if need_hidden else None, dw if need_weight else None


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
    """Each response's summed log-prob (S,), and the gradients of the loss.

    The loss is scale * `reference.pair_loss`: by default scale * sum_p weight_p * -log sigmoid(beta
    Delta_p), Delta_p = (sums[2p] - reference[2p]) - (sums[2p + 1] - reference[2p + 1]). One pass,
    three matrix products; only a pair that outgrows the workspace has its scores made twice.
    """
    sums, dh, dw = torch.ops.ldalign_cuda.pair_loss(
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
    return sums, dh if need_hidden else None, dw if need_weight else None


def sft_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs (N,), and the gradients of scale * sum_i -logp_i: one pass, three products."""
    logp, dh, dw = torch.ops.ldalign_cuda.sft_loss(
        hidden, weight, target, scale, need_hidden, need_weight, WORKSPACE_BYTES
    )
    return logp, dh if need_hidden else None, dw if need_weight else None


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
    """The weighted DPO loss of P pairs, all (P,) wide, and what its backward needs.

    Returns loss () = sum_p weight_p l_p, l, chosen, rejected (P,), and d loss / d sums_real (P,).
    """
    loss, each, chosen, rejected, coefficient = torch.ops.ldalign_cuda.weighted_dpo(
        sums_real,
        sums_generated,
        ref_real,
        ref_generated,
        weight,
        beta,
        kind == "ipo",
        label_smoothing,
    )
    return loss, each, chosen, rejected, coefficient
