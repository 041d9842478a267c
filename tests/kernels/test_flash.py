"""Pair attention by FlashAttention: which calls are made and how they are merged.

FlashAttention needs a GPU, so the two low-level functions of either generation are played here in
plain PyTorch, with the parameters and the conduct of flash-attn 2.8 and FlashAttention-3 that the
calls rely on; the last test runs the real ones where they are.
"""

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import attention, gradient, pack
from paged_cases import Case
from torch import Tensor, library

from ldalign import ops
from ldalign.kernels import flash, reference
from ldalign.run import environment


class FakeFlashAttention:
    """Plays flash_attn.flash_attn_interface: varlen forward and backward, their real parameters."""

    def __init__(self) -> None:
        self.causal: list[bool] = []

    def _flash_attn_varlen_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        return_softmax: bool = False,
        block_table: Tensor | None = None,
        leftpad_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
        zero_tensors: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert dropout_p == softcap == 0 and (causal or window_size_right == -1)
        self.causal.append(causal)
        out = torch.full_like(q, float("nan")).contiguous()
        lse = q.new_full((q.shape[1], len(q)), float("nan"))
        for own, keys in self._entries(
            q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        ):
            scores = self._scores(q[own], k[keys], softmax_scale, causal, window_size_left)
            values = v[keys].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0)
            # without keys: out 0, lse +infinity
            out[own] = (scores.softmax(-1) @ values).transpose(0, 1) if scores.shape[2] else 0
            lse[:, own] = scores.logsumexp(-1) if scores.shape[2] else float("inf")
        return out, lse, q.new_empty(0), q.new_empty(2)

    def _flash_attn_varlen_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
        zero_tensors: bool = False,
    ) -> Tensor:
        assert (
            dropout_p == softcap == 0
            and alibi_slopes is None
            and (causal or window_size_right == -1)
        )
        assert (
            deterministic
            and softmax_lse.is_contiguous()
            and softmax_lse.shape == (q.shape[1], len(q))
        )
        self.causal.append(causal)
        delta = (dout * out).sum(-1).T
        group = q.shape[1] // k.shape[1]
        for own, keys in self._entries(
            q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        ):
            scores = self._scores(q[own], k[keys], softmax_scale, causal, window_size_left)
            p = (scores - softmax_lse[:, own, None]).exp()  # (H, queries, keys)
            g, k_, v_ = (x.transpose(0, 1) for x in (dout[own], k[keys], v[keys]))
            ds = p * (g @ v_.repeat_interleave(group, 0).mT - delta[:, own, None]) * softmax_scale
            dq[own] = (ds @ k_.repeat_interleave(group, 0)).transpose(0, 1)
            dk[keys] = (
                (ds.mT @ q[own].transpose(0, 1)).unflatten(0, (-1, group)).sum(1).transpose(0, 1)
            )
            dv[keys] = (p.mT @ g).unflatten(0, (-1, group)).sum(1).transpose(0, 1)
        return delta

    @staticmethod
    def _entries(
        q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
    ) -> list[tuple[slice, slice]]:
        """The batch: entry i has queries cu_q[i] to cu_q[i + 1] - 1, and keys likewise."""
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
        runs = [[slice(a, b) for a, b in pairwise(cu.tolist())] for cu in (cu_q, cu_k)]
        for entries, most, tokens in zip(runs, (max_q, max_k), (len(q), len(k)), strict=True):
            assert entries[0].start == 0 and entries[-1].stop == tokens, "tokens nobody writes to"
            assert all(0 <= e.stop - e.start <= most for e in entries)
        assert max_q > 1, "then flash-attn may take each entry for one query"
        return list(zip(*runs, strict=True))

    @staticmethod
    def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, left: int) -> Tensor:
        """(H, queries, keys); queries and keys end together."""
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1)
        gap = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        unseen = (gap < 0) & causal
        if left >= 0:
            unseen = unseen | (gap > left)
        return (q.transpose(0, 1) @ keys.mT * scale).masked_fill(unseen, float("-inf"))


class FakeFlashAttention3:
    """Plays flash_attn_interface: forward and backward, their real parameters."""

    def __init__(self) -> None:
        self._played = FakeFlashAttention()
        self.causal = self._played.causal

    def _flash_attn_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_new: Tensor | None = None,
        v_new: Tensor | None = None,
        qv: Tensor | None = None,
        out_: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        cu_seqlens_k_new: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        page_table: Tensor | None = None,
        kv_batch_idx: Tensor | None = None,
        leftpad_k: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        seqlens_rotary: Tensor | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        attention_chunk: int = 0,
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        scheduler_metadata: Tensor | None = None,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        sm_margin: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert cu_seqlens_q is not None and softmax_scale is not None and max_seqlen_q is not None
        if page_table is not None:
            assert cu_seqlens_k is None, "then page table is not supported"
            assert seqused_k is not None and seqused_k.shape == page_table.shape[:1]
            assert seqused_k.dtype == page_table.dtype == torch.int32
            most = page_table.shape[1] * k.shape[1]
            # Of a row, what it uses of its pages, and nothing else.
            slots = page_table[:, :, None] * k.shape[1] + torch.arange(k.shape[1])  # (R, P, 16)
            used = [own[:n] for own, n in zip(slots.flatten(1), seqused_k.tolist(), strict=True)]
            k, v = (x.flatten(0, 1)[torch.cat(used)] for x in (k, v))
            cu_seqlens_k, max_seqlen_k = F.pad(seqused_k.cumsum(0).int(), (1, 0)), most
        assert cu_seqlens_k is not None and max_seqlen_k is not None
        entries = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        windows = window_size_left, window_size_right
        out, lse, _, _ = self._played._flash_attn_varlen_forward(
            q, k, v, *entries, 0.0, softmax_scale, causal, *windows
        )
        lse = lse.masked_fill(lse == float("inf"), float("-inf"))
        return out, lse, q.new_empty(0), q.new_empty(0)

    def _flash_attn_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        sequed_q: Tensor | None = None,
        sequed_k: Tensor | None = None,
        max_seqlen_q: int = 0,
        max_seqlen_k: int = 0,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
        softmax_scale: float = 1.0,
        is_causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        deterministic: bool = False,
        sm_margin: int = 0,
    ) -> Tensor:
        assert q.shape[2] <= 192, "no repeatable backward of wider heads"
        assert dq is not None and dk is not None and dv is not None
        entries = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        tensors = dout, q, k, v, out, softmax_lse, dq, dk, dv
        windows = window_size_left, window_size_right
        given = 0.0, softmax_scale, is_causal, *windows, softcap, None, deterministic
        return self._played._flash_attn_varlen_backward(*tensors, *entries, *given)


Fake = FakeFlashAttention | FakeFlashAttention3


@pytest.fixture(params=[2, 3])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fake:
    played = FakeFlashAttention() if request.param == 2 else FakeFlashAttention3()
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, flash.MODULES[request.param], played)  # type: ignore[arg-type]
    monkeypatch.setattr(flash, "generations", lambda: (request.param,))
    return played


PAIRS = pack((7, 5, 9), (18, 1, 17), (1, 1, 1))
CASES = {
    "pairs": (PAIRS, None),
    "one, two and three responses, and none": (
        pack((5, 3), (17, 6, 2), (19,), (4, 1, 9, 5), (1,)),
        None,
    ),
    "plain sequences in a window": (pack((30,), (1,), (4,)), 5),
    "window as long as the longest text": (PAIRS, 35),
    "a response away from its prompt": (
        torch.tensor([(0, 9, 0, 0), (9, 13, 9, 9), (13, 20, 0, 9)]),
        None,
    ),
    "a prompt's last tokens": (torch.tensor([(0, 9, 0, 0), (9, 13, 6, 9), (13, 20, 6, 9)]), None),
    "one-token texts": (pack((1,), (1,), (1, 1)), None),
}


@pytest.mark.parametrize("name", CASES)
def test_merged_calls_are_pair_attention(name: str, fake: Fake) -> None:
    segments, window = CASES[name]
    assert flash.supports(segments, window, torch.bfloat16, 16)
    heads, N = 6, int(segments[-1, 1])
    make = torch.Generator().manual_seed(N)
    # strided rows
    qkv = torch.randn(N, 2 * (heads + 4), 16, generator=make, dtype=torch.float64)[:, : heads + 4]
    grad = torch.randn(N, heads, 16, generator=make, dtype=torch.float64)
    out, lse = flash.pair_attention(qkv, heads, segments, window)
    for ours, exact in zip((out, lse), attention(qkv, heads, segments, window), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    dqkv = flash.pair_attention_backward(grad, qkv, out, lse, heads, segments, window)
    torch.testing.assert_close(
        dqkv, gradient(grad, qkv, heads, segments, window), rtol=1e-11, atol=1e-11
    )
    assert dqkv.is_contiguous() and lse.is_contiguous()
    assert fake.causal == ([True, False] if (segments[:, 3] > segments[:, 2]).any() else [True]) * 2


def test_the_second_call_matters(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, or weighed with the wrong sign, the comparison above fails."""
    qkv = torch.randn(
        int(PAIRS[-1, 1]), 4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    exact, _ = attention(qkv, 2, PAIRS, None)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "sigmoid", lambda x: 1 / (1 + x.exp()))
        assert (flash.pair_attention(qkv, 2, PAIRS, None)[0] - exact).norm() > 0.1 * exact.norm()
    alone, _ = flash.pair_attention(
        qkv, 2, pack(*((n,) for n in (PAIRS[:, 1] - PAIRS[:, 0]).tolist())), None
    )
    assert (alone - exact).norm() > 0.1 * exact.norm()


def test_no_tokens(fake: Fake) -> None:
    qkv = torch.empty(0, 8, 16, dtype=torch.bfloat16)
    out, lse = flash.pair_attention(qkv, 4, pack(), None)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4) and lse.dtype == torch.float32
    assert flash.pair_attention_backward(out, qkv, out, lse, 4, pack(), None).shape == (0, 8, 16)
    assert not fake.causal


UNSUPPORTED = {
    "a window shorter than a text with a prompt": (PAIRS, 34, torch.bfloat16, 64),
    "float32": (PAIRS, None, torch.float32, 64),
    "a head width flash-attn has no kernel for": (PAIRS, None, torch.float16, 20),
    "a wider head": (PAIRS, None, torch.float16, 264),
    "responses in another order than their prompts": (
        torch.tensor([(0, 3, 0, 0), (3, 6, 3, 3), (6, 8, 3, 6), (8, 9, 0, 3)]),
        None,
        torch.bfloat16,
        64,
    ),
    "a response that continues another's text": (
        torch.tensor([(0, 3, 0, 0), (3, 6, 0, 3), (6, 8, 0, 6)]),
        None,
        torch.bfloat16,
        64,
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_supports(name: str, fake: Fake) -> None:
    assert not flash.supports(*UNSUPPORTED[name])


def test_unordered_prompts_are_an_error(fake: Fake) -> None:
    segments = UNSUPPORTED["responses in another order than their prompts"][0]
    with pytest.raises(ValueError, match="supports"):
        flash.pair_attention(torch.zeros(9, 3, 16, dtype=torch.bfloat16), 1, segments, None)


@pytest.mark.parametrize(
    ("installed", "capability", "narrow", "wide"),
    [
        ((3, 2), (9, 0), 3, 2),
        ((3,), (9, 0), 3, None),
        ((2,), (9, 0), 2, 2),
        ((3, 2), (8, 0), 2, 2),
        ((3, 2), (10, 0), 2, 2),
        ((3,), (12, 0), None, None),
        ((), (9, 0), None, None),
        ((3, 2), None, None, None),
    ],
)
def test_which_generation(
    installed: tuple[int, ...],
    capability: tuple[int, int] | None,
    narrow: int | None,
    wide: int | None,
    machine: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By head width: 128, which both can do, and 256. The log and the environment's list say it."""
    machine(installed, capability)
    assert (flash.generation(128), flash.generation(256)) == (narrow, wide)
    assert flash.supports(PAIRS, None, torch.bfloat16, 256) == (wide is not None)
    assert flash.available() == (narrow is not None) == (not flash.why_not())
    tick = environment._flash_attention()
    assert tick.found == flash.available()
    assert f"FlashAttention-{narrow} (heads" in tick.detail or not tick.found
    qkv = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 3, 128), device=CUDA)
    ops._note_flash.cache_clear()
    with caplog.at_level("INFO"):
        chosen = ops._attention(qkv, PAIRS, None) if narrow else None  # type: ignore[arg-type]
    assert chosen is (flash if narrow else None)
    assert (f"pair_attention on cuda: FlashAttention-{narrow}" in caplog.text) == bool(narrow)
    assert flash.supports_pages(2, torch.bfloat16, 128) == (narrow == 3)
    assert ("prompts of a generation by -3" in tick.detail) == (narrow == 3)


CUDA = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Plays a machine: which generations are installed, and its GPU's capability or None."""

    def play(installed: tuple[int, ...], capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())  # type: ignore[arg-type]
        for number, made in ((2, FakeFlashAttention()), (3, FakeFlashAttention3())):
            there = made if number in installed else None
            monkeypatch.setitem(sys.modules, flash.MODULES[number], there)  # type: ignore[arg-type]

        def version(name: str) -> str:
            if 2 not in installed:
                raise importlib.metadata.PackageNotFoundError
            return "2.8.3"

        monkeypatch.setattr(flash.importlib.metadata, "version", version)
        flash.generations.cache_clear()
        flash.reads_pages.cache_clear()

    yield play
    flash.generations.cache_clear()
    flash.reads_pages.cache_clear()


PAGED = {  # new tokens of a row and those before them; the window
    "prompts": (((5, 0), (40, 0), (16, 0)), None),
    "responses among them, and prompts in pieces": (((1, 37), (20, 0), (7, 30), (16, 16)), None),
    "a row without new tokens": (((3, 2), (0, 9), (4, 0)), None),
    "a window within a page": (((1, 37), (20, 0), (7, 30)), 6),
    "a window across pages": (((1, 37), (40, 0), (7, 30)), 20),
    "a window of one": (((1, 37), (20, 0)), 1),
}


@pytest.mark.parametrize("name", PAGED)
def test_prompts_over_pages(
    name: str, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the operator, on what says of itself that it lies on a GPU."""
    of_rows, window = PAGED[name]
    machine((3,), (9, 0))
    case = Case(of_rows, window, K=2, G=3, E=16)
    inputs, most = case.inputs(torch.float64, "cpu"), max(new for new, _ in of_rows)
    exact = reference.paged_attention(*inputs, window)
    monkeypatch.setattr(ops, "_may_use_flash", lambda q: True)
    monkeypatch.setattr(ops, "_raw", lambda *_: pytest.fail("another kernel"))
    monkeypatch.setattr(flash, "supports_pages", lambda *_: True)
    out = ops.paged_attention(*inputs, most, window)
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
    assert out.is_contiguous()
    nothing = ops.paged_attention(inputs[0][:0], *inputs[1:3], inputs[3] * 0, inputs[4], 0)
    assert nothing.shape == (0, 6, 16)


def test_where_pages_are_left_to_triton(machine: Callable[..., None]) -> None:
    machine((3,), (9, 0))
    bf16 = torch.bfloat16
    assert flash.supports_pages(2, bf16, 192) and flash.supports_pages(300, torch.float16, 64)
    assert not flash.supports_pages(1, bf16, 64), "decoding, which is captured in graphs"
    assert not flash.supports_pages(2, torch.float32, 64) and not flash.supports_pages(2, bf16, 20)
    assert not flash.supports_pages(2, bf16, 200)
    machine((2,), (9, 0))
    assert not flash.supports_pages(2, bf16, 64), "pages of 256 tokens"
    flags = {"FLASHATTENTION_DISABLE_PAGEDKV": True}
    built = SimpleNamespace(CONFIG={"build_flags": flags})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn_config", built)  # type: ignore[arg-type]
        machine((3,), (9, 0))
        assert not flash.supports_pages(2, bf16, 64), "built without"
        flags["FLASHATTENTION_DISABLE_PAGEDKV"] = False
        machine((3,), (9, 0))
        assert flash.supports_pages(2, bf16, 64)


def test_why_not_says_why(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def version(text: str) -> str:
        monkeypatch.setattr(flash.importlib.metadata, "version", lambda name: text)
        flash.generations.cache_clear()
        return flash.why_not()

    machine((), None)
    assert "2.5.8; 2.7" in version("2.5.8") and "4.0.0b1; 2.7" in version("4.0.0b1")
    assert "-2: flash-attn 2.8.3 does not load" in version("2.8.3")
    monkeypatch.delitem(sys.modules, flash.MODULES[3])
    assert f"FlashAttention-3: {flash.MODULES[3]} is not installed" in version("2.8.3")
    machine((3,), (8, 6))
    assert "FlashAttention-3: it is for compute capability 9.0" in flash.why_not()
    machine((3,), (9, 0))
    monkeypatch.setattr(
        sys.modules[flash.MODULES[3]], "_flash_attn_backward", lambda dout, q, window_size: None
    )
    flash.generations.cache_clear()
    assert "a newer one is needed" in flash.why_not()


def test_the_parameters_of_an_operator_are_seen(machine: Callable[..., None]) -> None:
    """FlashAttention-3's functions are operators made by custom_op."""

    @library.custom_op("ldalign_test::forward", mutates_args=())
    def forward(q: Tensor, window_size_left: int = -1) -> Tensor:
        return q.clone()

    machine((3,), (9, 0))
    made = sys.modules[flash.MODULES[3]]
    made._flash_attn_forward = made._flash_attn_backward = forward  # type: ignore[attr-defined]
    assert not flash.why_not_3()


@pytest.mark.gpu
def test_the_real_flash_attention() -> None:
    """In bfloat16 no more than twice the error of eager PyTorch, three times for gradients; the
    same bits twice.
    """
    if not flash.available():
        pytest.skip(flash.why_not())
    segments, heads = pack((500, 700, 431), (130, 64, 129), (1000, 1, 257), (1,)), 12
    make = torch.Generator().manual_seed(0)
    N = int(segments[-1, 1])
    qkv = torch.randn(N, heads + 8, 64, generator=make).to("cuda", torch.bfloat16)
    grad = torch.randn(N, heads, 64, generator=make).to("cuda", torch.bfloat16)
    out, lse = flash.pair_attention(qkv, heads, segments, None)
    dqkv, again = (
        flash.pair_attention_backward(grad, qkv, out, lse, heads, segments, None) for _ in range(2)
    )
    assert torch.equal(dqkv, again)
    exact, eager = (
        (*attention(x, heads, segments, None), gradient(grad.to(x.dtype), x, heads, segments, None))
        for x in (qkv.double(), qkv)
    )
    for ours, theirs, e, times in zip((out, lse, dqkv), eager, exact, (2, 2, 3), strict=True):
        assert (ours.double() - e).norm() <= times * (theirs.double() - e).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_the_real_flash_attention_over_pages(window: int | None) -> None:
    """In bfloat16 no more than twice the error of eager PyTorch; the same bits twice."""
    if not flash.supports_pages(2, torch.bfloat16, 64):
        pytest.skip("no FlashAttention-3 that reads pages")
    rows = ((1, 370), (600, 0), (70, 300), (16, 16), (333, 77))
    inputs = Case(rows, K=2, G=4, E=64).inputs(torch.bfloat16, "cuda")
    out, again = (flash.paged_attention(*inputs, 600, window) for _ in range(2))
    assert torch.equal(out, again)
    q, keys, values, *where = inputs
    exact = reference.paged_attention(q.double(), keys.double(), values.double(), *where, window)
    eager = reference.paged_attention(*inputs, window)
    assert (out.double() - exact).norm() <= 2 * (eager.double() - exact).norm()
