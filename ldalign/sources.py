"""Where an iteration's pairs come from, one function a method: the stages it runs, in order.

Each takes the run, the iteration, the policy that the iteration starts from and the reference policy, and returns the
pairs to train on: tokens, weights, the reference's log-probs. The rest of the run is the same for all methods.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ldalign.batches import Pair
from ldalign.context import Context
from ldalign.methods import rejected_pairs, with_losers
from ldalign.pipeline import Parents
from ldalign.sampling import Response
from ldalign.settings import RunConfig
from ldalign.stages import distances_stage, file_hash, guide_stage, read_responses, reference_stage, responses_stage

RESPONSES = "iteration_{}/responses/responses.jsonl"


@dataclass(frozen=True)
class Pairs:
    """What an iteration trains on."""

    pairs: list[Pair]
    made_from: Parents  # what their tokens depend on, beside the data


def ld_align(ctx: Context, t: int, policy: Path, reference: Path) -> Pairs:
    """(real, generated, s): sample, guide (once), distances, reference (arXiv 2404.06390, section 4)."""
    responses = responses_stage(ctx, t, policy)
    guide = guide_stage(ctx)
    pairs, cut = _against_own(ctx, responses)
    pairs = distances_stage(ctx, t, guide, pairs, responses)
    made_from: Parents = {"responses": file_hash(ctx, RESPONSES.format(t))}
    return Pairs(reference_stage(ctx, t, reference, pairs, made_from, cut), made_from)


def spin(ctx: Context, t: int, policy: Path, reference: Path) -> Pairs:
    """(real, generated, 1): sample, reference (arXiv 2401.01335). mix_previous: the last iteration's losers too."""
    pairs, cut = _against_own(ctx, responses_stage(ctx, t, policy))
    made_from: dict[str, str | int | float] = {"responses": file_hash(ctx, RESPONSES.format(t))}
    if ctx.config.mix_previous and t > 0:
        made_from["previous responses"] = file_hash(ctx, RESPONSES.format(t - 1))
        older, _ = _against_own(ctx, read_responses(ctx, t - 1))
        pairs += [replace(pair, id=f"{pair.id} of iteration {t - 1}") for pair in older]
    return Pairs(reference_stage(ctx, t, reference, pairs, made_from, cut), made_from)


def dpo(ctx: Context, t: int, policy: Path, reference: Path) -> Pairs:
    """(chosen, rejected, 1) of preference data (arXiv 2305.18290): reference alone."""
    rows, pairs = ctx.used
    pairs = rejected_pairs(rows, pairs, ctx.tokenizer, ctx.config.max_length)
    return Pairs(reference_stage(ctx, t, reference, pairs, {}), {})


def sft(ctx: Context, t: int, policy: Path, reference: Path) -> Pairs:
    """Real responses without losers."""
    return Pairs(ctx.used[1], {})


def _against_own(ctx: Context, responses: list[Response]) -> tuple[list[Pair], int]:
    """Real responses against sampled ones, and how many of the latter max_length cut."""
    pairs = with_losers(ctx.used[1], [r.ids for r in responses], ctx.config.max_length)
    return pairs, sum(len(r.ids) > len(p.generated or ()) for r, p in zip(responses, pairs, strict=True))


SOURCES: dict[str, Callable[[Context, int, Path, Path], Pairs]] = {
    "ld_align": ld_align, "spin": spin, "dpo": dpo, "sft": sft,
}  # fmt: skip


def planned(config: RunConfig) -> list[str]:
    """The stages that make an iteration's pairs, by name, but for the guide, which is made once a run."""
    return {
        "ld_align": ["responses", "distances", "reference"], "spin": ["responses", "reference"], "dpo": ["reference"],
        "sft": [], "self_reward": ["responses", "judged", "reference"], "rlaif": ["responses", "judged", "reference"],
    }[config.method]  # fmt: skip
