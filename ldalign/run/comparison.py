"""Several methods from one start, on the same prompts, with the same budget: their runs."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldalign.run.folder import STARTED
from ldalign.run.settings import CompareConfig, RunConfig
from ldalign.run.stages.data import DATA_STAGE
from ldalign.run.stages.evaluation import EVALUATION_STAGE
from ldalign.run.stages.guide import GUIDE_STAGE
from ldalign.run.stages.reference import REFERENCE_STAGE
from ldalign.run.stages.responses import RESPONSES_STAGE
from ldalign.system.distributed import on_rank0
from ldalign.system.files import make_folder, read_jsonl, write_text

START = "start"
# What runs of one seed have in common, whatever their method.
SHARED = (
    EVALUATION_STAGE.folder("start"),
    GUIDE_STAGE.folder(0),
    RESPONSES_STAGE.folder(0),
    REFERENCE_STAGE.folder(0),
)
FIGURES = ("sampled", "greedy", "nll")


@dataclass(frozen=True)
class Arm:
    """One method of the comparison, with the weights of its pairs."""

    name: str  # as the user gave it: METHOD or METHOD/WEIGHTS
    method: str
    weights: str

    @classmethod
    def of(cls, name: str) -> "Arm":
        """The method of that name: "ld_align" or "ld_align/shuffled"."""
        method, _, weights = name.partition("/")
        return cls(name, method, weights or "latent")


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
    names = RunConfig.__dataclass_fields__
    # All methods take the same steps.
    without = {"validation": replace(config.validation, rows=0)}
    return RunConfig(**{name: getattr(config, name) for name in names} | without | changes)


def share(config: CompareConfig, seed: int, folder: Path) -> None:
    """Links what other runs of this seed have made into a new run's folder. Rank 0 does it; all
    ranks call it.

    The new run also gets the start's date, as their prompts must be the same.
    """

    def link() -> None:
        make_folder(folder)
        (folder / "lock").touch()
        if not (folder / STARTED).is_file():
            write_text(
                folder / STARTED, (Path(config.run) / START / STARTED).read_text(encoding="utf-8")
            )
        for name in SHARED:
            made = sorted(
                path
                for path in folder.parent.glob(f"*/{name}")
                if (path / "manifest.json").is_file()
            )
            if made and not (folder / name).exists():
                make_folder((folder / name).parent)
                partial = folder / f"{name}.shared"
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(made[0], partial, copy_function=os.link)
                partial.rename(folder / name)

    on_rank0(link)


def read_answers(folder: Path) -> dict[str, dict[str, float]]:
    """The figures of one policy for every held-out row, by id: sampled and greedy (shares right),
    nll (nats a token).

    folder: the policy's in the run ("RUN/iteration_0").
    """
    figures: dict[str, dict[str, float]] = {}
    for r in read_jsonl(folder / EVALUATION_STAGE.name / "answers.jsonl"):
        figures[r["id"]] = {"nll": -r["logp"] / r["n_tokens"]}
        greedy, sampled = r.get("correct", [])[:1], r.get("correct", [])[1:]
        if greedy:
            figures[r["id"]]["greedy"] = float(greedy[0])
        if sampled:
            figures[r["id"]]["sampled"] = sum(sampled) / len(sampled)
    return figures


def last_iteration(folder: Path, config: CompareConfig) -> Path:
    """Returns the folder of the last iteration in a training's run."""
    return folder / f"iteration_{config.iterations - 1}"


def score(figures: dict[str, dict[str, float]], ids: Sequence[str]) -> float:
    """What a learning rate is chosen by, on the validation rows: sampled accuracy, else greedy;
    unchecked, -NLL.
    """
    rows = [figures[i] for i in ids]
    for name in FIGURES[:2]:
        if all(name in row for row in rows):
            return float(np.mean([row[name] for row in rows]))
    return -float(np.mean([row["nll"] for row in rows]))


def validation_ids(config: CompareConfig) -> tuple[list[str], list[str]]:
    """The held-out rows that learning rates are chosen on, and those that are reported."""
    ids = [
        r["id"]
        for r in read_jsonl(Path(config.run) / START / DATA_STAGE.folder() / "heldout.jsonl")
    ]
    return ids[: config.compare.validation_rows], ids[config.compare.validation_rows :]
