"""A reward model: how good an answer is, as one number a (question, answer) pair.

The layout of OpenAssistant/reward-model-deberta-v3-large-v2: a sequence classifier with one logit over a pair of texts,
run by transformers (extra `reward`). It reads the raw texts: with a chat template around them its scores are others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ldalign.errors import EnvironmentProblem, InputError, NumericsError

NEEDED = {"*.safetensors": "weights in safetensors", "tokenizer.json": "tokenizer.json"}


def check_folder(folder: Path) -> None:
    """Raises InputError where files are missing that a reward model is read from.

    Without tokenizer.json transformers may make up an empty vocabulary, and every score would be wrong.
    """
    for pattern, what in NEEDED.items():
        if not any(folder.glob(pattern)):
            raise InputError(
                f"{folder}: has no {what} (reward.model); older models come as pytorch_model.bin and spm.model, which "
                "are not read here: convert such a model once, by the few lines in docs/judges.md, Rewards"
            )


class RewardModel:
    """A folder's classifier and tokenizer, float32, in evaluation mode.

    max_tokens: a pair's tokens; of a longer one the end of the longer text is cut. batch_tokens: of a batch, padding
    counted. Raises InputError for a folder that is no such model, EnvironmentProblem without transformers.
    """

    def __init__(self, folder: Path, device: torch.device, max_tokens: int = 512, batch_tokens: int = 8192) -> None:
        try:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer
        except ImportError:
            raise EnvironmentProblem("reward.model: transformers is missing; pip install ldalign[reward]") from None
        self.device, self.max_tokens, self.batch_tokens = device, max_tokens, batch_tokens
        check_folder(folder)
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            self.model = AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, **options
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{folder}: not a reward model that can be read (safetensors only): {reason}") from None
        if self.model.config.num_labels != 1:
            raise InputError(
                f"{folder}: has {self.model.config.num_labels} labels; a reward model has one logit (reward.model)"
            )
        self.model.eval().to(device)

    @torch.no_grad()
    def score(self, questions: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """(N,) float32 on the CPU: the reward of each answer. Batches of like length; rows do not see each other.

        Raises NumericsError naming the first row whose reward is not finite.
        """
        rows = [
            self.tokenizer(q, a, truncation=True, max_length=self.max_tokens)
            for q, a in zip(questions, answers, strict=True)
        ]
        sizes = [len(row["input_ids"]) for row in rows]
        out = torch.zeros(len(rows))
        for batch in _batches(sizes, self.batch_tokens):
            padded = self.tokenizer.pad([rows[i] for i in batch], return_tensors="pt").to(self.device)
            out[batch] = self.model(**padded).logits[:, 0].float().cpu()
        for i in (~torch.isfinite(out)).nonzero()[:1, 0].tolist():
            raise NumericsError(f"reward.model: the reward of row {i} is {out[i]}; look at its texts")
        return out


def _batches(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Row indices, longest first, so that a batch's first row gives its width: rows x width is at most `most`."""
    batches: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if batches and (len(batches[-1]) + 1) * sizes[batches[-1][0]] <= most:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
