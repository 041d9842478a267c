"""LD-Align, the whole method (arXiv 2404.06390): `torchrun train/align.py [--config FILE.yaml]
[key=value ...]`.

Stage by stage: SFT warm-up (optional), then for every iteration: sample, guide (once, or each time
with guide.retrain), distances, reference, align, evaluate; at the end the report. Other methods
(method=spin, dpo, sft, self_reward, rlaif) differ in where their pairs come from
(`ldalign.run.methods`). Every stage leaves its files with a manifest in the run folder; running the
same command again goes on after the last finished stage.
"""

from ldalign.run import methods
from ldalign.run.context import Context
from ldalign.run.measures import measure, measurements
from ldalign.run.settings import RunConfig
from ldalign.run.stages.policy import policy_stage, sft_stage, start_name, start_stage
from ldalign.run.stages.rewards import pair_rewards_stage
from ldalign.system import exits
from ldalign.train.command import run_stages


def main(argv: list[str]) -> None:
    """Reads the settings and runs all stages that are not done."""
    run_stages(argv, __doc__ or "", align, planned, by_method=True)


def align(ctx: Context) -> str:
    """The method: from the start policy to the last iteration's, and the baseline beside it."""
    config = ctx.config
    start = start_stage(ctx)
    first = start_name(config)
    measure(ctx, first, start, first)

    policy = start
    for t in range(config.iterations):
        source = methods.SOURCES[config.method](ctx, t, policy, start)
        if config.reward.model is not None and config.method == "ld_align":
            pair_rewards_stage(ctx, t)
        policy = policy_stage(ctx, t, policy, source.pairs, source.made_from)
        measure(ctx, f"iteration_{t}", policy, first)

    if config.continual_sft.epochs:
        baseline = sft_stage(ctx, "continual_sft", start)
        measure(ctx, "continual_sft", baseline, first)
    return f"The aligned policy: {policy}" if config.iterations else f"The policy: {policy}"


def planned(config: RunConfig) -> list[str]:
    """The stages of the whole run, by name."""
    names = ["sft/policy"] if config.sft.epochs else []
    names += measurements(config, start_name(config))
    steps = [*methods.planned(config), "policy"]
    if config.reward.model is not None and config.method == "ld_align":
        steps.insert(-1, "pair_rewards")
    for t in range(config.iterations):
        names += [
            *(f"iteration_{t}/{step}" for step in steps),
            *measurements(config, f"iteration_{t}"),
        ]
    if config.method == "ld_align":
        for t in range(config.iterations if config.guide.retrain else min(1, config.iterations)):
            names.insert(
                names.index(f"iteration_{t}/distances"), f"iteration_{t}/guide" if t else "guide"
            )
    if config.continual_sft.epochs:
        names += ["continual_sft/policy", *measurements(config, "continual_sft")]
    return names


if __name__ == "__main__":
    exits.run(main)
