"""A reward model: how good an answer is, as one number a (question, answer) pair.

The layout of OpenAssistant/reward-model-deberta-v3-large-v2: a sequence classifier with one logit
over a pair of texts, run by transformers (extra `reward`). It reads the raw texts: with a chat
template around them its scores are others.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from ldalign.evaluation.statistics import standard_error
from ldalign.models.stored_tensors import read_config
from ldalign.models.weights import check_files
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.system.memory import OutOfMemory, naming
from ldalign.system.metrics import Metrics
from ldalign.system.partial_rows import table
from ldalign.system.untrusted import read_json

TOKENIZER_CONFIG = "tokenizer_config.json"
PLAIN_NAME = re.compile(r"\w[\w.-]*")
# What helps where memory does not suffice.
LOWER_REWARD_TOKENS = "lower reward.batch_tokens or reward.max_tokens"
NEEDED = {"*.safetensors*": "weights in safetensors", "tokenizer.json": "tokenizer.json"}


class RewardModel:
    """A folder's classifier and tokenizer, float32, in evaluation mode.

    max_tokens: the most a pair may have; of a longer one the end of the longer text is cut.
    batch_tokens: the most a batch may have, padding counted. Raises InputError for a folder that is
    no such model, EnvironmentProblem without transformers, OutOfMemory.
    """

    def __init__(
        self, folder: Path, device: torch.device, max_tokens: int = 512, batch_tokens: int = 8192
    ) -> None:
        try:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
        except ImportError:
            raise EnvironmentProblem(
                "reward.model: transformers is missing; pip install ldalign[reward]"
            ) from None
        self.device, self.max_tokens, self.batch_tokens = device, max_tokens, batch_tokens
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        check_reward_model(folder)
        what = f"{folder}: the reward model's float32 weights on {device}"
        try:
            with naming(lambda: what, LOWER_REWARD_TOKENS):
                self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
                self.model, found = AutoModelForSequenceClassification.from_pretrained(
                    folder,
                    use_safetensors=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                    **options,
                )
                self.model.eval().to(device)
        except OutOfMemory:
            raise
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{folder}: not a reward model that can be read (safetensors only): {reason}"
            ) from None
        missing = sorted(found["missing_keys"])
        if missing:  # transformers would draw them at random
            raise InputError(
                f"{folder}: {len(missing)} tensors are missing, the first: {missing[0]}; is it a "
                "reward model?"
            )
        for name, tensor in self.model.state_dict().items():
            if not tensor.isfinite().all():
                raise InputError(
                    f"{folder}: tensor {name} holds NaN or Inf; the file is damaged (reward.model)"
                )
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
        progress: Callable[[int], None] = lambda rows: None,
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
            with naming(lambda: what, LOWER_REWARD_TOKENS):
                padded = self.tokenizer.pad([rows[i] for i in batch], return_tensors="pt")
                logits: torch.Tensor = self.model(**padded.to(self.device)).logits
                return logits[:, :1].float().cpu()

        def refusal(i: int, value: float) -> str:
            return f"row {names[i]}: the reward is {value}; look at its texts and at reward.model"

        batches = _batches(sizes, self.batch_tokens)
        return table(batches, rate, 1, refusal, path, progress)[:, 0].float()


def check_reward_model(folder: Path) -> None:
    """Raises InputError where the folder asks to run code, leads out of itself, or lacks a file.

    This comes before transformers reads any of them: it runs no code here, and reads no
    pickle, but trusts paths. Without tokenizer.json it may make up an empty vocabulary, and
    every score would be wrong.
    """
    for pattern, what in NEEDED.items():
        if not any(folder.glob(pattern)):
            raise InputError(
                f"{folder}: has no {what} (reward.model); older models come as pytorch_model.bin "
                "and spm.model, which are not read here: convert such a model once, by the few "
                "lines in docs/judges.md, Rewards"
            )
    read_config(folder)
    check_files(folder)
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        raise InputError(
            f"{adapter}: an adapter, whose base model is elsewhere; merge them into one folder"
        )
    settings = read_json(folder / TOKENIZER_CONFIG, missing={})
    if "auto_map" in settings:
        raise InputError(
            f"{folder / TOKENIZER_CONFIG}: auto_map asks to run code from the model folder; none "
            "is run"
        )
    for key, value in settings.items():
        # Older transformers open what these name; special_tokens_map_file alone is never read.
        if not key.endswith(("_file", "_files")) or key == "special_tokens_map_file":
            continue
        for name in value if isinstance(value, list) else [value]:
            if name is not None and not (isinstance(name, str) and PLAIN_NAME.fullmatch(name)):
                raise InputError(
                    f"{folder / TOKENIZER_CONFIG}: {key} {name!r} is no plain file name inside the "
                    "folder; take it out"
                )


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


def _batches(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Deals rows into batches, longest first; `most` bounds rows x the first one's length."""
    batches: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if batches and (len(batches[-1]) + 1) * sizes[batches[-1][0]] <= most:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
