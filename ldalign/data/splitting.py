"""Which rows are held out, which are trained on, and in what order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ldalign.system.seeds import permutation, uniforms

Keys = Sequence[bytes]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

HELD_OUT = "its prompt or conversation is held out"


@dataclass(frozen=True)
class Division:
    """Numbers of rows, in the order in which they are used; those of neither are in `left_out`, by
    the reason why.
    """

    train: Indices
    heldout: Indices
    left_out: dict[str, Indices]


def groups_of(conversations: Keys, prompts: Keys) -> Indices:
    """Returns the group of each of N rows: (N,). Rows of one conversation and rows of one prompt
    are of one group, and so is whatever hangs together by these.
    """
    parent = list(range(len(prompts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for keys in (conversations, prompts):
        first: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            a, b = root(i), root(first.setdefault(key, i))
            parent[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(len(parent))], dtype=np.int64)


def held_out(
    groups: Indices, count: int, seed: int, unfit: Mask | None = None
) -> npt.NDArray[np.bool_]:
    """Says which of N rows are held out: (N,), whole groups, `count` rows in all; fewer where the
    groups are too large to add up to it.

    unfit (N,): rows that cannot be used; they count for nothing.
    """
    unfit = np.zeros(len(groups), dtype=bool) if unfit is None else unfit
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups.tolist()):
        if not unfit[i]:
            members.setdefault(group, []).append(i)
    chosen = np.zeros(len(groups), dtype=bool)
    for i in permutation(seed, "heldout", len(groups)).tolist():
        if count == 0:
            break
        group = members.pop(int(groups[i]), [])
        if group and len(group) <= count:
            chosen[group] = True
            count -= len(group)
    return chosen


def divide(
    conversations: Keys,
    prompts: Keys,
    *,
    heldout: int,
    most: int | None,
    seed: int,
    shuffle: bool,
    entries: Indices | None = None,
    shares: Sequence[float] | None = None,
    given: tuple[Keys, Keys] | None = None,
    most_given: int | None = None,
    unfit: tuple[Mask, Mask] | None = None,
) -> Division:
    """Divides N rows by the keys of their conversations and prompts.

    heldout: how many to hold out. most: the most that are trained on; None: all. shuffle: whether
    rows are put into a random order before any cut, else they keep theirs. entries (N,): which
    entry of the data each row is of; shares: of each entry in the rows that are trained on. given:
    the keys of M held-out rows that came by themselves, in place of `heldout`: of them at most
    `most_given` are used, and rows that share a conversation or a prompt with one of them all are
    not trained on. unfit: (N,) and (M,): rows that cannot be used, in whose place the next ones
    come; they are nowhere in what is returned.
    """
    n = len(prompts)
    unfit = unfit or (np.zeros(n, dtype=bool), np.zeros(len(given[1]) if given else 0, dtype=bool))
    left_out: dict[str, Indices] = {}
    if given is None:
        mask = held_out(groups_of(conversations, prompts), heldout, seed, unfit[0])
        chosen = np.flatnonzero(mask)
        shared = np.zeros(n, dtype=bool)
    else:
        mask = np.zeros(n, dtype=bool)
        chosen = _ordered(np.arange(len(given[1])), seed, "heldout/order", shuffle)
        chosen = chosen[~unfit[1][chosen]][:most_given]
        taken = [set(keys) for keys in given]
        own: Any = zip(conversations, prompts, strict=True)
        shared = np.array([c in taken[0] or p in taken[1] for c, p in own], dtype=bool) & ~unfit[0]
        left_out[HELD_OUT] = np.flatnonzero(shared)
    train = _ordered(np.arange(n), seed, "rows/order", shuffle)
    train = train[~(mask | shared | unfit[0])[train]]
    if shares is not None and entries is not None:
        chosen_rows = mixed(train, entries[train], shares, seed)
        left_out["beyond data_shares"] = np.setdiff1d(train, chosen_rows)
        train = chosen_rows
    if most is not None:
        left_out["beyond the rows that are used"] = train[most:]
        train = train[:most]
    return Division(train, chosen, left_out)


def mixed(rows: Indices, entries: Indices, shares: Sequence[float], seed: int) -> Indices:
    """Returns rows of several entries (each row's: (N,)), one after the other drawn from an entry
    by its share, in the order in which they come there, until the entry that is drawn has no more.
    """
    bounds = np.cumsum(np.array(shares) / sum(shares))
    drawn = np.searchsorted(bounds, uniforms(seed, "rows/mixture", len(rows)), side="right")
    drawn = np.minimum(drawn, len(shares) - 1)  # of rounding
    out = np.full(len(rows), -1, dtype=np.int64)
    for entry in range(len(shares)):
        places, own = np.flatnonzero(drawn == entry), rows[entries == entry]
        count = min(len(places), len(own))
        out[places[:count]] = own[:count]
    missing = np.flatnonzero(out < 0)
    return out[: missing[0]] if len(missing) else out


def _ordered(rows: Indices, seed: int, key: str, shuffle: bool) -> Indices:
    return rows[permutation(seed, key, len(rows))] if shuffle else rows
