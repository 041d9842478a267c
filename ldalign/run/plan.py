"""The stages of a run in the order of the method, and those of them that are still to be made.

A new stage is a file in `ldalign/run/stages/`, which says the stage's name and cost and makes its
folder; a line here, which says its place; and whoever calls it and plans it: a method
(`ldalign.run.methods`), the measurements (`ldalign.run.measures`) or a script (`train/align.py`).
"""

from collections.abc import Sequence
from pathlib import Path

from ldalign.models.guide_folder import is_trained_guide
from ldalign.run.context import Context
from ldalign.run.manifest import MANIFEST
from ldalign.run.stage import Stage
from ldalign.run.stages.agreement import AGREEMENT_STAGE
from ldalign.run.stages.agreement_samples import AGREEMENT_SAMPLES_STAGE
from ldalign.run.stages.benchmarks import BENCHMARKS_STAGE
from ldalign.run.stages.data import DATA_STAGE
from ldalign.run.stages.distances import DISTANCES_STAGE
from ldalign.run.stages.evaluation import EVALUATION_STAGE
from ldalign.run.stages.guide import GUIDE_STAGE
from ldalign.run.stages.judged import JUDGED_STAGE
from ldalign.run.stages.pair_rewards import PAIR_REWARDS_STAGE
from ldalign.run.stages.policy import POLICY_STAGE
from ldalign.run.stages.reference import REFERENCE_STAGE
from ldalign.run.stages.responses import RESPONSES_STAGE
from ldalign.run.stages.reward import REWARD_STAGE

FIRST = (DATA_STAGE,)  # once a run, before all others
# With every policy: the start's, then each iteration's, then the baseline's. No policy has all.
PER_POLICY = (
    RESPONSES_STAGE,
    GUIDE_STAGE,
    DISTANCES_STAGE,
    JUDGED_STAGE,
    REFERENCE_STAGE,
    PAIR_REWARDS_STAGE,
    POLICY_STAGE,
    EVALUATION_STAGE,
    BENCHMARKS_STAGE,
    REWARD_STAGE,
)
LAST = (AGREEMENT_SAMPLES_STAGE, AGREEMENT_STAGE)  # once a run, after all others
ORDER = (*FIRST, *PER_POLICY, *LAST)


def stage_of(name: str) -> Stage:
    """The stage that makes the folder `name` of a run: "guide", "sft/policy",
    "start/benchmarks/piqa".
    """
    own = name.split("/")[:2][-1]
    return next(stage for stage in ORDER if stage.name == own)


def in_order(names: Sequence[str]) -> list[str]:
    """The stages of one policy, by name, in the order of the method; tasks stay in theirs."""
    return sorted(names, key=lambda name: ORDER.index(stage_of(name)))


def to_do(ctx: Context, planned: Sequence[str]) -> list[str]:
    """Those of the planned stages that are not finished in the run folder; a trained guide that is
    given is none.
    """
    folder = ctx.config.guide.folder
    given = folder is not None and is_trained_guide(Path(folder))
    return [
        name
        for name in planned
        if not (ctx.run.path / name / MANIFEST).is_file()
        and not (given and stage_of(name) is GUIDE_STAGE)
    ]
