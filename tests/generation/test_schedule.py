"""How full the engine's steps are, counted over a model that computes nothing."""

import numpy as np
import pytest
from simulated_engine import END, lengths, simulate

from ldalign.generation.paged_cache import PAGE

pytestmark = pytest.mark.gpu_check

PLACES, STEP = 36, 2304  # a seventh of a GPU's 256 rows and 16,384 tokens
PROMPTS, RESPONSES = lengths(10 * PLACES, most=256)


def test_places_are_refilled_as_rows_leave() -> None:
    """Ten times as many rows as places: the mean step is full to 84 %, the end included, where
    nothing is left to enter. Chunk by chunk it is at most two thirds.
    """
    counts, made = simulate(PROMPTS, RESPONSES, PLACES, STEP)
    assert counts.table()["rows busy"] > 0.84 * PLACES
    # What was computed is each prompt and each response, but for its last token, once.
    least = PROMPTS.sum() + (RESPONSES - 1).sum()
    assert least <= sum(counts.tokens) <= least + 2 * len(PROMPTS)
    assert max(counts.tokens) <= STEP and max(counts.busy) == PLACES
    # A step with a part of a prompt in it is no graph; graphs are for few numbers of rows.
    assert counts.table()["mixed"] < 0.055 and len(counts.graphs) <= 12
    few = 4 * PLACES
    chunked, same = simulate(PROMPTS[:few], RESPONSES[:few], PLACES, STEP, PLACES)
    assert chunked.table()["rows busy"] < PLACES * 2 / 3
    # A row's tokens depend on (seed, key) and logits, not on its company.
    assert same == {i: made[i] for i in range(few)}


@pytest.mark.long
def test_a_gpus_places() -> None:
    """docs/generation.md's figures."""
    counts, _ = simulate(*lengths(2560, most=256), 256, 16_384)
    assert counts.table()["rows busy"] > 220
    assert counts.table()["mixed"] < 0.05 and len(counts.graphs) <= 12


def test_rows_enter_before_one_that_waits_for_pages() -> None:
    """Two rows of each prompt: the second waits for the pages that the first computes, and rows
    behind it do not. Where they did, 54 of 64 places were busy and 44 % of the steps mixed.
    """
    places, samples = 64, 2
    prompts, responses = lengths(4 * places, most=64, samples=samples)
    counts, made = simulate(prompts, responses, places, 4096, samples=samples)
    assert counts.table()["rows busy"] > 0.94 * places and counts.table()["mixed"] < 0.1
    # The pages were shared, all but the last of a prompt.
    least = prompts[::samples].sum() + (responses - 1).sum()
    assert least <= sum(counts.tokens) <= least + (2 + PAGE) * len(prompts)
    _, alone = simulate(prompts, responses, 5, 4096, samples=samples)
    assert alone == made


def test_the_model_tells_rows_apart() -> None:
    """Else equal tokens would show nothing: responses differ, and each ends where it was to."""
    _, made = simulate(PROMPTS[:8], np.full(8, 20), 4, STEP)
    assert len({tuple(r.ids) for r in made.values()}) == 8
    assert all(r.ids[-1] == END and END not in r.ids[:-1] for r in made.values())
