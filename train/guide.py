"""The guiding model alone.

    ldalign guide [--ranks N] [--config FILE.yaml] [key=value ...]
    torchrun train/guide.py ...

Trains the guide into RUN/guide on the data's responses and generated ones. The generated ones are
those of the data where every row has one ({"real", "generated"} or {"chosen", "rejected"}), else
samples of the start policy in RUN/iteration_0/responses, which are made if they are not there.
align.py goes on from here with the same settings; any other run takes the guide as guide=RUN/guide.
The guides that guide.retrain asks for are align.py's.
"""

from ldalign.data.pairs import with_losers
from ldalign.run.context import Context
from ldalign.run.settings import RunConfig
from ldalign.run.stages.guide import GUIDE_STAGE, guide_plan, guide_stage
from ldalign.run.stages.policy import planned_start, start_stage
from ldalign.run.stages.responses import RESPONSES_STAGE, responses_stage
from ldalign.system import exits
from ldalign.train.command import need, run_script


def main(argv: list[str]) -> None:
    """Reads the settings, trains the guide."""
    run_script(argv, __doc__ or "", guide, planned, check)


def check(config: RunConfig) -> None:
    """Raises InputError for settings without a guide."""
    need(config.method == "ld_align", f"method={config.method}: has no guide; give method=ld_align")
    need(
        config.needs_guide,
        f"weights={config.weights}: no guide is read; leave it out",
    )


def guide(ctx: Context) -> str:
    """Trains the guide, after what it needs; returns the closing line."""
    _, pairs = ctx.used
    if ctx.train.rejected is not None:
        losers = ctx.train.rejected[: len(pairs)]
        # Self-play's start is made for a guide that begins as it, and for no other.
        start = start_stage(ctx) if guide_plan(ctx).reads_ids else ctx.start
    else:
        start = start_stage(ctx)
        losers = responses_stage(ctx, 0, start).tokens
    pairs = with_losers(pairs, losers, ctx.config.max_length)
    return f"The guide: {guide_stage(ctx, 0, start, pairs)}"


def planned(config: RunConfig) -> list[str]:
    """The names of the stages that `guide` makes where the data has no generated responses."""
    return [*planned_start(config), RESPONSES_STAGE.folder(0), GUIDE_STAGE.folder(0)]


if __name__ == "__main__":
    exits.run(main)
