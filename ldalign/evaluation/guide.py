"""What a trained guide's latent is worth, on rows that it has not seen.

The figure that counts is the sibling gain: by how much its own latent makes a response likelier
than the latent of the other response to the same prompt. A latent that says nothing of the
difference of the two has none, and its distances are noise, however much better it is than the
latent of another row.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ldalign.data.pairs import Pair
from ldalign.evaluation.statistics import standard_error
from ldalign.models.guide import NO_LATENT, Guide, Reading, States, joined
from ldalign.objective import effective_size, latent_distance
from ldalign.system.metrics import Bar

SURE = 2.0  # standard errors that the sibling gain must be above zero


@torch.no_grad()
def heldout_figures(
    guide: Guide, pairs: Sequence[Pair], budget: int, states: Sequence[States] | None = None
) -> dict[str, float]:
    """What the latent is worth on at least two pairs that the guide has not seen, the decoder
    reading all tokens. Every rank computes all of it. budget: about the most tokens at a time.
    states: of each pair, where they are known.

    true, other, none: the reconstruction loss in nats a response token with the response's own
    latent, with that of another row's response of the same side, with the learned latent for none;
    latent_gain = other - true.

    In nats a response, what its own latent adds to its log-prob over another latent:
    sibling_gain, over that of the row's other response, of the rows whose responses differ;
    first_gain, the same at the first token alone where the two differ; other_gain, none_gain. Each
    with its standard error over rows, NAME_se. own_better: the share of responses that are likelier
    with their own latent than with the sibling's (a tie is one half).

    Of the euclidean distances of the rows that differ: ess, the effective sample size of the
    weights that they would give, as a share; length_share and cut_share, the share of their
    variance (R squared) that the difference of lengths in tokens explains, and the number of
    responses without an end.
    """
    n = len(pairs)
    wanted = -(-sum(pair.tokens for pair in pairs) // max(1, budget // 4))
    rows: list[dict[str, float]] = []
    distances: list[Tensor] = []
    # Runs of nearly the same size, of two rows at least.
    with Bar("guide: held-out figures", n, "pairs") as progress:
        for indices in np.array_split(np.arange(n), max(1, min(wanted, n // 2))):
            run = [pairs[i] for i in indices]
            known = None if states is None else joined([states[i] for i in indices])
            found, z = _rows_of_run(guide, run, known)
            rows += found
            distances.append(latent_distance(z[0::2], z[1::2]).double().cpu())
            progress(len(run), 0)
    figures: dict[str, float] = {"rows": n}
    tokens = sum(row["tokens"] for row in rows)
    for name in ("true", "other", "none"):
        figures[name] = sum(row[name] for row in rows) / tokens
    figures["latent_gain"] = figures["other"] - figures["true"]
    for name in ("sibling_gain", "first_gain", "own_better", "other_gain", "none_gain"):
        values = np.array([row[name] for row in rows if name in row])
        figures[name] = float(values.mean()) if len(values) else 0.0
        figures[f"{name}_se"] = standard_error(values)
    figures["differing"] = sum(pair.differs for pair in pairs)
    return figures | _distance_figures(guide, pairs, torch.cat(distances))


def _rows_of_run(
    guide: Guide, run: Sequence[Pair], states: States | None
) -> tuple[list[dict[str, float]], Tensor]:
    """The figures of each pair of a run, and the latents (R, Z) of its responses."""
    readings, kinds = [], []
    for p, pair in enumerate(run):
        other = (p + 1) % len(run)  # the pair whose latents stand for another row's
        for side in (0, 1):
            i = 2 * p + side
            latents = {"true": i, "other": 2 * other + side, "none": NO_LATENT}
            if pair.differs:
                latents["sibling"] = 2 * p + 1 - side
            readings += [Reading(i, whose) for whose in latents.values()]
            kinds += [(p, side, name) for name in latents]
    logps, z = guide(run, readings, states)
    lengths = [len(run[p].responses[side]) for p, side, _ in kinds]
    by_kind = dict(zip(kinds, logps.double().cpu().split(lengths), strict=True))
    rows: list[dict[str, float]] = []
    for p, pair in enumerate(run):
        true = [by_kind[p, side, "true"] for side in (0, 1)]
        row = {"tokens": float(sum(map(len, pair.responses)))}
        for name in ("true", "other", "none"):
            row[name] = -sum(float(by_kind[p, side, name].sum()) for side in (0, 1))
        row["other_gain"] = (row["other"] - row["true"]) / 2
        row["none_gain"] = (row["none"] - row["true"]) / 2
        if pair.differs:
            gaps = [own - by_kind[p, side, "sibling"] for side, own in enumerate(true)]
            gains = [float(gap.sum()) for gap in gaps]
            row["sibling_gain"] = sum(gains) / 2
            row["own_better"] = sum((np.sign(gain) + 1) / 2 for gain in gains) / 2
            at = first_difference(*pair.responses)
            firsts = [float(gap[at]) for gap in gaps if at < len(gap)]
            row["first_gain"] = sum(firsts) / len(firsts)
        rows.append(row)
    return rows, z


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """The place of the first token in which two different responses differ; the shorter may have
    ended there.
    """
    same = [x == y for x, y in zip(a, b, strict=False)]
    return same.index(False) if False in same else len(same)


def _distance_figures(guide: Guide, pairs: Sequence[Pair], distances: Tensor) -> dict[str, float]:
    chosen = [i for i, pair in enumerate(pairs) if pair.differs]
    if not chosen:
        return {}
    d = distances[chosen]
    shares = explained_shares(d, [pairs[i] for i in chosen], guide.end_ids)
    return {"ess": effective_size(d), **shares}


def explained_shares(
    distances: Tensor, pairs: Sequence[Pair], end_ids: Sequence[int]
) -> dict[str, float]:
    """The shares of the variance of distances (N,) that are `explained` by the gap of the lengths
    of each pair's two responses, and by how many of the two were cut: those that end with none of
    end_ids.
    """
    cuts = [sum(y[-1] not in end_ids for y in pair.responses) for pair in pairs]
    by = {"length_share": [pair.length_gap for pair in pairs], "cut_share": cuts}
    return {name: explained(distances.numpy(), np.array(x, float)) for name, x in by.items()}


def explained(values: np.ndarray, by: np.ndarray) -> float:
    """The share of the variance of `values` (N,) that a straight line in `by` (N,) explains."""
    if len(values) < 3 or values.std() == 0 or by.std() == 0:
        return 0.0
    return float(np.corrcoef(values, by)[0, 1] ** 2)


def sentence(figures: dict[str, float]) -> str:
    """The held-out figures in one line."""
    return (
        f"held out, nats a response: own latent over the sibling's "
        f"{figures['sibling_gain']:+.3f} +- {figures['sibling_gain_se']:.3f} "
        f"(at the first differing token {figures['first_gain']:+.3f} +- "
        f"{figures['first_gain_se']:.3f}; better in {figures['own_better']:.0%}), over none "
        f"{figures['none_gain']:+.3f} +- {figures['none_gain_se']:.3f}, over another row's "
        f"{figures['other_gain']:+.3f} +- {figures['other_gain_se']:.3f}; "
        f"{figures['differing']:.0f} rows"
    )


def tells_apart(figures: Mapping[str, float]) -> bool:
    """Whether the guide tells a row's two responses apart: the sibling gain is at least SURE
    standard errors above zero, on the two rows at least that a standard error takes.
    """
    gain, error = figures["sibling_gain"], figures["sibling_gain_se"]
    return figures["differing"] > 1 and gain > 0 and gain >= SURE * error
