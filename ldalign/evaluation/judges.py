"""Judges: which of two answers to a question is better.

A judge is `checker`, the embedded data's program; or a language model of ours, the policy being
trained or any other folder, asked for one letter; or a model behind an OpenAI-compatible endpoint
(LLM-as-a-judge, arXiv 2306.05685; as a source of pairs: Self-Rewarding Language Models, 2401.10020,
and RLAIF, 2309.00267). What a model says depends on which answer it reads first, so it is asked in
both orders and the two are averaged, as in RLAIF. `embedding` asks nothing: a sentence-embedding
model measures which of the two answers lies closer to the real response.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from ldalign.data import embedded
from ldalign.data.pairs import Pair
from ldalign.data.rows import Message, Row, prompt_text
from ldalign.data.tokenizer import Tokenizer
from ldalign.evaluation.embedding import EmbeddingModel
from ldalign.evaluation.endpoint import Endpoint
from ldalign.models.mistral import Mistral
from ldalign.system.distributed import on_rank0
from ldalign.system.errors import InputError
from ldalign.system.metrics import Bar, say
from ldalign.training.scoring import response_logps

CHECKER = "checker"
POLICY = "policy"
EMBEDDING = "embedding"
LETTERS = ("A", "B")
QUESTION = """Two answers to a question are given below. Decide which one is better: \
more correct, more helpful, closer to what was asked. Neither the length of an answer nor its \
place in the order counts.

[Question]
{question}

[Answer A]
{a}

[Answer B]
{b}

"""
ONE_LETTER = (
    "Reply with one letter and nothing else: A if answer A is better, B if answer B is better."
)
OR_TIE = ONE_LETTER[:-1] + ", C if they are equally good."
VERDICT = re.compile(r"\W*(?:answer\W+)?([ABC])\W*", re.IGNORECASE)


class Judge(Protocol):
    """What decides between two answers."""

    def prefer(
        self,
        rows: Sequence[Row],
        first: Sequence[str],
        second: Sequence[str],
        path: Path | None = None,
    ) -> list[float]:
        """Says how surely the first answer is the better one, row by row.

        Values are in [0, 1]: 0.5 is a tie, NaN no verdict. All ranks call it with the same
        arguments and get the same result. A row matters by its history, and by what a checker
        or an embedding needs. path: as in `partial_rows.table`, for a stage that can be gone on
        with.
        """
        ...


class Checker:
    """The program that checks the embedded data's answers; equally right ones are a tie."""

    def prefer(
        self,
        rows: Sequence[Row],
        first: Sequence[str],
        second: Sequence[str],
        path: Path | None = None,
    ) -> list[float]:
        """Returns 1, 0 or 0.5 for each row; NaN for rows whose kind of task is not known here."""

        def decide(row: Row, a: str, b: str) -> float:
            if row.kind not in embedded.KINDS:
                return math.nan
            first_right, second_right = (
                embedded.check(str(row.kind), row.answer, text) for text in (a, b)
            )
            return 0.5 + (first_right - second_right) / 2

        return [decide(*texts) for texts in zip(rows, first, second, strict=True)]


class ModelJudge:
    """A model of ours, asked for one letter through its own chat template; nothing is generated.

    Its preference is the probability of one letter against the other, averaged over both orders of
    the answers, so prefer(a, b) = 1 - prefer(b, a) and the result repeats. micro_tokens: the token
    budget of a micro-batch. Raises InputError where both letters begin with the same token.
    """

    def __init__(
        self, model: Mistral, tokenizer: Tokenizer, micro_tokens: int, device: torch.device
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.micro_tokens, self.device = micro_tokens, device
        probe: tuple[Message, ...] = ({"role": "user", "content": ONE_LETTER},)
        # Letters as the template writes them after its header: SentencePiece may add a space.
        self.letters = [
            tokenizer.pair_ids(Row("letter", probe, letter)).response[0] for letter in LETTERS
        ]
        if self.letters[0] == self.letters[1]:
            raise InputError(
                f"{tokenizer.folder}: cannot judge: its answers A and B begin with the same token"
            )

    def prefer(
        self,
        rows: Sequence[Row],
        first: Sequence[str],
        second: Sequence[str],
        path: Path | None = None,
    ) -> list[float]:
        """NaN where a question with its answers is longer than the model's positions."""
        room = self.model.config.max_position_embeddings
        asked: list[Pair] = []  # two a row that fits: its answers in either order
        fits = []
        for row, a, b in zip(rows, first, second, strict=True):
            # Whichever answer is called the first, the order is one: the same batches and bits.
            low, high = min(a, b), max(a, b)
            both = [self._ids(row, low, high), self._ids(row, high, low)]
            fits.append(max(map(len, both)) < room)
            if fits[-1]:
                asked += [Pair(row.id, ids, self.letters[:1], self.letters[1:]) for ids in both]
        # (2 x rows that fit, 2): both orders of each row, by both letters
        with Bar("judge", len(asked), "questions") as progress:
            logps = response_logps(
                self.model, asked, self.micro_tokens, self.device, lambda n: progress(n, 0), path
            )
        says_a = torch.sigmoid(logps[:, 0] - logps[:, 1])
        lesser = iter(((says_a[0::2] + 1 - says_a[1::2]) / 2).tolist())  # that min(a, b) is better
        preferences = [next(lesser) if fit else math.nan for fit in fits]
        return [p if a <= b else 1 - p for p, a, b in zip(preferences, first, second, strict=True)]

    def _ids(self, row: Row, a: str, b: str) -> list[int]:
        text = _question(row, a, b) + ONE_LETTER
        return self.tokenizer.prompt_ids([{"role": "user", "content": text}])


class EndpointJudge:
    """A model behind an endpoint, asked in both orders; where it contradicts itself, it is a tie.

    connect: makes the endpoint, on rank 0 alone, which asks for all.
    """

    def __init__(self, connect: Callable[[], Endpoint]) -> None:
        self.connect = connect

    def prefer(
        self,
        rows: Sequence[Row],
        first: Sequence[str],
        second: Sequence[str],
        path: Path | None = None,
    ) -> list[float]:
        """Returns the mean of two verdicts of 0, 0.5 or 1 a row; NaN where either answer is none.

        path is not used: the endpoint keeps its answers itself.
        """

        def ask() -> list[float]:
            both = [
                _question(row, x, y) + OR_TIE
                for row, a, b in zip(rows, first, second, strict=True)
                for x, y in ((a, b), (b, a))
            ]
            with Bar("judge", len(both), "questions") as progress:
                answers = self.connect().ask(both, lambda n: progress(n, 0))
            verdicts = [_verdict(text) for text in answers]
            orders = zip(verdicts[0::2], verdicts[1::2], strict=True)
            return [(there + 1 - back) / 2 for there, back in orders]

        return on_rank0(ask)


class EmbeddingJudge:
    """The closeness of an answer to the row's real response, by a sentence-embedding model.

    It knows the real response, which a judge of quality does not, and nothing of the question.
    """

    def __init__(self, model: EmbeddingModel) -> None:
        self.model = model

    def prefer(
        self,
        rows: Sequence[Row],
        first: Sequence[str],
        second: Sequence[str],
        path: Path | None = None,
    ) -> list[float]:
        """Returns 0.5 + (cos(first, real) - cos(second, real)) / 4 for each row, a tie where both
        are as close; prefer(a, b) is exactly 1 - prefer(b, a).

        Raises NumericsError naming a row whose embedding is not finite, OutOfMemory.
        """
        real, ids = [row.response for row in rows], [row.id for row in rows]
        with Bar("judge", len(rows), "pairs") as progress:
            distances = self.model.distances(
                real, [first, second], ids, path, lambda pairs: progress(pairs, 0)
            )
        if self.model.cut:
            say(
                f"judge: texts longer than the {self.model.longest} tokens that judge.folder "
                f"reads, compared by their beginning: {self.model.cut}"
            )
        return [_closer(*pair) for pair in distances.tolist()]


def _closer(first: float, second: float) -> float:
    """How surely the first is closer, in [0, 1], from both distances 1 - cos in [0, 2]."""
    # The surer side is rounded, the other made from it: 1 - (1 - p) is p to the bit.
    surer = 0.5 + abs(second - first) / 4
    return surer if first <= second else 1 - surer


def _question(row: Row, a: str, b: str) -> str:
    return QUESTION.format(question=prompt_text(row), a=a, b=b)


def _verdict(answer: str) -> float:
    """Reads a verdict: 1 for A, 0 for B, 0.5 for C; NaN for anything else.

    What a model thinks aloud before it is not read.
    """
    found = VERDICT.fullmatch(answer.rpartition("</think>")[2])
    return {"A": 1.0, "B": 0.0, "C": 0.5}[found[1].upper()] if found else math.nan
