"""Held-out evaluation: the likelihood of real responses, and the accuracy of checkable answers.

Accuracy is measured greedily and on samples (several a prompt); standard errors are over prompts,
since samples of one prompt are not independent.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ldalign.data import embedded
from ldalign.data.pairs import Pair
from ldalign.data.rows import Row
from ldalign.data.tokenizer import Tokenizer
from ldalign.evaluation.statistics import standard_error
from ldalign.generation.answers import TOGETHER, make_answers
from ldalign.generation.decoders import Decoder, new_decoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.sampling import Response, Sampling
from ldalign.models.mistral import Mistral
from ldalign.system import distributed
from ldalign.system.files import make_folder
from ldalign.system.metrics import Bar
from ldalign.training.scoring import response_logps

# What rows that no program can check are asked for: nothing, a greedy answer, samples too.
Unchecked = Literal["nothing", "greedy", "samples"]


@dataclass(frozen=True)
class EvaluationSettings:
    """What is asked of a policy, and the sizes of its batches.

    samples: answers a prompt at `sampling`'s temperature, beside the greedy one. unchecked: which
    of these are also asked of rows that no program can check (greedy: for a reward model and the
    report). batch_rows: rows generated at a time. micro_tokens: tokens scored at a time.
    """

    samples: int
    sampling: Sampling
    batch_rows: int
    micro_tokens: int
    seed: int
    unchecked: Unchecked = "nothing"

    def answers(self, row: Row) -> int:
        """How many answers a row is asked for, the greedy one included; 0: none."""
        if row.kind is not None or self.unchecked == "samples":
            return 1 + self.samples
        return int(self.unchecked == "greedy")


@torch.no_grad()
def evaluate(
    model: Mistral,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    settings: EvaluationSettings,
    device: torch.device,
    kept: Path,
    progress: Callable[[int, int], None] = lambda rows, tokens: None,
    release: bool = False,
) -> tuple[dict[str, float], list[dict[str, object]]]:
    """Measures a policy on all rows; returns metrics and a record a row, on rank 0 alone.

    Metrics: nll/real (nats per response token), tokens_generated, truncated_frac; where rows can be
    checked also accuracy/greedy and accuracy/sampled with `_se` standard errors, and per kind
    accuracy/greedy/KIND. A record holds likelihood, texts and verdicts. A row that cannot be
    checked is answered as `unchecked` says, and has an empty `correct`.

    kept: a folder for what is done, which a later call with the same arguments goes on from.
    release: the model may lose its weights, so that there is never a second copy of them.
    """
    with Bar("log-probs of real responses", len(pairs), "rows") as scored:
        logps = response_logps(
            model,
            pairs,
            settings.micro_tokens,
            device,
            lambda n: scored(n, 0),
            kept / "logps",
        )[:, 0]
    metrics = {
        "rows": float(len(rows)),
        "nll/real": float(-logps.sum() / sum(len(p.real) for p in pairs)),
    }
    answered = [i for i, row in enumerate(rows) if settings.answers(row)]
    checkable = [i for i in answered if rows[i].kind is not None]
    decoder = new_decoder(model, release)
    asked = _prompts(rows, pairs, answered, settings)
    greedy, sampled = (
        _answers(kept / name, prompts, decoder, tokenizer, settings, name == "greedy", progress)
        for name, prompts in asked.items()
    )
    if distributed.rank() > 0:
        return {}, []
    records = _records(rows, pairs, logps)
    table = torch.zeros(len(rows), 4, dtype=torch.float64)  # the columns of `_check`
    samples = iter(sampled)
    for i, first in zip(answered, greedy, strict=True):
        answers = [first, *(next(samples) for _ in range(settings.answers(rows[i]) - 1))]
        said, table[i] = _check(rows[i], answers, tokenizer, settings.samples)
        records[i] |= said
    if checkable:
        kinds = [str(rows[i].kind) for i in checkable]
        metrics |= _summary("accuracy/greedy", table[checkable, 0].numpy(), kinds)
        if settings.samples:
            metrics |= _summary("accuracy/sampled", table[checkable, 1].numpy(), kinds)
    if answered:
        metrics |= {
            "tokens_generated": float(table[:, 2].sum()),
            "truncated_frac": float(table[answered, 3].mean()),
        }
    return metrics, records


@torch.no_grad()
def greedy_accuracy(
    model: Mistral,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    settings: EvaluationSettings,
    device: torch.device,
    scratch: Path,
) -> float:
    """Returns the share of rows whose greedy answer is right, the same on all ranks, which share
    the rows; each has a whole model, and may lose its weights.

    rows: at least one, all of which a program can check. scratch: a folder for what is done on the
    way, which is emptied before.
    """

    def empty() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        make_folder(scratch)

    distributed.on_rank0(empty)
    asked = [(f"greedy/{row.id}", pair.prompt) for row, pair in zip(rows, pairs, strict=True)]
    decoder = new_decoder(model, release=True)
    share, most = len(rows) // distributed.world_size(), settings.sampling.max_new_tokens
    with Bar("validation", share, "answers", most=most) as progress:
        answers = _answers(scratch / "greedy", asked, decoder, tokenizer, settings, True, progress)

    def right() -> int:
        found = zip(rows, answers, strict=True)
        return sum(_correct(row, tokenizer.decode(answer.ids), answer) for row, answer in found)

    return distributed.on_rank0(right) / len(rows)


def _prompts(
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    answered: Sequence[int],
    settings: EvaluationSettings,
) -> dict[str, list[tuple[str, Sequence[int]]]]:
    """Lists what is asked greedily, once a row, and by sampling: (key, prompt)s.

    The keys do not name the policy: every policy meets the same random numbers, and differences
    between policies have less noise.
    """
    return {
        "greedy": [(f"greedy/{rows[i].id}", pairs[i].prompt) for i in answered],
        "sampled": [
            (f"sample/{rows[i].id}/{n}", pairs[i].prompt)
            for i in answered
            for n in range(settings.answers(rows[i]) - 1)
        ],
    }


def _answers(
    path: Path,
    prompts: Sequence[tuple[str, Sequence[int]]],
    decoder: Decoder,
    tokenizer: Tokenizer,
    settings: EvaluationSettings,
    greedily: bool,
    progress: Callable[[int, int], None],
) -> list[Response]:
    """Returns the responses to (key, prompt)s in their order, on rank 0; [] on the others.

    The ranks share the work.
    """
    if not prompts:
        return []
    requests = [Request(key, prompt, i) for i, (key, prompt) in enumerate(prompts)]
    sampling = replace(settings.sampling, temperature=0.0) if greedily else settings.sampling
    longest = max(len(prompt) for _, prompt in prompts) + sampling.max_new_tokens
    share = -(-len(prompts) // distributed.world_size()) + TOGETHER
    rows = min(settings.batch_rows, len(prompts), share)

    def new_engine(decoder: Decoder) -> Engine:
        return Engine(
            decoder, sampling, tokenizer.end_ids, settings.seed, longest=longest, rows=rows
        )

    def record(request: Request, response: Response) -> dict[str, object]:
        return asdict(response)

    records = make_answers(path, requests, decoder, new_engine, record, progress)
    return [Response(**record) for record in records]


def _records(
    rows: Sequence[Row], pairs: Sequence[Pair], logps: torch.Tensor
) -> list[dict[str, object]]:
    """A record a row, before it is answered: its real response and that one's log-prob, nats."""
    return [
        {
            "id": row.id,
            "prompt": row.history[-1]["content"],
            "real": row.response,
            "logp": float(logp),
            "n_tokens": len(pair.real),
        }
        for row, pair, logp in zip(rows, pairs, logps, strict=True)
    ]


def _check(
    row: Row, answers: Sequence[Response], tokenizer: Tokenizer, samples: int
) -> tuple[dict[str, object], torch.Tensor]:
    """Decodes the answers to a row, the greedy one first, and checks them where a program can.

    Returns what the row's record says of them, and its line of numbers (4,): greedy one right,
    share of the samples right, tokens, share cut at max_new_tokens.
    """
    texts = [tokenizer.decode(answer.ids) for answer in answers]
    right: list[bool] = []
    if row.kind is not None:
        right = [_correct(row, text, a) for text, a in zip(texts, answers, strict=True)]
    cut = sum(answer.finish_reason == "length" for answer in answers) / len(answers)
    tokens = sum(len(answer.ids) for answer in answers)
    numbers = torch.tensor([sum(right[:1]), sum(right[1:]) / max(1, samples), tokens, cut])
    return {"greedy": texts[0], "sampled": texts[1:], "correct": right}, numbers


def _correct(row: Row, text: str, response: Response) -> bool:
    # A response that never ended is not an answer, whatever it holds.
    return response.finish_reason == "stop" and embedded.check(str(row.kind), row.answer, text)


def _summary(name: str, values: np.ndarray, kinds: Sequence[str]) -> dict[str, float]:
    """Returns the mean, its standard error over prompts, and the mean of each kind."""
    out = {name: float(values.mean()), f"{name}_se": standard_error(values)}
    for kind in sorted(set(kinds)):
        out[f"{name}/{kind}"] = float(values[[k == kind for k in kinds]].mean())
    return out
