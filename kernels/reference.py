"""The maths of every kernel in plain PyTorch: the lesson to read first, and the oracle for the fast paths.

Every function runs in float64 as well. Half-precision inputs are multiplied in their own dtype and accumulated,
normalised and summed in float32; the result is rounded once, at the end.

Shapes: N rows (flat tokens), D width, V vocabulary, P pairs, B sequences, T tokens, H query heads, K key/value heads,
E head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 stays, everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """log softmax(hidden weight^T)[target], one natural-log probability a row.

    hidden (N, D) and weight (V, D) of one dtype, target (N,) int64 in [0, V) -> (N,) float32 (float64 in float64).
    log p = z[target] - log sum_v exp z[v];  d log p / d z[v] = [v = target] - softmax(z)[v].
    """
    logits = (hidden @ weight.T).to(accumulate_dtype(hidden.dtype))  # (N, V)
    return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(dim=1)


def weighted_dpo_loss(
    logp_real: Tensor, logp_generated: Tensor, ref_real: Tensor, ref_generated: Tensor, weight: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over pairs of -weight log sigmoid(beta Delta), LD-Align's loss (arXiv 2404.06390, section 4.2.3).

    All inputs (P,): summed response log-probs under policy and reference, and the pair weights s. Delta =
    (logp_real - ref_real) - (logp_generated - ref_generated). Its gradient in logp_real is -beta s sigmoid(-beta Delta)
    and the opposite in logp_generated. The caller divides by the number of pairs in the *global* batch.

    Returns the loss () and per-pair metrics (P,), detached: loss (unweighted), rewards/chosen, rewards/rejected,
    rewards/margins, rewards/accuracies.
    """
    chosen = beta * (logp_real - ref_real)
    rejected = beta * (logp_generated - ref_generated)
    loss = -F.logsigmoid(chosen - rejected)
    metrics = {
        "loss": loss,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        # A tie counts one half, so that step 0 reads 0.5 and not 0 or 1 by rounding.
        "rewards/accuracies": (chosen > rejected).to(loss.dtype) + 0.5 * (chosen == rejected).to(loss.dtype),
    }
    return (weight * loss).sum(), {name: value.detach() for name, value in metrics.items()}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; x (..., D), weight (D,) -> (..., D) in x's dtype."""
    wide = x.to(accumulate_dtype(x.dtype))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout (Hugging Face's): x (N, H, E), cos and sin (N, E/2) -> (N, H, E), x's dtype.

    Pairs (x[e], x[e + E/2]) turn by the angle position * theta^(-2e/E).
    """
    a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, in the inputs' dtype."""
    wide = accumulate_dtype(gate.dtype)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal grouped-query attention over B sequences of one length.

    q (B, T, H, E), k and v (B, T, K, E), H a multiple of K -> (B, T, H, E). Query i sees keys max(0, i - window + 1)
    to i (Mistral's sliding window, arXiv 2310.06825; None: all keys up to i).
    """
    B, T, H, E = q.shape
    K = k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, E)
    scores = q.reshape(B, K, H // K, T, E) @ k[:, :, None].transpose(-1, -2)  # (B, K, H/K, T, T)
    scores = scores.to(accumulate_dtype(q.dtype)) / math.sqrt(E)
    i = torch.arange(T, device=q.device)
    hidden = i[:, None] < i[None, :]
    if window is not None:
        hidden = hidden | (i[:, None] - i[None, :] >= window)
    probs = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype)
    return (probs @ v[:, :, None]).reshape(B, H, T, E).transpose(1, 2)
