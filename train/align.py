"""LD-Align, the whole method (arXiv 2404.06390).

    ldalign align [--ranks N] [--config FILE.yaml] [key=value ...]
    torchrun train/align.py ...  # the same, also on several machines

Stage by stage: SFT (optional), then for every iteration: responses, guide (once, or each time with
guide.retrain), distances, reference, policy, evaluation; at the end the report. Other methods
(method=spin, dpo, sft, self_reward, rlaif) differ in where their pairs come from
(`ldalign.run.methods`). Every stage leaves its files with a manifest in the run folder; running the
same command again goes on where it stopped.
"""

from pathlib import Path

from ldalign.report.model_card import try_cards
from ldalign.run import methods
from ldalign.run.context import Context
from ldalign.run.measures import measure, measurements
from ldalign.run.plan import in_order
from ldalign.run.selection import read_selected, select
from ldalign.run.settings import RunConfig
from ldalign.run.stages.pair_rewards import PAIR_REWARDS_STAGE, pair_rewards_stage
from ldalign.run.stages.policy import (
    POLICY_STAGE,
    planned_start,
    policy_stage,
    sft_stage,
    start_name,
    start_stage,
)
from ldalign.system import exits
from ldalign.train.command import run_script


def main(argv: list[str]) -> None:
    """Reads the settings and runs all stages that are not done."""
    run_script(argv, __doc__ or "", align, planned, by_method=True, kept=kept)


def align(ctx: Context) -> str:
    """The method: from the start policy to the last iteration's, and the baseline beside it; the
    run's result is the iteration that validation chooses.
    """
    config = ctx.config
    start = start_stage(ctx)
    first = start_name(config)
    try_cards(ctx.run.path)
    measure(ctx, first, start, first)

    policy = start
    for t in range(config.iterations):
        made = methods.SOURCES[config.method](ctx, t, policy, start)
        if scores_pairs(config):
            pair_rewards_stage(ctx, t)
        policy = policy_stage(ctx, t, policy, made.pairs, made.made_from)
        try_cards(ctx.run.path)
        measure(ctx, f"iteration_{t}", policy, first)

    if config.continual_sft.epochs:
        baseline = sft_stage(ctx, "continual_sft", start)
        measure(ctx, "continual_sft", baseline, first)
    chosen = select(ctx, start)
    try_cards(ctx.run.path)  # now with what was measured
    aligned = "The aligned policy" if config.iterations else "The policy"
    return f"{aligned}: {ctx.run.path / chosen.folder} ({chosen.why})"


def kept(ctx: Context) -> Path:
    """The folder of the run's result."""
    return ctx.run.path / str(read_selected(ctx.run.path)["folder"])


def planned(config: RunConfig) -> list[str]:
    """The names of the stages of the whole run, in the order of the method."""
    names = [*planned_start(config), *measurements(config, start_name(config))]
    for t in range(config.iterations):
        steps = [*methods.planned(config, t), POLICY_STAGE.folder(t)]
        steps += [PAIR_REWARDS_STAGE.folder(t)] if scores_pairs(config) else []
        names += [*in_order(steps), *measurements(config, f"iteration_{t}")]
    if config.continual_sft.epochs:
        baseline = "continual_sft"
        names += [POLICY_STAGE.folder(baseline), *measurements(config, baseline)]
    return names


def scores_pairs(config: RunConfig) -> bool:
    """Whether a reward model scores every iteration's pairs, for the report to hold the latent
    distances against.
    """
    return config.reward.model is not None and config.method == "ld_align"


if __name__ == "__main__":
    exits.run(main)
