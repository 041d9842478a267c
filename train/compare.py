"""Methods compared from one start.

    torchrun train/compare.py --config configs/compare-smollm2.yaml [key=value ...]

Makes the start policy (sft.*), then trains every method of compare.methods from it on the same rows
for the same number of optimizer steps: at each of compare.learning_rates with the first seed, then
at the best one with all seeds; benchmarks.tasks are run on the first seed's. Writes
RUN/report/comparison.md, comparison.json and a figure. Every training is a run folder in
RUN/seed_N/; running the same command again goes on where it stopped.
"""

from dataclasses import replace
from pathlib import Path

from ldalign.report import comparison
from ldalign.run.comparison import (
    Arm,
    arm_config,
    last_iteration,
    read_answers,
    score,
    share,
    start_config,
    validation_ids,
)
from ldalign.run.context import check_verdicts, open_context
from ldalign.run.dry_run import dry_run
from ldalign.run.folder import RunFolder
from ldalign.run.settings import CompareConfig
from ldalign.run.stages.benchmarks import benchmark_stages, check_benchmarks
from ldalign.run.stages.policy import POLICY_STAGE, start_name
from ldalign.system import distributed, exits
from ldalign.system.config import to_yaml
from ldalign.system.metrics import say
from ldalign.train import align
from ldalign.train.command import open_run, read_config


def main(argv: list[str]) -> None:
    """Reads the settings, runs whatever is not done, writes the table."""
    config = read_config(argv, __doc__ or "", CompareConfig)
    if not isinstance(config, CompareConfig):
        return
    check_benchmarks(config)
    distributed.start(config.device, config.timeout_minutes)
    start = start_config(config)
    if "--dry-run" in argv:
        say(
            dry_run(
                open_context(RunFolder(Path(start.run), ""), start, write=False),
                align.planned(start),
            )
        )
    else:
        with RunFolder(Path(config.run), to_yaml(config)) as run:
            compare(config, run)
    distributed.stop()


def compare(config: CompareConfig, run: RunFolder) -> None:
    """Makes the start, searches the learning rates, trains the other seeds, writes the table."""
    arms = [Arm.of(name) for name in config.compare.methods]
    first_config = start_config(config)
    with open_run(first_config, align.planned(first_config)) as ctx:
        if any(arm.weights == "oracle" for arm in arms):
            check_verdicts(ctx.used[0])
        align.align(ctx)
        start = ctx.run.path / POLICY_STAGE.folder("sft") if config.sft.epochs else ctx.start
        say(f"start: {start} ({start_name(config)})")
    run.record()
    validation, _ = validation_ids(config)
    first, *others = config.compare.seeds
    searched: dict[str, dict[str, float]] = {}
    chosen: dict[str, float] = {}
    for arm in arms:
        scores = {}
        for rate in config.compare.learning_rates:
            folder = train(config, start, arm, first, rate)
            figures = read_answers(last_iteration(folder, config))
            scores[rate] = score(figures, validation)
        chosen[arm.name] = max(scores, key=lambda rate: scores[rate])
        searched[arm.name] = {f"{rate:g}": score for rate, score in scores.items()}
        say(f"{arm.name}: learning rate {chosen[arm.name]:g}")
    for seed in others:
        for arm in arms:
            train(config, start, arm, seed, chosen[arm.name])
    for arm in arms if config.benchmarks.tasks else ():
        own = arm_config(config, start, arm, first, chosen[arm.name])
        own = replace(own, benchmarks=config.benchmarks)
        with open_run(own, align.planned(own)) as ctx:
            name = f"iteration_{config.iterations - 1}"
            benchmark_stages(ctx, name, ctx.run.path / POLICY_STAGE.folder(name))
    summary = comparison.summarise(config, arms, chosen, searched)
    say(f"\n{comparison.write_comparison(config, summary)}")


def train(config: CompareConfig, start: Path, arm: Arm, seed: int, rate: float) -> Path:
    """Makes one training with its evaluation; returns its run folder."""
    own = arm_config(config, start, arm, seed, rate)
    folder = Path(own.run)
    say(f"\n{arm.name}, seed {seed}, learning rate {rate:g}: {folder}")
    share(config, arm, seed, rate)
    with open_run(own, align.planned(own)) as ctx:
        align.align(ctx)
    return folder


if __name__ == "__main__":
    exits.run(main)
