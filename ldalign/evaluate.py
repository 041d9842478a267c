"""Held-out evaluation: the likelihood of real responses, and for rows a program can check, accuracy.

Accuracy is measured greedily and on samples (several a prompt); standard errors are over prompts, since samples of one
prompt are not independent.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ldalign import distributed, tasks
from ldalign.batches import Pair
from ldalign.data import Row
from ldalign.decoders import new_decoder
from ldalign.generate import generate_ids
from ldalign.mistral import Mistral
from ldalign.sampling import Response, Sampling
from ldalign.scoring import response_logps
from ldalign.tokenizer import Tokenizer


@dataclass(frozen=True)
class EvaluationSettings:
    """samples: answers a prompt at `sampling`'s temperature, beside the greedy one.

    answer_all: a greedy answer also to rows that no program can check (for a reward model).
    """

    samples: int
    sampling: Sampling
    batch_rows: int
    micro_tokens: int
    seed: int
    answer_all: bool = False


@torch.no_grad()
def evaluate(
    model: Mistral,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    settings: EvaluationSettings,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda rows, tokens: None,
    release: bool = False,
) -> tuple[dict[str, float], list[tuple[int, dict[str, object]]]]:
    """Metrics over all rows, the same on every rank, and this rank's records (row index; likelihood, texts, verdicts).

    Metrics: nll/real (nats per response token), tokens_generated; where rows can be checked also accuracy/greedy and
    accuracy/sampled with `_se` standard errors, per kind as accuracy/greedy/KIND, and truncated_frac. A row that cannot
    be checked is answered with `answer_all` alone, and has no samples and an empty `correct`. release: the model may
    lose its weights, so that there is never a second copy of them.
    """
    logps = response_logps(model, pairs, settings.micro_tokens, device)[:, 0]
    metrics = {"rows": float(len(rows)), "nll/real": float(-logps.sum() / sum(len(p.real) for p in pairs))}
    answered = [i for i, row in enumerate(rows) if settings.answer_all or row.kind is not None]
    checkable = [i for i in answered if rows[i].kind is not None]
    mine = [i for i in answered if i % distributed.world_size() == distributed.rank()]
    ends = tokenizer.end_ids
    decoder = new_decoder(model, release)
    greedy = generate_ids(
        decoder, [pairs[i].prompt for i in mine], [f"greedy/{rows[i].id}" for i in mine], ends,
        replace(settings.sampling, temperature=0.0), settings.seed, settings.batch_rows, progress,
    )  # fmt: skip
    # The keys do not name the policy: every policy meets the same random numbers, and differences have less noise.
    repeated = [(i, n) for i in mine if rows[i].kind is not None for n in range(settings.samples)]
    samples = iter(generate_ids(
        decoder, [pairs[i].prompt for i, _ in repeated], [f"sample/{rows[i].id}/{n}" for i, n in repeated], ends,
        settings.sampling, settings.seed, settings.batch_rows, progress,
    ))  # fmt: skip
    own = range(distributed.rank(), len(rows), distributed.world_size())
    records: dict[int, dict[str, object]] = {
        i: {"id": rows[i].id, "prompt": rows[i].history[-1]["content"], "real": rows[i].response,
            "logp": float(logps[i]), "n_tokens": len(pairs[i].real)} for i in own
    }  # fmt: skip
    table = torch.zeros(len(mine), 4, dtype=torch.float64)  # greedy right, share of samples right, tokens, cut
    for n, i in enumerate(mine):
        checked = rows[i].kind is not None
        answers = [greedy[n], *(next(samples) for _ in range(settings.samples if checked else 0))]
        texts = [tokenizer.decode(a.ids) for a in answers]
        right = [_correct(rows[i], text, a) for text, a in zip(texts, answers, strict=True)] if checked else []
        table[n] = torch.tensor([sum(right[:1]), sum(right[1:]) / max(1, settings.samples),
                                 sum(len(a.ids) for a in answers),
                                 sum(a.finish_reason == "length" for a in answers) / len(answers)])  # fmt: skip
        records[i] |= {"greedy": texts[0], "sampled": texts[1:], "correct": right}
    whole = torch.stack([distributed.merge_rows(len(rows), mine, column) for column in table.T])
    if checkable:
        kinds = [str(rows[i].kind) for i in checkable]
        metrics |= _summary("accuracy/greedy", whole[0, checkable].numpy(), kinds)
        if settings.samples:
            metrics |= _summary("accuracy/sampled", whole[1, checkable].numpy(), kinds)
    if answered:
        metrics |= {"tokens_generated": float(whole[2].sum()), "truncated_frac": float(whole[3, answered].mean())}
    return metrics, list(records.items())


def _correct(row: Row, text: str, response: Response) -> bool:
    # A response that never ended is not an answer, whatever it holds.
    return response.finish_reason == "stop" and tasks.check(str(row.kind), row.answer, text)


def _summary(name: str, values: np.ndarray, kinds: Sequence[str]) -> dict[str, float]:
    """Mean, standard error over prompts, and the mean of each kind."""
    out = {name: float(values.mean()), f"{name}_se": standard_error(values)}
    for kind in sorted(set(kinds)):
        out[f"{name}/{kind}"] = float(values[[k == kind for k in kinds]].mean())
    return out


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values; 0 for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
