"""Tiny random models and pairs for the tests: made on the spot, float32, the same on every call."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ldalign.data.pairs import Pair
from ldalign.models.gpt2 import GPT2, GPT2Config, init_weights
from ldalign.models.mistral import Mistral, MistralConfig
from ldalign.models.toy import random_mistral

VOCABULARY = 61
MISTRAL = MistralConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=6,  # shorter than the texts, so that it acts
    tie_word_embeddings=False,
    max_position_embeddings=256,
)
GPT2_CONFIG = GPT2Config(VOCABULARY, 64, 32, 2, 4)


def mistral(seed: int = 0, scale: float = 5.0) -> Mistral:
    """A model whose predictions differ from row to row: `scale` times the usual 0.02."""
    model = random_mistral(MISTRAL, seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(scale)
    return model


def gpt2(seed: int = 0) -> GPT2:
    model = GPT2(GPT2_CONFIG)
    init_weights(model, seed)
    return model


def prompts(count: int, seed: int = 0, longest: int = 14) -> list[list[int]]:
    """Token ids of mixed lengths, 1 to `longest`."""
    draw = random.Random(seed)
    return [
        [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest))]
        for _ in range(count)
    ]


def pairs(count: int, seed: int = 0, weights: Sequence[float] | None = None) -> list[Pair]:
    """Makes pairs of uneven lengths; references are made up, or set with `with_reference`."""
    draw = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(least, most))]

    return [
        Pair(
            id=f"row-{i}",
            prompt=ids(1, 9),
            real=ids(1, 8),
            generated=ids(1, 8),
            weight=1.0 if weights is None else weights[i],
            ref_real=-draw.uniform(5, 30),
            ref_generated=-draw.uniform(5, 30),
        )
        for i in range(count)
    ]


def logps(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Returns (n,) log-probs of the response by the plainest means: one row, whole logits."""
    ids = torch.tensor([[*prompt, *response]])
    table = model(ids)[0].log_softmax(-1)
    return torch.stack([table[len(prompt) - 1 + t, token] for t, token in enumerate(response)])
