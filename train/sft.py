"""Supervised fine-tuning alone.

    ldalign sft [--ranks N] sft.epochs=2 [--config FILE.yaml] [key=value ...]
    torchrun train/sft.py ...

Trains `policy` on the real responses (keys sft.*) into RUN/sft/policy and evaluates it: the first
stages of align.py, which goes on from here with the same settings. Continual SFT, the baseline, is
this script with policy=RUN/sft/policy and a run folder of its own.
"""

from pathlib import Path

from ldalign.report.model_card import try_cards
from ldalign.run.context import Context
from ldalign.run.measures import measure, measurements
from ldalign.run.settings import RunConfig
from ldalign.run.stages.policy import POLICY_STAGE, planned_start, sft_stage
from ldalign.system import exits
from ldalign.train.command import need, run_script


def main(argv: list[str]) -> None:
    """Reads the settings, trains, evaluates."""
    run_script(argv, __doc__ or "", sft, planned, check, kept=kept)


def check(config: RunConfig) -> None:
    """Raises InputError where there is nothing to train."""
    need(config.sft.epochs > 0, "sft.epochs=0: nothing to train; give sft.epochs=1 or more")


def sft(ctx: Context) -> str:
    """Trains and measures; returns the closing line."""
    policy = sft_stage(ctx, "sft", ctx.start)
    try_cards(ctx.run.path)
    measure(ctx, "sft", policy, "sft")
    try_cards(ctx.run.path)  # now with what was measured
    return f"The policy: {policy}"


def kept(ctx: Context) -> Path:
    """The folder of the policy."""
    return ctx.run.path / POLICY_STAGE.folder("sft")


def planned(config: RunConfig) -> list[str]:
    """The names of the stages that `sft` makes."""
    return [*planned_start(config), *measurements(config, "sft")]


if __name__ == "__main__":
    exits.run(main)
