"""The maths of every kernel in plain PyTorch: the lesson to read first, and the kernels' oracle.

Every function runs in float64 as well. Half-precision inputs are multiplied in their own dtype and
accumulated, normalised and summed in float32; the result is rounded once, at the end.

Shapes: N rows (flat tokens), D width, V vocabulary, P pairs, S segments of a packed batch, R rows
of a generation, T tokens, n keys, H query heads, K key/value heads, E head width.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ldalign.kernels.loss_options import DPO, Kind, LossOptions


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """log softmax(hidden weight^T)[target], one natural-log probability a row.

    hidden (N, D) and weight (V, D) of one dtype, target (N,) int64 in [0, V) -> (N,)
    float32 (float64 in float64).

        log p = z[target] - log sum_v exp z[v],  d log p / d z[v] = [v = target] - softmax(z)[v]
    """
    logits = (hidden @ weight.T).to(accumulate_dtype(hidden.dtype))  # (N, V)
    return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(dim=1)


def weighted_dpo_loss(
    logp_real: Tensor,
    logp_generated: Tensor,
    ref_real: Tensor,
    ref_generated: Tensor,
    weight: Tensor,
    beta: float,
    kind: Kind = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """LD-Align's loss: the sum over pairs of -weight log sigmoid(beta Delta).

    All inputs (P,): summed response log-probs under policy and reference, and the pair weights s.
    Delta = (logp_real - ref_real) - (logp_generated - ref_generated). Its gradient in logp_real is
    -beta s sigmoid(-beta Delta) and the opposite in logp_generated. The caller divides by the
    number of pairs in the *global* batch. With label_smoothing e it is -weight [(1 - e) log
    sigmoid(beta Delta) + e log sigmoid(-beta Delta)]; of kind ipo it is weight (Delta - 1/(2
    beta))^2 (docs/methods.md).

    Returns the loss () and per-pair metrics (P,), detached: loss (unweighted), rewards/chosen,
    rewards/rejected, rewards/margins, rewards/accuracies. Source: arXiv 2404.06390, section 4.2.3.
    """
    chosen = beta * (logp_real - ref_real)
    rejected = beta * (logp_generated - ref_generated)
    if kind == "ipo":
        loss = ((chosen - rejected) / beta - 1 / (2 * beta)).square()
    elif label_smoothing:
        loss = -(1 - label_smoothing) * F.logsigmoid(chosen - rejected)
        loss = loss - label_smoothing * F.logsigmoid(rejected - chosen)
    else:
        loss = -F.logsigmoid(chosen - rejected)
    metrics = {
        "loss": loss,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        # A tie counts one half, so that step 0 reads 0.5 and not 0 or 1 by rounding.
        "rewards/accuracies": (chosen > rejected).to(loss.dtype)
        + 0.5 * (chosen == rejected).to(loss.dtype),
    }
    return (weight * loss).sum(), {name: value.detach() for name, value in metrics.items()}


def pair_loss(
    sums: Tensor,
    reference_sums: Tensor,
    lengths: Tensor,
    weight: Tensor,
    beta: float,
    options: LossOptions = DPO,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of pairs from the responses' summed log-probs, with every option of the loss.

    sums, reference_sums and lengths (2P,): log-probs under policy and reference, and tokens, of
    real, generated, real, ...; weight (P,). With length_normalised the margin is that of
    sums / lengths; nll adds nll * -sums / lengths of the real responses, whatever the weights are.
    An empty response counts as one of one token. Returns what `weighted_dpo_loss` does; the rewards
    are of sums always, and `loss` is without the NLL.
    """
    tokens = lengths.clamp(min=1)
    per = tokens if options.length_normalised else torch.ones_like(tokens)
    loss, metrics = weighted_dpo_loss(
        *_sides(sums / per, reference_sums / per),
        weight,
        beta,
        options.kind,
        options.label_smoothing,
    )
    rewards = weighted_dpo_loss(*_sides(sums, reference_sums), weight, beta)[1]
    nll = -sums[0::2] / tokens[0::2]
    return loss + options.nll * nll.sum(), rewards | {"loss": metrics["loss"]}


def _sides(sums: Tensor, reference_sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return sums[0::2], sums[1::2], reference_sums[0::2], reference_sums[1::2]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467).

    x (..., D), weight (D,) -> (..., D) in x's dtype.
    """
    wide = x.to(accumulate_dtype(x.dtype))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split as Hugging Face has it (arXiv 2104.09864).

    x (N, H, E), cos and sin (N, E/2) -> (N, H, E), x's dtype. Pairs (x[e], x[e + E/2]) turn by the
    angle position * theta^(-2e/E).
    """
    a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), elementwise, in the inputs' dtype."""
    wide = accumulate_dtype(gate.dtype)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def pair_attention(qkv: Tensor, heads: int, segments: Tensor, window: int | None = None) -> Tensor:
    """Causal grouped-query attention over a packed batch.

    A response sees its prompt but no other response. qkv (N, H + 2K, E): H query heads, K key and K
    value heads, H a multiple of K -> (N, H, E). segments (S, 4) int64 on the CPU: (begin, end,
    prefix_begin, prefix_end) of each run of tokens, in order; a prompt's prefix is empty, a
    response's is its prompt. Token i of a segment stands at position prefix length + i - begin and
    sees the prefix and its own segment up to itself; of those, with Mistral's sliding window (arXiv
    2310.06825), the last `window`.
    """
    outs = []
    for own, keys, unseen in segment_masks(segments, window, qkv.device):
        q, k, v = split_heads(qkv, heads, own, keys)
        scores = (q @ k[:, None].transpose(-1, -2)).to(accumulate_dtype(q.dtype))
        scores = scores / math.sqrt(q.shape[-1])  # (K, H/K, T, n)
        probs = scores.masked_fill(unseen, float("-inf")).softmax(-1).to(v.dtype)  # (K, H/K, T, n)
        outs.append((probs @ v[:, None]).flatten(0, 1).transpose(0, 1))
    return torch.cat(outs) if outs else qkv[:, :heads]


def segment_masks(
    segments: Tensor, window: int | None, device: torch.device
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields the tokens, the keys and the mask of each segment.

    They are: its T tokens, a slice; its n keys' tokens (n,), at positions 0 to n - 1; which keys a
    token does not see, (T, n) bool.
    """
    for begin, end, prefix_begin, prefix_end in segments.tolist():
        prefix, own = torch.arange(prefix_begin, prefix_end), torch.arange(begin, end)
        keys = torch.cat((prefix, own)).to(device)  # (n,)
        position = torch.arange(len(prefix), len(keys))  # (T,)
        gap = position[:, None] - torch.arange(len(keys))  # (T, n) positions from key to token
        unseen = (gap < 0) if window is None else (gap < 0) | (gap >= window)
        yield slice(begin, end), keys, unseen.to(device)


def split_heads(qkv: Tensor, heads: int, own: slice, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a segment's q (K, H/K, T, E), k and v (K, n, E).

    They come out of the packed batch's qkv (N, H + 2K, E).
    """
    K = (qkv.shape[1] - heads) // 2
    q = qkv[own, :heads].unflatten(1, (K, -1)).movedim(0, 2)
    k, v = qkv[:, heads:].index_select(0, keys).transpose(0, 1).split(K)
    return q, k, v


def adamw(
    p: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    factor: Tensor,
    learning_rate: float,
    decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW's step number `step`, from 1: the new weights, mean and square, not rounded.

    All of one shape; factor () is what the gradient g comes times.

        m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
        w <- (1 - eta decay) w - eta m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Source: arXiv 1711.05101; the decay comes times the learning rate eta, as torch.optim has it.
    """
    g = grad * factor
    mean = beta1 * mean + (1 - beta1) * g
    square = beta2 * square + (1 - beta2) * g**2
    size = (square / (1 - beta2**step)).sqrt() + eps
    moved = learning_rate * mean / (1 - beta1**step) / size
    return (1 - learning_rate * decay) * p - moved, mean, square


def rmsprop(
    p: Tensor,
    grad: Tensor,
    square: Tensor,
    factor: Tensor,
    learning_rate: float,
    decay: float,
    alpha: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """RMSprop's step as torch.optim has it: the new weights and square, not rounded.

    g <- g + decay w,  v <- a v + (1 - a) g^2,  w <- w - eta g / (sqrt(v) + eps)
    """
    g = grad * factor + decay * p
    square = alpha * square + (1 - alpha) * g**2
    return p - learning_rate * g / (square.sqrt() + eps), square


def rope_to_pages(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, keys: Tensor, values: Tensor, slots: Tensor
) -> Tensor:
    """Returns turned queries; writes turned keys, and values as they are, to a paged cache.

    qkv (N, H + 2K, E), H = heads, cos and sin (N, E/2) -> (N, H, E). keys, values (pages, page
    size, K, E); token n goes to slot slots[n] of the flattened pages.
    """
    size, K = keys.shape[1:3]
    turned = rope(qkv[:, : heads + K], cos, sin)
    for n, slot in enumerate(slots.tolist()):
        keys[slot // size, slot % size] = turned[n, heads:]
        values[slot // size, slot % size] = qkv[n, heads + K :]
    return turned[:, :heads]


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, pages: Tensor, window: int | None = None
) -> Tensor:
    """Causal grouped-query attention of new tokens over a paged key/value cache.

    q (N, H, E): the new tokens of R rows, row after row -> (N, H, E). rows (R, 2): each row's new
    tokens, and those before them. keys, values (pages, page size, K, E); pages (R, P): where a
    row's tokens lie, the new ones included. New token i stands at position before + i and sees the
    positions up to its own; with a sliding window the last `window` of them. Source: PagedAttention
    (Kwon et al., arXiv 2309.06180).
    """
    size, outs, start = keys.shape[1], [], 0
    for (new, before), own in zip(rows.tolist(), pages, strict=True):
        n = before + new
        held = own[: -(-n // size)].long()
        k = keys[held].flatten(0, 1)[:n].transpose(0, 1)  # (K, n, E)
        v = values[held].flatten(0, 1)[:n].transpose(0, 1)  # (K, n, E)
        queries = q[start : start + new].unflatten(1, (len(k), -1)).movedim(0, 2)  # (K, H/K, T, E)
        gap = torch.arange(before, n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        unseen = (gap < 0) if window is None else (gap < 0) | (gap >= window)
        scores = (queries @ k[:, None].transpose(-1, -2)).to(accumulate_dtype(q.dtype))
        scores = scores / math.sqrt(q.shape[-1])  # (K, H/K, new, n)
        probs = scores.masked_fill(unseen, float("-inf")).softmax(-1).to(v.dtype)
        outs.append((probs @ v[:, None]).flatten(0, 1).transpose(0, 1))
        start += new
    return torch.cat(outs) if outs else q


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    seen: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-prob under the distribution sampled from.

    logits (R, V), uniform (R,) -> (R,) int64, (R,). In this order: the logits of tokens in `seen`
    (R, T; -1 for none) are divided by `penalty` if positive, else multiplied; all are divided by
    `temperature`; the top_k largest stay (0: all; equals of the last too); of those, by falling
    probability, the tokens before which there is less mass than top_p; of those, the ones at least
    min_p times as likely as the first. The token is where the cumulative distribution, in the order
    of ids, passes `uniform`. temperature 0: the most likely token, the lowest id of equals, under
    the distribution before temperature and cuts.
    """
    z = penalised(logits, penalty, seen)
    if temperature == 0:
        ids = z.argmax(-1)
        return ids, z.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    probs = kept(z / temperature, top_k, top_p, min_p)
    ids = (probs.double().cumsum(-1) <= (uniform * probs.double().sum(-1))[:, None]).sum(-1)
    last = (probs > 0).long().cumsum(-1).argmax(-1)  # the last token that can be
    ids = ids.minimum(last)
    return ids, probs.gather(1, ids[:, None])[:, 0].log()


def penalised(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """Returns logits after the repetition penalty (Keskar et al., arXiv 1909.05858)."""
    if penalty == 1 or not seen.numel():
        return logits
    marked = torch.zeros(len(logits), logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    marked = marked.scatter(1, seen.where(seen >= 0, logits.shape[1]), True)[:, :-1]
    return torch.where(marked, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def cut(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Returns logits (R, V) with -inf for what top_k and then top_p leave out."""
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        mass = probs.double().cumsum(-1) - probs.double()  # before each
        left_out = torch.zeros_like(probs, dtype=torch.bool).scatter(1, order, mass >= top_p)
        logits = logits.masked_fill(left_out, float("-inf"))
    return logits


def kept(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Returns the probabilities (R, V) after the cuts, adding up to 1; 0 for what is cut."""
    probs = cut(logits, top_k, top_p).softmax(-1)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


GROUP = 64  # values of a row in 8 bits that have one scale, as csrc/kernels.h has it


def turned(groups: Tensor) -> Tensor:
    """Groups (..., 64) float32 times a symmetric Hadamard matrix of 1 and -1, 8 times a rotation.

    A product of two turned groups is 64 times theirs, and a value much larger than the others
    becomes 64 of middling size. Fast Walsh-Hadamard transform: sums and differences of the values
    that lie 32, 16, ..., 1 apart.
    """
    for stride in (32, 16, 8, 4, 2, 1):
        first, second = groups.unflatten(-1, (-1, 2, stride)).unbind(-2)
        groups = torch.stack((first + second, first - second), -2).flatten(-3)
    return groups


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds rows x (N, K) to 8 bits: q (N, K') int8, and scales (N, groups) float32.

    A group of 64 values of x, divided by 8 and turned, is about q scale; K' is K rounded up to 64,
    with zeros for x. scale is the largest size in the group / 127. Where 127 / that overflows
    float32, both are 0. A group with NaN or infinity has scale NaN and q 0.
    """
    padded = F.pad(x.float(), (0, -x.shape[1] % GROUP))
    groups = turned(padded.unflatten(1, (-1, GROUP)))  # (N, groups, 64)
    largest = groups.abs().amax(2)  # (N, groups)
    factor = torch.full_like(largest, 127) / largest  # 127 / x would multiply by 1 / x
    usable = factor.isfinite() & (factor > 0)
    scale = torch.where(largest.isfinite(), 0.0, torch.nan)
    scale = torch.where(usable, largest / (8 * 127), scale)
    q = (groups * torch.where(usable, factor, 0.0)[..., None]).nan_to_num(0.0, 0.0, 0.0).round()
    return q.to(torch.int8).flatten(1), scale


def int8_linear(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """x (N, K) times a weight that `quantise` made, (M, K') int8 with scales (M, groups): (N, M).

    x is rounded to 8 bits, too. A group's sum of products is exact; then it is scaled, and the
    groups are added in order, each operation rounded to float32.
    """
    q, of_x = quantise(x)
    total = torch.zeros(len(q), len(weight))
    for g, scale in enumerate(scales.T):
        group = slice(g * GROUP, (g + 1) * GROUP)
        exact = q[:, group].double() @ weight[:, group].double().T  # below 2^53
        total += exact.float() * (scale * of_x[:, g, None])
    return total
