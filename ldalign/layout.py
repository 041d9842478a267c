"""How the tokens of a flat batch see each other.

The models work on flat tokens (N, D) and leave attention to a *layout*, which knows where the sequences begin and end.
`Packed` serves training, scoring and prefill: sequences end to end, no padding. Generation adds a layout of its own
over the key/value cache. A model needs of a layout: `positions` (N,) int64, and `attend`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ldalign import ops


class Layout(Protocol):
    """What a model needs to know of its batch."""

    positions: Tensor  # (N,) int64, restarting at each sequence

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q (N, H, E), k and v (N, K, E) of one layer -> (N, H, E)."""
        ...


PADDING = 1.5  # sequences share an attention call up to this many times their real number of tokens


class Packed:
    """Causal sequences laid end to end, blind to each other.

    A sequence is given by its length, or by the lengths (prompt, response, response, ...) of its parts: then every
    response continues the prompt, at the positions after it, and is blind to the other responses. So a pair's prompt
    is computed once; the result is that of separate sequences [prompt | response].

    Everything but attention works on the flat tokens. Attention runs over groups of similar length, padded at their
    ends, where causality alone keeps real tokens from seeing the padding.
    """

    def __init__(self, lengths: Sequence[int | Sequence[int]], device: torch.device | str = "cpu") -> None:
        parts = [(n,) if isinstance(n, int) else tuple(n) for n in lengths]
        if any(n < 1 for sequence in parts for n in sequence):
            raise ValueError(f"every part of a packed sequence needs at least one token, got lengths {list(lengths)}")
        self.lengths = [sum(sequence) for sequence in parts]
        self.positions = torch.cat([_positions(sequence) for sequence in parts]).to(device)
        self.even = len(set(self.lengths)) == 1 and all(len(sequence) == 1 for sequence in parts)
        self._unseen: dict[int | None, list[Tensor | None]] = {}  # by window: the same for all layers
        self.groups = [] if self.even else [_group(parts, members, device) for members in _similar(self.lengths)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Attention within each sequence: q (N, H, E), k and v (N, K, E) -> (N, H, E)."""
        if self.even:
            shape = (len(self.lengths), self.lengths[0])
            q, k, v = q.unflatten(0, shape), k.unflatten(0, shape), v.unflatten(0, shape)
            return ops.attention(q, k, v, window).flatten(0, 1)
        if window not in self._unseen:
            self._unseen[window] = [group.unseen(window) for group in self.groups]
        outs = []
        for group, unseen in zip(self.groups, self._unseen[window], strict=True):
            q_, k_, v_ = (_Pad.apply(x, group).unflatten(0, group.shape) for x in (q, k, v))
            outs.append(ops.attention(q_, k_, v_, window, unseen).flatten(0, 1))
        return _Unpad.apply(self.groups, len(q), *outs)


@dataclass(frozen=True)
class _Group:
    """Sequences attended to together: `flat` (n,) are their tokens in the flat batch, `padded` (n,) in (S T,)."""

    shape: tuple[int, int]  # (S, T): sequences, longest length
    flat: Tensor
    padded: Tensor
    positions: Tensor | None  # (S, T), where a sequence has several responses; None: plain causal order
    parts: Tensor  # (S, T): 0 the prompt, 1, 2, ... the responses, -1 padding

    def unseen(self, window: int | None) -> Tensor | None:
        """(S, T, T) bool: which keys (last axis) each query may not see; None where plain causal order says it."""
        if self.positions is None:
            return None
        gap = self.positions[:, :, None] - self.positions[:, None, :]
        own = (self.parts[:, None, :] == self.parts[:, :, None]) | (self.parts[:, None, :] == 0)
        return (gap < 0) | ~own if window is None else (gap < 0) | (gap >= window) | ~own


def _positions(parts: Sequence[int]) -> Tensor:
    """Positions of one sequence's tokens: the prompt's from 0, each response's from the prompt's end."""
    return torch.cat([torch.arange(parts[0]), *(torch.arange(parts[0], parts[0] + n) for n in parts[1:])])


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Sequence indices in groups of similar length, longest first."""
    groups: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not groups or lengths[groups[-1][0]] * (len(groups[-1]) + 1) > PADDING * (tokens + lengths[i]):
            groups.append([])
            tokens = 0
        groups[-1].append(i)
        tokens += lengths[i]
    return groups


def _group(parts: Sequence[Sequence[int]], members: Sequence[int], device: torch.device | str) -> _Group:
    sizes = [sum(sequence) for sequence in parts]
    starts = [0, *itertools.accumulate(sizes)]
    S, T = len(members), max(sizes[i] for i in members)
    flat = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in members])
    padded = torch.cat([torch.arange(n * T, n * T + sizes[i]) for n, i in enumerate(members)])
    # Padding keeps counting, so that each padded query sees itself at least and its softmax is finite.
    positions = torch.arange(T).repeat(S, 1)
    numbers = torch.full((S, T), -1)
    for n, i in enumerate(members):
        positions[n, : sizes[i]] = _positions(parts[i])
        numbers[n, : sizes[i]] = torch.arange(len(parts[i])).repeat_interleave(torch.tensor(parts[i]))
    branched = any(len(parts[i]) > 1 for i in members)
    return _Group(
        (S, T), flat.to(device), padded.to(device), positions.to(device) if branched else None, numbers.to(device)
    )


class _Pad(torch.autograd.Function):
    """Flat tokens (N, ...) to a group's padded ones (S T, ...), zeros between; the backward is the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: _Group) -> Tensor:
        ctx.group, ctx.tokens = group, len(x)
        S, T = group.shape
        return x.new_zeros(S * T, *x.shape[1:]).index_copy_(0, group.padded, x.index_select(0, group.flat))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        group: _Group = ctx.group
        out = grad.new_zeros(ctx.tokens, *grad.shape[1:])
        return out.index_copy_(0, group.flat, grad.index_select(0, group.padded)), None


class _Unpad(torch.autograd.Function):
    """All groups' padded tokens back to the flat batch."""

    @staticmethod
    def forward(ctx: Any, groups: Sequence[_Group], tokens: int, *parts: Tensor) -> Tensor:
        ctx.groups = groups
        out = parts[0].new_empty(tokens, *parts[0].shape[1:])
        for group, part in zip(groups, parts, strict=True):
            out.index_copy_(0, group.flat, part.index_select(0, group.padded))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        parts = []
        for group in ctx.groups:
            S, T = group.shape
            part = grad.new_zeros(S * T, *grad.shape[1:])
            parts.append(part.index_copy_(0, group.padded, grad.index_select(0, group.flat)))
        return None, None, *parts
