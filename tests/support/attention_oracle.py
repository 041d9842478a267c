"""Pair attention by its definition, a dense mask and a softmax: every backend's oracle."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ldalign.kernels.reference import accumulate_dtype


def pack(*pairs: Sequence[int]) -> Tensor:
    """Makes segments (S, 4) of texts laid end to end, each (prompt, response, response, ...)."""
    rows, at = [], 0
    for lengths in pairs:
        starts = list(itertools.accumulate(lengths, initial=at))
        rows.append((at, starts[1], at, at))
        rows += [(a, b, at, starts[1]) for a, b in itertools.pairwise(starts[1:])]
        at = starts[-1]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)


def sees(segments: Tensor, window: int | None) -> Tensor:
    """(N, N) bool: whether token i (first axis) sees token j."""
    N = int(segments[-1, 1]) if len(segments) else 0
    seen = torch.zeros(N, N, dtype=torch.bool)
    for begin, end, prefix_begin, prefix_end in segments.tolist():
        keys = [*range(prefix_begin, prefix_end), *range(begin, end)]  # by position
        for i in range(begin, end):
            position = prefix_end - prefix_begin + i - begin
            first = 0 if window is None else max(0, position - window + 1)
            seen[i, keys[first : position + 1]] = True
    return seen


def attention(
    qkv: Tensor, heads: int, segments: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Returns out (N, H, E) in qkv's dtype and log-sum-exps (N, H) wide.

    Products are in qkv's dtype, the softmax is wide.
    """
    K = (qkv.shape[1] - heads) // 2
    q, k, v = (x.transpose(0, 1) for x in qkv.split([heads, K, K], dim=1))
    k, v = k.repeat_interleave(heads // K, 0), v.repeat_interleave(heads // K, 0)
    scores = (q @ k.mT).to(accumulate_dtype(qkv.dtype)) * qkv.shape[2] ** -0.5  # (H, N, N)
    scores = scores.masked_fill(~sees(segments, window).to(qkv.device), float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1), scores.logsumexp(-1).T


def gradient(grad: Tensor, qkv: Tensor, heads: int, segments: Tensor, window: int | None) -> Tensor:
    """The gradient of sum(grad * out) in qkv."""
    qkv = qkv.detach().clone().requires_grad_()
    (dqkv,) = torch.autograd.grad(attention(qkv, heads, segments, window)[0], qkv, grad)
    return dqkv


def parts(dqkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    K = (dqkv.shape[1] - heads) // 2
    dq, dk, dv = dqkv.split([heads, K, K], dim=1)
    return dq, dk, dv
