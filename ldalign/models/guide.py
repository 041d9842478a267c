"""The guide: a conditional autoencoder whose latents tell how far two responses are apart.

Encoder E: a transformer reads [x | y | y'], and each response becomes a latent z. Decoder D: a
transformer reads [x | y] and predicts y with the help of z (LD-Align, arXiv 2404.06390, sections 3
and 4.1). The distance of two responses to one prompt is ||E(x, y) - E(x, y')||_2 over the whole
latent, in float32 (`ldalign.objective.latent_distance`, which can also measure the angle).

The paper says no more than that. What is ldalign's own, each against a way in which text
autoencoders come to ignore their latent (docs/guide.md derives and measures it):

* readout: z is a linear map of the mean of the response tokens' states (arXiv 1911.03976), or of
  the states of query tokens after the response.
* injection: the states that the decoder's head reads are scaled and shifted by vectors made of z
  (FiLM, arXiv 1709.07871), or soft tokens made of z stand between prompt and response, or both.
* the sibling contrast, beside the paper's loss: a response must be likelier with its own latent
  than with that of the other response to the same prompt (`objective.contrast_loss`).
* one tower that is not trained, such as the policy, may be encoder and decoder at once: then one
  forward pass serves both, and all that is fitted or trained lies between them (`Latent`).

Shapes: P pairs, R = 2 P responses in the order real, generated, real, ...; N flat tokens, M
response tokens of all responses, D width, V vocabulary; m latent tokens of width k, Z = m k latent
width; Q readings, in which one response is predicted with one latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldalign import ops
from ldalign.data.pairs import Pair
from ldalign.data.rows import Message, Row, history_text
from ldalign.data.tokenizer import Tokenizer
from ldalign.models.layout import Packed
from ldalign.models.weights import LanguageModel
from ldalign.objective import Metric, contrast_loss, latent_distance
from ldalign.system.errors import InputError
from ldalign.system.memory import naming
from ldalign.system.partial_rows import table
from ldalign.system.transfer import to_device

END = "<|endoftext|>"
# What helps where the memory does not hold a batch of latents.
LOWER_FOR_LATENTS = "lower training.micro_tokens, or guide.max_tokens for another guide"
NO_LATENT = -1  # of a reading: the learned latent that stands for none

# Adam moves every entry of a matrix by the learning rate in a step, and hundreds of places of a
# latent add up to a shift: at the rate that the map to the latent needs, log-probs would move by
# whole nats a step, and own latents end as worse than none. So the way out is slower than the way
# in, which lags anyhow (arXiv 1901.05534).
WAY_OUT = 0.2

Readout = Literal["mean", "queries"]
Injection = Literal["output", "prefix", "both"]
LatentNorm = Literal["none", "rms"]


@dataclass(frozen=True)
class GuideConfig:
    """What a distance depends on, beside the weights; kept in the guide folder's guide.json."""

    readout: Readout = "mean"
    latent_tokens: int = 1  # m
    latent_width: int = 256  # k
    # rms: z is scaled to a root mean square of 1, so that a distance is an angle, and no response
    # far from all others by the length of its latent alone
    latent_norm: LatentNorm = "none"
    injection: Injection = "output"
    max_tokens: int | None = 512  # prompt and longer response together; None: whatever comes
    end_token: str = END  # ends the responses that ended by themselves


@dataclass(frozen=True)
class GuideLoss:
    """What training minimises beside the paper's loss, and what it keeps from the decoder."""

    contrast: float = 10.0  # weight of the sibling contrast; 0: the paper's loss alone
    bag_of_words: float = 0.0  # weight of predicting a response's tokens from its latent alone
    token_dropout: float = 0.0  # a response's share of hidden tokens is drawn between 0 and this
    latent_dropout: float = 0.1  # share of responses that are read with no latent
    latent_noise: float = 0.0  # deviation of the noise on latents, over their root mean square
    tokens: int | None = None  # most tokens of a response that count, drawn anew each time


class Reading(NamedTuple):
    """One response predicted with one latent; both are numbers of responses of the batch."""

    response: int
    latent: int  # or NO_LATENT


class States(NamedTuple):
    """What the encoder makes of the responses of P pairs."""

    read: Tensor  # (R, D) mean states, or (R m, D) states of the query tokens
    before: Tensor  # (M, D) the state in front of each response token, which predicts it


def joined(states: Sequence[States]) -> States:
    """Returns the states of several lists of pairs as those of one."""
    return States(*(torch.cat(x) for x in zip(*states, strict=True)))


class Counts(NamedTuple):
    """What a global batch's sums are divided by, whatever ranks and micro-batches see of it."""

    real: int  # response tokens
    generated: int
    contrasted: int  # tokens of the responses that are told from their sibling


class Latent(nn.Module):
    """What lies between the towers: readout, latent and injection; float32, whatever they are in.

    FSDP gathers its weights for each of METHODS.
    """

    METHODS = (
        "read",
        "own_or_null",
        "shift",
        "scale",
        "soft_tokens",
        "query_tokens",
        "hidden_token",
    )

    def __init__(self, config: GuideConfig, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.config = config
        m, k = config.latent_tokens, config.latent_width
        # A pooled state becomes all m latents, a query's state its own.
        pooled = config.readout == "mean"
        self.to_latent = nn.Linear(encoder_width, m * k if pooled else k)
        self.fixed = False  # whether training leaves this map as it is
        self.null = nn.Parameter(torch.zeros(m * k))
        self.mask = nn.Parameter(torch.zeros(decoder_width))
        if not pooled:
            self.queries = nn.Parameter(torch.zeros(m, encoder_width))
        if config.injection != "prefix":
            self.to_output = nn.Linear(m * k, decoder_width, bias=False)
            self.to_scale = nn.Linear(m * k, decoder_width, bias=False)
        if config.injection != "output":
            self.to_prefix = nn.Linear(k, decoder_width)
            self.soft_size = nn.Parameter(torch.ones(1))  # root mean square of a soft token

    def read(self, states: Tensor) -> Tensor:
        """The latents (R, Z) float32 of R responses, of `States.read`."""
        own: list[Tensor] = [self.to_latent.weight, self.to_latent.bias]
        weight, bias = (p.detach() for p in own) if self.fixed else own
        z = F.linear(states.float(), weight, bias)  # a distance is a difference of close numbers
        if self.config.readout == "queries":
            # (R, Z) of (R m, k); a copy, as FSDP warns of views
            z = z.unflatten(0, (-1, self.config.latent_tokens)).flatten(1).clone()
        return F.rms_norm(z, z.shape[1:], eps=1e-6) if self.config.latent_norm == "rms" else z

    def own_or_null(self, latents: Tensor, whose: Sequence[int]) -> Tensor:
        """The latents (Q, Z) of Q readings, of latents (R, Z)."""
        table = torch.cat([latents, self.null[None]])
        (places,) = to_device(table.device, torch.tensor([i % len(table) for i in whose]))
        return table[places]

    def shift(self, latents: Tensor) -> Tensor:
        """What is added to the states that the head reads: latents (Q, Z) -> (Q, D)."""
        return WAY_OUT * self.to_output(latents)

    def scale(self, latents: Tensor) -> Tensor:
        """What the states that the head reads are multiplied by: latents (Q, Z) -> (Q, D)."""
        return 1 + WAY_OUT * self.to_scale(latents)

    def soft_tokens(self, latents: Tensor) -> Tensor:
        """The soft tokens before a response: latents (Q, Z) -> (Q m, D), all of a learned size."""
        tokens = self.to_prefix(latents.unflatten(1, (self.config.latent_tokens, -1))).flatten(0, 1)
        return F.rms_norm(tokens, tokens.shape[1:], eps=1e-6) * self.soft_size

    def query_tokens(self) -> Tensor:
        """The query tokens' embeddings (m, D)."""
        return self.queries.clone()

    def hidden_token(self) -> Tensor:
        """The embedding (D,) that stands for a token which the decoder may not read."""
        return self.mask.clone()


class Guide(nn.Module):
    """Encoder, latent, decoder; the encoder may be the decoder, where it is not trained.

    `forward` gives the reconstruction log-probs and `loss` what training minimises: FSDP gathers
    the weights for these two.

    tokenizer: reads the texts. chat: the policy's tokenizer, whose chat template renders prompts;
    None: a prompt is read as plain text, with a blank line after it.
    """

    def __init__(
        self,
        encoder: LanguageModel,
        decoder: LanguageModel,
        config: GuideConfig,
        tokenizer: tokenizers.Tokenizer,
        chat: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.chat = tokenizer, chat
        self.encoder, self.decoder = encoder, decoder
        self.latent = Latent(
            config, encoder.embedding.embedding_dim, decoder.embedding.embedding_dim
        )
        end = tokenizer.token_to_id(config.end_token)
        if end is None:
            raise InputError(
                f"the guide's tokenizer has no {config.end_token} token; use the tokenizer.json "
                "its weights came with"
            )
        self.end_id: int = end

    @property
    def config(self) -> GuideConfig:
        """What a distance depends on, beside the weights."""
        return self.latent.config

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a response by itself."""
        return (self.end_id,) if self.chat is None else tuple(self.chat.end_ids)

    @property
    def shared(self) -> bool:
        """Whether one tower is both."""
        return self.decoder is self.encoder

    @property
    def one_pass(self) -> bool:
        """Whether the decoder reads what the encoder has read, unless tokens are hidden from it:
        then one forward pass makes the states of both.
        """
        plain = self.config.readout == "mean" and self.config.injection == "output"
        return self.shared and plain

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of the towers: what FSDP wraps one by one."""
        towers = [self.encoder] if self.shared else [self.encoder, self.decoder]
        return [block for tower in towers for block in tower.blocks]

    # ------------------------------------------------------------------------------ texts to tokens

    def pair(
        self,
        name: str,
        prompt: str | Sequence[Message],
        real: str,
        generated: str,
        ended: tuple[bool, bool] = (True, True),
    ) -> Pair:
        """Returns two responses to a prompt in the guide's own token ids, cut to fit (`fit`).

        prompt: the user's text, or the turns before the response. ended: whether each response
        ended by itself; one that was cut gets no end token.
        """
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = [
            self._response_ids(turns, *given)
            for given in zip((real, generated), ended, strict=True)
        ]
        if self.chat is not None:
            return self.fit(Pair(name, list(self.chat.prompt_ids(turns)), ids[0], ids[1]))
        text = f"{history_text(turns)}\n\n"
        x = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.fit(Pair(name, x, ids[0], ids[1]))

    def _response_ids(self, turns: Sequence[Message], text: str, ended: bool) -> list[int]:
        if self.chat is not None:
            ids = list(self.chat.pair_ids(Row("", tuple(turns), text)).response)
            return ids if ended or len(ids) == 1 else ids[:-1]
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [*ids, self.end_id] if ended or not ids else ids

    def fit(self, pair: Pair) -> Pair:
        """Returns a pair whose prompt and longer response have at most `max_tokens` together.

        A response above three quarters of the room loses its end; then the prompt, which both
        responses share, loses its beginning. An empty response becomes an end token.
        """
        most = self.config.max_tokens
        real, generated = (list(y) or [self.end_id] for y in (pair.real, pair.generated or []))
        prompt = list(pair.prompt)
        if most is not None and len(prompt) + max(len(real), len(generated)) > most:
            # a quarter stays for the prompt
            real, generated = real[: most * 3 // 4], generated[: most * 3 // 4]
            prompt = prompt[-max(1, most - max(len(real), len(generated))) :]
        return Pair(pair.id, prompt, real, generated)

    # ---------------------------------------------------------------------------- encode and decode

    def encode(self, pairs: Sequence[Pair]) -> Tensor:
        """Returns the latents (R, Z) float32 of the responses of P pairs; a prompt is read once."""
        return self.latent.read(self.states(pairs).read)

    def states(self, pairs: Sequence[Pair]) -> States:
        """Returns the encoder's states of P pairs: of [x | y | y'], each response with its query
        tokens after it. Where `one_pass` holds, they are all that a latent and the decoder need.
        """
        device = self.latent.null.device
        m = 0 if self.config.readout == "mean" else self.config.latent_tokens
        parts = _pack(pairs, [p.responses for p in pairs], after=m)
        # A product with the rows' averages repeats bit for bit, as adding at places may not.
        averages = torch.zeros(0 if m else len(parts.ends), len(parts.ids))  # (R, N)
        for row, start, end in zip(averages, parts.starts, parts.ends, strict=False):
            row[start:end] = 1.0 / (end - start)
        ids, at, predictors, averages = to_device(
            device,
            torch.tensor(parts.ids),
            torch.tensor([end + i for end in parts.ends for i in range(m)], dtype=torch.int64),
            torch.tensor(parts.predictors()),
            averages,
        )
        embedded = self.encoder.embedding(ids)  # (N, D)
        if m:
            queries = self.latent.query_tokens().to(embedded.dtype).repeat(len(parts.ends), 1)
            embedded = embedded.index_copy(0, at, queries)  # (R m, D) of them
        states = self.encoder.hidden(embedded, Packed(parts.lengths, device))
        before = states[predictors]
        return States(states[at] if m else averages @ states.float(), before)

    def decode(
        self,
        pairs: Sequence[Pair],
        latents: Tensor,
        readings: Sequence[Reading],
        hidden_tokens: Tensor | None = None,
    ) -> Tensor:
        """Returns the log-probs float32 of all tokens of Q readings, one reading after the other.

        latents (R, Z). readings: pair by pair. hidden_tokens (M,) bool, on the CPU: the tokens of
        the R responses that the decoder may not read; None: it reads all.
        """
        return ops.linear_logprob(*self._written(pairs, latents, readings, hidden_tokens, None))

    def forward(
        self, pairs: Sequence[Pair], readings: Sequence[Reading], states: States | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encodes all responses; returns the log-probs float32 of all tokens of Q readings, as
        `decode` with no token hidden, and the latents (R, Z). states: as in `loss`.
        """
        states = self.states(pairs) if states is None else states
        latents = self.latent.read(states.read)
        before = states.before if self.one_pass else None
        return ops.linear_logprob(*self._written(pairs, latents, readings, None, before)), latents

    def loss(
        self,
        pairs: Sequence[Pair],
        kept: Sequence[bool],
        tokens: Sequence[Sequence[int]],
        hidden_tokens: Tensor | None,
        noise: Tensor | None,
        what: GuideLoss,
        counts: Counts,
        states: States | None = None,
    ) -> Tensor:
        """Returns what these pairs add to the loss () of a global batch, in training.

        The loss is `objective.reconstruction_loss`, plus `contrast` times `objective.contrast_loss`
        of the responses that differ from their sibling, over the number of their tokens, plus
        `bag_of_words` times the reconstruction loss of the latent by itself.

        kept (R,): the responses that are read with their latent; the others are read with none, and
        no contrast. tokens: of each of the R responses, the places of the tokens that count.
        hidden_tokens (M,) bool: as in `decode`. noise (R, Z): is added to the latents, in units of
        each one's root mean square. counts: of the global batch. states: of these pairs, where they
        are known already; None: they are made.
        """
        states = self.states(pairs) if states is None else states
        latents = self.latent.read(states.read)
        if noise is not None:
            # Of each latent by itself: of a micro-batch's it would depend on what is in there.
            latents = latents + noise * latents.detach().square().mean(1, keepdim=True).sqrt()
        readings, rivals = training_readings(pairs, kept, what.contrast > 0)
        before = states.before if self.one_pass and hidden_tokens is None else None
        written = self._written(pairs, latents, readings, hidden_tokens, before, tokens)
        lengths = [len(tokens[r.response]) for r in readings]
        sums = ops.segment_sum(ops.linear_logprob(*written), lengths)  # (Q,)
        # With the own latent or none: R of them.
        own = [i for i, r in enumerate(readings) if r.latent in (r.response, NO_LATENT)]
        places, means, compared = to_device(
            sums.device,
            torch.tensor(own),
            torch.tensor([1 / counts[i % 2] for i in range(len(own))]),
            torch.tensor(rivals, dtype=torch.int64).view(-1, 2),
        )
        loss = -(sums[places] * means).sum()
        if rivals:
            gaps = contrast_loss(sums[compared[:, 0]], sums[compared[:, 1]])
            loss = loss + what.contrast / counts.contrasted * gaps.sum()
        if what.bag_of_words:
            alone = self.latent.shift(latents) @ self.decoder.output_weight.float().T  # (R, V)
            logps = alone.log_softmax(dim=1)
            responses = [y for p in pairs for y in p.responses]
            bags = to_device(
                logps.device,
                *(torch.tensor(y)[list(at)] for y, at in zip(responses, tokens, strict=True)),
            )
            bag_sums = torch.stack([row[bag].sum() for row, bag in zip(logps, bags, strict=True)])
            loss = loss - what.bag_of_words * (bag_sums * means).sum()
        return loss

    def _written(
        self,
        pairs: Sequence[Pair],
        latents: Tensor,
        readings: Sequence[Reading],
        hidden_tokens: Tensor | None,
        before: Tensor | None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the decoder's head takes: the states that predict the tokens of all readings, the
        output weight (V, D), and those tokens.

        before (M, D): the states in front of each response token, where the encoder has made them.
        tokens: of each response, the places of those to predict; None: all.
        """
        responses = [y for p in pairs for y in p.responses]
        places = [range(len(y)) for y in responses] if tokens is None else tokens
        z = self.latent.own_or_null(latents, [r.latent for r in readings])  # (Q, Z)
        # With soft tokens in front, a response is read anew for each latent; else once.
        soft = self.latent.soft_tokens(z) if self.config.injection != "output" else None
        parts = list(range(len(responses))) if soft is None else [r.response for r in readings]
        if before is None:
            before = self._decoder_states(pairs, parts, soft, hidden_tokens)
        starts = np.cumsum([0, *(len(responses[i]) for i in parts)])
        of_reading = [r.response if soft is None else q for q, r in enumerate(readings)]
        rows = [
            int(starts[i]) + place
            for i, reading in zip(of_reading, readings, strict=True)
            for place in places[reading.response]
        ]
        of_rows, counts, targets = to_device(
            latents.device,
            torch.tensor(rows),
            torch.tensor([len(places[r.response]) for r in readings]),
            torch.tensor([responses[r.response][i] for r in readings for i in places[r.response]]),
        )
        hidden = before[of_rows]
        if self.config.injection != "prefix":
            scale, shift = (
                change(z).repeat_interleave(counts, dim=0, output_size=len(rows))
                for change in (self.latent.scale, self.latent.shift)
            )
            hidden = (hidden.float() * scale + shift).to(hidden.dtype)
        return hidden, self.decoder.output_weight, targets

    def _decoder_states(
        self,
        pairs: Sequence[Pair],
        which: Sequence[int],
        soft: Tensor | None,
        hidden_tokens: Tensor | None,
    ) -> Tensor:
        """The decoder's states in front of each token of responses `which`, pair by pair: all their
        tokens, one response after the other.

        soft: the soft tokens in front of each, all of them. hidden_tokens (M,): as in `decode`.
        """
        device, m = self.latent.null.device, 0 if soft is None else len(soft) // len(which)
        of_pair: list[list[list[int]]] = [[] for _ in pairs]
        for i in which:
            of_pair[i // 2].append(pairs[i // 2].responses[i % 2])
        parts = _pack(pairs, of_pair, before=m)
        hidden = torch.zeros(len(parts.ids), dtype=torch.bool)
        if hidden_tokens is not None:
            flags = hidden_tokens.split([len(y) for p in pairs for y in p.responses])
            for i, start, end in zip(which, parts.starts, parts.ends, strict=True):
                hidden[start:end] = flags[i]
        ids, at, predictors, hidden = to_device(
            device,
            torch.tensor(parts.ids),
            torch.tensor([x - m + i for x in parts.starts for i in range(m)], dtype=torch.int64),
            torch.tensor(parts.predictors()),
            hidden,
        )
        embedded = self.decoder.embedding(ids)  # (N, D)
        if hidden_tokens is not None:
            token = self.latent.hidden_token().to(embedded.dtype)
            embedded = torch.where(hidden[:, None], token, embedded)
        if soft is not None:
            embedded = embedded.index_copy(0, at, soft.to(embedded.dtype))
        states = self.decoder.hidden(embedded, Packed(parts.lengths, device))
        return states[predictors]

    # ------------------------------------------------------------------------------------ distances

    def distance(
        self,
        prompts: Sequence[str | Sequence[Message]],
        real: Sequence[str],
        generated: Sequence[str],
        batch_tokens: int = 8192,
        metric: Metric = "euclidean",
        ids: Sequence[str] | None = None,
    ) -> Tensor:
        """Returns how far two responses are apart, for each of N prompts: (N,) float32 on the CPU.

        A prompt is the user's text, or the turns before the response; both responses are taken to
        have ended by themselves. Otherwise as `pair_distances`.
        """
        names = [str(i) for i in range(len(prompts))] if ids is None else ids
        rows = zip(names, prompts, real, generated, strict=True)
        return self.pair_distances([self.pair(*row) for row in rows], batch_tokens, metric)

    def pair_distances(
        self,
        pairs: Sequence[Pair],
        batch_tokens: int = 8192,
        metric: Metric = "euclidean",
        path: Path | None = None,
    ) -> Tensor:
        """Returns how far the responses of N pairs are apart: (N,) float32 on the CPU; by the
        guide's own latents, else as `distances_by`.
        """
        return self.distances_by([self.latent], pairs, batch_tokens, metric, path)[:, 0]

    @torch.no_grad()
    def distances_by(
        self,
        latents: Sequence[Latent],
        pairs: Sequence[Pair],
        batch_tokens: int = 8192,
        metric: Metric = "euclidean",
        path: Path | None = None,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> Tensor:
        """Returns how far the responses of N pairs are apart, by each of L maps of the encoder's
        states to latents: (N, L) float32 on the CPU.

        It is `ldalign.objective.latent_distance` of E(x, y) and E(x, y'). All ranks call it with
        the same pairs and share the work; the batches, and so the result, are the same for any
        number of them.

        latents: the guide's own, or others for the same encoder, which have the same queries.
        pairs: in the guide's token ids (`pair`, `fit`). batch_tokens: the most tokens of a batch.
        path, progress: as in `partial_rows.table`, for a stage that can be gone on with.

        Raises NumericsError naming a row whose distance is not finite, OutOfMemory.
        """
        # A response is no distance from itself, and need not be read to say so.
        costs = [pair.tokens if pair.differs else 0 for pair in pairs]

        def measure(batch: Sequence[int]) -> Tensor:
            distances = torch.zeros(len(batch), len(latents), device=self.latent.null.device)
            chosen = [n for n, i in enumerate(batch) if pairs[i].differs]
            if not chosen:
                return distances
            what = f"latents of {len(chosen)} pairs of {sum(costs[i] for i in batch)} tokens"
            with naming(lambda: what, LOWER_FOR_LATENTS):
                read = self.states([pairs[batch[n]] for n in chosen]).read
                both = [latent.read(read) for latent in latents]  # (2 rows, Z) each
                found = [latent_distance(z[0::2], z[1::2], metric) for z in both]
                (places,) = to_device(distances.device, torch.tensor(chosen))
                distances[places] = torch.stack(found, dim=1)
            return distances

        def refusal(i: int, value: float) -> str:
            return (
                f"row {pairs[i].id}: the latent distance is {value}; look at its texts and at the "
                "guide's losses"
            )

        batches = longest_first(costs, batch_tokens)
        return table(batches, measure, len(latents), refusal, path, progress).float()


def training_readings(
    pairs: Sequence[Pair], kept: Sequence[bool], contrast: bool
) -> tuple[list[Reading], list[tuple[int, int]]]:
    """Returns the readings of a loss, pair by pair, and the rivals of its contrast as numbers of
    readings: (with the own latent, with the sibling's).

    kept (R,): the responses that are read with their latent. A pair has the readings of its two
    responses first, then with contrast those with the sibling's latent, of responses that are kept
    and differ.
    """
    readings: list[Reading] = []
    rivals: list[tuple[int, int]] = []
    for p, pair in enumerate(pairs):
        both = (2 * p, 2 * p + 1)
        at = len(readings)
        readings += [Reading(i, i if kept[i] else NO_LATENT) for i in both]
        if contrast and pair.differs:
            for side, i in enumerate(both):
                if kept[i]:
                    rivals.append((at + side, len(readings)))
                    readings.append(Reading(i, both[1 - side]))
    return readings, rivals


class _Parts(NamedTuple):
    """Prompts with what follows them, packed end to end: [x | slots, y, slots | slots, y', ...].

    One entry a part in `starts`, `ends`, `before`.
    """

    ids: list[int]  # 0 in a slot
    lengths: list[list[int]]  # as `Packed` takes them
    starts: list[int]  # where the response begins, after its slots
    ends: list[int]  # and where it ends
    before: list[int]  # the token before its first: the last slot, or the prompt's last token

    def predictors(self) -> list[int]:
        """The places of the tokens that predict those of all responses, one after the other: each
        is predicted by the one before it.
        """
        parts = zip(self.starts, self.ends, self.before, strict=True)
        return [i for start, end, first in parts for i in (first, *range(start, end - 1))]


def _pack(
    pairs: Sequence[Pair], parts: Sequence[Sequence[list[int]]], before: int = 0, after: int = 0
) -> _Parts:
    """Packs the pairs' prompts, each with its parts (responses), which have empty slots for
    embeddings before and after them.
    """
    packed = _Parts([], [], [], [], [])
    for pair, responses in zip(pairs, parts, strict=True):
        packed.ids.extend(pair.prompt)
        last = len(packed.ids) - 1
        packed.lengths.append([len(pair.prompt)])
        for response in responses:
            start = len(packed.ids) + before
            packed.ids.extend([*[0] * before, *response, *[0] * after])
            packed.lengths[-1].append(before + len(response) + after)
            packed.starts.append(start)
            packed.ends.append(start + len(response))
            packed.before.append(start - 1 if before else last)
    return packed


def longest_first(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Returns all items, by their numbers, in runs of at most `budget` cost, the dearest first: so
    those of a run cost about as much, and memory peaks at once.
    """
    return runs(sorted(range(len(costs)), key=lambda i: (-costs[i], i)), costs, budget)


def runs(items: Sequence[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    """Returns consecutive items in runs of at most `budget` cost; a dearer item gets its own."""
    found: list[list[int]] = []
    room = 0
    for i in items:
        if not found or costs[i] > room:
            found.append([])
            room = budget
        found[-1].append(i)
        room -= costs[i]
    return found
