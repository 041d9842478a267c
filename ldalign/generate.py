"""Sampling: batched, KV-cached, mixed prompt lengths, every row with a random stream of its own.

A row's tokens depend on (seed, its key) and on nothing else: each step takes one uniform number of the row's own
counter-based stream and inverts the cumulative distribution with it. Whatever the batch, the order or the rank, the
same row gives the same tokens, as far as the logits are the same to the last bits (float32: yes but for a draw that
falls within rounding of a boundary; bf16 products change with the batch shape, so only nearly always).

Shapes: R rows being generated, C cached tokens per row, H query heads, K key/value heads, E head width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldalign.data import Message
from ldalign.layout import Packed
from ldalign.mistral import Mistral
from ldalign.seeds import uniforms
from ldalign.tokenizer import Tokenizer

COMPACT_BELOW = 0.75  # dropping finished rows copies the whole cache: worth it once this share of the rows is left

BLOCK = 256  # tokens whose probabilities the sampler sums first


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"bad sampling settings {self}: max_new_tokens >= 1, temperature >= 0, top_k >= 0, 0 < top_p <= 1"
            )


@dataclass(frozen=True)
class Response:
    """One sampled response. ids hold the end token where the model gave one; a cut response never has one."""

    ids: list[int]
    finish_reason: str  # "stop" or "length"
    logp: float  # natural log, summed over ids, under the distribution sampled from (temperature and cuts included)


class KVCache:
    """Keys and values of R rows, and the layout of one decode step over them.

    k and v of a layer: (R, K, C, E). Finished rows are dropped by `keep`.
    """

    def __init__(self, model: Mistral, rows: int, capacity: int) -> None:
        c = model.config
        like = model.output_weight
        shape = (rows, c.num_key_value_heads, capacity, c.head_dim)
        self.k = [like.new_zeros(shape) for _ in range(c.num_hidden_layers)]
        self.v = [like.new_zeros(shape) for _ in range(c.num_hidden_layers)]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)  # (R,) tokens held
        self.longest = 0

    def fill(self, layer: int, lengths: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Stores the prompts' keys and values (N, K, E), laid end to end."""
        for row, (a, b) in enumerate(zip(k.split(list(lengths)), v.split(list(lengths)), strict=True)):
            self.k[layer][row, :, : len(a)] = a.transpose(0, 1)
            self.v[layer][row, :, : len(b)] = b.transpose(0, 1)

    def start(self, lengths: Sequence[int]) -> None:
        """Declares the prompts stored."""
        self.lengths = torch.tensor(list(lengths), device=self.lengths.device)
        self.longest = max(lengths)

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these (indices, int64)."""
        self.k = [k[rows] for k in self.k]
        self.v = [v[rows] for v in self.v]
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max())

    @property
    def positions(self) -> Tensor:
        """(R,) the position of each row's next token."""
        return self.lengths

    def advance(self) -> None:
        """After a step: every row holds one token more."""
        self.lengths = self.lengths + 1
        self.longest += 1

    def attend(self, layer: int, qkv: Tensor, heads: int, window: int | None) -> Tensor:
        """One new token a row: qkv (R, H + 2K, E) -> (R, H, E), over the row's cache and itself."""
        R, H, E = len(qkv), heads, qkv.shape[2]
        K = (qkv.shape[1] - heads) // 2
        q, k, v = qkv.split((H, K, K), 1)
        rows = torch.arange(R, device=q.device)
        self.k[layer][rows, :, self.lengths] = k
        self.v[layer][rows, :, self.lengths] = v
        keys, values = self.k[layer][:, :, : self.longest + 1], self.v[layer][:, :, : self.longest + 1]
        scores = (q.unflatten(1, (K, H // K)) @ keys.transpose(-1, -2)).float() / math.sqrt(E)  # (R, K, H/K, C)
        column = torch.arange(self.longest + 1, device=q.device)
        unseen = column > self.lengths[:, None]
        if window is not None:
            unseen = unseen | (column <= self.lengths[:, None] - window)
        probs = scores.masked_fill(unseen[:, None, None], float("-inf")).softmax(-1).to(values.dtype)
        return (probs @ values).view(R, H, E)


class _Prefill(Packed):
    """The prompts of one batch, end to end; leaves their keys and values in the cache on the way."""

    def __init__(self, lengths: Sequence[int], cache: KVCache) -> None:
        super().__init__(lengths, cache.lengths.device)
        self.cache = cache

    def attend(self, layer: int, qkv: Tensor, heads: int, window: int | None) -> Tensor:
        k, v = qkv[:, heads:].chunk(2, 1)
        self.cache.fill(layer, self.lengths, k, v)
        return super().attend(layer, qkv, heads, window)


def sample_step(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row: logits (R, V), uniform (R,) float64 in [0, 1) -> ids (R,) int64, log-probs (R,) float32.

    Greedy at temperature 0 (log-prob of the untempered distribution; ties go to the lowest id).
    """
    logits = logits.float()
    if sampling.temperature == 0:
        ids = logits.argmax(-1)
        return ids, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1:
        probs, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        # A token stays while the mass before it is below top_p, so the most likely one always does.
        cut = torch.zeros_like(probs, dtype=torch.bool).scatter(1, order, probs.cumsum(-1) - probs >= sampling.top_p)
        logits = logits.masked_fill(cut, float("-inf"))
    probs = logits.softmax(-1)
    ids = _invert(probs, uniform)
    return ids, probs.gather(1, ids[:, None])[:, 0].log()


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token (R,) at which each row's cumulative distribution passes `uniform`: first its block, then in the block.

    Partial sums are float64: over a vocabulary, float32 ones would move boundaries by more than the logits' rounding.
    """
    padded = F.pad(probs, (0, -probs.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))  # (R, V / BLOCK, BLOCK)
    blocks = padded.sum(-1).double().cumsum(-1)
    wanted = uniform[:, None] * blocks[:, -1:]
    block = torch.searchsorted(blocks, wanted, right=True).clamp(max=blocks.shape[1] - 1)
    before = F.pad(blocks, (1, 0)).gather(1, block)
    inside = padded.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0]  # (R, BLOCK)
    offset = torch.searchsorted(inside.double().cumsum(-1), wanted - before, right=True).clamp(max=BLOCK - 1)
    ids = (block * BLOCK + offset)[:, 0]
    # A number within rounding of a block's end can pass its last token, onto one of probability 0 or past the last.
    lost = F.pad(probs, (0, 1)).gather(1, ids[:, None].clamp(max=probs.shape[-1]))[:, 0] <= 0
    if bool(lost.any()):
        ids = torch.where(lost, block[:, 0] * BLOCK + inside.argmax(-1), ids)
    return ids


@torch.inference_mode()
def generate_batch(
    model: Mistral,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    end_ids: Sequence[int],
    sampling: Sampling,
    seed: int,
) -> list[Response]:
    """Responses to one batch of prompts (token ids), one key a prompt; rows leave the batch as they finish."""
    device = model.output_weight.device
    distinct = list(dict.fromkeys(tuple(prompt) for prompt in prompts))  # samples of one prompt share its prefill
    lengths = [len(p) for p in distinct]
    cache = KVCache(model, len(distinct), max(lengths) + sampling.max_new_tokens)
    flat = torch.tensor([token for prompt in distinct for token in prompt], device=device)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    logits = model(flat, _Prefill(lengths, cache), lambda hidden, weight: hidden[last] @ weight.T)  # (R, V)
    cache.start(lengths)
    if len(distinct) < len(prompts):
        number = {prompt: n for n, prompt in enumerate(distinct)}
        copies = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=device)
        cache.keep(copies)
        logits = logits[copies]

    draws = torch.from_numpy(np.stack([uniforms(seed, key, sampling.max_new_tokens) for key in keys])).to(device)
    ends = torch.tensor(list(end_ids), dtype=torch.int64, device=device)
    ids_of: list[list[int]] = [[] for _ in prompts]
    logp_of = [0.0] * len(prompts)
    reason = ["length"] * len(prompts)
    rows = list(range(len(prompts)))  # batch row of each cache row
    for step in range(sampling.max_new_tokens):
        ids, logp = sample_step(logits, draws[rows, step], sampling)
        stopped = torch.isin(ids, ends).tolist()
        for row, token, p, stop in zip(rows, ids.tolist(), logp.tolist(), stopped, strict=True):
            if reason[row] != "stop":  # a finished row may ride along for a while, see below
                ids_of[row].append(token)
                logp_of[row] += p
                reason[row] = "stop" if stop else "length"
        live = [i for i, row in enumerate(rows) if reason[row] != "stop"]
        if not live or step + 1 == sampling.max_new_tokens:
            break
        if len(live) <= COMPACT_BELOW * len(rows):
            kept = torch.tensor(live, device=device)
            cache.keep(kept)
            rows, ids = [rows[i] for i in live], ids[kept]
        logits = model(ids, cache, lambda hidden, weight: hidden @ weight.T)
        cache.advance()
    return [Response(*row) for row in zip(ids_of, reason, logp_of, strict=True)]


def generate_ids(
    model: Mistral,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    end_ids: Sequence[int],
    sampling: Sampling,
    seed: int,
    batch_rows: int = 64,
    progress: Callable[[int, int], None] = lambda rows, tokens: None,
) -> list[Response]:
    """Responses in the order of `prompts`, made in batches of rows of similar length.

    keys name the rows' random streams; progress is called with (rows, new tokens) after each batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))  # longest first: memory peaks at once
    out: dict[int, Response] = {}
    for start in range(0, len(order), batch_rows):
        batch = order[start : start + batch_rows]
        done = generate_batch(model, [prompts[i] for i in batch], [keys[i] for i in batch], end_ids, sampling, seed)
        out |= dict(zip(batch, done, strict=True))
        progress(len(batch), sum(len(r.ids) for r in done))
    return [out[i] for i in range(len(prompts))]


def generate(
    model: Mistral,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_rows: int = 64,
) -> list[str]:
    """Texts answering `conversations` (lists of {"role", "content"}, ending with the user's turn).

    temperature 0 is greedy. The same (seed, index in the list) gives the same text whatever `batch_rows` (float32).
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p)
    prompts = [tokenizer.prompt_ids(c) for c in conversations]
    keys = [str(i) for i in range(len(prompts))]
    responses = generate_ids(model, prompts, keys, tokenizer.end_ids, sampling, seed, batch_rows)
    return [tokenizer.decode(r.ids) for r in responses]
