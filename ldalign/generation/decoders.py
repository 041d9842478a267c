"""Running a Mistral on new tokens over a paged cache: the half of generation that computes.

`Decoder.step` takes the new tokens of many rows at once, one for a row in the middle of its
response and a run of them for a prompt, and gives the next-token logits. Two implementations:
`PackedDecoder`, the whole of it in C++ with weights laid out for it, on CPUs; `ModuleDecoder`, the
very modules that are trained, with attention through the page table, anywhere.

Shapes: N new tokens, R rows, P pages a row, L layers, D width, H query heads, K key/value heads,
E head width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldalign import ops
from ldalign.generation.graphs import CudaGraphs, Graphs
from ldalign.generation.paged_cache import PAGE
from ldalign.kernels import cpp
from ldalign.models.layout import Rotary
from ldalign.models.mistral import Mistral, rope_tables
from ldalign.system.errors import InputError
from ldalign.system.memory import LargePages
from ldalign.system.transfer import to_device

PANEL = 32  # rows of a weight that are packed together, as csrc/kernels.h has it
# exact: the model's own; int8: their roundings to 8 bits, and the products' inputs in 8 bits, too
Weights = Literal["exact", "int8"]


class Packed(NamedTuple):
    """A weight (N, K) as the C++ products read it (`pack_weight`)."""

    values: Tensor  # (panels, K, 32) in the model's dtype, or int8
    scales: Tensor | None = None  # (panels, groups of K, 32) float32, of int8


class Decoder(Protocol):
    """What the engine needs of the part that computes."""

    device: torch.device
    step_tokens: int  # new tokens of a step, beyond which more would not make it more efficient

    @property
    def graphed(self) -> "GraphDecoder | None":
        """Itself, where steps of decoding are captured as CUDA graphs."""
        ...

    def page_bytes(self) -> int:
        """Returns the bytes that one page takes, keys and values of all layers."""
        ...

    def allocate(self, pages: int, longest: int) -> None:
        """Makes a cache of so many pages, for rows of at most `longest` tokens."""
        ...

    def step(self, ids: Tensor, rows: Tensor, pages: Tensor, last: Tensor) -> Tensor:
        """Returns the logits after the new tokens numbered `last`: (len(last), V) float32.

        Their keys and values are in the cache afterwards.

        ids (N,) int64: the new tokens, row after row.
        rows (R, 2) int64: how many new tokens a row has, and how many are in its cache.
        pages (R, P) int32: a row's pages, in order.
        last (len(last),) int64: places in `ids`, ascending, none twice.

        All four are on the CPU; the logits are on the decoder's device.
        """
        ...


class GraphDecoder(Decoder, Protocol):
    """A decoder whose steps of decoding the host need not see.

    Its cache has one page more than was asked for, the last, for rows that are not there.
    """

    graphs: Callable[[], Graphs]

    def decode(self, ids: Tensor, held: Tensor, pages: Tensor) -> Tensor:
        """Returns the logits after one new token of each row: (R, V) float32.

        ids (R,) int64, held (R,) int64: tokens before it, pages (R, P) int32: as in `step`, but all
        of them on the device, and nothing is read by the host.
        """
        ...


def new_decoder(model: Mistral, release: bool = False, weights: Weights = "exact") -> Decoder:
    """Returns the fastest decoder there is for the model's device and dtype.

    release: the model may lose its weights, so that there are never two copies of them.
    weights: int8 draws from another distribution than the model's, one near it
        (docs/generation.md).

    Raises InputError for int8 where the C++ decoder cannot be.
    """
    if PackedDecoder.able(model):
        return PackedDecoder(model, release, weights)
    if weights != "exact":
        raise _needs_packed(weights)
    return ModuleDecoder(model)


def check_weights(weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError for weights that no decoder has for such a policy."""
    if weights != "exact" and not _packs(device, dtype):
        raise _needs_packed(weights)


def _packs(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and ops.choose("sample", "cpu") == "cpp"
    )


def _needs_packed(weights: Weights) -> InputError:
    why = f" ({cpp.why_not()})" if cpp.why_not() else ""
    return InputError(
        f"sampling.weights={weights}: is for policies of even widths in float32 or bfloat16 on a "
        f"CPU, by the C++ extension{why}; leave it out, or give device=cpu"
    )


class PackedDecoder:
    """Everything in C++ (`csrc/decode.cpp`), from weights packed for few rows.

    A row's result has the same bits whatever rows it is computed with, in float32 and in bfloat16:
    every sum runs in one fixed order.
    """

    step_tokens = 512
    graphed: GraphDecoder | None = None

    @staticmethod
    def able(model: Mistral) -> bool:
        """Says whether this machine, the model's dtype and its widths allow it."""
        weight, c = model.output_weight, model.config
        even = c.hidden_size % 2 == c.intermediate_size % 2 == 0
        return even and _packs(weight.device, weight.dtype)

    @torch.no_grad()
    def __init__(self, model: Mistral, release: bool = False, weights: Weights = "exact") -> None:
        self.config, self.device = model.config, torch.device("cpu")
        self.dtype, self.weights = model.output_weight.dtype, weights
        empty = LargePages().empty
        # The order that `cpp.decode_layers` reads them in.
        self.packed: list[Packed] = []  # 4 L
        self.norms: list[Tensor] = []  # 2 L + 1, float32
        for block in model.blocks:
            attention, mlp = block.self_attn, block.mlp
            for linear in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
                self.packed.append(self._take(linear, release, empty))
            self.norms.append(block.input_layernorm.weight.float())
            self.norms.append(block.post_attention_layernorm.weight.float())
        self.norms.append(model.model.norm.weight.float())
        tied = self.config.tie_word_embeddings
        # A tied embedding is read out of the packed head (`_embed`), so that it exists once; not
        # out of one in 8 bits, whose error every layer would see.
        shared = tied and weights == "exact"
        self.embedding = None if shared else model.embedding.weight.detach()
        self.head = self._take(
            model.embedding if tied else model.lm_head, release and (shared or not tied), empty
        )

    def _take(self, module: nn.Module, release: bool, empty: "Empty") -> Packed:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        given = weight.detach()
        exact = self.weights == "exact"
        packed = Packed(pack_weight(given, empty)) if exact else pack_int8(given, empty)
        if release:
            weight.data = weight.new_empty(0)
        return packed

    def page_bytes(self) -> int:
        c = self.config
        key_and_value = c.head_dim + self._value_width()
        numbers = c.num_hidden_layers * c.num_key_value_heads * PAGE * key_and_value
        return numbers * self.dtype.itemsize

    def _value_width(self) -> int:
        """A value's width in the cache: E, padded to whole vectors of 16."""
        return -(-self.config.head_dim // PAGE) * PAGE

    def allocate(self, pages: int, longest: int) -> None:
        c = self.config
        shape = (c.num_hidden_layers, pages, c.num_key_value_heads)
        self.keys = self.values = torch.empty(0)  # an earlier cache is gone before there is another
        # Not zeros: the system gives no memory to a page that was never written to.
        # Keys (L, pages, K, E, 16): one load takes the same element of 16 keys.
        empty = LargePages().empty
        self.keys = empty(*shape, c.head_dim, PAGE, dtype=self.dtype)
        # Values (L, pages, K, 16, E padded): a value's elements lie together.
        self.values = empty(*shape, PAGE, self._value_width(), dtype=self.dtype)
        self.cos, self.sin = rope_tables(torch.arange(longest), c.head_dim, c.rope_theta)

    def step(self, ids: Tensor, rows: Tensor, pages: Tensor, last: Tensor) -> Tensor:
        c = self.config
        hidden = cpp.decode_layers(
            self._embed(ids),
            [weight.values for weight in self.packed],
            [weight.scales for weight in self.packed if weight.scales is not None],
            self.norms,
            self.keys,
            self.values,
            rows,
            pages,
            self.cos,
            self.sin,
            c.num_attention_heads,
            c.intermediate_size,
            c.sliding_window,
            c.rms_norm_eps,
        )  # (N, D)
        if len(last) < len(hidden):  # else all: no row has a prompt in this step
            hidden = hidden[last]
        return cpp.packed_linear(hidden, *self.head, c.vocab_size, wide_out=True)

    def _embed(self, ids: Tensor) -> Tensor:
        if self.embedding is not None:
            return F.embedding(ids, self.embedding)
        return cpp.packed_rows(self.head.values, ids)


class Empty(Protocol):
    """Makes a tensor, as `torch.empty`."""

    def __call__(self, *shape: int, dtype: torch.dtype) -> Tensor: ...


def pack_weight(weight: Tensor, empty: Empty = torch.empty) -> Tensor:
    """Packs a weight so that a product reads it once, from front to back.

    (N, K) float32, bfloat16 or int8, K of whole words of 4 bytes -> (ceil(N / 32), K, 32): panels
    of 32 rows, which lie in turns of a word each. Rows that the last panel lacks are zeros. empty:
    makes the result. Raises ValueError for a weight without columns, which has no words.
    """
    if not weight.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it needs at least one column")
    if len(weight) % PANEL:
        weight = F.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    words = weight.contiguous().view(torch.int32).unflatten(0, (-1, PANEL))  # (panels, 32, words)
    packed = empty(len(words), words.shape[2], PANEL, dtype=torch.int32)
    packed.copy_(words.transpose(1, 2))
    return packed.view(weight.dtype).view(-1, weight.shape[1], PANEL)


def pack_int8(weight: Tensor, empty: Empty = torch.empty) -> Packed:
    """Rounds a weight (N, K) float32 or bfloat16 to 8 bits (`cpp.quantise`) and packs it.

    Raises ValueError as `pack_weight`.
    """
    values, scales = cpp.quantise(weight)
    return Packed(pack_weight(values, empty), pack_weight(scales, empty))


class ModuleDecoder:
    """The model's own forward, with a layout that keeps keys and values in pages.

    On a GPU steps of decoding are CUDA graphs (`ldalign.generation.standing`).
    """

    def __init__(self, model: Mistral, graphs: Callable[[], Graphs] | None = None) -> None:
        """graphs: what captures steps; None: CUDA on a GPU, elsewhere nothing."""
        self.model, self.device = model, model.output_weight.device
        on_gpu = self.device.type == "cuda"
        # On a GPU so many that steps with prompts in them, which are no graphs, are few: 4 in 100
        # of 256 rows with prompts of 350 and responses of 170 tokens, 7 with 8192 tokens a step.
        self.step_tokens = 16_384 if on_gpu else 512
        self.graphs = graphs or partial(CudaGraphs, self.device)
        self.captured = on_gpu or graphs is not None

    @property
    def graphed(self) -> GraphDecoder | None:
        # No attribute: a cycle would keep the cache until it is found.
        return self if self.captured else None

    def page_bytes(self) -> int:
        c = self.model.config
        numbers = c.num_hidden_layers * PAGE * c.num_key_value_heads * c.head_dim
        return 2 * numbers * self.model.output_weight.itemsize  # keys and values

    def allocate(self, pages: int, longest: int) -> None:
        c = self.model.config
        self.keys = self.values = torch.empty(0)  # an earlier cache is gone before there is another
        # Zeros: a position not yet written has probability 0, and 0 times NaN would be NaN.
        shape = (c.num_hidden_layers, pages + 1, PAGE, c.num_key_value_heads, c.head_dim)
        self.keys, self.values = (self.model.output_weight.new_zeros(shape) for _ in range(2))

    @torch.no_grad()
    def step(self, ids: Tensor, rows: Tensor, pages: Tensor, last: Tensor) -> Tensor:
        counts, held = rows.unbind(1)  # (R,) new tokens, and those in the cache
        first = counts.cumsum(0) - counts  # (R,) where a row's new tokens begin among the N
        # A new token stands behind those its row holds.
        positions = torch.arange(len(ids)) + (held - first).repeat_interleave(counts)  # (N,)
        row = torch.arange(len(rows)).repeat_interleave(counts)  # (N,)
        numbers = (ids, slots(positions, row, pages), positions, rows, pages, last)
        ids, slot, positions, rows, pages, last = to_device(self.device, *numbers)
        layout = Paged(self.keys, self.values, slot, positions, rows, pages, int(counts.max()))
        # (len(last), V)
        return self.model(ids, layout, lambda hidden, weight: (hidden[last] @ weight.T).float())

    @torch.no_grad()
    def decode(self, ids: Tensor, held: Tensor, pages: Tensor) -> Tensor:
        slot = slots(held, torch.arange(len(held), device=self.device), pages)
        rows = torch.stack((torch.ones_like(held), held), 1)
        layout = Paged(self.keys, self.values, slot, held, rows, pages, 1)
        return self.model(ids, layout, lambda hidden, weight: (hidden @ weight.T).float())


def slots(positions: Tensor, row: Tensor, pages: Tensor) -> Tensor:
    """Returns where tokens lie in the flattened pages: (N,) int64.

    positions (N,) in their rows, row (N,): which of the rows, pages (R, P).
    """
    return pages[row, positions // PAGE].long() * PAGE + positions % PAGE


@dataclass
class Paged:
    """The layout (`ldalign.models.layout.Layout`) of one step over the pages."""

    keys: Tensor  # (L, pages, 16, K, E)
    values: Tensor  # (L, pages, 16, K, E)
    slots: Tensor  # (N,) int64, of the new tokens in the flattened pages
    positions: Tensor  # (N,) int64
    rows: Tensor  # (R, 2), as in `Decoder.step`
    pages: Tensor  # (R, P), as in `Decoder.step`
    longest: int  # new tokens of a row

    def attend(
        self, layer: int, qkv: Tensor, heads: int, window: int | None, rotary: Rotary | None
    ) -> Tensor:
        """Attention of the new tokens: qkv (N, H + 2K, E) -> (N, H, E).

        Each sees its row's cache and the row's new tokens before it.
        """
        assert rotary is not None
        keys, values = self.keys[layer], self.values[layer]
        # Written first: a prompt's tokens see each other through the cache, too.
        q = ops.rope_to_pages(qkv, *rotary, heads, keys, values, self.slots)
        return ops.paged_attention(q, keys, values, self.rows, self.pages, self.longest, window)
