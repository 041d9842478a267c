"""The random streams, by their numbers: a change of any of them would make another run of the same
settings, and no other test would see it.
"""

import hashlib

import numpy as np
import pytest
import tiny
import torch
from tiny_guides import text_guide

from ldalign.data.splitting import divide, held_out, mixed
from ldalign.evaluation.crossed import bootstrap
from ldalign.kernels import eager
from ldalign.objective import pair_weights
from ldalign.system.seeds import normals, permutation, uniforms
from ldalign.training.batches import global_batches
from ldalign.training.guide import split
from ldalign.training.optim import make_optimizer


def test_uniforms() -> None:
    """Of (seed, key) alone; fewer numbers are the beginning of more."""
    drawn = [0.05681157153780969, 0.35343723231313073, 0.8075253388275803, 0.3028862797635289]
    assert uniforms(0, "iteration/0/a", 4).tolist() == drawn
    assert uniforms(0, "iteration/0/a", 2).tolist() == drawn[:2]
    assert uniforms(1, "iteration/0/a", 1).tolist() == [0.536330303605949]
    assert uniforms(0, "iteration/0/a", 4).dtype == np.float64


def test_permutations() -> None:
    assert permutation(0, "guide/epoch/0", 8).tolist() == [6, 3, 7, 0, 5, 2, 1, 4]
    assert permutation(7, "guide/heldout", 8).tolist() == [3, 0, 1, 6, 5, 7, 2, 4]


def test_normals() -> None:
    drawn = [[0.21924330294132233, 0.7893916368484497], [-0.22442542016506195, 0.90064537525177]]
    assert normals(0, "toy/x", 2, 2).tolist() == drawn
    assert normals(0, "toy/y", 2, 2).tolist() != drawn != normals(1, "toy/x", 2, 2).tolist()


def test_the_order_of_rows_in_training() -> None:
    batches = [(epoch, rows.tolist()) for epoch, rows in global_batches(5, 3, 2, 0, "guide")]
    assert batches == [(0, [3, 0, 2]), (0, [1, 4]), (1, [3, 1, 4]), (1, [0, 2])]


def test_what_is_held_out() -> None:
    """Of the data, whole groups; for validation; of held-out rows that are given."""
    groups = np.array([0, 1, 2, 2, 3, 4, 5, 6])
    assert np.flatnonzero(held_out(groups, 3, 0)).tolist() == [2, 3, 6]
    assert np.flatnonzero(held_out(groups, 3, 1)).tolist() == [1, 2, 3]
    keys = [bytes([i]) for i in range(12)]
    given = [b"x", b"y", b"z", b"w", b"v"]
    asked = {"heldout": 2, "most": 6, "seed": 3, "shuffle": True, "validation": 2}
    own, other = divide(keys, keys, **asked), divide(keys, keys, **asked, given=(given, given))
    assert [part.tolist() for part in (own.train, own.heldout, own.validation)] == [
        [10, 4, 5, 1, 2, 0],
        [8, 9],
        [7, 11],
    ]
    assert [part.tolist() for part in (other.train, other.heldout, other.validation)] == [
        [10, 9, 4, 5, 7, 8],
        [4, 1],
        [0, 2],
    ]


def test_what_the_guide_holds_out() -> None:
    """The first of an order of their own: `permutation(7, "guide/heldout", 8)`."""
    seen, unseen = split(tiny.pairs(8), 0.25, 7)
    assert [pair.id for pair in unseen] == ["row-3", "row-0"]
    assert [pair.id for pair in seen] == [f"row-{i}" for i in (1, 6, 5, 7, 2, 4)]
    _, unseen = split(tiny.pairs(8), 0.25, 7, "iteration_1/guide")
    assert [pair.id for pair in unseen] != ["row-3", "row-0"]


def test_the_mixture_of_entries() -> None:
    mixture = mixed(np.arange(12), np.array([0, 1] * 6), [1.0, 2.0], 0)
    assert mixture.tolist() == [1, 3, 5, 0, 2, 7, 4, 6, 9, 8, 11, 10]


def test_shuffled_weights() -> None:
    """The weights 1 to 6, over their mean, dealt out among the kept."""
    distances = torch.arange(1.0, 7.0, dtype=torch.float64)
    weights, _ = pair_weights("shuffled", distances, [True, True, False, True, True, True], 4)
    assert (weights * 18 / 5).tolist() == pytest.approx([1, 5, 0, 2, 4, 6])


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        found.update(name.encode() + p.detach().numpy().tobytes())
    return found.hexdigest()[:16]


def test_what_models_begin_as() -> None:
    """A new GPT-2, the toy policy, and a guide's map to the latent with all that goes with it."""
    assert digest(tiny.gpt2()) == "caedc34652375811" != digest(tiny.gpt2(1))
    assert digest(tiny.mistral(0, 1.0)) == "29e553380d0ddfd2"
    assert digest(text_guide().latent) == "70842fba4866ec2f"


def test_the_bits_that_round() -> None:
    """MurmurHash3's finalizer, whose value of 1 is 0x514E28B7: index 0 with the seed 1, and the
    other way round by the factor of the index.
    """
    bits = eager._random_bits(torch.zeros(2, 2), 1)
    assert bits.flatten().tolist() == [0x514E28B7, 2527132011, 314344336, 2535364964]
    assert eager._random_bits(torch.zeros(2), 1 - 0x9E3779B9 & 0xFFFFFFFF)[1] == 0x514E28B7


@pytest.mark.parametrize(
    ("name", "seed", "matrix", "vector"),
    [
        ("adamw", 0, [-1, -2, 0, -2, -1, -1], [-3, -1]),
        ("adamw", 3, [-1, -1, -1, -1, 0, -1], [0, 0]),
        ("rmsprop", 0, [-7, -7, -5, -6, -7, -5], [-7, -7]),
        ("rmsprop", 3, [-6, -5, -7, -6, -6, -6], [-6, -5]),
    ],
)
def test_three_steps_rounded_at_random(
    name: str, seed: int, matrix: list[int], vector: list[int]
) -> None:
    """bfloat16 weights of 1, in their last places from there: by seed, step, parameter and place.
    A step of AdamW is 0.001, a quarter of a place, and one of RMSprop some 0.01, 0.006 and 0.005.
    """
    model = torch.nn.ParameterList(
        [torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)]
    )
    optimizer = make_optimizer(model, name, 1e-3, state_dtype=torch.bfloat16, seed=seed)  # type: ignore[arg-type]
    for _ in range(3):
        for p in model:
            p.grad = torch.full_like(p, 0.3)
        optimizer.step()
    places = [(p.detach().view(torch.int16) - 0x3F80).flatten().tolist() for p in model]
    assert places == [matrix, vector]


def test_what_the_bootstrap_draws() -> None:
    """Of three seeds and four prompts: the resamples are numpy's, by the seed alone."""
    table = np.array([[0.0, 1, 4, 3], [1, 3, 6, 5], [2, 2, 7, 5]])
    drawn = [2.584012565977005, 3.4541266036465634, 3.2710509179618295, 3.25]
    assert bootstrap(table, 0, 4).tolist() == pytest.approx(drawn)
