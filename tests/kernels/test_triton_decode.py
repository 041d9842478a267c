"""Triton's generation against the reference: interpreted here, native on a CUDA device.

float64 judges attention: on the same rounded inputs the error is at most twice that of eager
PyTorch running the reference in that dtype. The same comparison must fail for wrong windows, pages
and heads. What no query may see is NaN: pages of nobody, the rest of a row's last page, and what
its table names beyond that. The sampler must choose the reference's tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
import triton_backend
from paged_cases import PAGE, Case, Inputs
from torch import Tensor
from triton_backend import NATIVE, gpu

from ldalign.kernels import reference, triton_common, triton_decode
from ldalign.kernels.triton_decode import _passing

device, interpret = triton_backend.device, triton_backend.interpret
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and infinity


def run(case: Case, inputs: Inputs, most: int | None = None) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_decode, "SPLITS", case.splits)
        most = max((new for new, _ in case.rows), default=0) if most is None else most
        out: Tensor = gpu.paged_attention(*inputs, most, case.window)
    assert out.shape == inputs[0].shape and out.dtype == inputs[0].dtype and out.is_contiguous()
    return out


def check(case: Case, ours: Tensor, inputs: Inputs) -> None:
    """The rule of the module's first lines."""
    q, keys, values, rows, pages = inputs
    exact = reference.paged_attention(
        q.double(), keys.double(), values.double(), rows, pages, case.window
    )
    eager = reference.paged_attention(q, keys, values, rows, pages, case.window)
    error, allowed = (ours.double() - exact).norm(), (eager.double() - exact).norm()
    # Eager may happen to be exact; a value of several float32 operations cannot promise that.
    floor = (4 if q.dtype == torch.float32 else 1) * torch.finfo(q.dtype).eps * exact.norm()
    assert error <= max(2 * allowed, floor), f"error {error:.1e}, {allowed:.1e}"


MIXED = ((1, 37), (20, 0), (1, 0), (7, 30), (0, 9), (16, 16), (1, 15))
ONES = tuple((1, before) for before in (0, 5, 15, 16, 47, 100))
CASES = {
    "decoding": Case(ONES, K=2, G=3, E=64),
    "decoding, one head a group": Case(ONES, E=20),
    "decoding, group larger than a tile": Case(ONES[:3], G=20),
    "decoding, two runs": Case(ONES, K=2, G=4, splits=2),
    "decoding, four runs": Case(ONES, G=3, E=20, splits=4),
    "decoding, more runs than tiles of keys": Case(ONES, E=64, splits=16),
    "decoding, one row": Case(((1, 60),), K=2, splits=4),
    "decoding, window of one": Case(ONES, window=1, G=3, splits=2),
    "decoding, window within a page": Case(ONES, window=5),
    "decoding, window across pages": Case(ONES, window=40, K=2, splits=2),
    "decoding, window of a page": Case(ONES, window=16, splits=4),
    "prompts": Case(((5, 0), (23, 0), (16, 0)), G=3, E=20),
    "prompts, continued": Case(((5, 16), (23, 9), (2, 50)), K=2, E=64),
    "mixed": Case(MIXED, K=2, G=4),
    "mixed, splits asked for in vain": Case(MIXED, G=3, splits=4),
    "mixed, window of one": Case(MIXED, window=1, G=3),
    "mixed, window within a page": Case(MIXED, window=6),
    "mixed, window across pages": Case(MIXED, window=20, G=4),
    "mixed, window beyond the text": Case(MIXED, window=1000),
    "huge scores": Case(MIXED, scale=50.0),
    "decoding, huge scores": Case(ONES, splits=4, scale=50.0),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in CASES for dtype in (torch.float32, torch.bfloat16)),
        ("decoding, two runs", torch.float16),
        ("mixed", torch.float16),
    ],
    ids=str,
)
def test_attention_against_the_reference(name: str, dtype: torch.dtype, device: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype, device)
    check(case, run(case, inputs), inputs)


@pytest.mark.parametrize("window", [None, 1, 6, 20, 40])
def test_query_tiles_longer_than_key_tiles(
    window: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the last queries of a tile see nothing in its first keys, and the
    first nothing in its last.
    """
    if not NATIVE:
        monkeypatch.setattr(triton_decode, "tiles", lambda *_: triton_decode.Tiles(64, 16, 1, 1))
    case = Case(((90, 0), (1, 37), (50, 21)), window=window)
    inputs = case.inputs(torch.float32, device)
    check(case, run(case, inputs), inputs)


def another_page(inputs: Inputs) -> Inputs:
    """Rows of three pages or more have their second page in place of their first, too."""
    q, keys, values, rows, pages = inputs
    pages = pages.clone()
    long = pages[:, 2] != pages[:, -1]
    pages[long, 0] = pages[long, 1]
    return q, keys, values, rows, pages


WRONG: dict[str, tuple[dict[str, Any], Callable[[Inputs], Inputs]]] = {
    "window one longer": ({"window": 7}, lambda inputs: inputs),
    "window one shorter": ({"window": 5}, lambda inputs: inputs),
    "no window": ({"window": None}, lambda inputs: inputs),
    "another page": ({}, another_page),
    "one token less before": (
        {},
        lambda x: (*x[:3], x[3] - (x[3] * torch.tensor([0, 1])).clamp(max=1), x[4]),
    ),
    "keys of the other heads": ({}, lambda x: (x[0], x[1].roll(1, 2), *x[2:])),
    "values of the slot before": ({}, lambda x: (x[0], x[1], x[2].nan_to_num().roll(1, 1), *x[3:])),
    "another row's query": ({}, lambda x: (x[0].roll(1, 0), *x[1:])),
    "another head's query": ({}, lambda x: (x[0].roll(1, 1), *x[1:])),
}


@pytest.mark.parametrize("mutation", WRONG)
@pytest.mark.parametrize(
    "rows", [((1, 20), (1, 31), (1, 7), (1, 50)), MIXED], ids=["decoding", "mixed"]
)
def test_comparison_sees_other_windows_pages_and_heads(
    rows: tuple[tuple[int, int], ...], mutation: str, device: str
) -> None:
    case = Case(rows, window=6, K=2, G=2, splits=2)
    change, spoil = WRONG[mutation]
    if mutation == "another page":
        case = case._replace(window=None)  # a window of six may well not see it
    inputs = case.inputs(torch.bfloat16, device)
    check(case, run(case, inputs), inputs)
    on_cpu = spoil(tuple(x.cpu() for x in inputs))  # type: ignore[arg-type]
    wrong = run(case._replace(**change), tuple(x.to(device) for x in on_cpu))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="error"):
        check(case, wrong, inputs)


def test_comparison_sees_a_missing_run_of_keys(device: str) -> None:
    """As if the last of four runs of keys were left out."""
    case = Case(((1, 63), (1, 63)), splits=4)
    inputs = case.inputs(torch.bfloat16, device)
    check(case, run(case, inputs), inputs)
    fewer = inputs[3] - torch.tensor([0, 16], device=device)
    with pytest.raises(AssertionError, match="error"):
        check(case, run(case, (*inputs[:3], fewer, inputs[4])), inputs)


@pytest.mark.parametrize("name", ["decoding, four runs", "mixed, window across pages"])
def test_strides_repeats_and_inputs(name: str, device: str) -> None:
    """Any strides, a larger `most`, the same bits each time, and nothing written to an input."""
    case = CASES[name]
    inputs = case.inputs(torch.float32, device)
    kept = [x.clone() for x in inputs]
    first = run(case, inputs)
    assert torch.equal(first, run(case, inputs)), "not the same bits twice"
    q, keys, values, rows, pages = inputs
    apart = (
        torch.cat([q, q[:, :1] + 1], 1)[:, :-1],  # as the first heads of a joint projection
        # as one layer of several
        torch.stack([keys, keys], 1)[:, 1],
        torch.stack([values, values], 1)[:, 1],
        rows,
        torch.stack([pages, pages], 2)[:, :, 0],
    )
    assert torch.equal(first, run(case, apart)), "strides change the result"
    differing = (q, keys, values.transpose(1, 2).contiguous().transpose(1, 2), rows, pages)
    assert torch.equal(first, run(case, differing)), "strides of the values change the result"
    if max(new for new, _ in case.rows) > 1:
        assert torch.equal(first, run(case, inputs, most=50)), "`most` changes the result"
    for a, b in zip(kept, inputs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 4])
def test_a_row_decodes_alone_as_it_does_with_others(splits: int, device: str) -> None:
    case = Case(ONES, G=3, splits=splits)
    q, keys, values, rows, pages = case.inputs(torch.bfloat16, device)
    together = run(case, (q, keys, values, rows, pages))
    for r in range(len(ONES)):
        alone = run(
            case._replace(rows=(ONES[r],)),
            (q[r : r + 1], keys, values, rows[r : r + 1], pages[r : r + 1]),
        )
        assert torch.equal(together[r : r + 1], alone)


@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("splits", [1, 4])
def test_nan_is_seen_where_it_is_in_use_and_nowhere_else(
    splits: int, which: str, device: str
) -> None:
    case = Case(((1, 40), (1, 70), (1, 70)), window=33, splits=splits)
    inputs = case.inputs(torch.float32, device)
    clean = run(case, inputs)
    assert not clean.isnan().any()
    spoilt = inputs[1 if which == "keys" else 2]
    for position, seen in ((37, False), (38, True)):  # the last 33 of 71 positions begin at 38
        spoilt[inputs[4][1, position // PAGE].long(), position % PAGE] = torch.nan
        result = run(case, inputs)
        assert bool(result[1].isnan().any()) is seen
        assert torch.equal(result[[0, 2]], clean[[0, 2]])


def test_nothing_to_do(device: str) -> None:
    for rows in ((), ((0, 3), (0, 20))):
        assert run(
            Case(rows, K=2, G=2), Case(rows, K=2, G=2).inputs(torch.bfloat16, device)
        ).shape == (0, 4, 16)


def test_number_of_splits() -> None:
    """Enough to fill the GPU, as far as the keys go."""
    assert [triton_decode.splits(n, 1024, 132) for n in (1, 64, 192, 264, 5000)] == [8, 8, 2, 1, 1]
    assert [triton_decode.splits(3, n, 132) for n in (1, 16, 255, 256, 1000, 100_000)] == [
        1,
        1,
        1,
        2,
        4,
        64,
    ]


def test_launches_depend_on_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a captured decoding step may be replayed with other lengths, pages and tokens."""
    launches: list[Any] = []

    def record(
        kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **options: Any
    ) -> None:
        numbers = [x for x in args if not isinstance(x, Tensor)]
        launches.append(
            (
                kernel.__name__,
                grid,
                numbers,
                [x.shape for x in args if isinstance(x, Tensor)],
                options,
            )
        )

    monkeypatch.setattr(triton_decode, "launch", record)
    inputs = Case(((1, 3), (1, 70), (1, 90)), K=2, splits=4).inputs(torch.bfloat16, "cpu")
    for rows in (inputs[3], inputs[3] * torch.tensor([1, 0])):
        run(Case(((1, 0),), splits=4), (*inputs[:3], rows, inputs[4]))
    assert len(launches) == 4 and launches[:2] == launches[2:]


def test_nothing_is_read_back() -> None:
    """Tensors of device meta have no values: whoever asks for one gets an error."""
    launches: list[str] = []

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    cache, pages = empty(64, PAGE, 2, 64), empty(4, 32, dtype=torch.int32)
    with triton_common.recording(
        (9, 0), lambda kernel, args, options: launches.append(kernel.__name__)
    ):
        for most in (1, 30):
            rows = empty(4, 2, dtype=torch.int64)
            triton_decode.paged_attention(
                empty(4 * most, 6, 64), cache, cache, rows, pages, most, None
            )
        for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 5, 0.9)):
            uniform, seen = empty(4, dtype=torch.float64), empty(4, 7, dtype=torch.int64)
            triton_decode.sample(empty(4, 100), uniform, temperature, top_k, top_p, 0.1, 1.2, seen)
    attention = ["_paged_attention_kernel", "_merge_splits_kernel", "_paged_attention_kernel"]
    assert launches == [*attention, *["_sample_kernel"] * 3]


# ------------------------------------------------------------------------------------------ sampler


class How(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    penalty: float = 1.0

    def draw(
        self, logits: Tensor, uniform: Tensor, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        seen = logits.new_empty(len(logits), 0, dtype=torch.int64) if seen is None else seen
        ids, logp = gpu.sample(logits, uniform, *self, seen)
        assert (
            ids.dtype == torch.int64
            and logp.dtype == torch.float32
            and ids.shape == logp.shape == logits.shape[:1]
        )
        return ids, logp


HOW = [
    How(),
    How(0.0),
    How(0.5),
    How(1.5, top_k=4),
    How(top_p=0.8),
    How(min_p=0.2),
    How(0.0, penalty=1.5),
    How(0.8, penalty=0.7),
    How(1.1, 5, 0.7),
    How(1.3, 20, 0.9, 0.1, 1.2),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the vocabulary so small that small vocabularies have several."""
    monkeypatch.setattr(triton_decode, "BLOCK", 16)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("V", [5, 53])
def test_sampler_against_the_reference(how: How, V: int, device: str, small: None) -> None:
    R = 20
    logits = (2 * normal(R, V)).to(device)
    make = torch.Generator().manual_seed(V)
    uniform = torch.rand(R, generator=make, dtype=torch.float64).to(device)
    seen = torch.randint(-1, V, (R, 9), generator=make).to(device)
    ids, logp = how.draw(logits.clone(), uniform, seen)
    expected, expected_logp = reference.sample(logits.double(), uniform, *how, seen)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(logp.double(), expected_logp, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [How(), How(0.5), How(min_p=0.2), How(1.1, 5, 0.7)], ids=str)
def test_distribution(how: How, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spread numbers give each token its probability, but for one
    draw, and a cut token never.
    """
    monkeypatch.setattr(triton_decode, "BLOCK", 4)  # three blocks
    n, logits = (
        100,
        torch.tensor([0.3, -1.0, 2.0, 1.9, -4.0, 0.9, 0.0, -0.5, 1.5, 0.7], device=device),
    )
    uniform = (torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n
    ids, logp = how.draw(logits.expand(n, -1), uniform)
    counts = torch.bincount(ids, minlength=10).double()

    def expected(how: How) -> Tensor:
        return reference.kept(
            logits[None].double() / how.temperature, how.top_k, how.top_p, how.min_p
        )[0]

    def agrees(how: How) -> bool:
        probs = expected(how)
        return bool(((counts - n * probs).abs() <= 1.001).all()) and bool(
            (counts[probs == 0] == 0).all()
        )

    assert agrees(how)
    assert not agrees(how._replace(temperature=how.temperature * 2))
    torch.testing.assert_close(logp.double().exp(), expected(how)[ids], rtol=1e-5, atol=0)


@pytest.mark.parametrize("how", [How(top_k=10), How(top_p=0.8), How(min_p=0.05)], ids=str)
@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
def test_no_cut_token_at_the_ends_of_the_unit_interval(
    u: float, how: How, device: str, small: None
) -> None:
    """The first block of the vocabulary and the end of the last are cut:
    rounding must not fall on them.
    """
    logits = normal(20, 80).to(device)
    logits[:, :17], logits[:, -3:] = -9.0, -9.0
    uniform = torch.full((20,), u, dtype=torch.float64, device=device)
    ids, logp = how.draw(logits, uniform)
    assert bool(((ids >= 17) & (ids < 77)).all()) and bool(torch.isfinite(logp).all())
    possible = reference.kept(logits.double(), how.top_k, how.top_p, how.min_p) > 0
    end = possible.int().argmax(1) if u == 0.0 else 79 - possible.int().flip(1).argmax(1)
    assert torch.equal(ids, end)


def test_ends_of_the_unit_interval_without_cuts(device: str, small: None) -> None:
    logits = normal(3, 80).to(device)
    for u, end in ((0.0, 0), (1.0 - 2.0**-53, 79)):
        assert (
            How().draw(logits, torch.full((3,), u, dtype=torch.float64, device=device))[0].tolist()
            == [end] * 3
        )


def test_no_impossible_token_at_the_ends_of_blocks(device: str, small: None) -> None:
    """Numbers at, and a little beside, what the blocks add up to, where impossible tokens lie
    around their ends.
    """
    R, V = 8, 96
    logits = (2 * normal(R, V)).to(device)
    impossible = torch.zeros(V, dtype=torch.bool, device=device)
    # around ends, and one whole block
    for begin, end in ((0, 2), (13, 18), (28, 49), (79, 80), (90, 96)):
        impossible[begin:end] = True
    logits[:, impossible] = -torch.inf
    mass = logits.double().softmax(-1).cumsum(-1)
    for end in (16, 32, 48, 64, 80):
        for nudge in (-1e-8, -1e-16, 0.0, 1e-16, 1e-8):
            uniform = (mass[:, end - 1] + nudge).clamp(0, 1 - 2.0**-53)
            ids, logp = How().draw(logits, uniform)
            assert not impossible[ids].any() and bool(torch.isfinite(logp).all())
            # the last possible token before the end or the first after it
            before, after = (
                (~impossible)[:end].nonzero().max(),
                end + (~impossible)[end:].nonzero().min(),
            )
            assert bool(((ids == before) | (ids == after)).all())


@pytest.mark.parametrize("how", [How(), How(0.0), How(0.9, 20, 0.9, 0.01, 1.2)], ids=str)
def test_sampler_repeats_and_leaves_its_inputs(how: How, device: str, small: None) -> None:
    """The same bits each time, with any strides, and for a row alone."""
    wide = torch.stack([normal(6, 53), normal(53, 6).T], 2).to(device)
    logits, uniform = (
        wide[:, :, 0],
        torch.linspace(0.01, 0.99, 6, dtype=torch.float64, device=device),
    )
    seen = torch.arange(12, device=device).view(6, 2)
    kept = wide.clone(), uniform.clone(), seen.clone()
    ids, logp = how.draw(logits, uniform, seen)
    padded = torch.cat([logits, logits], 1)[:, :53]
    for same in (logits, logits.contiguous(), padded):
        again = how.draw(same, uniform, seen)
        assert torch.equal(ids, again[0]) and torch.equal(logp, again[1])
    for r in range(6):
        alone = how.draw(logits[r : r + 1], uniform[r : r + 1], seen[r : r + 1])
        assert torch.equal(ids[r : r + 1], alone[0]) and torch.equal(logp[r : r + 1], alone[1])
    assert all(torch.equal(a, b) for a, b in zip(kept, (wide, uniform, seen), strict=True))


@pytest.mark.parametrize("top_k", [0, 7])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.8, 0.999])
def test_top_p_keeps_what_the_reference_keeps(
    top_p: float, top_k: int, device: str, small: None
) -> None:
    """The least likely token that is kept, of equals the last, can be drawn; and its log-prob tells
    the mass of all that are. Rows of plain, equal, small and far-apart logits.
    """
    rows = normal(6, 53)
    rows[1] = rows[1].round()  # some twenty equal
    rows[2] = torch.where(rows[3] > 0, 0.0, -0.0)  # equal zeros of two signs
    rows[3] *= 1e4
    rows[4] = rows[4] * 1e-3 - 100.0
    wide = reference.kept(rows.double() / 0.7, top_k, top_p, 0.0)
    least = wide.where(wide > 0, 2.0).flip(1).argmin(1)  # of equals the last
    least = 52 - least
    p = wide.gather(1, least[:, None])[:, 0]
    middle = wide.cumsum(1).gather(1, least[:, None])[:, 0] - p / 2
    ids, logp = How(0.7, top_k, top_p).draw(rows.to(device), middle.to(device))
    assert torch.equal(ids.cpu(), least)
    torch.testing.assert_close(logp.cpu().double(), p.log(), rtol=1e-5, atol=1e-5)


ROTATED = {
    "plain": (5, 4, 2, 16),
    "wide": (3, 3, 3, 20),
    "one": (1, 2, 1, 8),
    "many": (70, 1, 1, 64),
}


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_to_pages(name: str, dtype: torch.dtype, device: str) -> None:
    """Queries, keys and values against the reference in float64; no other slot is written to."""
    N, H, K, E = ROTATED[name]
    wide = torch.cat([normal(N, H + 2 * K, E), normal(N, 1, E)], 1).to(device, dtype)
    qkv, angle = wide[:, :-1], normal(N, E // 2).to(device)
    slots = torch.randperm(6 * PAGE, generator=torch.Generator().manual_seed(N))[:N].to(device)
    start = normal(2, 6, PAGE, K, E).to(device, dtype)
    ours, exact = start.clone(), start.double()
    q = gpu.rope_to_pages(qkv, angle.cos(), angle.sin(), H, *ours, slots)
    turn = angle.double().cos(), angle.double().sin()
    exact_q = reference.rope_to_pages(qkv.double(), *turn, H, *exact, slots)
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    for got, wanted in ((q, exact_q), (ours, exact)):
        torch.testing.assert_close(got, wanted.to(dtype), rtol=rtol, atol=1e-5)
    written = torch.zeros(6 * PAGE, dtype=torch.bool, device=device)
    written[slots] = True
    assert torch.equal(ours.flatten(1, 2)[:, ~written], start.flatten(1, 2)[:, ~written])
    assert torch.equal(ours[1].flatten(0, 1)[slots], qkv[:, H + K :])
    assert not torch.allclose(q.double(), qkv[:, :H].double(), atol=0.1)


@triton.jit
def _passing_kernel(weights, wanted, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, BLOCK)
    tl.store(out, _passing(tl.load(weights + index), index, tl.load(wanted)))


@pytest.mark.parametrize(
    ("weights", "wanted", "index"),
    [
        ((0.0, 0.5, 0.0, 0.25), 0.0, 1),
        ((0.0, 0.5, 0.0, 0.25), -1e-17, 1),  # rounding took it below 0
        ((0.0, 0.5, 0.0, 0.25), 0.5, 3),
        ((0.5, 0.25, 0.0, 0.0), 0.75, 1),  # and to the end, or beyond
        ((0.5, 0.25, 0.0, 0.0), 0.8, 1),
        ((0.0, 0.0, 0.0, 0.0), 0.0, 0),
        ((0.5, torch.nan, 0.0, 0.0), torch.nan, 0),
    ],
    ids=str,
)
def test_passing_never_lands_on_zero(
    weights: tuple[float, ...], wanted: float, index: int, device: str
) -> None:
    out = torch.empty(1, dtype=torch.int32, device=device)
    inputs = (torch.tensor(x, dtype=torch.float64, device=device) for x in (weights, [wanted]))
    _passing_kernel[(1,)](*inputs, out, BLOCK=4)
    assert out.item() == index


def test_greedy_takes_the_first_of_equals(device: str, small: None) -> None:
    logits = torch.full((5, 50), -3.0, device=device)
    logits[0, [7, 9, 40]] = 2.0  # in one block, and in another
    logits[1, [33, 34]] = 1e4
    logits[2] = 0.0
    logits[3, 49] = 5.0
    logits[4] = -torch.inf
    logits[4, 20] = -1e4
    ids, logp = How(0.0).draw(logits, torch.full((5,), 0.99, dtype=torch.float64, device=device))
    assert ids.tolist() == [7, 33, 0, 49, 20]
    torch.testing.assert_close(
        logp.double(), logits.double().log_softmax(-1).amax(1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalty(temperature: float, device: str, small: None) -> None:
    """Seen tokens lose: the most likely one, positive, is divided; a negative one is multiplied."""
    logits = torch.tensor([[4.0, 3.0, -1.0] + [-20.0] * 20] * 3, device=device)
    seen = torch.tensor([[-1, -1, -1], [0, 0, -1], [0, 1, 2]], device=device)
    uniform = torch.full((3,), 0.5, dtype=torch.float64, device=device)
    ids, logp = How(temperature, penalty=2.0).draw(logits, uniform, seen)
    z = torch.tensor([[4.0, 3.0, -1.0], [2.0, 3.0, -1.0], [2.0, 1.5, -2.0]], dtype=torch.float64)
    assert ids.tolist() == [0, 1, 0]
    expected = z.log_softmax(-1).gather(1, ids[:, None].cpu())[:, 0]
    torch.testing.assert_close(logp.double().cpu(), expected, rtol=1e-5, atol=1e-6)


def test_nan_logits_give_a_token_that_exists_and_nan(device: str, small: None) -> None:
    logits = normal(6, 40).to(device)
    logits[1, 20], logits[2, :], logits[4, 39] = torch.nan, torch.nan, torch.nan
    clean = [0, 3, 5]
    for how in (How(), How(0.0)):
        ids, logp = how.draw(logits, torch.full((6,), 0.7, dtype=torch.float64, device=device))
        assert bool(((ids >= 0) & (ids < 40)).all()) and logp.isnan().tolist() == [
            r not in clean for r in range(6)
        ]
        alone = how.draw(logits[clean], torch.full((3,), 0.7, dtype=torch.float64, device=device))
        assert torch.equal(ids[clean], alone[0]) and torch.equal(logp[clean], alone[1])


# ------------------------------------------------------------------------------------ on a real GPU


def lengths(R: int, longest: int) -> list[int]:
    return torch.randint(longest, (R,), generator=torch.Generator().manual_seed(R)).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 3, 64, None), (8, 4, 128, 300)], ids=str)
@pytest.mark.parametrize("R", [1, 4, 64])
def test_decoding_in_a_graph(R: int, shape: tuple[int, int, int, int | None]) -> None:
    """In the tiles, pipelines and splits of the real GPU; captured once and replayed
    for other rows and tokens.
    """
    if not NATIVE:
        pytest.skip("needs a CUDA device")
    K, G, E, window = shape
    case = Case(tuple((1, n) for n in lengths(R, 1000)), window, K, G, E)
    inputs = case.inputs(torch.bfloat16, "cuda")
    check(case, gpu.paged_attention(*inputs, 1, window), inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gpu.paged_attention(*inputs, 1, window)
    for x in inputs[3:]:
        x.copy_(x.roll(1, 0))
    inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    check(case, out, inputs)
    assert torch.equal(out, gpu.paged_attention(*inputs, 1, window))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 3, 64, None), (8, 4, 128, 300)], ids=str)
def test_production_prompts(shape: tuple[int, int, int, int | None]) -> None:
    """Prompts among rows that decode; the host never waits for the GPU."""
    if not NATIVE:
        pytest.skip("needs a CUDA device")
    K, G, E, window = shape
    case = Case(
        (*((1, n) for n in lengths(20, 700)), (400, 0), (512, 64), (33, 512)), window, K, G, E
    )
    inputs = case.inputs(torch.bfloat16, "cuda")
    check(case, run(case, inputs), inputs)
    torch.cuda.set_sync_debug_mode("error")  # where the host would wait, torch raises
    try:
        ours, again = (run(case, inputs) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(ours, again)


@pytest.mark.gpu
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("V", [49_152, 128_256])
def test_production_sampler(V: int, how: How) -> None:
    """The reference's tokens, but where the number falls within rounding of a boundary."""
    if not NATIVE:
        pytest.skip("needs a CUDA device")
    R = 200
    logits = (2 * normal(R, V)).cuda()
    make = torch.Generator().manual_seed(V)
    uniform = torch.rand(R, generator=make, dtype=torch.float64).cuda()
    seen = torch.randint(-1, V, (R, 900), generator=make).cuda()
    how.draw(logits.clone(), uniform, seen)
    spare = logits.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids, logp = how.draw(spare, uniform, seen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wide = logits.double()
    expected, _ = reference.sample(wide, uniform, *how, seen)
    assert (ids != expected).sum() <= R // 50
    wide = reference.penalised(wide, how.penalty, seen)
    if how.temperature:
        probs = reference.kept(wide / how.temperature, how.top_k, how.top_p, how.min_p)
        mass = torch.nn.functional.pad(probs.cumsum(-1), (1, 0))
        beside = torch.stack([mass.gather(1, ids[:, None] + i)[:, 0] for i in (0, 1)])
        assert bool(((beside[0] - 1e-5 <= uniform) & (uniform <= beside[1] + 1e-5)).all())
        exact = probs.gather(1, ids[:, None])[:, 0].log()
    else:
        exact = wide.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), exact, rtol=1e-4, atol=1e-4)
