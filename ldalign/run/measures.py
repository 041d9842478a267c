"""What is measured of every policy of a run: the held-out evaluation; where asked for, rewards and
benchmarks.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ldalign.evaluation.reward import check_reward_model
from ldalign.run.context import Context, find_model
from ldalign.run.settings import RunConfig
from ldalign.run.stages.benchmarks import benchmark_stages, planned_benchmarks
from ldalign.run.stages.evaluation import evaluation_stage
from ldalign.run.stages.judged import check_judge
from ldalign.run.stages.rewards import reward_stage
from ldalign.system.errors import EnvironmentProblem


def measure(ctx: Context, name: str, policy: Path, first: str) -> None:
    """All measurements of `policy`, in folders of NAME. first: the name of the policy its rewards
    are compared with.
    """
    evaluation_stage(ctx, name, policy)
    if ctx.config.reward.model is not None and ctx.heldout.rows:
        reward_stage(ctx, name, first)
    benchmark_stages(ctx, name, policy)


def check_measurements(config: RunConfig, planned: Sequence[str]) -> None:
    """Whether what planned stages ask other models for can be had, before anything is computed; all
    ranks call it.

    Raises InputError for a folder that is none, EnvironmentProblem for a missing package.
    """
    if any(name.endswith(("/judged", "agreement")) for name in planned):
        check_judge(config)
    if any(name.endswith(("/reward", "/pair_rewards")) for name in planned):
        if importlib.util.find_spec("transformers") is None:
            raise EnvironmentProblem(
                "reward.model: transformers is missing; pip install ldalign[reward]"
            )
        check_reward_model(find_model(config, str(config.reward.model)))


def measurements(config: RunConfig, name: str) -> list[str]:
    """The stages that `measure` makes, by name."""
    names = [f"{name}/evaluation"] if config.evaluation.rows else []
    if config.reward.model is not None and config.evaluation.rows:
        names.append(f"{name}/reward")
    return names + planned_benchmarks(config, name)
