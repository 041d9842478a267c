"""Properties that any input must have: packing, dealing, manifests. (Rows: data/test_rows.py.)"""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ldalign.data.pairs import Pair
from ldalign.models.layout import Packed
from ldalign.run.manifest import check_stage, run_stage
from ldalign.system.errors import InputError
from ldalign.training.batches import Batch, deal, global_batches

FEW = settings(max_examples=30, deadline=None)
IDS = st.lists(st.integers(0, 60), min_size=1, max_size=9)
PAIRS = st.lists(
    st.builds(Pair, id=st.just("x"), prompt=IDS, real=IDS, generated=st.none() | IDS),
    min_size=1,
    max_size=6,
)


@FEW
@given(PAIRS)
def test_a_packed_batch_predicts_every_response_token_once(pairs: list[Pair]) -> None:
    """Each target is a response's token, and its row is the token before it in
    [prompt | that response].
    """
    batch = Batch.pack(pairs)
    responses = [(pair, response) for pair in pairs for response in pair.responses]
    assert len(batch.ids) == sum(pair.tokens for pair in pairs)
    assert batch.lengths == [len(response) for _, response in responses]
    assert batch.targets.tolist() == [token for _, response in responses for token in response]
    before = [token for pair, response in responses for token in [pair.prompt[-1], *response[:-1]]]
    assert batch.ids[batch.rows].tolist() == before
    places = [len(p.prompt) - 1 + t for p, response in responses for t in range(len(response))]
    assert batch.layout.positions[batch.rows].tolist() == places


@FEW
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=5))
def test_segments_cover_the_tokens_and_see_only_their_own_prompt(lengths: list[list[int]]) -> None:
    """Segments lie end to end; a response's prefix is its own sequence's prompt, and
    positions go on after it.
    """
    layout = Packed(lengths)
    begin, end, prefix_begin, prefix_end = layout.segments.unbind(1)
    assert begin[0] == 0 and torch.equal(begin[1:], end[:-1]) and end[-1] == sum(map(sum, lengths))
    k = 0
    for prompt, *responses in lengths:
        start = int(begin[k])
        assert (int(end[k]) - start, int(prefix_end[k]) - int(prefix_begin[k])) == (prompt, 0)
        for length in responses:
            k += 1
            assert (int(prefix_begin[k]), int(prefix_end[k])) == (start, start + prompt)
            assert layout.positions[begin[k] : end[k]].tolist() == list(
                range(prompt, prompt + length)
            )
        k += 1


@FEW
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 120)
)
def test_every_item_is_dealt_once_within_the_budget(
    sizes: list[int], ranks: int, budget: int
) -> None:
    """All ranks get the same number of micro-batches; none is over the budget
    unless it is a single item.
    """
    dealt = deal(sizes, ranks, budget)
    assert len(dealt) == ranks and len({len(micros) for micros in dealt}) == 1
    micros = [micro for rank in dealt for micro in rank]
    assert sorted(i for micro in micros for i in micro) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in micro) <= budget or len(micro) == 1 for micro in micros)


@FEW
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 3), st.integers(0, 9))
def test_every_epoch_has_every_row_once(count: int, size: int, epochs: int, seed: int) -> None:
    batches = list(global_batches(count, size, epochs, seed, "guide"))
    for epoch in range(epochs):
        rows = [int(i) for e, batch in batches if e == epoch for i in batch]
        assert sorted(rows) == list(range(count))


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
PARENTS = st.dictionaries(
    st.text(max_size=8),
    st.text(max_size=8) | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    max_size=4,
)


@FEW
@given(PARENTS, PARENTS)
def test_a_stage_is_known_by_its_parents(parents: dict[str, Any], others: dict[str, Any]) -> None:
    """The same parents: done, and not made again. Any other ones: refused."""
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder) / "stage"
        assert run_stage(stage, parents, lambda partial: None)
        assert not run_stage(stage, dict(reversed(parents.items())), lambda partial: None)
        assume(json.dumps(parents, sort_keys=True) != json.dumps(others, sort_keys=True))
        assume(parents != others)
        with pytest.raises(InputError, match="made from something else"):
            run_stage(stage, others, lambda partial: None)


def test_any_manifest_is_read_or_refused() -> None:
    """Whatever JSON is in its place: an InputError, or the stage is what it says. Both happen."""
    counts = Counter[bool]()
    none = st.just({})

    @FEW
    @given(PLAIN | st.fixed_dictionaries({"parents": PLAIN | none, "files": PLAIN | none}))
    @example({"parents": {}, "files": {}})
    def holds(manifest: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
            try:
                check_stage(Path(folder), {})
            except InputError:
                counts[False] += 1
                return
        assert manifest["parents"] == {} and manifest["files"] == {}
        counts[True] += 1

    holds()
    assert counts[True] and counts[False] > 5
