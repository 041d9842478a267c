"""Several methods from one start, on the same prompts, with the same budget: their runs."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ldalign.evaluation.statistics import Array
from ldalign.run.compare_settings import CompareConfig
from ldalign.run.folder import STARTED
from ldalign.run.lock import LOCK, lock
from ldalign.run.manifest import MANIFEST
from ldalign.run.settings import RunConfig
from ldalign.run.stages.benchmarks import planned_benchmarks
from ldalign.run.stages.data import DATA_STAGE
from ldalign.run.stages.distances import DISTANCES_STAGE
from ldalign.run.stages.evaluation import EVALUATION_STAGE, answers_file
from ldalign.run.stages.guide import GUIDE_STAGE
from ldalign.run.stages.policy import POLICY_STAGE
from ldalign.run.stages.reference import REFERENCE_STAGE
from ldalign.run.stages.responses import RESPONSES_STAGE
from ldalign.system.distributed import on_rank0
from ldalign.system.errors import InputError
from ldalign.system.files import make_folder, read_jsonl, write_text, writing

START = "start"
# What trainings of one seed have in common, whatever their method; with the same pairs and weights
# in the first iteration; and with the same learning rate too.
SHARED = (
    EVALUATION_STAGE.folder("start"),
    GUIDE_STAGE.folder(0),
    RESPONSES_STAGE.folder(0),
    REFERENCE_STAGE.folder(0),
)
SHARED_PAIRS = (DISTANCES_STAGE.folder(0),)
SHARED_TRAINING = (POLICY_STAGE.folder(0), EVALUATION_STAGE.folder("iteration_0"))
ACCURACIES = ("sampled", "greedy")
WEIGHTS = "*.safetensors"  # in a policy's folder


@dataclass(frozen=True)
class Arm:
    """One method of the comparison, and the keys that make it this one."""

    name: str  # as compare.methods has it
    method: Literal["sft", "spin", "ld_align"]
    weights: str = "latent"
    sft_prompts: Literal["all", "pairs"] = "all"
    retrain: bool = False  # a guide of its own for every iteration

    @classmethod
    def of(cls, name: str) -> "Arm":
        """The method of that name: "ld_align", "ld_align/shuffled" or "sft/pairs"."""
        method, _, kind = name.partition("/")
        if method == "sft":
            return cls(name, "sft", sft_prompts="pairs" if kind else "all")
        if method == "spin":
            return cls(name, "spin")
        if kind == "retrained":
            return cls(name, "ld_align", retrain=True)
        return cls(name, "ld_align", kind or "latent")

    @property
    def first_iteration(self) -> tuple[str, str, str]:
        """What the first iteration depends on: a guide is trained again after it."""
        return self.method, self.weights, self.sft_prompts


def start_config(config: CompareConfig) -> RunConfig:
    """The run that makes the start policy: SFT and its evaluation."""
    return _plain(
        config,
        run=f"{config.run}/{START}",
        iterations=0,
        learning_rate=config.compare.learning_rates[0],
        continual_sft=replace(config.continual_sft, epochs=0),
        method="ld_align",
    )


def arm_config(
    config: CompareConfig, start: Path, arm: Arm, seed: int, learning_rate: float
) -> RunConfig:
    """One training of one method: from the start policy, on the rows that
    the start's run wrote down.
    """
    data = Path(config.run) / START / DATA_STAGE.folder()
    return _plain(
        config,
        run=str(arm_folder(config, arm, seed, learning_rate)),
        policy=str(start),
        method=arm.method,
        weights=arm.weights,
        sft_prompts=arm.sft_prompts,
        guide=replace(config.guide, retrain=arm.retrain),
        seed=seed,
        learning_rate=learning_rate,
        data=str(data / "train.jsonl"),
        heldout=str(data / "heldout.jsonl"),
        turns="last",
        shuffle=False,
        sft=replace(config.sft, epochs=0),
        continual_sft=replace(config.continual_sft, epochs=0),
        benchmarks=replace(config.benchmarks, tasks=[]),
    )


def arm_folder(config: CompareConfig, arm: Arm, seed: int, learning_rate: float) -> Path:
    """The run folder of one training of one method."""
    return Path(config.run) / f"seed_{seed}" / f"{arm.name.replace('/', '-')}-{learning_rate:g}"


def _plain(config: CompareConfig, **changes: Any) -> RunConfig:
    names = [key.name for key in fields(RunConfig)]
    # All methods take the same steps.
    without = {"validation": replace(config.validation, rows=0)}
    return RunConfig(**{name: getattr(config, name) for name in names} | without | changes)


def share(config: CompareConfig, arm: Arm, seed: int, rate: float) -> None:
    """Links what other trainings of this seed have made into the folder of a new one. Rank 0 does
    it; all ranks call it.

    The new one also gets the start's date, as their prompts must be the same.
    """
    folder = arm_folder(config, arm, seed, rate)
    arms = [Arm.of(name) for name in config.compare.methods]
    rates = config.compare.learning_rates
    twins = [other for other in arms if other.first_iteration == arm.first_iteration]
    sources = {
        SHARED: [arm_folder(config, other, seed, r) for other in arms for r in rates],
        SHARED_PAIRS: [arm_folder(config, other, seed, r) for other in twins for r in rates],
        SHARED_TRAINING: [arm_folder(config, other, seed, rate) for other in twins],
    }

    def link() -> None:
        make_folder(folder)
        (folder / LOCK).touch()
        if not (folder / STARTED).is_file():
            write_text(
                folder / STARTED, (Path(config.run) / START / STARTED).read_text(encoding="utf-8")
            )
        for names, folders in sources.items():
            for name in names:
                made = [own / name for own in folders if _is_whole(own / name)]
                if made and not (folder / name).exists():
                    make_folder((folder / name).parent)
                    partial = folder / f"{name}.shared"
                    shutil.rmtree(partial, ignore_errors=True)
                    shutil.copytree(made[0], partial, copy_function=os.link)
                    partial.rename(folder / name)

    on_rank0(link)


def trainings(config: CompareConfig) -> list[tuple[int, Arm, float]]:
    """All trainings of this process, in order: seed, method, learning rate. Of seeds after the
    first, whose rate is not known beforehand, with the first of compare.learning_rates.
    """
    rates, seeds = config.compare.learning_rates, config.compare.seeds
    return [
        (seed, Arm.of(name), rate)
        for seed in config.compare.only or seeds
        for name in config.compare.methods
        for rate in (rates if seed == seeds[0] else rates[:1])
    ]


def stages_to_make(
    config: CompareConfig, start: Path, planned: Callable[[RunConfig], list[str]]
) -> list[tuple[RunConfig, str]]:
    """Every stage of all trainings of this process, with its training's settings; what trainings
    share is there once. planned: names the stages of a run.
    """
    made: dict[Any, tuple[RunConfig, str]] = {}
    for seed, arm, rate in trainings(config):
        own = arm_config(config, start, arm, seed, rate)
        for name in planned(own):
            key: tuple[Any, ...] = (name, seed)
            if name not in SHARED:
                key += (arm.first_iteration,)
                if name not in SHARED_PAIRS:
                    key += (rate,) if name in SHARED_TRAINING else (rate, arm.name)
            made.setdefault(key, (own, name))
    return list(made.values())


def _is_whole(stage: Path) -> bool:
    """Whether a stage is finished, and still has all files that it was finished with."""
    path = stage / MANIFEST
    if not path.is_file():
        return False
    files = json.loads(path.read_text(encoding="utf-8"))["files"]
    return all((stage / name).is_file() for name in files)


def remove_weights(
    config: CompareConfig, arms: Sequence[Arm], seed: int, rates: Mapping[str, Sequence[float]]
) -> None:
    """Deletes the weights of a seed's policies that no training needs any more; all else stays.
    Rank 0 does it; all ranks call it.

    rates: by method that is finished, the learning rates of its trainings that are. Where one of
    `arms` that is not finished begins as it does, they stay.
    """
    waiting = {arm.first_iteration for arm in arms if arm.name not in rates}

    def remove() -> None:
        for arm in arms:
            for rate in rates.get(arm.name, ()) if arm.first_iteration not in waiting else ():
                run = arm_folder(config, arm, seed, rate)
                # The last ones first: by them `is_removed` knows that all may go.
                for t in reversed(range(config.iterations)):
                    for path in (run / POLICY_STAGE.folder(t)).glob(WEIGHTS):
                        path.unlink()

    on_rank0(remove)


def is_removed(config: CompareConfig, arm: Arm, seed: int, rate: float) -> bool:
    """Whether a training is evaluated and its last policy's weights were removed after that."""
    policy = last_iteration(arm_folder(config, arm, seed, rate), config) / POLICY_STAGE.name
    return is_evaluated(config, arm, seed, rate) and not _is_whole(policy)


def hold(config: CompareConfig, seeds: Sequence[int]) -> contextlib.ExitStack:
    """Holds the folders of these seeds for this process, until the stack is closed. Rank 0 does it;
    all ranks call it.

    Raises EnvironmentProblem where another process trains one of them.
    """
    with contextlib.ExitStack() as held:  # closed where one of them is refused

        def take() -> None:
            for seed in seeds:
                folder = Path(config.run) / f"seed_{seed}"
                make_folder(folder)
                held.enter_context(lock(folder)).sign()

        with writing(Path(config.run)):
            on_rank0(take)
        return held.pop_all()


def learning_rate(config: CompareConfig, arm: Arm) -> float | None:
    """The best of the learning rates for a method on the validation rows, as the first seed's runs
    found; None before all of them are evaluated.
    """
    if len(config.compare.learning_rates) == 1:
        return config.compare.learning_rates[0]
    found = searched(config, arm)
    return max(found, key=lambda rate: found[rate].mean()) if found else None


def searched(config: CompareConfig, arm: Arm) -> dict[float, Array]:
    """By learning rate, what a method's policy of the first seed is worth on each validation row
    (rows,), as `scores`; {} before all are evaluated.
    """
    rates, first = config.compare.learning_rates, config.compare.seeds[0]
    if not all(is_evaluated(config, arm, first, rate) for rate in rates):
        return {}
    validation, _ = validation_ids(config)
    folders = {rate: arm_folder(config, arm, first, rate) for rate in rates}
    answers = {r: read_answers(last_iteration(f, config)) for r, f in folders.items()}
    return {rate: scores(answers[rate], validation) for rate in rates}


def is_evaluated(config: CompareConfig, arm: Arm, seed: int, rate: float) -> bool:
    """Whether a training is finished, with its last policy's evaluation."""
    folder = last_iteration(arm_folder(config, arm, seed, rate), config)
    return (folder / EVALUATION_STAGE.name / MANIFEST).is_file()


def unfinished(config: CompareConfig, arms: Sequence[Arm]) -> list[int]:
    """Those of the seeds whose trainings, at the learning rates chosen, are not all evaluated and
    benchmarked.
    """
    asked = planned_benchmarks(config, f"iteration_{config.iterations - 1}")

    def is_done(arm: Arm, seed: int) -> bool:
        rate = learning_rate(config, arm)
        if rate is None or not is_evaluated(config, arm, seed, rate):
            return False
        folder = arm_folder(config, arm, seed, rate)
        return all((folder / name / MANIFEST).is_file() for name in asked)

    return [n for n in config.compare.seeds if not all(is_done(arm, n) for arm in arms)]


def read_answers(folder: Path) -> dict[str, dict[str, float]]:
    """The figures of one policy for every held-out row, by id: sampled and greedy (shares right),
    nll (nats a token).

    folder: the policy's in the run ("RUN/iteration_0").
    """
    figures: dict[str, dict[str, float]] = {}
    for r in read_jsonl(answers_file(folder)):
        figures[r["id"]] = {"nll": -r["logp"] / r["n_tokens"]}
        greedy, sampled = r.get("correct", [])[:1], r.get("correct", [])[1:]
        if greedy:
            figures[r["id"]]["greedy"] = float(greedy[0])
        if sampled:
            figures[r["id"]]["sampled"] = sum(sampled) / len(sampled)
    return figures


def iteration_folders(folder: Path, config: CompareConfig) -> list[Path]:
    """Returns the folders of the iterations in a training's run."""
    return [folder / f"iteration_{t}" for t in range(config.iterations)]


def last_iteration(folder: Path, config: CompareConfig) -> Path:
    """Returns the folder of the last iteration in a training's run."""
    return iteration_folders(folder, config)[-1]


def scored_by(figures: dict[str, dict[str, float]], ids: Sequence[str]) -> str:
    """The figure that a learning rate is chosen by: sampled accuracy, else greedy; nll where a
    validation row has no checker, whatever the rows that are reported have.
    """
    known = (name for name in ACCURACIES if all(name in figures[i] for i in ids))
    return next(known, "nll")


def scores(figures: dict[str, dict[str, float]], ids: Sequence[str]) -> Array:
    """What a learning rate is chosen by, by its mean over the validation rows (rows,): the figure
    of `scored_by`, the NLL as -NLL.
    """
    name = scored_by(figures, ids)
    values = np.array([figures[i][name] for i in ids])
    return -values if name == "nll" else values


def check_reported(config: CompareConfig, heldout: int) -> None:
    """Raises InputError where the held-out rows, so many, leave fewer than two to report: of one
    there is no error.
    """
    aside = config.compare.validation_rows
    if heldout - aside < 2:
        raise InputError(
            f"compare.validation_rows={aside}: of {heldout} rows that are held out "
            f"{max(0, heldout - aside)} would be left to report; hold out more (heldout_fraction, "
            "heldout), or give fewer"
        )


def validation_ids(config: CompareConfig) -> tuple[list[str], list[str]]:
    """The held-out rows that learning rates are chosen on, and those that are reported."""
    ids = [
        r["id"]
        for r in read_jsonl(Path(config.run) / START / DATA_STAGE.folder() / "heldout.jsonl")
    ]
    return ids[: config.compare.validation_rows], ids[config.compare.validation_rows :]
