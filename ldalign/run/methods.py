"""Where an iteration's pairs come from, one function a method: the stages it runs, in order.

Each takes the run, the iteration, the policies that the iteration and the run start from, and
returns the pairs to train on: tokens, weights, the reference's log-probs. The rest of the run is
the same for all methods.

A new method is a function here with its lines in `SOURCES` and `STAGES`; a value of the key
`method` and the keys it does not read in `ldalign.run.settings`; and its words in
`ldalign.report.words` and `ldalign.report.analysis`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ldalign.data.pairs import Pairs, joined_pairs, ranked_pairs, with_losers
from ldalign.evaluation.judges import POLICY
from ldalign.run.context import Context, file_hash
from ldalign.run.manifest import Parents
from ldalign.run.settings import RunConfig, reader
from ldalign.run.stage import Stage
from ldalign.run.stages.distances import DISTANCES_STAGE, distances_stage
from ldalign.run.stages.guide import GUIDE_STAGE, guide_stage
from ldalign.run.stages.judged import JUDGED, JUDGED_STAGE, judged_stage
from ldalign.run.stages.reference import REFERENCE_STAGE, reference_stage
from ldalign.run.stages.responses import (
    RESPONSES,
    RESPONSES_STAGE,
    Responses,
    read_responses,
    responses_stage,
)
from ldalign.system.errors import InputError


@dataclass(frozen=True)
class TrainingPairs:
    """The pairs that an iteration trains on."""

    pairs: Pairs
    made_from: Parents  # what their tokens depend on, beside the data


def ld_align(ctx: Context, t: int, policy: Path, start: Path) -> TrainingPairs:
    """Makes pairs (real, generated, s) by responses, guide (once), distances and reference (arXiv
    2404.06390, section 4).
    """
    responses = responses_stage(ctx, t, policy)
    pairs, cut = _against_own(ctx, responses)
    guide = _guide(ctx, t, start, pairs)
    pairs = distances_stage(ctx, t, guide, start, pairs)
    made_from: Parents = {"responses": file_hash(ctx, RESPONSES.format(t))}
    return TrainingPairs(
        reference_stage(ctx, t, _reference(ctx, policy, start), pairs, made_from, cut), made_from
    )


def spin(ctx: Context, t: int, policy: Path, start: Path) -> TrainingPairs:
    """Makes pairs (real, generated, 1) by responses and reference (arXiv 2401.01335); with
    mix_previous those of the iteration before too.
    """
    pairs, cut = _against_own(ctx, responses_stage(ctx, t, policy))
    made_from: Parents = {"responses": file_hash(ctx, RESPONSES.format(t))}
    if ctx.config.mix_previous and t > 0:
        previous = file_hash(ctx, RESPONSES.format(t - 1))
        made_from = {**made_from, "previous responses": previous}
        older, _ = _against_own(ctx, read_responses(ctx, t - 1))
        named = [f"{name} of iteration {t - 1}" for name in older.ids]
        pairs = joined_pairs([pairs, older.changed(ids=named)])
    return TrainingPairs(
        reference_stage(ctx, t, _reference(ctx, policy, start), pairs, made_from, cut), made_from
    )


def dpo(ctx: Context, t: int, policy: Path, start: Path) -> TrainingPairs:
    """Makes pairs (chosen, rejected, 1) of preference data, by reference alone (arXiv
    2305.18290).
    """
    _, pairs = ctx.used
    losers = ctx.train.rejected
    if losers is None:
        raise InputError(
            f"{ctx.run.path}/data: has no rejected responses, which method=dpo trains on; delete it"
        )
    losers = losers[: len(pairs)]
    pairs = with_losers(pairs, losers, ctx.config.max_length)
    return TrainingPairs(reference_stage(ctx, t, _reference(ctx, policy, start), pairs, {}), {})


def sft(ctx: Context, t: int, policy: Path, start: Path) -> TrainingPairs:
    """Makes pairs of a real response and no loser, by no stage; with sft_prompts=pairs by
    responses, of those rows alone whose own sample would make a pair.
    """
    _, pairs = ctx.used
    if ctx.config.sft_prompts == "all":
        return TrainingPairs(pairs, {})
    against, _ = _against_own(ctx, responses_stage(ctx, t, policy))
    made_from: Parents = {"responses": file_hash(ctx, RESPONSES.format(t))}
    return TrainingPairs(pairs.take(against.usable), made_from)


def self_reward(ctx: Context, t: int, policy: Path, start: Path) -> TrainingPairs:
    """Makes pairs (better, worse, 1) of two own samples, as the policy itself judges
    them (arXiv 2401.10020).
    """
    return _of_two_samples(ctx, t, policy, start, POLICY)


def rlaif(ctx: Context, t: int, policy: Path, start: Path) -> TrainingPairs:
    """Makes pairs (better, worse, 1) of two own samples, as the judge that judge.* names says
    (arXiv 2309.00267).
    """
    return _of_two_samples(ctx, t, policy, start, None)


def _of_two_samples(
    ctx: Context, t: int, policy: Path, start: Path, judge: str | None
) -> TrainingPairs:
    """Samples two responses a prompt, has them judged, drops ties, takes the
    reference of the rest.
    """
    responses = responses_stage(ctx, t, policy, samples=2)
    preferences = judged_stage(ctx, t, policy, responses, judge)
    samples = responses.tokens
    ranked = ranked_pairs(
        ctx.used[1], (samples[0::2], samples[1::2]), preferences, ctx.config.max_length
    )
    made_from: Parents = {
        "responses": file_hash(ctx, RESPONSES.format(t)),
        "judged": file_hash(ctx, f"{JUDGED_STAGE.folder(t)}/{JUDGED}"),
    }
    return TrainingPairs(
        reference_stage(ctx, t, _reference(ctx, policy, start), ranked, made_from), made_from
    )


def _guide(ctx: Context, t: int, start: Path, pairs: Pairs) -> Path | None:
    """The guide of iteration t: the first one's, or with guide.retrain its own."""
    if not ctx.config.needs_guide:
        return None
    if ctx.config.guide.retrain or t == 0:
        return guide_stage(ctx, t, start, pairs)
    first, _ = _against_own(ctx, read_responses(ctx, 0))
    return guide_stage(ctx, 0, start, first)


def _reference(ctx: Context, policy: Path, start: Path) -> Path:
    return policy if ctx.config.reference == "iteration" else start


def _against_own(ctx: Context, responses: Responses) -> tuple[Pairs, int]:
    """Real responses against sampled ones, and how many of the latter max_length cut."""
    pairs = with_losers(ctx.used[1], responses.tokens, ctx.config.max_length)
    assert pairs.generated is not None
    return pairs, int((responses.tokens.lengths > pairs.generated.lengths).sum())


SOURCES: dict[str, Callable[[Context, int, Path, Path], TrainingPairs]] = {
    "ld_align": ld_align,
    "spin": spin,
    "dpo": dpo,
    "sft": sft,
    "self_reward": self_reward,
    "rlaif": rlaif,
}


# The stages that each of them makes, by the method's `reader`; their order is that of
# `ldalign.run.plan`.
STAGES: dict[str, frozenset[Stage]] = {
    "ld_align": frozenset({RESPONSES_STAGE, GUIDE_STAGE, DISTANCES_STAGE, REFERENCE_STAGE}),
    "spin": frozenset({RESPONSES_STAGE, REFERENCE_STAGE}),
    "dpo": frozenset({REFERENCE_STAGE}),
    "sft": frozenset(),
    "sft/pairs": frozenset({RESPONSES_STAGE}),
    "self_reward": frozenset({RESPONSES_STAGE, JUDGED_STAGE, REFERENCE_STAGE}),
    "rlaif": frozenset({RESPONSES_STAGE, JUDGED_STAGE, REFERENCE_STAGE}),
}


def planned(config: RunConfig, t: int) -> list[str]:
    """The names of the stages that make iteration t's pairs, in no order."""
    stages = STAGES[reader(config.method, config.sft_prompts)]
    if not config.needs_guide or (t > 0 and not config.guide.retrain):
        stages -= {GUIDE_STAGE}  # the first iteration's serves all
    return [stage.folder(t) for stage in stages]
