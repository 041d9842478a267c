"""The guide: a conditional autoencoder whose latents tell how far two responses are apart.

Encoder: GPT-2 reads [x; y; m query embeddings]; their final hidden states are projected to z (m x
k). Decoder: GPT-2 reads [W z as m prefix embeddings; x; y] and predicts y (LD-Align, arXiv
2404.06390, sections 3 and 4.1; m, k and the dropouts are ldalign's choices, see `GuideConfig`). The
distance of two responses to one prompt is ||E(x, y) - E(x, y')||_2 over the whole latent, in
float32 (`ldalign.objective.latent_distance`, which can also measure the angle). Towers may also
start as the policy (`ldalign.models.guide_folder.policy_guide`).

A strong decoder can ignore z and predict y from its own past. Against that, training hides a share
of the response tokens the decoder reads (word dropout, arXiv 1511.06349), and the held-out losses
always say whether z is used: `latent_gain` = loss with another row's z - loss with the true z, in
nats per token. A new guide's blocks start wider than GPT-2's 0.02 (`new_guide`): at small widths,
0.02 leaves z without a trace of the text for hundreds of steps.

The guide reads text through a tokenizer of its own: that of the model its towers start from, or a
byte-level BPE trained on the data. It adds no chat template and no BOS.

Shapes: B examples, N flat tokens, M response tokens of all examples, D width, V vocabulary; m
latent tokens of width k, Z = m k latent width.
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
# What helps where the memory does not hold a batch of latents.
LOWER_FOR_LATENTS = "lower training.micro_tokens, or guide.max_tokens for another guide"
NO_LATENT = -1  # of `Guide.forward`: an example that is decoded with zeros for its latent


@dataclass(frozen=True)
class GuideConfig:
    """What the two towers do not say themselves; kept in the guide folder's guide.json."""

    latent_tokens: int = 1  # m
    latent_width: int = 256  # k
    token_dropout: float = 0.5  # share of response tokens hidden from the decoder in training
    # Share of training examples without z, so that the loss without z means something.
    latent_dropout: float = 0.1
    max_tokens: int = 512  # prompt and response together; the prompt loses its beginning first
    end_token: str = END  # ends prompts and responses; a guide.json may lack the key


@dataclass(frozen=True)
class Example:
    """One prompt and one response, in the guide's own token ids.

    The response ends with the end token, also where the policy's sample was cut at `max_new_tokens`
    and has none: the guide reads texts. Only one that `max_tokens` cuts here loses it.
    """

    prompt: list[int]
    response: list[int]


class Guide(nn.Module):
    """Encoder, latent, decoder.

    `forward` gives the reconstruction log-probs and `loss` their sum in training: FSDP gathers the
    weights for these two.
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
        """Returns a pair of texts as token ids: [prompt, end] and [response, end].

        Together they have at most `max_tokens`. The end token serves as separator too. Of a pair
        that is too long, a response above three quarters of the room keeps its beginning and loses
        its end token; then the prompt keeps its end.
        """
        x = [*self.tokenizer.encode(prompt, add_special_tokens=False).ids, self.end_id]
        y = [*self.tokenizer.encode(response, add_special_tokens=False).ids, self.end_id]
        most = self.config.max_tokens
        if len(x) + len(y) > most:
            y = y[: most * 3 // 4]  # a quarter stays for the prompt
        return Example(x[-max(1, most - len(y)) :], y)

    def encode(self, examples: Sequence[Example]) -> Tensor:
        """Returns the latents (B, Z) float32 of B examples.

        A prompt that several of them share is read once.
        """
        device, m = self.queries.device, self.config.latent_tokens
        by_prompt: dict[tuple[int, ...], list[int]] = {}  # the examples of each prompt
        for i, example in enumerate(examples):
            by_prompt.setdefault(tuple(example.prompt), []).append(i)
        ids: list[int] = []  # N of them: [x; y; m queries; y'; m queries; ...], prompt by prompt
        lengths: list[list[int]] = []
        at: list[list[int]] = [[]] * len(examples)  # where each example's queries stand in ids
        for prompt, members in by_prompt.items():
            ids += prompt
            lengths.append([len(prompt)])
            for i in members:
                # Id 0 where a query goes: its embedding is replaced below.
                ids += [*examples[i].response, *[0] * m]
                lengths[-1].append(len(examples[i].response) + m)
                at[i] = list(range(len(ids) - m, len(ids)))
        places = torch.tensor(at, device=device).flatten()  # (B m,)
        embedded = self.encoder.embedding(torch.tensor(ids, device=device))  # (N, D)
        queries = self.queries.to(embedded.dtype).repeat(len(examples), 1)  # (B m, D)
        embedded = embedded.index_copy(0, places, queries)
        hidden = self.encoder.hidden(embedded, Packed(lengths, device))[places]  # (B m, D)
        # float32 whatever the towers compute in: a distance is a difference of close numbers.
        latents = self.to_latent(hidden).float()  # (B m, k)
        return latents.unflatten(0, (len(examples), m)).flatten(1)

    def decode(
        self, examples: Sequence[Example], latents: Tensor, hidden_tokens: Tensor | None = None
    ) -> Tensor:
        """The log-probs (M,) float32 of all response tokens, given latents (B, Z).

        hidden_tokens (M,) bool: the response tokens the decoder may not read; None: it reads all.
        """
        return ops.linear_logprob(*self._head_inputs(examples, latents, hidden_tokens))

    def forward(
        self, examples: Sequence[Example], latents_of: Sequence[int] | None = None
    ) -> Tensor:
        """The log-probs (M,) float32 of the examples' response tokens.

        latents_of: whose latent each example is decoded with, as an index into `examples`;
        NO_LATENT: zeros; None: its own.
        """
        latents = self.encode(examples)  # (B, Z)
        if latents_of is not None:
            index = torch.tensor(list(latents_of), device=latents.device)
            latents = latents[index.clamp(min=0)] * (index != NO_LATENT)[:, None]
        return self.decode(examples, latents)

    def loss(
        self, examples: Sequence[Example], kept: Tensor, hidden_tokens: Tensor, scale: float
    ) -> Tensor:
        """scale times the summed reconstruction loss () of the examples, in training: fused, no
        log-prob a token is kept (`objective.reconstruction_loss` is this with scale 1 / M).

        kept (B,) bool: the examples that are decoded with their latent, the others with zeros.
        hidden_tokens (M,) bool: the response tokens that the decoder may not read.
        """
        latents = self.encode(examples)  # (B, Z)
        latents = latents * kept[:, None].to(latents)
        return ops.sft_loss(*self._head_inputs(examples, latents, hidden_tokens), scale)[0]

    def _head_inputs(
        self, examples: Sequence[Example], latents: Tensor, hidden_tokens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the decoder's head takes: the hidden states (M, D) that predict the response tokens,
        the output weight (V, D), and those tokens (M,).
        """
        device, m = latents.device, self.config.latent_tokens
        sizes = [m + len(e.prompt) + len(e.response) for e in examples]
        ids = torch.tensor(
            [t for e in examples for t in (*[0] * m, *e.prompt, *e.response)], device=device
        )  # (N,), id 0 where the latent goes
        ends = torch.tensor(sizes, device=device).cumsum(0)  # (B,)
        starts = ends - torch.tensor(sizes, device=device)
        prefix = (starts[:, None] + torch.arange(m, device=device)).flatten()  # (B m,)
        lengths = torch.tensor([len(e.response) for e in examples], device=device)
        response = _ranges(ends - lengths, lengths)  # (M,) positions of the response tokens
        embedded = self.decoder.embedding(ids)  # (N, D)
        if hidden_tokens is not None:
            embedded = embedded.index_fill(0, response[hidden_tokens], 0.0)
        latents = latents.unflatten(1, (m, -1)).to(embedded.dtype)  # (B, m, k)
        prefix_embeddings = self.from_latent(latents).flatten(0, 1)  # (B m, D)
        embedded = embedded.index_copy(0, prefix, prefix_embeddings.to(embedded.dtype))
        hidden = self.decoder.hidden(embedded, Packed(sizes, device))
        # The token before a response token predicts it; before the first is the prompt's last.
        return hidden[response - 1], self.decoder.output_weight, ids[response]

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
        """Returns how far two responses are apart, for each of N prompts: (N,) float32 on the CPU.

        It is `ldalign.objective.latent_distance` of E(x, y) and E(x, y'), without dropout. All
        ranks call it with the same rows and share the work; the batches, and so the result, are the
        same for any number of them.

        batch_tokens: the most tokens of a batch of pairs.
        ids: the rows' names in errors; None: their numbers.
        path, progress: as in `partial_rows.table`, for a stage that can be gone on with.

        Raises NumericsError naming a row whose distance is not finite, OutOfMemory.
        """
        pairs = [
            (self.example(x, y), self.example(x, g))
            for x, y, g in zip(prompts, real, generated, strict=True)
        ]
        costs = [_size(real) + _size(other) for real, other in pairs]  # tokens
        names = range(len(pairs)) if ids is None else ids

        def measure(batch: Sequence[int]) -> Tensor:
            what = f"latents of {len(batch)} pairs of {sum(costs[i] for i in batch)} tokens"
            with naming(lambda: what, LOWER_FOR_LATENTS):
                # A pair's two responses lie side by side, so that they share their prompt.
                z = self.encode([e for i in batch for e in pairs[i]])  # (2 rows, Z)
                return latent_distance(z[0::2], z[1::2], metric)[:, None].cpu()  # (rows, 1)

        def refusal(i: int, value: float) -> str:
            return (
                f"row {names[i]}: the latent distance is {value}; look at its texts and at the "
                "guide's losses"
            )

        # Longest first: pairs of a batch are about as long, and memory peaks at once.
        longest_first = sorted(range(len(pairs)), key=lambda i: (-costs[i], i))
        batches = _runs(longest_first, costs, batch_tokens)
        return table(batches, measure, 1, refusal, path, progress)[:, 0].float()


def _size(example: Example) -> int:
    """The tokens of an example."""
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
    offsets = lengths.cumsum(0) - lengths  # where each range begins in the result
    steps = torch.arange(int(lengths.sum()), device=starts.device)
    return steps + (starts - offsets).repeat_interleave(lengths)
