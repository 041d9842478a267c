"""The guiding model: a conditional autoencoder whose latent space measures how far two responses
are apart.

Encoder: GPT-2 reads [x; y; m query embeddings]; their final hidden states are projected to z (m x
k). Decoder: GPT-2 reads [W z as m prefix embeddings; x; y] and predicts y (LD-Align, arXiv
2404.06390, sections 3 and 4.1; m, k and the dropouts are ldalign's choices, see `GuideConfig`). The
distance of two responses to one prompt is ||E(x, y) - E(x, y')||_2 over the whole latent, in
float32. Other choices: both towers start as the policy (`policy_guide`), and the angle instead of
the length (`cosine_distance`).

A strong decoder can ignore z and predict y from its own past. Against that, training hides a share
of the response tokens the decoder reads (word dropout, arXiv 1511.06349), and the held-out losses
always say whether z is used: `latent_gain` = loss with another row's z - loss with the true z, in
nats per token. A new guide's blocks start wider than GPT-2's 0.02 (`new_guide`): at small widths,
0.02 leaves z without a trace of the text for hundreds of steps.

The guide reads text through a tokenizer of its own: that of the model its towers start from, or a
byte-level BPE trained on the data. It adds no chat template and no BOS.

Shapes: N flat tokens, D width, Z = m k latent width, B examples, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from torch import Tensor, nn

from ldalign import ops
from ldalign.models.layout import Packed
from ldalign.models.weights import LanguageModel
from ldalign.objective import Metric, latent_distance
from ldalign.system.errors import InputError
from ldalign.system.memory import naming
from ldalign.system.partial_rows import table

END = "<|endoftext|>"
NO_LATENT = -1


@dataclass(frozen=True)
class GuideConfig:
    """What the two towers do not say themselves; kept in the guide folder's guide.json."""

    latent_tokens: int = 1  # m
    latent_width: int = 256  # k
    token_dropout: float = 0.5  # share of response tokens hidden from the decoder in training
    # share of training examples without z, so that the loss without z means something
    latent_dropout: float = 0.1
    max_tokens: int = 512  # prompt and response together; the prompt loses its beginning first
    end_token: str = END  # of prompts and responses, in the tokenizer; guide.json may lack it


@dataclass(frozen=True)
class Example:
    """One (prompt, response) in the guide's own token ids.

    The response ends with the end token, also where the policy's sample was cut at `max_new_tokens`
    and has none: the guide reads texts. Only one that `max_tokens` cuts here loses it.
    """

    prompt: list[int]
    response: list[int]


class Guide(nn.Module):
    """Encoder, latent, decoder. `forward` gives the reconstruction log-probs, so that FSDP gathers
    weights for it.
    """

    def __init__(
        self,
        encoder: LanguageModel,
        decoder: LanguageModel,
        config: GuideConfig,
        tokenizer: tokenizers.Tokenizer,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.encoder, self.decoder = encoder, decoder
        width = encoder.embedding.embedding_dim
        self.queries = nn.Parameter(torch.zeros(config.latent_tokens, width))
        self.to_latent = nn.Linear(width, config.latent_width)
        self.from_latent = nn.Linear(config.latent_width, decoder.embedding.embedding_dim)
        end = tokenizer.token_to_id(config.end_token)
        if end is None:
            raise InputError(
                f"the guide's tokenizer has no {config.end_token} token; use the tokenizer.json "
                "its weights came with"
            )
        self.end_id: int = end

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of both towers: what FSDP wraps one by one."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def example(self, prompt: str, response: str) -> Example:
        """Token ids of a pair of texts: [prompt, end] and [response, end], cut to `max_tokens` in
        all.

        The end token serves as separator too. An over-long response keeps its beginning and loses
        its end token; an over-long prompt keeps its end.
        """
        x = [*self.tokenizer.encode(prompt, add_special_tokens=False).ids, self.end_id]
        y = [*self.tokenizer.encode(response, add_special_tokens=False).ids, self.end_id]
        y = y[: self.config.max_tokens * 3 // 4] if len(x) + len(y) > self.config.max_tokens else y
        return Example(x[-max(1, self.config.max_tokens - len(y)) :], y)

    def encode(self, examples: Sequence[Example]) -> Tensor:
        """The latents (B, Z) float32 of B examples. A prompt that several of them share is read
        once.
        """
        device, m = self.queries.device, self.config.latent_tokens
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for i, example in enumerate(examples):
            by_prompt.setdefault(tuple(example.prompt), []).append(i)
        ids: list[int] = []
        at: list[list[int]] = [[]] * len(examples)  # the query positions of each example
        for prompt, members in by_prompt.items():
            ids += prompt
            for i in members:
                # id 0 where a query goes; its embedding is replaced
                ids += [*examples[i].response, *[0] * m]
                at[i] = list(range(len(ids) - m, len(ids)))
        layout = Packed(
            [
                [len(x), *(len(examples[i].response) + m for i in own)]
                for x, own in by_prompt.items()
            ],
            device,
        )
        queries = torch.tensor(at, device=device).flatten()  # (B m,)
        embedded = self.encoder.embedding(torch.tensor(ids, device=device))
        embedded = embedded.index_copy(
            0, queries, self.queries.to(embedded.dtype).repeat(len(examples), 1)
        )
        hidden = self.encoder.hidden(embedded, layout)[queries]
        return self.to_latent(hidden).float().unflatten(0, (len(examples), m)).flatten(1)

    def decode(
        self,
        examples: Sequence[Example],
        latents: Tensor,
        hidden_tokens: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """(M,) float32 log-probs of all response tokens, given latents (B, Z); with a scale, their
        sum times -scale ().

        hidden_tokens (M,) bool: the response tokens the decoder may not read; None: it reads them
        all.
        """
        device, m = latents.device, self.config.latent_tokens
        sizes = [m + len(e.prompt) + len(e.response) for e in examples]
        ids = torch.tensor(
            [t for e in examples for t in (*[0] * m, *e.prompt, *e.response)], device=device
        )
        ends = torch.tensor(sizes, device=device).cumsum(0)
        starts = ends - torch.tensor(sizes, device=device)
        prefix = (starts[:, None] + torch.arange(m, device=device)).flatten()
        lengths = torch.tensor([len(e.response) for e in examples], device=device)
        response = _ranges(ends - lengths, lengths)  # (M,) positions of the response tokens
        embedded = self.decoder.embedding(ids)
        if hidden_tokens is not None:
            embedded = embedded.index_fill(0, response[hidden_tokens], 0.0)
        prefix_embeddings = self.from_latent(
            latents.unflatten(1, (m, -1)).to(embedded.dtype)
        ).flatten(0, 1)
        embedded = embedded.index_copy(0, prefix, prefix_embeddings.to(embedded.dtype))
        hidden = self.decoder.hidden(embedded, Packed(sizes, device))
        head = hidden[response - 1], self.decoder.output_weight, ids[response]
        return ops.linear_logprob(*head) if scale is None else ops.sft_loss(*head, scale)[0]

    def forward(
        self,
        examples: Sequence[Example],
        latents_of: Sequence[int] | None = None,
        dropout: tuple[Tensor, Tensor] | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """(M,) float32 log-probs of the examples' response tokens; with a scale, their sum times
        -scale ().

        latents_of: whose latent each example is decoded with, as an index into `examples`;
        NO_LATENT: zeros; None: its own. dropout: in training, which latents to keep (B,) bool and
        which response tokens to hide (M,) bool.
        """
        latents = self.encode(examples)
        if latents_of is not None:
            index = torch.tensor(list(latents_of), device=latents.device)
            latents = latents[index.clamp(min=0)] * (index != NO_LATENT)[:, None]
        if dropout is None:
            return self.decode(examples, latents, scale=scale)
        kept, hidden_tokens = dropout
        return self.decode(examples, latents * kept[:, None].to(latents), hidden_tokens, scale)

    @torch.no_grad()
    def distance(
        self,
        prompts: Sequence[str],
        real: Sequence[str],
        generated: Sequence[str],
        batch_tokens: int = 8192,
        metric: Metric = "euclidean",
        ids: Sequence[str] | None = None,
        path: Path | None = None,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> Tensor:
        """(N,) float32 on the CPU: ||E(x, y) - E(x, y')||_2 of N prompts with two responses each;
        no dropout.

        metric "cosine": `cosine_distance` of E(x, y) and E(x, y') instead. All ranks call it with
        the same rows and share the work; the batches, and so the result, are the same for any
        number of them. ids: of the rows, for errors; None: their numbers. path: as in
        `partial_rows.table`, for a stage that can be gone on with. Raises NumericsError naming a
        row whose distance is not finite, OutOfMemory.
        """
        pairs = [
            (self.example(x, y), self.example(x, g))
            for x, y, g in zip(prompts, real, generated, strict=True)
        ]
        costs = [_size(real) + _size(other) for real, other in pairs]
        names = range(len(pairs)) if ids is None else ids

        def measure(batch: Sequence[int]) -> Tensor:
            what = f"latents of {len(batch)} pairs of {sum(costs[i] for i in batch)} tokens"
            with naming(
                lambda: what, "lower training.micro_tokens, or guide.max_tokens for another guide"
            ):
                z = self.encode([e for i in batch for e in pairs[i]])  # (2 rows, Z)
                return latent_distance(z[0::2], z[1::2], metric)[:, None].cpu()

        def refusal(i: int, value: float) -> str:
            return (
                f"row {names[i]}: the latent distance is {value}; look at its texts and at the "
                "guide's losses"
            )

        batches = _runs(
            sorted(range(len(pairs)), key=lambda i: (-costs[i], i)), costs, batch_tokens
        )
        return table(batches, measure, 1, refusal, path, progress)[:, 0].float()


def _size(example: Example) -> int:
    return len(example.prompt) + len(example.response)


def _runs(items: Sequence[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    """Consecutive items in runs of at most `budget` cost; a dearer item gets a run of its own."""
    runs: list[list[int]] = []
    room = 0
    for i in items:
        if not runs or costs[i] > room:
            runs.append([])
            room = budget
        runs[-1].append(i)
        room -= costs[i]
    return runs


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """[s, s + 1, ..., s + n - 1] for each start s and length n, end to end."""
    offsets = lengths.cumsum(0) - lengths
    steps = torch.arange(int(lengths.sum()), device=starts.device)
    return steps + (starts - offsets).repeat_interleave(lengths)
