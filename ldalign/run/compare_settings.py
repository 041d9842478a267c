"""The keys of a comparison: what `train/compare.py` reads beside a run's."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_type_hints

from ldalign.run.keys import ValidationKeys
from ldalign.run.settings import RunConfig
from ldalign.system.config import (
    each,
    group,
    not_empty,
    positive,
    setting,
)

# What may be compared beside ld_align/WEIGHTS, with all WEIGHTS that the key `weights` has.
COMPARABLE = ("sft", "sft/pairs", "spin", "ld_align", "ld_align/retrained")


@dataclass(frozen=True)
class CompareKeys:
    """What is compared, and how learning rates are chosen."""

    methods: list[str] = setting(
        ["sft", "spin", "ld_align/shuffled", "ld_align"],
        "sft, sft/pairs (sft_prompts=pairs), spin, ld_align, ld_align/retrained "
        "(guide.retrain=true), ld_align/WEIGHTS (weights=WEIGHTS)",
        check=not_empty,
    )
    seeds: list[int] = setting(
        [0, 1, 2],
        "of sampling, guide and row order; the first one's runs choose the learning rates",
        check=not_empty,
    )
    only: list[int] = setting(
        [],
        "those of the seeds that this process trains, while others train the rest of the same run; "
        "[]: all",
    )
    policies: Literal["keep", "remove"] = setting(
        "keep",
        "the weights of the policies that are trained; remove: each training's, once it is "
        "evaluated and no other needs it",
    )
    primary: list[str] | None = setting(
        None,
        "differences named in advance, such as [ld_align - spin]: printed first, a family of tests "
        "of their own; null: ld_align - spin and ld_align - ld_align/shuffled, where compared",
    )
    learning_rates: list[float] = setting(
        [5e-6, 1.5e-5, 4.5e-5], "tried for every method", check=each(positive)
    )
    validation_rows: int = setting(
        80, "held-out rows that learning rates are chosen on; the rest is reported", check=positive
    )


@dataclass(frozen=True)
class CompareConfig(RunConfig):
    """Keys of `train/compare.py`: a run's, and what is compared. method, weights, seed,
    learning_rate are set by it.
    """

    compare: CompareKeys = group(CompareKeys, "the comparison")

    @property
    def _kinds(self) -> Collection[str]:
        return {name.partition("/")[2] or "latent" for name in self.compare.methods}

    def _measuring_problems(self) -> list[str]:
        """None: the last iteration's policies are compared."""
        return []

    def _folder_problems(self) -> list[str]:
        """As `RunConfig`'s; where no weights need it, the comparison's table of distances reads
        judge.folder.
        """
        if "semantic" in self._kinds and self.judge.folder is None:
            return [
                "compare.methods: ld_align/semantic needs the folder of a sentence-embedding "
                "model; give judge.folder"
            ]
        return []

    def _arm_problems(self) -> list[str]:
        """The contradictions between what is compared."""
        found, names = [], self.compare.methods
        kinds = get_args(get_type_hints(RunConfig)["weights"])
        known = {*COMPARABLE, *(f"ld_align/{kind}" for kind in kinds)}
        for name in dict.fromkeys(names):
            if name not in known:
                found.append(
                    f"compare.methods: {name!r} is not one of {', '.join(COMPARABLE)}, "
                    f"ld_align/WEIGHTS with weights of {', '.join(kinds)}"
                )
            if names.count(name) > 1:
                found.append(f"compare.methods: {name!r} is there twice; leave one out")
        if {"ld_align", "ld_align/latent"} <= set(names):
            found.append("compare.methods: ld_align is ld_align/latent; leave one out")
        if "ld_align/retrained" in names and self.iterations < 2:
            found.append(
                f"iterations={self.iterations}: ld_align/retrained differs from ld_align from the "
                "second iteration on; give iterations=2, or leave it out"
            )
        for key in ("seeds", "only"):
            seeds = getattr(self.compare, key)
            if len(set(seeds)) < len(seeds):
                found.append(f"compare.{key}: a seed is there twice; leave one out")
        rates = self.compare.learning_rates
        if not rates or len({f"{rate:g}" for rate in rates}) < len(rates):
            found.append(
                f"compare.learning_rates={rates}: give one or more, each once in six figures, as "
                "folders are named by them"
            )
        strange = [n for n in self.compare.only if n not in self.compare.seeds]
        if strange:
            found.append(
                f"compare.only: {strange[0]} is none of compare.seeds={self.compare.seeds}; give "
                "some of them"
            )
        for name in self.compare.primary or ():
            sides = name.split(" - ")
            if len(sides) != 2 or sides[0] == sides[1] or not {*sides} <= {*names, "start"}:
                found.append(
                    f"compare.primary: {name!r} is not METHOD - METHOD, two of compare.methods or "
                    "start"
                )
        return found

    @property
    def of_all(self) -> "CompareConfig":
        """The settings of the whole comparison, whichever of its processes has them."""
        return replace(self, compare=replace(self.compare, only=[]))

    @property
    def primary(self) -> list[tuple[str, str]]:
        """The differences named in advance: (first, second), first minus second."""
        usual = ["ld_align - spin", "ld_align - ld_align/shuffled"]
        given = usual if self.compare.primary is None else self.compare.primary
        pairs = [(a, b) for a, _, b in (name.partition(" - ") for name in given)]
        return [(a, b) for a, b in pairs if {a, b} <= {*self.compare.methods, "start"}]

    def problems(self) -> list[str]:
        """The contradictions between keys, a sentence each; [] where there are none."""
        found = super().problems() + self._arm_problems()
        for key in ("method", "sft_prompts", "weights", "weight_clip", "mix_previous", "responses"):
            if getattr(self, key) != getattr(RunConfig, key):
                found.append(f"{key}: compare.methods says what is compared; leave {key} out")
        if self.validation != ValidationKeys() or self.select is not None:
            found.append(
                "validation, select: all methods take the same steps, and the last weights are "
                "compared; leave them out"
            )
        if self.hub.push is not None:
            found.append("hub.push: a comparison pushes none of its policies; leave it out")
        if self.guide.retrain:
            found.append("guide.retrain: give ld_align/retrained in compare.methods; leave it out")
        if self.iterations < 1:
            found.append(f"iterations={self.iterations}: a comparison needs 1 or more")
        if not self.max_new_tokens or not self.max_length:
            found.append(
                "max_new_tokens, max_length: all trainings must have the same; give numbers, such "
                "as train/align.py --dry-run says for 0"
            )
        if self.training.steps is None:
            found.append("training.steps: must be given, so that all methods have the same budget")
        if self.compare.validation_rows >= self.evaluation.rows:
            found.append(
                f"compare.validation_rows={self.compare.validation_rows}: leaves none of "
                "evaluation.rows="
                f"{self.evaluation.rows} to report"
            )
        return found
