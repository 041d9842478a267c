"""FlashAttention, where it is installed: pair attention in two calls of its kernels, merged.

Of two packages the first that runs here: FlashAttention-3 (module flash_attn_interface) on GPUs of
compute capability 9.0, FlashAttention-2 (flash-attn). A response's queries see two runs of keys. Of
their variable-length kernels, one call gives all segments by themselves, causal; the other the
responses' queries over their prompts, no mask. With out_a, lse_a and out_b, lse_b of the two,

    lse = log(exp lse_a + exp lse_b),  w = exp(lse_b - lse) = sigmoid(lse_b - lse_a),
    out = (1 - w) out_a + w out_b.

The gradient of a score needs only lse and out of the whole row, p = exp(s - lse) and ds = p (dp - g
. out): the backward makes both calls with the merged ones, and their gradients add up.

Both calls take the packed tokens as they lie, queries and keys. For the second, a batch entry's
queries are a prompt's responses and its keys the prompt; entries without keys, or without queries,
step over all other tokens. The first are answered with out 0 and an infinite lse (FlashAttention-2
+, -3 -), the second with gradients 0. Both know a window only for queries and keys that end
together, so not for the second call: `supports` says where it would be needed, and Triton's kernel
is the one to use. Oracle: `ldalign.kernels.reference.pair_attention`.

Prompts of a generation: FlashAttention-3 reads a paged cache as it lies, with pages of any size,
and a row's queries and keys end together, as it wants them. FlashAttention-2 wants pages of 256
tokens or a multiple; they have 16. Oracle: `ldalign.kernels.reference.paged_attention`.
"""

import functools
import importlib
import importlib.metadata
import inspect
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ldalign.kernels import segments as work
from ldalign.kernels.segments import Segment

OLDEST = (2, 7)  # the first of flash-attn whose low-level functions have the parameters used here
# By generation: its module, the widest head (FlashAttention-3 has no repeatable backward of wider).
MODULES = {3: "flash_attn_interface", 2: "flash_attn.flash_attn_interface"}
WIDEST = {3: 192, 2: 256}
ON_3 = (9, 0)  # the compute capability that FlashAttention-3 is made for


@functools.cache
def generations() -> tuple[int, ...]:
    """Returns which of FlashAttention-3 and -2 can run here, the faster first."""
    return tuple(number for number, why in ((3, why_not_3()), (2, _why_not_2())) if not why)


def why_not() -> str:
    """Returns why this backend cannot run here, in one line; "" if it can."""
    return "" if generations() else f"FlashAttention-3: {why_not_3()}; -2: {_why_not_2()}"


def available() -> bool:
    """Says whether a FlashAttention is there and a GPU that it runs on."""
    return bool(generations())


def generation(head_dim: int) -> int | None:
    """Returns the FlashAttention that runs heads of this width here, 3 or 2; None: neither."""
    return next((number for number in generations() if head_dim <= WIDEST[number]), None)


def interface(number: int) -> ModuleType:
    """Returns the module of a generation's functions."""
    return importlib.import_module(MODULES[number])


def why_not_3() -> str:
    """Returns why FlashAttention-3 cannot run here, in one line; "" if it can."""
    try:
        made = interface(3)
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == MODULES[3]
        return f"{MODULES[3]} is not installed" if missing else f"it does not load ({error})"
    for function in (made._flash_attn_forward, made._flash_attn_backward):
        # An operator made by torch's custom_op hides its function's parameters.
        known = inspect.signature(getattr(function, "_init_fn", function)).parameters
        if "window_size_left" not in known:
            return "a newer one is needed, whose functions take window_size_left"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    return "" if capability == ON_3 else "it is for compute capability 9.0"


@functools.cache
def reads_pages() -> bool:
    """Says whether FlashAttention-3 can run here, and was built with its kernels for pages."""
    if 3 not in generations():
        return False
    try:
        flags = importlib.import_module("flash_attn_config").CONFIG["build_flags"]
    except ImportError:  # an older build, which wrote nothing down
        return True
    return not flags.get("FLASHATTENTION_DISABLE_PAGEDKV", False)


def _why_not_2() -> str:
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return "the package flash-attn is not installed"
    if not OLDEST <= tuple(int(part) for part in version.split(".")[:2]) < (3,):
        return f"flash-attn is {version}; 2.7 or 2.8 is needed"
    try:
        interface(2)
    except ImportError as error:
        return f"flash-attn {version} does not load ({error})"
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def supports(segments: Tensor, window: int | None, dtype: torch.dtype, head_dim: int) -> bool:
    """Says whether these two calls can do it.

    It takes half precision, each prompt's responses together and in the prompts' order, and no
    window that ends within a prompt.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if not half or head_dim % 8 or generation(head_dim) is None:
        return False

    def fit(rows: list[Segment]) -> bool:
        longest = max((s.positions for s in rows if s.prefix), default=0)
        return (window is None or window >= longest) and prompt_calls(rows) is not None

    return work.derived(segments, ("flash-attn supports", window), fit)


def pair_attention(
    qkv: Tensor, heads: int, segments: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Returns out (N, H, E) and lse (N, H) float32.

    qkv (N, H + 2K, E), H = heads; segments (S, 4) int64 on the CPU.
    """
    if not len(qkv):
        return qkv.new_empty(qkv[:, :heads].shape), qkv.new_empty((0, heads), dtype=torch.float32)
    own, prompts = _calls(segments, qkv.device)
    out, lse = _forward(qkv, heads, own, window)  # lse (H, N)
    if prompts is not None:
        other, other_lse = _forward(qkv, heads, prompts, None)
        # Queries without keys: weight 0.
        other_lse = other_lse.masked_fill(other_lse == float("inf"), float("-inf"))
        share = torch.sigmoid(other_lse - lse).T[:, :, None]
        out = torch.lerp(out.to(lse.dtype), other.to(lse.dtype), share).to(qkv.dtype)
        lse = torch.logaddexp(lse, other_lse)
    return out, lse.T.contiguous()


def pair_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    segments: Tensor,
    window: int | None,
) -> Tensor:
    """Returns the gradient of sum(grad * out), (N, H + 2K, E) contiguous."""
    if not len(qkv):
        return qkv.new_empty(qkv.shape)
    own, prompts = _calls(segments, qkv.device)
    by_head = lse.T.contiguous()
    dqkv = _backward(grad, qkv, out, by_head, heads, own, window)
    if prompts is not None:
        dqkv += _backward(grad, qkv, out, by_head, heads, prompts, None)
    return dqkv


def supports_pages(most: int, dtype: torch.dtype, head_dim: int) -> bool:
    """Says whether `paged_attention` can do it: prompts in half precision, by FlashAttention-3.

    most: the largest number of new tokens of a row. Of 1, a step of decoding, Triton cuts the keys
    into runs by numbers that the host has, as a CUDA graph needs it.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return most > 1 and half and head_dim % 8 == 0 and head_dim <= WIDEST[3] and reads_pages()


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    pages: Tensor,
    most: int,
    window: int | None,
) -> Tensor:
    """Returns (N, H, E), contiguous: as `ldalign.kernels.triton_decode.paged_attention`."""
    if not len(q):
        return torch.empty_like(q)
    out, *_ = interface(3)._flash_attn_forward(
        q,
        keys,
        values,
        cu_seqlens_q=F.pad(rows[:, 0].cumsum(0, dtype=torch.int32), (1, 0)),
        seqused_k=rows.sum(1, dtype=torch.int32),
        max_seqlen_q=most,
        page_table=pages,
        softmax_scale=q.shape[2] ** -0.5,
        causal=True,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )
    made: Tensor = out
    return made


class Call(NamedTuple):
    """A batch of entries for one call.

    Entry i has queries queries[i] to queries[i + 1] - 1, and keys likewise.
    """

    queries: list[int]
    keys: list[int]
    causal: bool


def own_call(segments: list[Segment]) -> Call:
    """Returns the call in which every segment stands by itself."""
    cuts = [0, *(s.end for s in segments if s.end > s.begin)]
    return Call(cuts, cuts, causal=True)


def prompt_calls(segments: list[Segment]) -> list[Call] | None:
    """Returns no call or one: the queries of each prompt's responses over the prompt.

    None where one call cannot order them.
    """
    queries, keys = [0], [0]

    def entry(query: int, key: int) -> None:
        if (query, key) != (queries[-1], keys[-1]):
            queries.append(query)
            keys.append(key)

    previous = None
    for s in segments:
        if not s.prefix:
            continue
        # One more response of the same prompt.
        if previous == (s.prefix_begin, s.prefix_end, s.begin):
            queries[-1] = s.end
        else:
            if s.prefix_begin < keys[-1]:
                return None
            entry(s.begin, keys[-1])  # queries without keys
            entry(s.begin, s.prefix_begin)  # keys without queries
            entry(s.end, s.prefix_end)
        previous = (s.prefix_begin, s.prefix_end, s.end)
    if previous is None:
        return []
    entry(segments[-1].end, keys[-1])
    entry(segments[-1].end, segments[-1].end)
    return [Call(queries, keys, causal=False)]


class _Placed(NamedTuple):
    """A call with its offsets on the device."""

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int
    causal: bool


def _calls(segments: Tensor, device: torch.device) -> tuple[_Placed, _Placed | None]:
    def make(rows: list[Segment]) -> tuple[_Placed, _Placed | None]:
        prompts = prompt_calls(rows)
        if prompts is None:
            raise ValueError(
                "pair_attention: FlashAttention cannot order these segments' prompts; "
                "ask supports() first"
            )
        return _place(own_call(rows), device), _place(prompts[0], device) if prompts else None

    return work.derived(segments, ("flash-attn calls", device), make)


def _place(call: Call, device: torch.device) -> _Placed:
    longest = [max(b - a for a, b in pairwise(cuts)) for cuts in (call.queries, call.keys)]
    # At 1, FlashAttention-2 takes every entry of a grouped-query batch for one query: entries
    # without queries would shift the rest.
    queries, keys = work.on_device(device, call.queries, call.keys)
    return _Placed(queries, keys, max(2, longest[0]), longest[1], call.causal)


def _heads(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the query, key and value heads."""
    K = (x.shape[1] - heads) // 2
    q, k, v = x.split([heads, K, K], dim=1)
    return q, k, v


def _forward(qkv: Tensor, heads: int, call: _Placed, window: int | None) -> tuple[Tensor, Tensor]:
    given = _given(qkv, call, window)
    if generation(qkv.shape[2]) == 3:
        out, lse, *_ = interface(3)._flash_attn_forward(
            *_heads(qkv, heads), causal=call.causal, **given
        )
    else:
        out, lse, *_ = interface(2)._flash_attn_varlen_forward(
            *_heads(qkv, heads), dropout_p=0.0, causal=call.causal, **given
        )
    return out, lse


def _backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    call: _Placed,
    window: int | None,
) -> Tensor:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    tensors = (grad, *_heads(qkv, heads), out, lse)
    given = _given(qkv, call, window) | {"softcap": 0.0, "deterministic": True}
    given |= dict(zip(("dq", "dk", "dv"), _heads(dqkv, heads), strict=True))
    if generation(qkv.shape[2]) == 3:
        interface(3)._flash_attn_backward(*tensors, is_causal=call.causal, **given)
    else:
        interface(2)._flash_attn_varlen_backward(
            *tensors, dropout_p=0.0, causal=call.causal, alibi_slopes=None, **given
        )
    return dqkv


def _given(qkv: Tensor, call: _Placed, window: int | None) -> dict[str, Any]:
    """The arguments that all four functions know, by their names."""
    return {
        "cu_seqlens_q": call.queries,
        "cu_seqlens_k": call.keys,
        "max_seqlen_q": call.most_queries,
        "max_seqlen_k": call.most_keys,
        "softmax_scale": qkv.shape[2] ** -0.5,
        "window_size_left": -1 if window is None else window - 1,
        "window_size_right": 0 if call.causal else -1,
    }
