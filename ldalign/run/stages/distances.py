"""The stage iteration_t/distances: latent distances of the pairs, and the weights made of them."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ldalign.data.embedded import check
from ldalign.data.pairs import Pair, Pairs
from ldalign.evaluation.embedding import EmbeddingModel
from ldalign.evaluation.guide import explained_shares
from ldalign.models.guide import Guide, Latent
from ldalign.models.guide_folder import load_guide, pooled_guide
from ldalign.objective import (
    Metric,
    effective_size,
    length_distance,
    oracle_distance,
    pair_weights,
)
from ldalign.run.context import Context, file_hash
from ldalign.run.manifest import Parents, hash_model_folder
from ldalign.run.stage import Cost, Stage
from ldalign.run.stages.guide import guide_hash, guide_pairs, guide_plan, guide_tokens
from ldalign.run.stages.judged import embedding_folder
from ldalign.run.stages.responses import RESPONSES
from ldalign.system import distributed
from ldalign.system.files import again, iter_jsonl, read_jsonl, reading, write_jsonl
from ldalign.system.metrics import Bar, Metrics
from ldalign.system.partial_rows import FOLDER as PARTS

log = logging.getLogger(__name__)


def _cost(ctx: Context, name: str) -> Cost:
    # Another guide, and an embedding model, is small beside the policy: its tokens are left out.
    config = ctx.config
    of_policy = config.weights == "pooled" or (config.needs_guide and guide_plan(ctx).reads_ids)
    return Cost(scored=guide_tokens(ctx) if of_policy else 0)


DISTANCES_STAGE = Stage("distances", _cost)


def distances_stage(ctx: Context, t: int, guide: Path | None, start: Path, pairs: Pairs) -> Pairs:
    """Measures how far each pair's two responses lie apart, in latent space or as the key `weights`
    says; returns the pairs with the weights made of these distances (arXiv 2404.06390, section
    4.2.2).

    guide: the trained guide's folder; None where the weights come of none. start: the policy that
    self-play starts from. pairs: one a row of `ctx.used`, with losers.
    """
    name, config = DISTANCES_STAGE.folder(t), ctx.config
    rows, _ = ctx.used
    kept = pairs.usable.tolist()

    def make(folder: Path) -> Metrics:
        distances = _distances(ctx, t, guide, start, pairs, folder / PARTS / "distances")
        weights, clipped = pair_weights(
            config.weights, distances, kept, config.seed + t, config.weight_clip
        )
        if clipped:
            log.warning(
                "%s: weight_clip=%g lowered %d of %d weights",
                name,
                config.weight_clip,
                clipped,
                sum(kept),
            )
        if distributed.rank() == 0:
            columns = zip(rows, distances.tolist(), weights.tolist(), strict=True)
            write_jsonl(
                folder / "distances.jsonl",
                ({"id": r.id, "distance": d, "weight": w} for r, d, w in columns),
            )
        found = _distance_summary(distances, weights, pairs, kept, ctx.tokenizer.end_ids)
        return found | {"weight/clipped": clipped}

    parents: Parents = {
        **_measured_by(ctx, guide, start),
        "responses": file_hash(ctx, RESPONSES.format(t)),
        "data": ctx.used_hash,
        **ctx.keys("max_length", "distance", "weights", "weight_clip"),
        **(ctx.keys("seed") if config.weights == "shuffled" else {}),
    }
    ctx.run.stage(name, parents, make, resume=True)
    path = ctx.run.path / name / "distances.jsonl"
    with reading(path, again(path.parent)):
        weights = np.array([float(record["weight"]) for record in read_jsonl(path)])
        if len(weights) != len(pairs):
            raise ValueError(f"{len(weights)} weights for {len(pairs)} pairs")
    return pairs.changed(weights=weights)


def _distances(
    ctx: Context, t: int, guide: Path | None, start: Path, pairs: Pairs, parts: Path
) -> torch.Tensor:
    """(N,) float64: how far the two responses of pairs are apart by the key `weights`; where these
    are made of a guide, in its latent space. parts: where the rows that are done are kept.
    """
    kind = ctx.config.weights
    if kind == "uniform":
        return torch.ones(len(pairs), dtype=torch.float64)
    if kind == "length":
        return length_distance(pairs)
    if kind == "oracle":
        return oracle_distance(right_losers(ctx, t), ctx.config.oracle_contrast)
    if kind == "semantic":
        return semantic_distances(ctx, pairs, parts)
    made = open_guide(ctx, guide, start)
    read = guide_pairs(ctx, made, ctx.used[0], pairs)
    return latent_distances(ctx, made, read, parts)[:, 0]


def _measured_by(ctx: Context, guide: Path | None, start: Path) -> Parents:
    """What the distances depend on beside the pairs, for the stage's manifest."""
    kind = ctx.config.weights
    if guide is not None:
        return {"guide": guide_hash(guide), "dtype": str(ctx.dtype)}
    if kind == "semantic":
        return {"judge.folder": hash_model_folder(embedding_folder(ctx.config))}
    if kind == "pooled":
        return {"policy": hash_model_folder(start), "dtype": str(ctx.dtype)}
    return ctx.keys("oracle_contrast") if kind == "oracle" else {}


def right_losers(ctx: Context, t: int) -> list[bool]:
    """Says of each row of `ctx.used`, all of which name a checker, whether the response that
    iteration t sampled is a right answer; one that did not end is none.
    """
    path = ctx.run.path / RESPONSES.format(t)
    with reading(path, again(path.parent)):
        return [
            record["finish_reason"] == "stop"
            and check(str(row.kind), row.answer, record["response"])
            for row, record in zip(ctx.used[0], iter_jsonl(path), strict=True)
        ]


def open_guide(ctx: Context, guide: Path | None, start: Path) -> Guide:
    """The trained guide in a folder; or where there is none, the one that reads the mean states of
    the policy `start` for latents (weights=pooled).
    """
    if guide is None:
        return pooled_guide(start, ctx.dtype, ctx.device, ctx.template)
    return load_guide(guide, ctx.device, ctx.dtype)


def latent_distances(
    ctx: Context,
    guide: Guide,
    pairs: Sequence[Pair],
    path: Path | None,
    others: Sequence[Latent] = (),
) -> torch.Tensor:
    """(N, 1 + L) float64: how far the two responses of pairs in the guide's ids are apart, by the
    key `distance`; of the guide's latents, and of L others that read its encoder's states.

    path: where the rows that are done are kept, as in `Guide.distances_by`.
    """
    metric: Metric = "cosine" if ctx.config.distance == "cosine" else "euclidean"
    budget = ctx.config.training.micro_tokens
    latents = [guide.latent, *others]
    with Bar("distances", len(pairs), "pairs") as progress:
        found = guide.distances_by(latents, pairs, budget, metric, path, lambda n: progress(n, 0))
    return found.double()


def semantic_distances(ctx: Context, pairs: Sequence[Pair], path: Path) -> torch.Tensor:
    """(N,) float64: how far the texts of pairs in the policy's ids are apart by the embedding model
    judge.folder.
    """
    model = EmbeddingModel(embedding_folder(ctx.config), ctx.device)
    real, generated = (
        [ctx.tokenizer.decode(pair.responses[side]) for pair in pairs] for side in (0, 1)
    )
    ids = [pair.id for pair in pairs]
    with Bar("distances", len(pairs), "pairs") as progress:
        found = model.distance(real, generated, ids, path, lambda n: progress(n, 0))
    return found.double()


def _distance_summary(
    distances: torch.Tensor,
    weights: torch.Tensor,
    pairs: Sequence[Pair],
    kept: Sequence[bool],
    end_ids: Sequence[int],
) -> Metrics:
    """Means and spreads over the pairs that are kept, and the share of the distances' variance that
    their lengths and cuts explain; {} if there are none. All are (N,), pairs in the policy's ids,
    whose responses end with one of end_ids unless they were cut.
    """
    chosen = torch.tensor(list(kept))
    d, w = distances[chosen], weights[chosen]
    if not len(d):
        return {}
    used = [pair for pair, keep in zip(pairs, kept, strict=True) if keep]
    shares = explained_shares(d, used, end_ids)
    quantiles = {f"distance/p{q}": float(d.quantile(q / 100)) for q in (10, 50, 90)}
    return {
        "distance/mean": float(d.mean()),
        "distance/std": float(d.std(correction=0)),
        **quantiles,
        **{f"distance/{name}": share for name, share in shares.items()},
        "weight/mean": float(w.mean()),
        "weight/min": float(w.min()),
        "weight/max": float(w.max()),
        "weight/std": float(w.std(correction=0)),
        "weight/ess": effective_size(w),
    }
