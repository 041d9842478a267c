"""Requests for log-probs, packed so that what their contexts share is computed once."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """A continuation to be scored after its context, in token ids; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        """What the model reads: the last id is only predicted."""
        return self.context + self.continuation[:-1]


@dataclass(frozen=True)
class Tree:
    """Requests whose contexts begin alike: the prefix is computed once, and each goes on there."""

    prefix: tuple[int, ...]
    members: list[int]  # indices of requests
    requests: list[Scored]

    @property
    def branches(self) -> list[tuple[int, ...]]:
        """What the model reads for each request after the prefix; may be empty."""
        return [request.read[len(self.prefix) :] for request in self.requests]

    @property
    def tokens(self) -> int:
        """How many tokens the model reads."""
        return len(self.prefix) + sum(map(len, self.branches))


def plan_trees(requests: Sequence[Scored], budget: int) -> list[Tree]:
    """Puts all requests into trees, by equal contexts or a shared beginning, to save tokens.

    A tree of several contexts has at most `budget` tokens.
    """
    order = sorted(range(len(requests)), key=lambda i: requests[i].context)
    groups = [list(same) for _, same in itertools.groupby(order, key=lambda i: requests[i].context)]
    trees: list[Tree] = []
    run: list[list[int]] = []
    for group in groups:
        longer = _tree(requests, [*run, group])
        # In a run, a context costs what follows the shared beginning, for each continuation.
        own = len(requests[group[0]].context)
        if run and (len(group) * (own - len(longer.prefix)) >= own or longer.tokens > budget):
            trees += _cheaper(requests, run)
            run = []
        run.append(group)
    return trees + (_cheaper(requests, run) if run else [])


def _cheaper(requests: Sequence[Scored], run: list[list[int]]) -> list[Tree]:
    """Returns one tree of all groups, or one of each, whichever reads fewer tokens."""
    apart = [_tree(requests, [group]) for group in run]
    together = _tree(requests, run)
    return [together] if together.tokens < sum(tree.tokens for tree in apart) else apart


def _tree(requests: Sequence[Scored], groups: Iterable[Sequence[int]]) -> Tree:
    members = [i for group in groups for i in group]
    # They are sorted: what the first and the last context share, all share.
    first, last = requests[members[0]].context, requests[members[-1]].context
    both = enumerate(zip(first, last, strict=False))
    shared = next((n for n, (a, b) in both if a != b), min(len(first), len(last)))
    return Tree(first[:shared], members, [requests[i] for i in members])


def flatten(
    trees: Sequence[Tree],
) -> tuple[list[int], list[list[int]], list[int], list[int], list[int]]:
    """Lays trees end to end: (ids, part lengths, rows that predict, targets, targets a request).

    The part lengths are as `Packed` wants them.
    """
    ids: list[int] = []
    parts: list[list[int]] = []
    rows: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for tree in trees:
        start, shared = len(ids), len(tree.prefix)
        ids += tree.prefix
        parts.append([shared])
        for request, branch in zip(tree.requests, tree.branches, strict=True):
            moved = len(ids) - shared  # of a position in the request to its row, behind the prefix
            first = len(request.context) - 1
            predicting = range(first, first + len(request.continuation))
            rows += [p + (start if p < shared else moved) for p in predicting]
            targets += request.continuation
            lengths.append(len(request.continuation))
            ids += branch
            if branch:
                parts[-1].append(len(branch))
    return ids, parts, rows, targets, lengths


def greedy(
    hidden: Tensor, weight: Tensor, targets: Tensor, logps: Tensor, lengths: Sequence[int]
) -> list[bool]:
    """Says of each segment whether every target is the likeliest token, with few logits.

    hidden (M, D), weight (V, D), targets (M,), logps (M,). Logits are made for the least likely
    target of each segment, and for the others only where that passes.
    """
    starts = list(itertools.accumulate(lengths, initial=0))
    spans = [range(a, b) for a, b in itertools.pairwise(starts)]
    values = logps.tolist()
    worst = [min(span, key=lambda row: values[row]) for span in spans]
    passed = _likeliest(hidden, weight, targets, worst)
    hopeful = zip(spans, worst, passed, strict=True)
    rest = [row for span, low, ok in hopeful if ok for row in span if row != low]
    others = dict(zip(rest, _likeliest(hidden, weight, targets, rest), strict=True))
    return [
        ok and all(others.get(row, True) for row in span)
        for span, ok in zip(spans, passed, strict=True)
    ]


def _likeliest(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Sequence[int]) -> list[bool]:
    """Says whether these rows' targets have the highest logit; of several, the first counts."""
    out: list[bool] = []
    for chunk in torch.tensor(rows, dtype=torch.int64, device=hidden.device).split(64):
        out += ((hidden[chunk] @ weight.T).argmax(-1) == targets[chunk]).tolist()
    return out
