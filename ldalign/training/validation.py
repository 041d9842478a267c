"""Validation: what a policy in training is worth on rows that nothing else reads, every few steps.

Measured is the likelihood of the rows' real responses, by the very forward that trains, and where
the caller asks for it the share of its answers that are right. The best weights so far are kept on
the disk, training can end where it has stopped to gain, and all that is decided here lies in the
loop's state, so that a stage that goes on from a checkpoint decides the same again.

The rows are none of those that a report's figures are of: what is chosen on rows looks better on
them than it is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldalign.data.pairs import Pair
from ldalign.models.weights import LanguageModel
from ldalign.system import distributed
from ldalign.system.errors import InputError, NumericsError
from ldalign.system.files import (
    PARTIAL,
    hash_file,
    make_folder,
    read_json,
    reading,
    save_tensors,
    sync,
    writing,
)
from ldalign.training.batches import Batch, deal, pair_costs, token_logprobs
from ldalign.training.checkpoint import DAMAGED, MANIFEST, MAX_BYTES, State

Metric = Literal["nll", "accuracy"]
PARTS = 4  # evaluations of a stage where nobody says how often: one a quarter
STATE = "validation"  # the key of the loop's state

Figures = dict[str, float]  # of one evaluation: "step", "nll", and with answers "accuracy"


@dataclass(frozen=True)
class ValidationPlan:
    """On what, how often, and what follows from it; the same on all ranks."""

    pairs: Sequence[Pair]  # held-out rows, without losers
    every: int | None = None  # optimizer steps between two evaluations; None: a quarter of all
    early_stop: int | None = None  # evaluations without a better one that end training; None: none
    # where the best weights are kept; None: the last ones are what is wanted
    keep: Path | None = None
    dtype: torch.dtype = torch.float32  # that they are kept in
    # Of the model in training, the share of right answers; all ranks call it. None: not measured.
    accuracy: Callable[[LanguageModel], float] | None = None


def steps_between(every: int | None, steps: int) -> int:
    """Returns how many of a stage's `steps` lie between two evaluations."""
    return every or max(1, -(-steps // PARTS))


def evaluations(every: int | None, steps: int) -> int:
    """Returns how many evaluations a stage of so many steps has, the one before its first too."""
    return 1 + -(-steps // steps_between(every, steps))


def better(new: Figures, old: Figures | None) -> bool:
    """Says whether an evaluation is better than another: more right answers, where those were
    measured, and of as many the lower NLL. None: there is no other.
    """
    if old is None:
        return True
    key = [(-figures.get("accuracy", 0.0), figures["nll"]) for figures in (new, old)]
    return key[0] < key[1]


def best_weights(plan: ValidationPlan, summary: Mapping[str, float]) -> dict[str, Tensor] | None:
    """Returns the best weights of a stage that has ended, by name, on the CPU in plan.dtype ({} but
    on rank 0); None, on all ranks, where they are the last ones, or the last are what is wanted.

    summary: of `Validator.summary`, and the stage's "steps".
    """
    if plan.keep is None or summary["validation/step"] == summary["steps"]:
        return None
    if distributed.rank() > 0:
        return {}
    from safetensors.torch import load_file

    return load_file(_path(plan.keep, summary["validation/step"]))


class Validator:
    """The evaluations of one stage in training. Every method is called by all ranks.

    steps: of the whole stage. micro_tokens: as in training. stage: named in errors.
    """

    def __init__(
        self,
        plan: ValidationPlan,
        model: LanguageModel,
        steps: int,
        micro_tokens: int,
        device: torch.device,
        stage: str,
    ) -> None:
        self.plan, self.model, self.steps, self.device = plan, model, steps, device
        self.every, self.stage = steps_between(plan.every, steps), stage
        sizes, costs = [pair.tokens for pair in plan.pairs], pair_costs(model, plan.pairs)
        dealt = deal(sizes, distributed.world_size(), micro_tokens, costs)
        self.micros = dealt[distributed.rank()]

    def after_step(
        self, step: int, last: bool, state: State
    ) -> tuple[Mapping[str, Any], str] | None:
        """Measures the model after `step` steps, 0 before the first, if it is time or `last`.

        Returns the record for metrics.jsonl and the line that a person reads; None where it was not
        measured. state[STATE] gets what was found; state["ended"] says that training is to end.
        Raises NumericsError for an NLL that is not finite, EnvironmentProblem where the best
        weights cannot be written.
        """
        if not (last or step % self.every == 0):
            return None
        figures: Figures = {"step": step, "nll": self._nll()}
        if self.plan.accuracy is not None:
            figures["accuracy"] = self.plan.accuracy(self.model)
        found = state.setdefault(STATE, {"start": None, "best": None, "last": None, "worse": 0})
        if step == 0:
            found["start"] = figures  # to compare with: no training is no result of training
        elif better(figures, found["best"]):
            # The last are the model's own.
            found |= {"best": figures | ({} if last else self._keep(step)), "worse": 0}
        else:
            found["worse"] += 1
        found["last"] = figures
        if self.plan.early_stop is not None and found["worse"] >= self.plan.early_stop:
            state["ended"] = True
        return self._record(figures, found)

    def summary(self, state: State) -> dict[str, float]:
        """The stage's figures: of the weights that are its result, of those before its first step
        and after its last.
        """
        found = state[STATE]
        chosen = found["last"] if self.plan.keep is None else found["best"]
        out = {"validation/step": float(chosen["step"])}
        for name in ("nll", "accuracy"):
            for key, figures in (
                ("", chosen),
                ("_start", found["start"]),
                ("_last", found["last"]),
            ):
                if name in figures:
                    out[f"validation/{name}{key}"] = figures[name]
        return out | {"validation/ended_early": float(state.get("ended", False))}

    def check(self, state: State) -> None:
        """Checks, before a stage goes on, that the best weights so far are there as they were
        written. Raises InputError naming the file.
        """
        best = state.get(STATE, {}).get("best")
        if self.plan.keep is not None and best is not None and "sha256" in best:
            path = _path(self.plan.keep, best["step"])
            distributed.on_rank0(lambda: _check(path, best["sha256"]))

    # ------------------------------------------------------------------------------------ measuring

    @torch.no_grad()
    def _nll(self) -> float:
        """Nats per real response token, over all rows; the same on all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro in self.micros:
            # An empty micro-batch takes part in the collectives with a row that counts for nothing.
            chosen = [self.plan.pairs[i] for i in micro] or [self.plan.pairs[0]]
            logps = token_logprobs(self.model, Batch.pack(chosen, self.device))
            total -= logps.double().sum() if micro else 0.0
        distributed.reshard(self.model)  # no backward follows that would
        tokens = sum(len(pair.real) for pair in self.plan.pairs)
        nll = float(distributed.total(total)) / tokens
        if not math.isfinite(nll):
            raise NumericsError(
                f"{self.stage}: the NLL of the validation rows is {nll}; lower the stage's "
                "learning_rate, or look at these rows (data/validation.jsonl)"
            )
        return nll

    def _record(self, figures: Figures, found: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        step, best = int(figures["step"]), found["best"]
        record: dict[str, float] = {"global_step": step}
        record |= {f"validation/{name}": figures[name] for name in figures if name != "step"}
        text = f"step {step}/{self.steps}  validation  nll {figures['nll']:.4f}"
        if "accuracy" in figures:
            text += f"  accuracy {figures['accuracy']:.1%}"
        if best is not None:
            record["validation/best_step"] = int(best["step"])
            text += "  the best so far" if best["step"] == step else f"  best: step {best['step']}"
        return record, text

    # -------------------------------------------------------------------------------------- keeping

    def _keep(self, step: int) -> dict[str, str]:
        """Writes the weights as the best so far; returns {"sha256": the file's}, {} where none are
        kept. Of the older ones those go that no checkpoint refers to.
        """
        if self.plan.keep is None:
            return {}
        weights = distributed.full_state(self.model, self.plan.dtype)
        path = _path(self.plan.keep, step)

        def write() -> str:
            make_folder(path.parent)
            partial = path.with_name(path.name + PARTIAL)
            save_tensors({name: p.contiguous() for name, p in weights.items()}, partial)
            with writing(path):
                partial.replace(path)
                sync(path.parent)
                needed = {path, *(_path(path.parent, best) for best in _referred(path.parent))}
                for old in path.parent.glob("best_*.safetensors"):
                    if old not in needed:
                        old.unlink()
            return hash_file(path)

        return {"sha256": distributed.on_rank0(write)}


def _path(folder: Path, step: float) -> Path:
    return folder / f"best_{int(step):08d}.safetensors"


def _referred(folder: Path) -> set[float]:
    """The steps whose weights are the best by the state of a checkpoint in `folder`."""
    steps = set()
    for manifest in folder.glob(f"step_*/{MANIFEST}"):
        if manifest.parent.name.endswith(DAMAGED):
            continue
        with reading(manifest, f"delete {manifest.parent}"):
            state = read_json(manifest, MAX_BYTES)["state"]
            best = state.get(STATE, {}).get("best")
            steps |= {best["step"]} if best is not None else set()
    return steps


def _check(path: Path, sha256: str) -> None:
    if not path.is_file() or hash_file(path) != sha256:
        raise InputError(
            f"{path}: missing or damaged, and the checkpoints beside it go on from it; bring back "
            f"a copy, or delete {path.parent} to begin this stage again"
        )
