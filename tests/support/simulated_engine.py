"""The engine's schedule without a model: simulated_engine.py [--rows 2560] [--places 256]
[--samples 1].

Runs the engine, and the module decoder with what on a GPU would be CUDA graphs, over a model whose
logits are a hash of (row, position) and which ends each response at a length drawn beforehand.
Prints, for rows that enter chunk by chunk and for rows that enter as others leave, and for some
sizes of a step: how many steps there are, how many rows compute in one, the share of steps that
hold a part of a prompt (and so are no graphs), tokens a step, and how many graphs there are. A
minute.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from fake_graphs import FakeGraphs
from torch import Tensor

from ldalign.generation.answers import longest_first
from ldalign.generation.decoders import ModuleDecoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.paged_cache import PAGE, pages_for
from ldalign.generation.sampling import Response, Sampling
from ldalign.models.mistral import Mistral

END, VOCABULARY = 0, 8
UNLIMITED = 2**40  # bytes of cache


@dataclass
class Counts:
    """What a schedule came to, an entry a step."""

    busy: list[int] = field(default_factory=list)  # rows that computed
    tokens: list[int] = field(default_factory=list)  # new tokens that they computed
    mixed: list[bool] = field(default_factory=list)  # whether a part of a prompt was among them
    graphs: set[tuple[int, int]] = field(default_factory=set)  # their rows and pages

    def table(self) -> dict[str, float]:
        """The numbers that are printed."""
        return {
            "steps": len(self.busy),
            "rows busy": sum(self.busy) / len(self.busy),
            "mixed": sum(self.mixed) / len(self.mixed),
            "tokens a step": sum(self.tokens) / len(self.tokens),
            "graphs": len(self.graphs),
        }


class HashModel:
    """Stands for a Mistral. A prompt's last id is VOCABULARY + its row's number; ends (rows,) are
    the tokens of prompt and response together, and the logits depend on (row, position) alone.

    spare: the number of the page of rows that only fill up a graph.
    """

    config = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=1)
    output_weight = torch.eye(VOCABULARY)

    def __init__(self, ends: np.ndarray, spare: int) -> None:
        self.ends, self.spare = ends, spare
        self.row_of = np.zeros(spare + 1, dtype=np.int64)  # by the page of a row's newest token
        self.counts = Counts()

    def __call__(self, ids: Tensor, layout: Any, head: Callable[[Tensor, Tensor], Tensor]) -> Any:
        counts, held = layout.rows.numpy().T  # (R,) new tokens, and those before them
        pages = layout.pages.numpy()  # (R, P)
        last, position = counts.cumsum() - 1, held + counts - 1  # (R,) of a row's last new token
        there, mixed = pages[:, 0] < self.spare, bool((counts > 1).any())
        if not mixed:
            self.counts.graphs.add(pages.shape)
        if there.any():  # else the step is computed to be captured
            self.counts.busy.append(int(there.sum()))
            self.counts.tokens.append(int(counts[there].sum()))
            self.counts.mixed.append(mixed)
        every = np.arange(len(pages))
        before = self.row_of[pages[every, (position - 1).clip(0) // PAGE]]
        number = ids.numpy()[last] - VOCABULARY
        row = np.where((number >= 0) & (number < len(self.ends)), number, before)
        self.row_of[pages[every, position // PAGE]] = row
        hidden = torch.zeros(len(ids), VOCABULARY)
        hidden[torch.from_numpy(last)] = self._logits(row, position)
        return head(hidden, self.output_weight)

    def _logits(self, row: np.ndarray, position: np.ndarray) -> Tensor:
        """(R, V) after the tokens at these positions (R,) of these rows (R,)."""
        number = ((row * 4096 + position)[:, None] * VOCABULARY + np.arange(VOCABULARY)).view("u8")
        mixed = number * np.uint64(0x9E3779B97F4A7C15)
        logits = ((mixed ^ (mixed >> np.uint64(29))) >> np.uint64(40)).astype(np.float32) / 2**22
        # The next token is at position + 1, and the last of all at ends - 1.
        logits[:, END] = np.where(position + 2 >= self.ends[row], 1e4, -1e4)
        return torch.from_numpy(logits)


def lengths(rows: int, most: int, samples: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompts (rows,), 100 to 600, and of responses (rows,): lognormal, a mean of 180
    where `most` does not cut them. samples: rows of one prompt.
    """
    draw = np.random.default_rng(seed)
    spread = 0.6
    responses = draw.lognormal(np.log(180) - spread**2 / 2, spread, rows).astype(np.int64)
    prompts = draw.integers(100, 601, -(-rows // samples)).repeat(samples)[:rows]
    return prompts, responses.clip(1, most)


def simulate(
    prompts: np.ndarray,
    responses: np.ndarray,
    places: int,
    step_tokens: int,
    chunk: int | None = None,
    samples: int = 1,
) -> tuple[Counts, dict[int, Response]]:
    """Makes responses of these tokens to prompts of those; returns the counts, and the responses by
    row.

    chunk: rows that have all left before others enter; None: a row enters as another leaves.
    samples: so many rows in turn have one prompt, but for the last token, by which they are told
    apart, and share its full pages.
    """
    most, longest = int(responses.max()), int((prompts + responses).max())
    model = HashModel(prompts + responses, places * pages_for(longest))
    engine = Engine(
        ModuleDecoder(cast(Mistral, model), lambda: FakeGraphs(watch=False)),
        Sampling(most),
        [END],
        0,
        longest=longest,
        rows=places,
        step_tokens=step_tokens,
        cache_bytes=UNLIMITED,
    )
    made: dict[int, Response] = {}
    named = VOCABULARY + len(prompts)  # the first token, of a prompt's own
    requests = longest_first(
        Request(str(i), [named + i // samples, *[1] * (int(n) - 2), VOCABULARY + i], i)
        for i, n in enumerate(prompts)
    )
    size = chunk or len(requests)
    for i in range(0, len(requests), size):
        for request, response in engine.run(requests[i : i + size]):
            made[request.index] = response
    assert [len(made[i].ids) for i in range(len(made))] == responses.tolist()
    return model.counts, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2560)
    parser.add_argument("--places", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--samples", type=int, default=1, help="rows of one prompt")
    args = parser.parse_args()
    prompts, responses = lengths(args.rows, args.max_new_tokens, args.samples)
    print(
        f"{args.rows} rows, {args.places} places; tokens: prompts {prompts.mean():.0f}, responses "
        f"{responses.mean():.0f}, at most {responses.max()}"
    )
    for step_tokens in (512, 16384):
        for name, chunk in (("chunk by chunk", args.places), ("as others leave", None)):
            counts, _ = simulate(prompts, responses, args.places, step_tokens, chunk, args.samples)
            said = ", ".join(f"{key} {value:.4g}" for key, value in counts.table().items())
            print(f"{step_tokens:>5} tokens a step, {name}: {said}", flush=True)


if __name__ == "__main__":
    main()
