"""Methods compared from one start.

    ldalign compare [--ranks N] --config configs/compare-wordings.yaml [key=value ...]
    torchrun train/compare.py ...

Makes the start policy (sft.*), then trains every method of compare.methods from it on the same rows
for the same number of optimizer steps: at each of compare.learning_rates with the first seed, then
at the best one with all seeds; benchmarks.tasks are run on all of these. Writes
RUN/report/comparison.md, comparison.json and a figure. Every training is a run folder in
RUN/seed_N/; running the same command again goes on where it stopped. Several processes may share
the seeds of one run (compare.only=[0] in one, compare.only=[1,2] in another): whichever ends last
writes the page.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ldalign.evaluation.embedding import EmbeddingModel
from ldalign.report.comparison import Distance, power_before, summarise, table_of
from ldalign.report.comparison_page import power_sentence, write_comparison
from ldalign.run.compare_settings import CompareConfig
from ldalign.run.comparison import (
    Arm,
    arm_config,
    check_reported,
    hold,
    is_removed,
    learning_rate,
    read_answers,
    remove_weights,
    share,
    stages_to_make,
    start_config,
    trainings,
    unfinished,
    validation_ids,
)
from ldalign.run.context import Context, agree_on_settings, check_verdicts, open_context
from ldalign.run.dry_run import dry_run, rough_seconds
from ldalign.run.folder import RunFolder
from ldalign.run.manifest import MANIFEST
from ldalign.run.plan import stage_of
from ldalign.run.prepared import check_data
from ldalign.run.stages.benchmarks import benchmark_stages, check_benchmarks, planned_benchmarks
from ldalign.run.stages.judged import check_embedding, embedding_folder
from ldalign.run.stages.policy import POLICY_STAGE, start_name
from ldalign.system import distributed, exits
from ldalign.system.config import to_yaml
from ldalign.system.errors import InputError
from ldalign.system.metrics import say
from ldalign.train import align
from ldalign.train.command import open_run, read_config, take_gpus


def main(argv: list[str]) -> None:
    """Reads the settings, runs whatever is not done, writes the page."""
    argv, gpus = take_gpus(argv)
    config = read_config(argv, __doc__ or "", CompareConfig)
    if not isinstance(config, CompareConfig):
        return
    check_benchmarks(config)
    distributed.start(config.device, config.timeout_minutes)
    agree_on_settings(config)
    check_data(config)
    if config.judge.folder is not None:
        check_embedding(config)
    if "--dry-run" in argv:
        start = start_config(config)
        ctx = open_context(RunFolder(Path(start.run), ""), start, write=False)
        say(f"the start policy: {dry_run(ctx, align.planned(start), gpus)}")
        say(outlook(config, ctx))
    else:
        compare(config)
    distributed.stop()


def compare(config: CompareConfig) -> None:
    """Makes the start, trains the seeds that are this process's, and where no other is left to
    train, writes the page.

    Whoever works on what all share, the start and the page, holds the run's folder, and the others
    wait; whoever trains a seed holds that seed's, and another is refused.
    """
    arms = [Arm.of(name) for name in config.compare.methods]
    own = config.compare.only or config.compare.seeds
    with contextlib.ExitStack() as held:
        with RunFolder(Path(config.run), to_yaml(config.of_all), wait=True) as run:
            held.enter_context(hold(config, own))
            start = make_start(config)
            run.record()
        chosen = choose_rates(config, start, arms, own)
        for seed in own:
            rates: dict[str, list[float]] = {}
            for arm in arms:
                train(config, start, arm, seed, chosen[arm.name])
                if config.benchmarks.tasks:
                    run_benchmarks(config, start, arm, seed, chosen[arm.name])
                rates[arm.name] = [chosen[arm.name]]
                if config.compare.policies == "remove":
                    remove_weights(config, arms, seed, rates)
    with RunFolder(Path(config.run), to_yaml(config.of_all), wait=True):
        left = unfinished(config, arms)
        if left:
            say(f"\nseeds {left} are not finished: the page comes with the last of them")
            return
        summary = summarise(config, arms, chosen, _distance(config))
        say(f"\n{write_comparison(Path(config.run), summary)}")


def outlook(config: CompareConfig, ctx: Context) -> str:
    """Says how many trainings this process makes after the start, and what they roughly take. ctx:
    the start's, whose rows they have.

    Raises InputError as `check_rows`.
    """
    check_rows(config, ctx)
    count = len(trainings(config))
    stages = stages_to_make(config, ctx.start, align.planned)
    costs = [(name, stage_of(name).cost(replace(ctx, config=own), name)) for own, name in stages]
    hours = rough_seconds(ctx, [cost for _, cost in costs]) / 3600
    policies = [cost.kept for name, cost in costs if stage_of(name) is POLICY_STAGE]
    most = f"{sum(policies) / 2**30:.1f} GiB of policies"
    if config.compare.policies == "keep":
        most += " (compare.policies=remove: about those of one seed at a time, or fewer)"
    else:
        most += ", removed as they are evaluated"
    return (
        f"the comparison: {count} trainings, of {len(config.compare.methods)} methods, with "
        f"{len(policies)} policies: {hours:.1f} hours, as rough as above; {most}"
    )


def check_rows(config: CompareConfig, ctx: Context) -> None:
    """Raises InputError where weights=oracle is compared and rows have no checker, and as
    `check_reported`. ctx: the start's, whose rows all trainings have.
    """
    check_reported(config, len(ctx.heldout.rows))
    if "ld_align/oracle" in config.compare.methods:
        check_verdicts(ctx.used[0])


def make_start(config: CompareConfig) -> Path:
    """Makes the start policy with its evaluation; returns its folder, and says which differences
    the comparison could show. Raises InputError as `check_rows`, before anything is trained.
    """
    own = start_config(config)
    with open_run(own, align.planned(own)) as ctx:
        check_rows(config, ctx)
        align.align(ctx)
        start = ctx.run.path / POLICY_STAGE.folder("sft") if config.sft.epochs else ctx.start
        say(f"start: {start} ({start_name(config)})")
    _, test = validation_ids(config)
    answers = read_answers(Path(own.run) / start_name(config))
    seeds = len(config.compare.seeds)
    power = power_before(table_of([answers], test), config.evaluation.samples, seeds)
    if power:
        say(f"the smallest difference seen with 80 % power: {power_sentence(power, seeds)}")
    return start


def choose_rates(
    config: CompareConfig, start: Path, arms: Sequence[Arm], own: Sequence[int]
) -> dict[str, float]:
    """Trains the first seed at every learning rate, where it is this process's; returns each
    method's best.

    Raises InputError where the first seed is another's and not that far.
    """
    first, chosen = config.compare.seeds[0], {}
    worse: dict[str, list[float]] = {}
    for arm in arms:
        for rate in config.compare.learning_rates if first in own else ():
            train(config, start, arm, first, rate)
        best = learning_rate(config, arm)
        if best is None:
            raise InputError(
                f"compare.only={list(own)}: seed {first} has not tried all learning rates of "
                f"{arm.name} yet, so it is not known which one to take; run compare.only=[{first}] "
                "first, or give one of compare.learning_rates"
            )
        chosen[arm.name] = best
        say(f"{arm.name}: learning rate {best:g}")
        worse[arm.name] = [rate for rate in config.compare.learning_rates if rate != best]
        if config.compare.policies == "remove" and first in own:
            remove_weights(config, arms, first, worse)
    return chosen


def train(config: CompareConfig, start: Path, arm: Arm, seed: int, rate: float) -> None:
    """Makes one training with its evaluation, in its run folder."""
    own = arm_config(config, start, arm, seed, rate)
    say(f"\n{arm.name}, seed {seed}, learning rate {rate:g}: {own.run}")
    if is_removed(config, arm, seed, rate):
        say("already done, and its weights are removed")
        return
    share(config, arm, seed, rate)
    with open_run(own, align.planned(own)) as ctx:
        align.align(ctx)


def run_benchmarks(config: CompareConfig, start: Path, arm: Arm, seed: int, rate: float) -> None:
    """Runs benchmarks.tasks on a method's last policy of one seed; the start has them.

    Raises InputError where they are not done and the policy's weights are removed.
    """
    name = f"iteration_{config.iterations - 1}"
    own = arm_config(config, start, arm, seed, rate)
    own = replace(own, benchmarks=config.benchmarks)
    stages = [Path(own.run) / stage for stage in planned_benchmarks(own, name)]
    if is_removed(config, arm, seed, rate):
        if not all((stage / MANIFEST).is_file() for stage in stages):
            raise InputError(
                f"{own.run}: its policy's weights are removed (compare.policies=remove), so "
                "benchmarks.tasks cannot be run on it; delete the folder to train it again"
            )
        return
    with open_run(own, align.planned(own)) as ctx:
        benchmark_stages(ctx, name, ctx.run.path / POLICY_STAGE.folder(name))


def _distance(config: CompareConfig) -> Distance | None:
    """How far texts are from others by the model judge.folder; None without one."""
    if config.judge.folder is None:
        return None
    model = EmbeddingModel(embedding_folder(config), distributed.start(config.device))
    return lambda texts, others, ids: model.distance(texts, others, ids).double().numpy()


if __name__ == "__main__":
    exits.run(main)
