"""Which rows are held out, which are trained on, and in what order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ldalign.system.errors import InputError
from ldalign.system.seeds import permutation, uniforms

Keys = Sequence[bytes]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

VALIDATION_ROWS = 32  # set aside for validation where nobody says how many
FEWEST_VALIDATION_ROWS = 8  # fewer choose by luck: then none are
HELD_OUT = "its prompt or conversation is held out"


@dataclass(frozen=True)
class Division:
    """Numbers of rows, in the order in which they are used; those of none of the three are in
    `left_out`, by the reason why.
    """

    train: Indices
    heldout: Indices
    validation: Indices
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


def heldout_counts(most: int, reported: int, validation: int | None) -> tuple[int, int]:
    """Returns how many of at most `most` held-out rows are reported, and how many are set aside for
    validation.

    reported: the most that are reported. validation: how many to set aside; None: VALIDATION_ROWS,
    but at most a quarter where `reported` leaves fewer, and none where these are fewer than
    FEWEST_VALIDATION_ROWS. Raises InputError where so many are asked for that fewer would be left
    to report, and fewer than `reported`.
    """
    if validation is None:
        free = max(most - reported, most // 4)
        aside = min(VALIDATION_ROWS, free) if free >= FEWEST_VALIDATION_ROWS else 0
        return min(reported, most - aside), aside
    if most - validation < min(reported, validation):
        raise InputError(
            f"validation.rows={validation}: of {most} rows that can be held out "
            f"{max(0, most - validation)} would be left to report; hold out more "
            f"(heldout_fraction, heldout), or give validation.rows={most // 2} or fewer, 0 for none"
        )
    return min(reported, most - validation), validation


def held_out(groups: Indices, count: int, seed: int, taken: Mask | None = None) -> Mask:
    """Says which of N rows are held out: (N,), whole groups, `count` rows in all; fewer where the
    groups are too large to add up to it.

    taken (N,): rows that are not to be had; they count for nothing.
    """
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups.tolist()):
        if taken is None or not taken[i]:
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
    validation: int = 0,
    unfit: tuple[Mask, Mask] | None = None,
) -> Division:
    """Divides N rows by the keys of their conversations and prompts.

    heldout: how many to hold out; validation: and how many more for validation, of other
    conversations and prompts. most: the most that are trained on; None: all. shuffle: whether rows
    are put into a random order before any cut, else they keep theirs. entries (N,): which entry of
    the data each row is of; shares: of each entry in the rows that are trained on. given: the keys
    of M held-out rows that came by themselves: both kinds are of these then, and rows that share a
    conversation or a prompt with one of them all are not trained on. unfit: (N,) and (M,): rows
    that cannot be used, in whose place the next ones come; they are nowhere in what is returned.
    """
    n = len(prompts)
    unfit = unfit or (np.zeros(n, dtype=bool), np.zeros(len(given[1]) if given else 0, dtype=bool))
    left_out: dict[str, Indices] = {}
    if given is None:
        groups = groups_of(conversations, prompts)
        reported = held_out(groups, heldout, seed, unfit[0])
        mask = held_out(groups, validation, seed, unfit[0] | reported)
        chosen, aside = np.flatnonzero(reported), np.flatnonzero(mask)
        mask |= reported
        shared = np.zeros(n, dtype=bool)
    else:
        mask = np.zeros(n, dtype=bool)
        order = _ordered(np.arange(len(given[1])), seed, "heldout/order", shuffle)
        order = order[~unfit[1][order]]
        chosen, rest = order[:heldout], order[heldout:]
        aside = rest[~_sharing(given, rest, _keys_of(given, chosen))][:validation]
        taken = set(given[0]), set(given[1])
        shared = _sharing((conversations, prompts), np.arange(n), taken) & ~unfit[0]
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
    return Division(train, chosen, aside, left_out)


def _keys_of(keys: tuple[Keys, Keys], rows: Indices) -> tuple[set[bytes], set[bytes]]:
    """The conversations and the prompts of some rows."""
    conversations, prompts = ({column[i] for i in rows.tolist()} for column in keys)
    return conversations, prompts


def _sharing(keys: tuple[Keys, Keys], rows: Indices, taken: tuple[set[bytes], set[bytes]]) -> Mask:
    """Says which of the rows share a conversation or a prompt with `taken`: (len(rows),)."""
    found = [keys[0][i] in taken[0] or keys[1][i] in taken[1] for i in rows.tolist()]
    return np.array(found, dtype=bool)


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
