"""The work that is measured: pairs of token ids, and what they cost at the least.

Pairs are random ids of realistic lengths, the same on every machine; nothing is read from disk.
Costs count the arithmetic and the memory traffic that no implementation of the step can do without,
so that shares of what the machine can do compare implementations. Shapes: D width, F feed-forward
width, H query heads, K key/value heads, E head width, V vocabulary, N tokens.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Pair = dict[str, list[int]]  # prompt, real, generated: token ids
Config = dict[str, Any]  # a model folder's config.json


@dataclass(frozen=True)
class Lengths:
    """Token counts: `template` in every prompt, then log-normal bodies of (median, deviation).

    The deviation is that of the logarithm. `tied` is the correlation of a pair's prompt and
    response lengths, in logarithms: longer questions have longer answers. The generated response's
    length has the real one's distribution.
    """

    prompt: tuple[float, float]
    response: tuple[float, float]
    # the chat template's share of SmolLM2-Instruct's prompts, system message included
    template: int = 35
    tied: float = 0.0
    longest: int = 2048

    def draw(self, dice: random.Random) -> tuple[int, int, int]:
        """The lengths of one pair: prompt, real, generated."""
        shared = dice.gauss(0, 1)
        own = (dice.gauss(0, 1), dice.gauss(0, 1))
        prompt = self.template + self._tokens(self.prompt, shared)
        real, generated = (
            self._tokens(self.response, self.tied * shared + math.sqrt(1 - self.tied**2) * z)
            for z in own
        )
        return prompt, real, generated

    def _tokens(self, of: tuple[float, float], z: float) -> int:
        return min(self.longest, max(4, round(of[0] * math.exp(of[1] * z))))


LENGTHS = {
    # Measured: 2,500 training rows of GSM8K under SmolLM2-135M-Instruct's tokenizer and template.
    # Mean tokens of a prompt 90 (5 %: 62, 95 %: 132), of a response 124 (58, 228).
    "gsm8k": Lengths(prompt=(51, 0.385), response=(113, 0.42), tied=0.54, longest=455),
    "short": Lengths(prompt=(12, 0.4), response=(16, 0.5)),
    "long": Lengths(prompt=(350, 0.5), response=(350, 0.5)),
    "long_prompts": Lengths(prompt=(500, 0.3), response=(40, 0.4)),
    "long_responses": Lengths(prompt=(20, 0.4), response=(300, 0.4)),
}


def make_pairs(lengths: Lengths, count: int, vocabulary: int, seed: int = 0) -> list[Pair]:
    """Makes pairs of random ids, the same for the same arguments.

    The first ids, maybe control tokens, are left out.
    """
    dice = random.Random(f"{seed}/{lengths}")
    return [
        dict(
            zip(
                ("prompt", "real", "generated"),
                (_ids(dice, n, vocabulary) for n in lengths.draw(dice)),
                strict=True,
            )
        )
        for _ in range(count)
    ]


def even_pair(tokens: int, vocabulary: int) -> Pair:
    """Makes a pair of `tokens` tokens: a quarter prompt, the rest two responses of one length."""
    dice = random.Random(tokens)
    response = 3 * tokens // 8
    sizes = {"prompt": tokens - 2 * response, "real": response, "generated": response}
    return {part: _ids(dice, n, vocabulary) for part, n in sizes.items()}


def _ids(dice: random.Random, count: int, vocabulary: int) -> list[int]:
    return [dice.randrange(min(20, vocabulary // 2), vocabulary) for _ in range(count)]


def tokens_of(pairs: Sequence[Pair]) -> int:
    """Counts the tokens that a step has to read: each prompt once, no padding."""
    return sum(len(part) for pair in pairs for part in pair.values())


def describe(batches: Sequence[Sequence[Pair]]) -> dict[str, float]:
    """Says what the pairs look like: tokens a pair, the prompt's share, what padding adds."""
    pairs = [pair for batch in batches for pair in batch]
    padded = sum(
        2
        * len(batch)
        * max(len(p["prompt"]) + max(len(p["real"]), len(p["generated"])) for p in batch)
        for batch in batches
    )
    return {
        "pairs": len(pairs),
        "tokens_per_pair": tokens_of(pairs) / len(pairs),
        "prompt_share": sum(len(p["prompt"]) for p in pairs) / tokens_of(pairs),
        "padded_over_packed": padded / tokens_of(pairs),
    }


# Models by shape alone, for random weights, as the config.json of each has it.
SHAPES: dict[str, Config] = {
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
    },
    "smollm2-360m": {
        "model_type": "llama",
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
    },
}


# --------------------------------------------------------------------------------------------- cost

PRODUCTS = ("attention", "MLP", "head")  # the parts of a step that are matrix products


class Cost(NamedTuple):
    """Floating-point operations, and bytes read and written."""

    flops: float
    bytes: float

    def __add__(self, other: object) -> "Cost":
        assert isinstance(other, Cost)
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Shape:
    """The sizes of a Mistral-like network that costs depend on."""

    D: int
    F: int
    H: int
    K: int
    E: int
    V: int
    layers: int
    tied: bool

    @classmethod
    def of(cls, config: Config) -> "Shape":
        """Reads the sizes from a config.json."""
        heads, width = config["num_attention_heads"], config["hidden_size"]
        return cls(
            width,
            config["intermediate_size"],
            heads,
            config["num_key_value_heads"],
            config.get("head_dim") or width // heads,
            config["vocab_size"],
            config["num_hidden_layers"],
            bool(config.get("tie_word_embeddings")),
        )

    @property
    def attention_products(self) -> list[tuple[int, int]]:
        """(in, out) of the matrix products around attention, in one block."""
        return [(self.D, (self.H + 2 * self.K) * self.E), (self.H * self.E, self.D)]

    @property
    def mlp_products(self) -> list[tuple[int, int]]:
        """(in, out) of the feed-forward's matrix products, in one block."""
        return [(self.D, 2 * self.F), (self.F, self.D)]

    @property
    def weights(self) -> int:
        """How many weights the model has."""
        block = sum(i * o for i, o in self.attention_products + self.mlp_products) + 2 * self.D
        return self.layers * block + self.D + (1 if self.tied else 2) * self.V * self.D


def step_costs(
    shape: Shape, pairs: Sequence[Pair], itemsize: int, state_bytes: int
) -> dict[str, Cost]:
    """Returns the least cost of one training step, by part.

    state_bytes: read and written per weight by the optimizer. A product (N, i) x (i, o) is
    three in training, each reading two matrices and writing one. Attention looks at the keys
    that each token sees; windows are taken to be longer than the pairs. Elementwise work reads
    its inputs and writes its outputs once forward and once backward; its few operations an
    element are counted roughly.
    """
    s, N = shape, tokens_of(pairs)
    M = sum(len(p["real"]) + len(p["generated"]) for p in pairs)
    attention = _attention(s, N, sum(_seen(p) for p in pairs), itemsize)
    for i, o in s.attention_products:
        attention += _trained_product(N, i, o, itemsize)
    mlp = Cost(0, 0)
    for i, o in s.mlp_products:
        mlp += _trained_product(N, i, o, itemsize)
    # two norms, each with an addition to the stream
    norms = Cost(24 * N * s.D, 2 * 8 * N * s.D * itemsize)
    rope = Cost(6 * N * (s.H + s.K) * s.E, 4 * N * (s.H + s.K) * s.E * itemsize)
    swiglu = Cost(15 * N * s.F, 8 * N * s.F * itemsize)
    return {
        "attention": _times(s.layers, attention),
        "MLP": _times(s.layers, mlp),
        "head": Cost(6 * M * s.D * s.V, 3 * (M * s.D + s.D * s.V) * itemsize),
        "elementwise": _times(s.layers, norms + rope + swiglu),
        "optimizer": Cost(12 * s.weights, state_bytes * s.weights),
    }


def scoring_costs(shape: Shape, pairs: Sequence[Pair], itemsize: int) -> dict[str, Cost]:
    """Returns the least cost of the log-probs of both responses of each pair, by part.

    One forward: a third of what training needs for products and attention.
    """
    s, N = shape, tokens_of(pairs)
    M = sum(len(p["real"]) + len(p["generated"]) for p in pairs)
    third = _attention(s, N, sum(_seen(p) for p in pairs), itemsize)
    attention, mlp = Cost(third.flops / 3, third.bytes / 3), Cost(0, 0)
    for i, o in s.attention_products:
        attention += _product(N, i, o, 1, itemsize)
    for i, o in s.mlp_products:
        mlp += _product(N, i, o, 1, itemsize)
    return {
        "attention": _times(s.layers, attention),
        "MLP": _times(s.layers, mlp),
        "head": Cost(2 * M * s.D * s.V, (M * s.D + s.D * s.V) * itemsize),
        "elementwise": _times(s.layers, _elementwise(s, N, itemsize)),
    }


def attention_flops(shape: Shape, pairs: Sequence[Pair]) -> float:
    """Counts the operations of attention's own products, with keys and values, in one step."""
    seen = sum(_seen(p) for p in pairs)
    return shape.layers * _attention(shape, tokens_of(pairs), seen, 1).flops


def step_flops(shape: Shape, pairs: Sequence[Pair]) -> float:
    """Counts the operations of one step's matrix products, which a model-FLOPs share counts."""
    return sum(
        cost.flops for part, cost in step_costs(shape, pairs, 1, 0).items() if part in PRODUCTS
    )


def generation_costs(
    shape: Shape, prompts: Sequence[int], new_tokens: int, itemsize: int
) -> dict[str, Cost]:
    """Returns the least cost of sampling new_tokens for each prompt, by part.

    prompts: their lengths. There is the prefill, then one pass a token.
    """
    s, R = shape, len(prompts)
    N, passes = sum(prompts) + R * (new_tokens - 1), new_tokens
    seen = sum(n * (n + 1) // 2 + sum(n + t for t in range(1, new_tokens)) for n in prompts)
    # keys and values read while decoding
    cached = sum(n + t for n in prompts for t in range(1, new_tokens))
    attention = Cost(4 * s.H * s.E * seen, 2 * s.K * s.E * cached * itemsize)
    for i, o in s.attention_products:
        attention += _product(N, i, o, passes, itemsize)
    mlp = Cost(0, 0)
    for i, o in s.mlp_products:
        mlp += _product(N, i, o, passes, itemsize)
    return {
        "attention": _times(s.layers, attention),
        "MLP": _times(s.layers, mlp),
        "head": _product(R * new_tokens, s.D, s.V, passes, itemsize),
        "elementwise": _times(s.layers, _elementwise(s, N, itemsize)),
        "sampler": Cost(6 * R * new_tokens * s.V, R * new_tokens * s.V * itemsize),
    }


def _seen(pair: Pair) -> int:
    """Counts the keys that all tokens of a pair see together."""
    x = len(pair["prompt"])
    return x * (x + 1) // 2 + sum(
        x * n + n * (n + 1) // 2 for n in (len(pair["real"]), len(pair["generated"]))
    )


def _attention(s: Shape, N: int, seen: int, itemsize: int) -> Cost:
    """Costs attention, forward and backward: two products an unmasked score, then four.

    q, k, v and the output are read and written.
    """
    return Cost(3 * 4 * s.H * s.E * seen, 3 * N * (2 * s.H + 2 * s.K) * s.E * itemsize)


def _elementwise(s: Shape, N: int, itemsize: int) -> Cost:
    """Costs a layer's norms, rope and SwiGLU, forward alone."""
    return Cost(
        8 * N * s.D + 3 * N * (s.H + s.K) * s.E + 5 * N * s.F,
        (7 * N * s.D + 2 * N * (s.H + s.K) * s.E + 3 * N * s.F) * itemsize,
    )


def _trained_product(N: int, i: int, o: int, itemsize: int) -> Cost:
    return _times(3, _product(N, i, o, 1, itemsize))


def _product(N: int, i: int, o: int, passes: int, itemsize: int) -> Cost:
    """N rows in `passes` products, each of which reads the weight once."""
    return Cost(2 * N * i * o, (N * i + N * o + passes * i * o) * itemsize)


def _times(n: int, cost: Cost) -> Cost:
    return Cost(n * cost.flops, n * cost.bytes)
