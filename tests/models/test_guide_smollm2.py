"""A few steps of the guide on the real SmolLM2-135M-Instruct, with real text."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_guides import CPU, settings_of

from ldalign.data import embedded
from ldalign.data.pairs import Pair
from ldalign.evaluation.guide import heldout_figures
from ldalign.models.guide import Guide, GuideConfig
from ldalign.models.guide_folder import pretrained_guide
from ldalign.system import distributed
from ldalign.training.guide import train_guide
from ldalign.training.latent_map import fit

pytestmark = pytest.mark.slow
HELD_OUT = 3


@pytest.fixture
def one_rank(in_process: None) -> Iterator[None]:
    distributed.start("cpu")
    yield


def questions(guide: Guide, count: int) -> list[Pair]:
    """Questions with short answers: the right one, and that to another question of the kind."""
    rows = embedded.make_rows(0, "train", 300)
    short = [r["messages"] for r in rows if sum(len(m["content"]) for m in r["messages"]) < 160]
    assert len(short) > count
    return [
        guide.pair(str(i), [short[i][0]], short[i][1]["content"], short[i + 1][1]["content"])
        for i in range(count)
    ]


def check(guide: Guide, chosen: list[Pair], folder: Path, **settings: Any) -> dict[str, float]:
    """Trains on all but the last rows; every loss, gradient norm, weight and figure is finite."""
    path = folder / "metrics.jsonl"
    train_guide(
        guide,
        chosen[:-HELD_OUT],
        settings_of(global_batch=3, **settings),
        compute_dtype=torch.bfloat16,
        device=CPU,
        seed=0,
        metrics_path=path,
    )
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(steps) >= 2
    for step in steps:
        assert 0 < step["loss"] < 40 and 0 < step["grad_norm"] < math.inf
    assert all(bool(p.isfinite().all()) for p in distributed.full_state(guide, None).values())
    figures = heldout_figures(guide, chosen[-HELD_OUT:], 4000)
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["differing"] == HELD_OUT and 0 < figures["ess"] <= 1
    return figures


def test_the_policy_as_a_frozen_guide(smollm2_folder: Path, tmp_path: Path, one_rank: None) -> None:
    """What a run makes by default: it begins as the policy, and learns to read its latent."""
    config = GuideConfig(max_tokens=None)
    guide = pretrained_guide(config, 0, smollm2_folder, True, torch.bfloat16)
    chosen = questions(guide, 15)
    start = {name: p.clone() for name, p in guide.encoder.named_parameters()}
    before = heldout_figures(guide.eval(), chosen[-HELD_OUT:], 4000)
    assert before["sibling_gain"] == pytest.approx(0.0, abs=1e-4) and 1 < before["true"] < 12
    after = check(guide, chosen, tmp_path, epochs=6, learning_rate=1e-3)
    assert after["sibling_gain"] > 2.0 and after["true"] < before["true"] - 0.1
    assert after["true"] < after["none"] < after["other"]
    assert all(torch.equal(start[name], p) for name, p in guide.encoder.named_parameters())


def test_two_trained_towers_with_queries_and_a_prefix(
    smollm2_folder: Path, tmp_path: Path, one_rank: None
) -> None:
    """In bfloat16, through 60 norms, most tokens hidden and most latents dropped.

    It died of NaN in its first step: prefix, mask and latent for none were zeros, in front of the
    sequence.
    """
    config = GuideConfig("queries", latent_tokens=4, latent_width=64, injection="prefix")
    guide = pretrained_guide(config, 0, smollm2_folder, False, torch.bfloat16)
    chosen = questions(guide, 6 + HELD_OUT)
    check(guide, chosen, tmp_path, learning_rate=1e-4, token_dropout=1.0, latent_dropout=0.5)


def test_distances_in_bfloat16_are_those_in_float32(smollm2_folder: Path, one_rank: None) -> None:
    """The map to the latent in float32, the tower in either: what that moves is small beside what
    the weights vary by.
    """
    config = GuideConfig(max_tokens=None, latent_norm="rms")
    wide, half = (
        pretrained_guide(config, 0, smollm2_folder, True, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    chosen = questions(wide, 16)
    fit(wide, chosen)
    half.latent.load_state_dict(wide.latent.state_dict())
    exact, found = wide.pair_distances(chosen), half.pair_distances(chosen)
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.0)
    weights, other = exact / exact.mean(), found / found.mean()
    assert (weights - other).abs().max() < 0.02 and weights.std() > 0.1
