"""A reward model: how good an answer is, as one number a (question, answer) pair.

The layout of OpenAssistant/reward-model-deberta-v3-large-v2: a sequence classifier with one logit
over a pair of texts, run by transformers (extra `reward`). It reads the raw texts: with a chat
template around them its scores are others.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ldalign.evaluation.statistics import standard_error
from ldalign.evaluation.transformers_folder import Kind, batches, check_folder, load
from ldalign.system.errors import InputError
from ldalign.system.memory import naming
from ldalign.system.metrics import Bar, Metrics
from ldalign.system.partial_rows import table

REWARD = Kind(
    "a reward model",
    key="reward.model",
    head="AutoModelForSequenceClassification",
    otherwise=(
        "older models come as pytorch_model.bin and spm.model, which are not read here: convert "
        "such a model once, by the few lines in docs/judges.md, Rewards"
    ),
    lower="lower reward.batch_tokens or reward.max_tokens",
)


class RewardModel:
    """A folder's classifier and tokenizer, float32, in evaluation mode.

    max_tokens: the most a pair may have; of a longer one the end of the longer text is cut.
    batch_tokens: the most a batch may have, padding counted. Raises InputError for a folder that is
    no such model, EnvironmentProblem without transformers, OutOfMemory.
    """

    def __init__(
        self, folder: Path, device: torch.device, max_tokens: int = 512, batch_tokens: int = 8192
    ) -> None:
        self.device, self.max_tokens, self.batch_tokens = device, max_tokens, batch_tokens
        self.tokenizer, self.model = load(folder, device, REWARD)
        if self.model.config.num_labels != 1:
            raise InputError(
                f"{folder}: has {self.model.config.num_labels} labels; a reward model has one "
                "logit (reward.model)"
            )

    @torch.no_grad()
    def score(
        self,
        questions: Sequence[str],
        answers: Sequence[str],
        ids: Sequence[str] | None = None,
        path: Path | None = None,
    ) -> torch.Tensor:
        """Returns the reward of each answer to its question: (N,) float32 on the CPU.

        All ranks call it with the same rows and share the work. Batches are of like length, rows do
        not see each other, and the batches are the same for any number of ranks. ids: the rows'
        names in errors; None: their numbers. path: as in `partial_rows.table`, for a stage that can
        be gone on with. Raises NumericsError naming a row whose reward is not finite, OutOfMemory.
        """
        rows = [
            self.tokenizer(q, a, truncation=True, max_length=self.max_tokens)
            for q, a in zip(questions, answers, strict=True)
        ]
        sizes = [len(row["input_ids"]) for row in rows]
        names = range(len(rows)) if ids is None else ids

        def rate(batch: Sequence[int]) -> torch.Tensor:
            what = f"rewards of {len(batch)} answers of at most {sizes[batch[0]]} tokens"
            with naming(lambda: what, REWARD.lower):
                padded = self.tokenizer.pad([rows[i] for i in batch], return_tensors="pt")
                logits: torch.Tensor = self.model(**padded.to(self.device)).logits
                return logits[:, :1].float().cpu()

        def refusal(i: int, value: float) -> str:
            return f"row {names[i]}: the reward is {value}; look at its texts and at reward.model"

        dealt = batches(sizes, self.batch_tokens)
        with Bar("rewards", len(rows), "answers") as progress:
            found = table(dealt, rate, 1, refusal, path, lambda n: progress(n, 0))
        return found[:, 0].float()


def check_reward_model(folder: Path) -> None:
    """Raises InputError as `transformers_folder.check_folder` does."""
    check_folder(folder, REWARD)


def summary(generated: np.ndarray, real: np.ndarray, first: np.ndarray | None = None) -> Metrics:
    """Returns mean rewards and win rates, with standard errors over prompts.

    generated, real, first: rewards (N,) of the policy's answers, of the real ones, of the first
    policy's. A tie counts one half.
    """
    metrics = {
        "reward/mean": float(generated.mean()),
        "reward/mean_se": standard_error(generated),
        "reward/real": float(real.mean()),
        **_wins("reward/win_rate", generated, real),
    }
    return metrics if first is None else metrics | _wins("reward/win_rate_first", generated, first)


def _wins(name: str, one: np.ndarray, other: np.ndarray) -> Metrics:
    wins = (np.sign(one - other) + 1) / 2
    return {name: float(wins.mean()), f"{name}_se": standard_error(wins)}
