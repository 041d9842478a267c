"""What is measured of every policy of a run: the held-out evaluation; where asked
for, rewards and benchmarks.
"""

from collections.abc import Sequence
from pathlib import Path

from ldalign.evaluation.reward import REWARD, check_reward_model
from ldalign.evaluation.transformers_folder import need_transformers
from ldalign.run.context import Context, find_model
from ldalign.run.plan import in_order, stage_of
from ldalign.run.settings import RunConfig
from ldalign.run.stages.agreement import AGREEMENT_STAGE
from ldalign.run.stages.benchmarks import benchmark_stages, planned_benchmarks
from ldalign.run.stages.distances import DISTANCES_STAGE
from ldalign.run.stages.evaluation import EVALUATION_STAGE, evaluation_stage
from ldalign.run.stages.judged import JUDGED_STAGE, check_embedding, check_judge
from ldalign.run.stages.pair_rewards import PAIR_REWARDS_STAGE
from ldalign.run.stages.reward import REWARD_STAGE, reward_stage


def measure(ctx: Context, name: str, policy: Path, first: str) -> None:
    """Makes all measurements of `policy`, in the folder NAME of the run.

    first: the name of the policy that its rewards are compared with.
    """
    if not is_measured(ctx.config, name):
        return
    evaluation_stage(ctx, name, policy)
    if ctx.config.reward.model is not None and ctx.heldout.rows:
        reward_stage(ctx, name, first)
    benchmark_stages(ctx, name, policy)


def is_measured(config: RunConfig, name: str) -> bool:
    """Whether a policy is measured at all: evaluation.iterations=last leaves out the iterations
    before the last.
    """
    on_the_way = [f"iteration_{t}" for t in range(config.iterations - 1)]
    return config.evaluation.iterations == "every" or name not in on_the_way


def check_measurements(config: RunConfig, planned: Sequence[str]) -> None:
    """Checks, before anything is computed, that the other models which planned stages ask are
    there. All ranks call it.

    Raises InputError for a folder that is none, EnvironmentProblem for a missing package.
    """
    stages = {stage_of(name) for name in planned}
    if stages & {JUDGED_STAGE, AGREEMENT_STAGE}:
        check_judge(config)
    if stages & {REWARD_STAGE, PAIR_REWARDS_STAGE}:
        need_transformers(REWARD.key)
        check_reward_model(find_model(config, str(config.reward.model)))
    if DISTANCES_STAGE in stages and config.weights == "semantic":
        check_embedding(config)


def measurements(config: RunConfig, name: str) -> list[str]:
    """The names of the stages that `measure` makes, in the order of the method."""
    if not is_measured(config, name):
        return []
    names = planned_benchmarks(config, name)
    if config.evaluation.rows:
        names.append(EVALUATION_STAGE.folder(name))
    if config.evaluation.rows and config.reward.model is not None:
        names.append(REWARD_STAGE.folder(name))
    return in_order(names)
