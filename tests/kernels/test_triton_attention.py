"""Triton's pair attention against its definition: interpreted here, native on a CUDA device.

float64 judges, as in test_triton.py: on the same rounded inputs the error is at most twice that of
eager PyTorch in that dtype, three times for gradients, for each of out, lse, dq, dk and dv. The
same comparison must fail for wrong windows, prefixes and rows.
"""

import gc
import random
from typing import NamedTuple

import pytest
import torch
import triton_backend
from attention_oracle import attention, gradient, pack, parts, sees
from torch import Tensor
from triton_backend import NATIVE, gpu

from ldalign.kernels import segments as work

device, interpret = triton_backend.device, triton_backend.interpret
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and infinity
RESULTS = ("out", "lse", "dq", "dk", "dv")


class Case(NamedTuple):
    segments: Tensor
    window: int | None = None
    K: int = 1
    G: int = 1  # query heads of a key head
    E: int = 16
    scale: float = 1.0

    @property
    def heads(self) -> int:
        return self.K * self.G

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        """qkv and an upstream gradient."""
        N = int(self.segments[-1, 1]) if len(self.segments) else 0
        make = torch.Generator().manual_seed(N)
        qkv = torch.randn(N, self.heads + 2 * self.K, self.E, generator=make, dtype=torch.float64)
        qkv[:, : self.heads + self.K] *= self.scale
        grad = torch.randn(N, self.heads, self.E, generator=make, dtype=torch.float64)
        return qkv.to(device, dtype), grad.to(device, dtype)


PAIRS = pack((7, 5, 3), (18, 1, 17), (1, 1, 1))
MIXED = pack((5, 3), (6, 2, 7), (9,), (3, 1, 2, 5), (1,))  # one, two and three responses, and none
# A response away from its prompt, one that continues a part of it, and one that continues another
# response
ANY_PREFIX = torch.tensor(
    [(0, 9, 0, 0), (9, 13, 9, 9), (13, 20, 0, 9), (20, 31, 2, 7), (31, 50, 9, 20)]
)
CASES = {
    "pairs": Case(PAIRS, K=2, E=32),
    "pairs, groups of three": Case(PAIRS, G=3),
    "mixed": Case(MIXED, K=2, G=4),
    # no prefixes; a head width that is no power of two
    "plain": Case(pack((19,), (1,), (16,)), G=3, E=20),
    "window of one": Case(PAIRS, window=1),
    # some see some of it, some nothing
    "window within the prompt": Case(pack((20, 18, 3), (3, 14)), window=6, G=3),
    "window of the prompt": Case(pack((20, 18, 3), (3, 14)), window=20),
    "window over several tiles": Case(pack((40, 30)), window=35),
    "window beyond the text": Case(PAIRS, window=1000),
    "any prefix": Case(
        torch.tensor(
            [(0, 9, 0, 0), (9, 13, 9, 9), (13, 20, 0, 9), (20, 31, 2, 7), (31, 50, 9, 20)]
        ),
        G=2,
    ),
    "huge scores": Case(PAIRS, scale=50.0),
}


def run(case: Case, qkv: Tensor, grad: Tensor) -> list[Tensor]:
    """RESULTS by the kernels."""
    out, lse = gpu.pair_attention(qkv, case.heads, case.segments, case.window)
    dqkv = gpu.pair_attention_backward(grad, qkv, out, lse, case.heads, case.segments, case.window)
    assert dqkv.shape == qkv.shape and dqkv.is_contiguous()
    return [out, lse, *parts(dqkv, case.heads)]


def by_definition(case: Case, qkv: Tensor, grad: Tensor) -> list[Tensor]:
    out, lse = attention(qkv, case.heads, case.segments, case.window)
    return [
        out,
        lse,
        *parts(gradient(grad, qkv, case.heads, case.segments, case.window), case.heads),
    ]


def check(case: Case, ours: list[Tensor], qkv: Tensor, grad: Tensor) -> None:
    """The rule of the module's first lines."""
    exact, eager = by_definition(case, qkv.double(), grad.double()), by_definition(case, qkv, grad)
    largest, upstream = exact[1].abs().max(), grad.double().norm()  # an lse is near its best score
    for name, a, b, e in zip(RESULTS, ours, eager, exact, strict=True):
        assert a.shape == e.shape and a.dtype == b.dtype, f"{name}: {a.shape} {a.dtype}"
        error, allowed = (a.double() - e).norm(), (b.double() - e).norm()
        # Eager may happen to be exact; a value of several float32 operations cannot promise that.
        floor = (4 if a.dtype == torch.float32 else 1) * torch.finfo(a.dtype).eps * e.norm()
        times = 2
        if name in ("dq", "dk", "dv"):
            times = 3  # and the difference dp - delta, however small, is rounded as dp is
            floor += 4 * torch.finfo(torch.float32).eps * upstream * qkv.double().abs().max()
        if name == "dv":
            # A softmax weight is exp(score - lse) of a score that was computed again, in another
            # order of sums: float32 rounds the score, and the weight is off by as much of itself.
            floor += torch.finfo(torch.float32).eps * upstream * largest
        assert error <= max(times * allowed, floor), f"{name}: {error:.1e}, {allowed:.1e}"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in CASES for dtype in (torch.float32, torch.bfloat16)),
        ("mixed", torch.float16),
    ],
    ids=str,
)
def test_against_the_definition(name: str, dtype: torch.dtype, device: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype, device)
    check(case, run(case, *inputs), *inputs)


RESPONSE = PAIRS[:, 3:] > PAIRS[:, 2:3]
WRONG = {
    "window one longer": ("window within the prompt", {"window": 7}),
    "window one shorter": ("window within the prompt", {"window": 5}),
    "no window": ("window within the prompt", {"window": None}),
    "no prefix": ("pairs", {"segments": torch.where(RESPONSE, PAIRS[:, [0, 1, 0, 0]], PAIRS)}),
    "prefix a token short": (
        "pairs",
        {"segments": torch.where(RESPONSE, PAIRS - torch.tensor([0, 0, 0, 1]), PAIRS)},
    ),
    "responses that see each other": ("pairs", {"segments": pack((7, 8), (18, 18), (1, 2))}),
}


@pytest.mark.parametrize("mutation", WRONG)
def test_comparison_sees_another_mask(mutation: str, device: str) -> None:
    name, change = WRONG[mutation]
    case = CASES[name]
    inputs = case.inputs(torch.bfloat16, device)
    wrong = run(case._replace(**change), *inputs)
    right = by_definition(case, *inputs)
    check(case, right, *inputs)
    for i, result in enumerate(RESULTS):
        with pytest.raises(AssertionError, match=result):
            check(case, [*right[:i], wrong[i], *right[i + 1 :]], *inputs)


def test_comparison_sees_zeros_rolls_and_swapped_heads(device: str) -> None:
    case = Case(MIXED, K=2, G=2)
    inputs = case.inputs(torch.bfloat16, device)
    right = run(case, *inputs)
    check(case, right, *inputs)
    for i, result in enumerate(RESULTS):
        for wrong in (torch.zeros_like(right[i]), right[i].roll(1, 0), right[i].roll(1, 1)):
            with pytest.raises(AssertionError, match=result):
                check(case, [*right[:i], wrong, *right[i + 1 :]], *inputs)


def test_strides_repeats_and_inputs(device: str) -> None:
    """Any strides, an expanded upstream gradient, the same bits each time, and
    nothing written to an input.
    """
    case = Case(MIXED, K=2, G=2)
    qkv, grad = case.inputs(torch.float32, device)
    grad = grad[:1, :1, :1].expand_as(grad)
    kept = [qkv.clone(), grad.clone(), case.segments.clone()]
    first = run(case, qkv, grad)
    again = run(case, qkv, grad.contiguous())
    # twice the strides of rows and heads
    apart = run(case, torch.stack([qkv, qkv + 1], 2)[:, :, 0], grad)
    for a, b, c in zip(first, again, apart, strict=True):
        assert torch.equal(a, b), "not the same bits twice"
        assert torch.equal(a, c), "strides change the result"
    assert all(torch.equal(a, b) for a, b in zip(kept, (qkv, grad, case.segments), strict=True))


@pytest.mark.parametrize("where", ["q", "k", "v", "grad"])
def test_nan_in_gives_nan_out_in_its_own_text(where: str, device: str) -> None:
    case = Case(pack((3, 5, 1), (4, 3), (2, 1)), G=2)
    qkv, grad = case.inputs(torch.float32, device)
    clean = run(case, qkv, grad)
    spoilt = grad if where == "grad" else parts(qkv, case.heads)["qkv".index(where)]
    spoilt[10, 0, 3] = float("nan")  # of the second text, tokens 9 to 15
    results = run(case, qkv, grad)
    assert any(result[10].isnan().any() for result in results)
    for a, b in zip(results, clean, strict=True):
        assert torch.equal(a[:9], b[:9]) and torch.equal(a[16:], b[16:])


def test_no_tokens(device: str) -> None:
    case = Case(pack(), K=2, G=3)
    inputs = case.inputs(torch.bfloat16, device)
    assert [tuple(x.shape) for x in run(case, *inputs)] == [
        (0, 6, 16),
        (0, 6),
        (0, 6, 16),
        (0, 2, 16),
        (0, 2, 16),
    ]


# --------------------------------------------------------------------------------------- work lists


def test_tiles_of_keys_have_exactly_the_readers_of_the_mask() -> None:
    """Every (query, key) of the mask once, and what is beside the mask only within a
    tile that has some of it.
    """
    chance = random.Random(0)
    for _ in range(50):
        segments = pack(
            *([chance.randint(1, 9) for _ in range(chance.randint(1, 4))] for _ in range(3))
        )
        window = chance.choice([None, 1, 3, 8, 100])
        tiles, readers = work.key_tiles(
            [work.Segment(*row) for row in segments.tolist()], 4, window
        )
        seen = torch.zeros_like(sees(segments, window), dtype=torch.int64)
        for tile in tiles:
            for reader in readers[tile.reader : tile.readers_end]:
                query = torch.arange(reader.begin, reader.end)[:, None]
                key = torch.arange(tile.first, tile.end)
                gap = query - key + reader.shift
                inside = (gap >= 0) & (gap < (window or 1000))
                assert inside.any(1).all(), "a query that sees no key of the tile"
                seen[query, key] += inside
        assert torch.equal(seen, sees(segments, window).long())
        work_of = [sum(r.end - r.begin for r in readers[t.reader : t.readers_end]) for t in tiles]
        assert work_of == sorted(work_of, reverse=True)


def test_tiles_of_queries_hold_every_row_once() -> None:
    group, rows = 3, 16
    tiles = work.query_tiles([work.Segment(*row) for row in MIXED.tolist()], group, rows, None)
    found = sorted(
        (t.begin * group + row)
        for t in tiles
        for row in range(t.row, min(t.row + rows, t.length * group))
    )
    assert found == list(range(int(MIXED[-1, 1]) * group))


def test_work_is_made_once_for_a_batch_and_forgotten_with_it() -> None:
    calls = []

    def make(rows: list[work.Segment]) -> int:
        calls.append(rows)
        return len(rows)

    segments, twin = PAIRS.clone(), PAIRS.clone()
    assert [work.derived(segments, "a", make), work.derived(segments, "a", make)] == [9, 9] and len(
        calls
    ) == 1
    work.derived(segments, "b", make)
    work.derived(twin, "a", make)  # equal, but another tensor
    assert len(calls) == 3
    held = len(work._known)
    del segments
    gc.collect()
    assert len(work._known) == held - 1


# ------------------------------------------------------------------------------------ on a real GPU


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 3, 64, None), (8, 4, 128, 4096), (8, 4, 128, 300)], ids=str)
def test_production_shape(shape: tuple[int, int, int, int | None]) -> None:
    """Pairs of many lengths in bfloat16, in the tiles and pipelines of the real GPU; the
    host never waits for it.
    """
    if not NATIVE:
        pytest.skip("needs a CUDA device")
    K, G, E, window = shape
    case = Case(pack((500, 700, 431), (130, 64, 129), (1000, 1, 257), (1,)), window, K, G, E)
    qkv, grad = case.inputs(torch.bfloat16, "cuda")
    run(case, qkv, grad)
    torch.cuda.set_sync_debug_mode("error")  # where the host would wait, torch raises
    try:
        ours, again = (
            run(case._replace(segments=case.segments.clone()), qkv, grad) for _ in range(2)
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    for head in range(K):  # a key head at a time: the definition holds all scores
        group = slice(head * G, head * G + G)
        alone = torch.cat([qkv[:, group], qkv[:, [K * G + head, K * G + K + head]]], 1)
        results = [x[:, group] for x in ours[:3]] + [x[:, head : head + 1] for x in ours[3:]]
        check(case._replace(K=1), results, alone, grad[:, group])
