"""The stage iteration_t/distances: latent distances of the pairs, and the weights made of them."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ldalign.data.pairs import Pair, usable
from ldalign.data.rows import Row, prompt_text
from ldalign.generation.sampling import Response
from ldalign.models.guide_folder import load_guide
from ldalign.objective import effective_size, pair_weights
from ldalign.run.context import Context, file_hash
from ldalign.run.manifest import Parents
from ldalign.run.stage import Cost, Stage
from ldalign.run.stages.guide import guide_hash, guide_is_policy, guide_tokens
from ldalign.run.stages.responses import RESPONSES, response_texts
from ldalign.system import distributed
from ldalign.system.files import read_jsonl, write_jsonl
from ldalign.system.metrics import Metrics
from ldalign.system.partial_rows import FOLDER as PARTS

log = logging.getLogger(__name__)


def _cost(ctx: Context, name: str) -> Cost:
    # Another guide is small beside the policy: its tokens are left out.
    return Cost(scored=guide_tokens(ctx)[0] if guide_is_policy(ctx.config.guide) else 0)


DISTANCES_STAGE = Stage("distances", _cost)


def distances_stage(
    ctx: Context, t: int, guide: Path, pairs: Sequence[Pair], responses: Sequence[Response]
) -> list[Pair]:
    """Measures how far each pair's two responses lie apart in latent space; returns the pairs with
    the weights made of these distances (arXiv 2404.06390, section 4.2.2).

    guide: the trained guide's folder. responses: one a row of `ctx.used`, as are the pairs.
    """
    name, config = DISTANCES_STAGE.folder(t), ctx.config
    rows, _ = ctx.used
    kept = [usable(pair) for pair in pairs]

    def make(folder: Path) -> Metrics:
        distances = latent_distances(
            ctx, guide, rows, response_texts(ctx, responses), folder / PARTS / "distances"
        )
        weights, clipped = pair_weights(
            config.weights, distances, pairs, kept, config.seed + t, config.weight_clip
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
        return _distance_summary(distances, weights, kept) | {"weight/clipped": clipped}

    parents: Parents = {
        "guide": guide_hash(guide),
        "responses": file_hash(ctx, RESPONSES.format(t)),
        "data": ctx.used_hash,
        **ctx.keys("max_length", "distance", "weights", "weight_clip"),
        **(ctx.keys("seed") if config.weights == "shuffled" else {}),
    }
    ctx.run.stage(name, parents, make, resume=True)
    weights = [r["weight"] for r in read_jsonl(ctx.run.path / name / "distances.jsonl")]
    return [replace(pair, weight=weight) for pair, weight in zip(pairs, weights, strict=True)]


def latent_distances(
    ctx: Context, guide: Path, rows: Sequence[Row], texts: Sequence[str], path: Path
) -> torch.Tensor:
    """(N,) float64: how far each text lies from its row's real response, by the key `distance`.

    path: where the rows that are done are kept, as in `Guide.distance`.
    """
    distances = load_guide(guide, ctx.device).distance(
        [prompt_text(row) for row in rows],
        [row.response for row in rows],
        texts,
        ctx.config.training.micro_tokens,
        ctx.config.distance,
        [row.id for row in rows],
        path,
    )
    return distances.double()


def _distance_summary(
    distances: torch.Tensor, weights: torch.Tensor, kept: Sequence[bool]
) -> Metrics:
    """Means and spreads over the pairs that are kept; {} if there are none. All are (N,)."""
    chosen = torch.tensor(list(kept))
    d, w = distances[chosen], weights[chosen]
    if not len(d):
        return {}
    quantiles = {f"distance/p{q}": float(d.quantile(q / 100)) for q in (10, 50, 90)}
    return {
        "distance/mean": float(d.mean()),
        "distance/std": float(d.std(correction=0)),
        **quantiles,
        "weight/mean": float(w.mean()),
        "weight/min": float(w.min()),
        "weight/max": float(w.max()),
        "weight/std": float(w.std(correction=0)),
        "weight/ess": effective_size(w),
    }
