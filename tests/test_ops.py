"""The ops against the reference: same values, same gradients, in every dtype; and packing against one by one.

float64 must agree to rounding. Otherwise float64 judges: on the same rounded inputs the error is at most twice that of
eager PyTorch running the reference in that dtype, three times for gradients. Upstream gradients are random and uneven.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldalign import layout, ops
from ldalign.errors import EnvironmentProblem
from ldalign.kernels import reference
from ldalign.layout import Packed

Case = tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64) * scale


def targets(N: int, V: int) -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(N + V))


def head_case(N: int, D: int, V: int) -> Case:
    target = targets(N, V)
    inputs = [normal(N, D, scale=2), normal(V, D, seed=1, scale=D**-0.5)]
    return lambda h, w: ops.linear_logprob(h, w, target), lambda h, w: reference.linear_logprob(h, w, target), inputs


def norm_case(*shape: int) -> Case:
    inputs = [normal(*shape), normal(shape[-1], seed=1)]
    return lambda x, w: ops.rms_norm(x, w, 1e-3), lambda x, w: reference.rms_norm(x, w, 1e-3), inputs


def rope_case(N: int, H: int, E: int) -> Case:
    angles = normal(N, E // 2, seed=1, scale=5).float()
    cos, sin = angles.cos(), angles.sin()
    return lambda x: ops.rope(x, cos, sin), lambda x: reference.rope(x, cos, sin), [normal(N, H, E)]


def swiglu_case(*shape: int) -> Case:
    return ops.swiglu, reference.swiglu, [normal(*shape, scale=2), normal(*shape, seed=1)]


def attention_case(B: int, T: int, H: int, K: int, E: int, window: int | None) -> Case:
    inputs = [normal(B, T, H, E, scale=2), normal(B, T, K, E, seed=1), normal(B, T, K, E, seed=2)]
    return lambda q, k, v: ops.attention(q, k, v, window), lambda q, k, v: reference.attention(q, k, v, window), inputs


CASES = {
    "head, aligned": head_case(64, 32, 128),
    "head, ragged": head_case(37, 13, 101),
    "head, one row": head_case(1, 8, 33),
    "head, vocabulary": head_case(3, 8, 50_257),
    "rms_norm": norm_case(16, 64),
    "rms_norm, ragged": norm_case(3, 5, 33),
    "rms_norm, one value": norm_case(1, 1),
    "rope": rope_case(17, 3, 10),
    "rope, one token": rope_case(1, 1, 2),
    "swiglu": swiglu_case(16, 64),
    "swiglu, ragged": swiglu_case(3, 1, 77),
    "attention": attention_case(2, 16, 4, 4, 8, None),
    "attention, grouped": attention_case(2, 19, 6, 2, 10, None),
    "attention, window": attention_case(2, 19, 4, 2, 8, 5),
    "attention, window of one": attention_case(1, 5, 2, 1, 4, 1),
    "attention, window longer than the text": attention_case(1, 7, 2, 1, 4, 8),
    "attention, one token": attention_case(3, 1, 4, 2, 8, 3),
}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """linear_logprob works through five rows of a vocabulary of 101 at a time."""
    monkeypatch.setattr(ops, "LOGIT_BYTES", 5 * 4 * 101 + 3)


@pytest.fixture(params=["products", "sdpa"])
def attention_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways a CPU computes attention, short sequences and long."""
    if request.param == "sdpa":
        monkeypatch.setattr(ops, "PRODUCT_TOKENS", 0)
    return str(request.param)


def run(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    """The value and the gradient of every input, under a random upstream gradient unless one is given."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    if upstream is None:
        upstream = normal(*out.shape, seed=9) * torch.linspace(0.1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def check(
    function: Callable[..., Tensor], eager: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype
) -> None:
    inputs = [x.to(dtype) for x in inputs]
    exact = run(eager, [x.double() for x in inputs])
    ours, theirs = run(function, inputs), run(eager, inputs)
    for i, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        what = f"gradient {i - 1}" if i else "value"
        assert a.shape == e.shape and a.dtype == b.dtype, what
        error, allowed = (a.double() - e).norm(), (b.double() - e).norm()
        if dtype == torch.float64:
            assert error <= 1e-12 * (1 + e.norm()), f"{what}: {error:.1e}"
        else:
            # Eager may happen to be exact, as with a window of one, where q and k have no gradient at all.
            floor = (4 if dtype == torch.float32 else 1) * torch.finfo(a.dtype).eps * max(x.norm() for x in exact)
            assert error <= max((3 if i else 2) * allowed, floor), f"{what}: {error:.1e} against {allowed:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_op_against_reference(name: str, dtype: torch.dtype) -> None:
    check(*CASES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("attention")])
def test_long_attention_against_reference(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "PRODUCT_TOKENS", 0)
    check(*CASES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_head_in_pieces_against_reference(dtype: torch.dtype, small_pieces: None) -> None:
    check(*CASES["head, ragged"], dtype)
    check(*head_case(120, 13, 101), dtype)  # 24 pieces
    check(*CASES["head, vocabulary"], dtype)  # one row is more than a piece may hold


@pytest.mark.parametrize("name", [name for name in CASES if "vocabulary" not in name and "aligned" not in name])
def test_gradcheck(name: str) -> None:
    function, _, inputs = CASES[name]
    inputs = [x[:6].clone().requires_grad_() if x.shape[0] == 37 else x.clone().requires_grad_() for x in inputs]
    if name == "head, ragged":
        target = targets(37, 101)[:6]
        function = lambda h, w: ops.linear_logprob(h, w, target)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", [name for name in CASES if "vocabulary" not in name])
def test_strides_repeats_and_inputs(name: str, small_pieces: None) -> None:
    """Any strides, an expanded upstream gradient, the same bits each time, and nothing written to an input."""
    function, _, inputs = CASES[name]
    inputs = [x.float() for x in inputs]
    kept = [x.clone() for x in inputs]
    expanded = torch.tensor(0.7).expand(function(*inputs).shape)
    first = run(function, inputs, expanded)
    spread = [torch.stack([x, x + 1], -1)[..., 0] for x in inputs]
    assert not any(x.is_contiguous() for x in spread if x.numel() > 1)
    leaves = [x.requires_grad_() for x in spread]
    out = function(*leaves)
    others = [out.detach(), *torch.autograd.grad(out, leaves, expanded.contiguous())]
    for a, b, c in zip(first, others, run(function, inputs, expanded), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        assert torch.equal(a, c), "not the same bits twice"
    assert all(torch.equal(x, k) for x, k in zip(inputs, kept, strict=True))
    with torch.no_grad():
        assert torch.equal(function(*inputs), first[0])


# ---------------------------------------------------------------------------------------------- linear_logprob


class Largest(TorchDispatchMode):
    """Notes the largest tensor any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_head_makes_no_logits_of_all_rows(small_pieces: None) -> None:
    N, D, V = 200, 4, 101
    with Largest() as seen:
        run(lambda h, w: ops.linear_logprob(h, w, targets(N, V)), [normal(N, D).float(), normal(V, D).float()])
    assert seen.elements <= max(N * D, V * D, 5 * V)
    with Largest() as seen:
        reference.linear_logprob(normal(N, D), normal(V, D), targets(N, V))
    assert seen.elements == N * V, "the watch itself works"


@pytest.mark.parametrize("which", [0, 1])
def test_head_with_one_side_frozen(which: int, small_pieces: None) -> None:
    function, _, inputs = CASES["head, ragged"]
    upstream = normal(37, seed=4)
    both = run(function, inputs, upstream)
    leaves = [x.clone().requires_grad_(i == which) for i, x in enumerate(inputs)]
    function(*leaves).backward(upstream)
    assert leaves[1 - which].grad is None
    assert torch.equal(leaves[which].grad, both[1 + which])


def test_head_of_huge_logits(small_pieces: None) -> None:
    """Logits of +-1e4: exact values, finite gradients, and a target with no chance is -2e4, not -inf."""
    hidden = torch.tensor([[1e4], [-1e4]] * 6, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], *[[0.5]] * 99], requires_grad=True)
    logp = ops.linear_logprob(hidden, weight, torch.zeros(12, dtype=torch.int64))
    assert logp.tolist() == [0.0, -2e4] * 6
    logp.sum().backward()
    assert hidden.grad.flatten().tolist() == [0.0, 2.0] * 6
    assert weight.grad.isfinite().all()


def test_head_refuses_shapes_that_do_not_fit() -> None:
    h, w, t = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4, dtype=torch.int64)
    for arguments in ((h, torch.ones(5, 2), t), (h, w, t[:3]), (h, w, t[:, None])):
        with pytest.raises(ValueError, match=r"expected \(N, D\), \(V, D\) and \(N,\)"):
            ops.linear_logprob(*arguments)


def test_segment_sum() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    sums = ops.segment_sum(values, [2, 1, 2])
    assert sums.tolist() == [3.0, 4.0, 24.0]
    sums.backward(torch.tensor([1.0, -2.0, 0.5]))
    assert values.grad.tolist() == [1.0, 1.0, -2.0, 0.5, 0.5]
    assert ops.segment_sum(values[:0], []).shape == (0,)
    with pytest.raises(ValueError, match="add up to 4, but there are 5"):
        ops.segment_sum(values, [2, 2])


def test_dpo_is_the_reference_until_a_kernel_takes_over() -> None:
    arguments = [normal(7, seed=i) for i in range(4)]
    loss, metrics = ops.weighted_dpo_loss(*arguments, normal(7, seed=5).abs(), 0.2)
    expected, expected_metrics = reference.weighted_dpo_loss(*arguments, normal(7, seed=5).abs(), 0.2)
    torch.testing.assert_close((loss, metrics), (expected, expected_metrics))


# ---------------------------------------------------------------------------------------------- packing

LENGTHS = [7, 1, 5, 5, 12, 3, 30, 2]


def qkv(N: int, H: int = 4, K: int = 2, E: int = 6) -> list[Tensor]:
    return [normal(N, H, E, scale=2), normal(N, K, E, seed=1), normal(N, K, E, seed=2)]


@pytest.mark.parametrize("padding", [1.0, 1.5, 100.0], ids=["no padding", "some", "one group"])
@pytest.mark.parametrize("window", [None, 1, 4, 30])
def test_packed_attention_is_one_by_one(
    window: int | None, padding: float, attention_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "PADDING", padding)
    packed = Packed(LENGTHS)

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True)
        return torch.cat([reference.attention(*(x[None] for x in row), window)[0] for row in rows])

    inputs = qkv(sum(LENGTHS))
    ours, theirs = run(lambda *x: packed.attend(0, *x, window), inputs), run(alone, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", [None, 4])
def test_packed_attention_of_equal_lengths(window: int | None, attention_path: str) -> None:
    q, k, v = qkv(3 * 9)
    ours = Packed([9, 9, 9]).attend(0, q, k, v, window)
    theirs = reference.attention(*(x.view(3, 9, *x.shape[1:]) for x in (q, k, v)), window)
    torch.testing.assert_close(ours, theirs.flatten(0, 1), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_shared_prompts_are_separate_sequences(window: int | None, attention_path: str) -> None:
    """[prompt | a | b] is [prompt | a] and [prompt | b], and the gradient of the prompt is the sum of both."""
    parts: list[int | tuple[int, ...]] = [(6, 3, 9), 5, (1, 4, 4), (2, 7), (8, 1, 2, 5)]
    packed = Packed(parts)
    shared: list[Tensor] = []  # for every separate sequence, where its tokens lie in the flat batch
    start = 0
    for sequence in parts:
        prompt, *responses = (sequence,) if isinstance(sequence, int) else sequence
        at = start + prompt
        for n in responses or [0]:
            shared.append(torch.cat([torch.arange(start, start + prompt), torch.arange(at, at + n)]))
            at += n
        start = at
    first = [i for i, rows in enumerate(shared) if i == 0 or shared[i - 1][0] != rows[0]]
    assert [packed.positions[rows].tolist() for rows in shared] == [list(range(len(rows))) for rows in shared]

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        for i, rows in enumerate(shared):
            one = reference.attention(*(x[rows][None] for x in (q, k, v)), window)[0]
            keep = torch.ones(len(rows), dtype=torch.bool)
            if i not in first:  # the prompt's own output counts once
                keep = ~torch.isin(rows, shared[i - 1])
            out = out.index_copy(0, rows[keep], one[keep])
        return out

    inputs = qkv(start)
    ours, theirs = run(lambda *x: packed.attend(0, *x, window), inputs), run(alone, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_packed_positions_and_refusals() -> None:
    assert Packed([3, 1, 2]).positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert Packed([(2, 3, 1), 2]).positions.tolist() == [0, 1, 2, 3, 4, 2, 0, 1]
    for lengths in ([3, 0], [(2, 0)], [-1]):
        with pytest.raises(ValueError, match="needs at least one token"):
            Packed(lengths)


# ---------------------------------------------------------------------------------------------- backend


@pytest.fixture
def fresh_backend() -> Iterator[None]:
    ops.backend.cache_clear()
    yield
    ops.backend.cache_clear()


def test_unknown_backend_is_an_error(fresh_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDALIGN_BACKEND", "cuda-fast")
    with pytest.raises(
        EnvironmentProblem, match="LDALIGN_BACKEND='cuda-fast' is not available; choose auto or reference"
    ):
        ops.linear_logprob(torch.ones(1, 1), torch.ones(2, 1), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("wanted", ["auto", "reference", None])
def test_backend_is_chosen_and_logged_once(
    wanted: str | None, fresh_backend: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("LDALIGN_BACKEND", raising=False)
    if wanted:
        monkeypatch.setenv("LDALIGN_BACKEND", wanted)
    with caplog.at_level(logging.INFO, logger="ldalign.ops"):
        for _ in range(2):
            assert ops.backend() == "reference"
            logp = ops.linear_logprob(torch.ones(1, 1), torch.ones(2, 1), torch.zeros(1, dtype=torch.int64))
    assert logp.item() == pytest.approx(-math.log(2))
    assert [r.getMessage() for r in caplog.records] == [f"ops: backend reference (LDALIGN_BACKEND={wanted or 'auto'})"]
